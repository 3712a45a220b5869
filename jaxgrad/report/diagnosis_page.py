"""The page of a diagnosis: verdict, cards, pictures, and the table of the layers."""

from typing import Any

import numpy as np

from jaxgrad.report import diagnosis_figures as drawn
from jaxgrad.report import figures
from jaxgrad.report.html import embed
from jaxgrad.report.page import PAGE, STYLE, escaped
from jaxgrad.report.terminal import number

_MORE_STYLE = """
pre { background: var(--tint); padding: .5rem .7rem; border-radius: 5px; overflow-x: auto; margin: .4rem 0; font-size: .85rem; }
.finding table { width: auto; font-size: .82rem; margin: .3rem 0; }
.finding td { text-align: left; white-space: normal; padding: .12rem .8rem .12rem 0; border: 0; }
.finding td:first-child { white-space: nowrap; }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); align-items: start; }
.verdicts li.warning { border-left-color: var(--last); }
tr.guilty th, tr.guilty td { color: var(--alarm); font-weight: 600; }
"""  # noqa: E501 (CSS)


def diagnosis_page(report: Any) -> str:
    """A `jaxgrad.Report` as one HTML page that opens anywhere, offline.

    Args:
        report: the report; its `course` holds what the pictures are drawn from.

    Returns:
        The page's text.
    """
    sections = [_header(report), _findings(report), _pictures(report), _layers(report)]
    sections.append(_notes(report))
    body = "\n".join(section for section in sections if section)
    return PAGE.format(title="jaxgrad diagnosis", style=STYLE + _MORE_STYLE, body=body)


def _header(report: Any) -> str:
    primary = report.primary
    kind = {"error": "alarm", "warning": "warning"}.get(getattr(primary, "severity", ""), "calm")
    facts = "".join(
        f"<div><dt>{escaped(key.replace('_', ' '))}</dt><dd>{escaped(_fact(value))}</dd></div>"
        for key, value in report.facts.items()
        if value is not None
    )
    return f"""<header><p class="kicker">jaxgrad diagnosis</p>
<h1>{escaped("healthy" if primary is None else primary.code)}</h1>
<ul class="verdicts"><li class="{kind}"><span>{escaped(report.verdict)}</span></li></ul>
<dl class="facts">{facts}</dl></header>"""


def _fact(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _findings(report: Any) -> str:
    if not report.findings:
        return ""
    cards = "".join(_card(finding) for finding in report.findings)
    return f"<section><h2>Findings</h2>{cards}</section>"


def _card(finding: Any) -> str:
    rows = "".join(
        f"<tr><td>{escaped(key.replace('_', ' '))}</td><td>{escaped(_evidence(value))}</td></tr>"
        for key, value in finding.evidence.items()
    )
    follows = f" · follows from {finding.consequence_of}" if finding.consequence_of else ""
    wrong = f"<p><b>Wrong if</b> {escaped(finding.may_be_wrong)}.</p>"
    return f"""<article class="finding {escaped(finding.severity)}">
<h3><code>{escaped(finding.code)}</code><span class="where">{escaped(finding.where)}</span></h3>
<p>{escaped(finding.cause)}</p><table>{rows}</table>
<p class="fix"><b>Fix</b></p><pre><code>{escaped(finding.fix)}</code></pre>
{wrong if finding.may_be_wrong else ""}
<p class="small">{escaped(finding.severity)}, {escaped(finding.stage)}, confidence
{finding.confidence:.0%}{escaped(follows)}</p></article>"""


def _evidence(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        shown = ", ".join(_evidence(v) for v in value[:8])
        return shown + (f", ... ({len(value)} in all)" if len(value) > 8 else "")
    return str(value)


def bands(report: Any) -> list[drawn.Band]:
    """Where on the loss curve each finding holds: from its step on, or from the beginning."""
    steps = report.course.steps
    found = []
    for finding in report.findings:
        if finding.severity == "info" or not len(steps):
            continue
        first, last = float(steps[0]), float(steps[-1])
        step = finding.evidence.get("step", report.facts.get("stopped"))
        if finding.stage == "running" and isinstance(step, int):
            first = float(step)
            last = first if finding.code == "loss.spike" else last
        label = finding.code + (f" at {finding.where}" if finding.where else "")
        found.append((first, last, figures.plain(label, 44), finding.severity))
    return found


def _pictures(report: Any) -> str:
    course = report.course
    if course is None:
        return ""
    training, layers = [], []
    if len(course.losses):
        chance = report.facts.get("chance")
        curve = drawn.loss_with_bands(course.steps, course.losses, bands(report), chance)
        training.append(embed(curve, "wide"))
    if course.update_ratio.size:
        leaves = (course.leaf_names, course.leaf_steps, course.update_ratio)
        training.append(embed(drawn.update_ratios(*leaves), "wide"))
    if np.isfinite(course.raw_norms).any():
        lines = (course.steps, course.raw_norms, course.clipped_norms)
        training.append(embed(drawn.norms(*lines), "wide"))
    if course.heat.size:
        title = f"gradient RMS by {course.heat_of} and step"
        heat = figures.heat_map(course.heat_names, course.heat_steps, course.heat, title)
        training.append(embed(heat, "wide"))
    if course.units:
        layers.append(embed(drawn.unit_map(course.units), "wide"))
    elif course.zero_shares.size:
        zeros = (course.heat_names, course.heat_steps, course.zero_shares)
        layers.append(embed(drawn.zero_map(*zeros), "wide"))
    if course.exponents:
        layers.append(embed(drawn.exponent_histogram(course.exponents), "wide"))
    parts = [
        _section("While training", "pair", training),
        _section("Profile by layer", "three", _profiles(course)),
        _section("Units and numbers", "pair", layers),
    ]
    return "".join(parts)


def _section(title: str, grid: str, pictures: list[str]) -> str:
    if not pictures:
        return ""
    return f'<section><h2>{title}</h2><div class="grid {grid}">{"".join(pictures)}</div></section>'


_TITLES = {
    "activation_rms": "activation RMS",
    "gradient_rms": "gradient RMS, dL/dz",
    "weight_gradient_rms": "weight-gradient RMS, dL/dW",
}


def _profiles(course: Any) -> list[str]:
    found = []
    for key, title in _TITLES.items():
        initial = course.initial.get(key, np.zeros(0))
        final = None if course.final is None else course.final[key]
        if key == "weight_gradient_rms":
            weighted = ~np.isnan(initial)
            initial = initial[weighted]
            final = None if final is None else final[weighted]
        if len(initial):
            found.append(embed(figures.profile(title, initial, final)))
    return found


def _layers(report: Any) -> str:
    if not report.rows:
        return ""
    guilty: set[str] = set()
    for finding in report.findings:
        if finding.is_alarm:
            guilty |= {finding.where, *map(str, finding.evidence.get("layers", ()))}
    head = "".join(
        f"<th>{label}</th>"
        for label in ("#", "layer", "activation RMS", "gradient RMS", "weight-gradient RMS",
                      "exact zeros")
    )  # fmt: skip
    lines = []
    for k, row in enumerate(report.rows, 1):
        mark = row["name"] in guilty or guilty & set(row.get("parameters", ()))
        cells = (row["activation_rms"], row["gradient_rms"], row["weight_gradient_rms"])
        numbers = "".join(f"<td>{number(value)}</td>" for value in cells)
        zeros = row["zero_share"]
        share = "-" if np.isnan(zeros) else f"{100 * zeros:.0f} %"
        lines.append(
            f'<tr class="{"guilty" if mark else ""}"><td>{k}</td>'
            f'<th scope="row">{escaped(row["name"])}</th>{numbers}<td>{share}</td></tr>'
        )
    return f"""<section><details open><summary><h2>Layer by layer, at the first step</h2>
<span>{len(report.rows)} layers</span></summary><div class="scroll"><table>
<thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div></details></section>"""


def _notes(report: Any) -> str:
    notes = "".join(f"<li>{escaped(note)}</li>" for note in report.notes)
    left_out = f"<h3>What this reading leaves out</h3><ul>{notes}</ul>" if notes else ""
    return f"""<section class="reading"><h2>How to read this</h2>
<p>The first finding is the primary cause; what follows from it is listed under it and raises no
alarm of its own. A band on the loss curve begins where its finding holds. Axes of RMS, norms and
ratios are logarithmic; an exact zero is an open triangle on the lower edge, NaN and infinity are
crosses on the upper one. <b>Update over weight</b> of a healthy run stands near a thousandth. A
unit is <b>at work</b> on an example where a rectifier lets something through, and where a tanh or
a sigmoid is not at its bounds.</p>{left_out}</section>"""
