"""The page: one file that opens anywhere, offline, on a phone, in the dark and on paper.

No request leaves it, and its content security policy forbids any. Every text that comes from
outside (names, titles, causes) passes through `escaped`.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgrad.report import figures
from jaxgrad.report.page import PAGE, STYLE, escaped
from jaxgrad.report.record import FlowLike, Row, RunRecord, is_alarming, reading, rows
from jaxgrad.report.terminal import number

_OPEN_ROWS = 40


def report_page(record: RunRecord) -> str:
    """One model's report as an HTML page.

    Args:
        record: what was measured.

    Returns:
        The page's text, UTF-8, self-contained.
    """
    sections = [
        _header(record),
        _findings(record),
        _pictures(record),
        _layers("Layer by layer, at initialization", rows(record.initial, record.initial_gains)),
    ]
    if record.final is not None:
        after = rows(record.final, record.final_gains)
        sections.append(_layers("Layer by layer, after training", after))
    sections += [_parameters(record), _how_to_read(record)]
    return _page(record.title, "\n".join(sections))


def index_page(
    records: Sequence[RunRecord], title: str = "jaxgrad: where the gradient goes"
) -> str:
    """A page that leads to the reports in the folders beside it, one card a model."""
    gradients = [row.gradient_rms for record in records for row in rows(record.initial)]
    span = _span(gradients)  # one scale for all cards, so that they can be compared
    cards = "\n".join(_card(record, span) for record in records)
    lead = "One card a model: the gradient's RMS by layer, from the first to the last."
    body = f"""<header><p class="kicker">jaxgrad</p><h1>{escaped(title)}</h1>
<p class="lead">{lead}</p></header>
<div class="cards">{cards}</div>"""
    return _page(title, body)


def write_report(record: RunRecord, folder: Path) -> Path:
    """Writes `report.html` into a folder and gives its path."""
    folder.mkdir(parents=True, exist_ok=True)
    return _write(folder / "report.html", report_page(record))


def write_index(records: Sequence[RunRecord], folder: Path) -> Path:
    """Writes `index.html`, with links to `NAME/report.html`, and gives its path."""
    folder.mkdir(parents=True, exist_ok=True)
    return _write(folder / "index.html", index_page(records))


def embed(svg: str, kind: str = "") -> str:
    """An SVG in a page; its ids get a prefix of their own, since a page holds several."""
    prefix = f"f{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"
    for mark in ('id="', "url(#", 'href="#'):
        svg = svg.replace(mark, mark + prefix)
    return f'<figure class="{kind}">{svg}</figure>'


# ---------------------------------------------------------------------------------------- sections


def _header(record: RunRecord) -> str:
    sentences = [("At initialization", record.initial, record.initial_loss)]
    if record.final is not None:
        sentences.append(("After training", record.final, record.final_loss))
    verdicts = "".join(
        f'<li class="{"alarm" if is_alarming(flow, loss) else "calm"}"><b>{when}</b>'
        f"<span>{escaped(reading(flow, loss))}</span></li>"
        for when, flow, loss in sentences
    )
    facts = "".join(
        f"<div><dt>{escaped(label)}</dt><dd>{escaped(value)}</dd></div>"
        for label, value in record.facts.items()
    )
    return f"""<header><p class="kicker">jaxgrad report</p><h1>{escaped(record.title)}</h1>
<p class="lead">{escaped(record.description)}</p>
<ul class="verdicts">{verdicts}</ul><dl class="facts">{facts}</dl></header>"""


def _findings(record: RunRecord) -> str:
    if not record.findings:
        return ""
    items = "".join(_finding(finding) for finding in record.findings)
    return f"<section><h2>Findings</h2>{items}</section>"


def _finding(finding: Any) -> str:
    code, where, severity = (escaped(getattr(finding, f)) for f in ("code", "where", "severity"))
    return f"""<article class="finding {severity}"><h3><code>{code}</code>
<span class="where">{where}</span></h3><p>{escaped(finding.cause)}</p>
<p class="fix"><b>Cure</b> {escaped(finding.fix)}</p></article>"""


def _pictures(record: RunRecord) -> str:
    before, after = record.initial, record.final
    first, last = rows(before), None if after is None else rows(after)
    weighted = [i for i, row in enumerate(first) if row.weight_gradient_rms is not None]

    def profile(title: str, name: str, places: Sequence[int]) -> str:
        initial = _column(first, name, places)
        final = None if last is None else _column(last, name, places)
        return embed(figures.profile(title, initial, final))

    everywhere = range(len(first))
    pictures = (
        profile("activation RMS", "activation_rms", everywhere)
        + profile("gradient RMS, dL/dz", "gradient_rms", everywhere)
        + profile("weight-gradient RMS, dL/dW", "weight_gradient_rms", weighted)
    )
    text = f'<section><h2>Profile by layer</h2><div class="grid three">{pictures}</div></section>'
    history = record.history
    if history is None:
        return text
    training = embed(figures.loss_curve(history.losses))
    if before.names:
        heat = figures.heat_map(before.names, history.steps, history.gradient_rms)
        training = embed(heat, "wide") + training
    return f"""{text}<section><h2>While training</h2>
<div class="grid two">{training}</div></section>"""


def _layers(title: str, table: Sequence[Row]) -> str:
    span = _span([row.gradient_rms for row in table])
    head = (
        "<tr><th>#</th><th>layer</th><th>Jacobian gain</th><th>activation RMS</th>"
        '<th>gradient RMS</th><th>weight-gradient RMS</th><th>exact zeros</th><th class="bar">'
        f"gradient, {_spanescaped(span)}</th></tr>"
    )
    body = "".join(_layer_row(i, row, span) for i, row in enumerate(table, 1))
    inner = f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'
    opened = " open" if len(table) <= _OPEN_ROWS else ""
    return (
        f"<section><details{opened}><summary><h2>{escaped(title)}</h2>"
        f"<span>{len(table)} layers</span></summary>{inner}</details></section>"
    )


def _layer_row(place: int, row: Row, span: tuple[float, float]) -> str:
    broken = row.nonfinite > 0 or (row.ran and not math.isfinite(row.gradient_rms))
    cls = "broken" if broken else "silent" if row.gradient_rms == 0 or not row.ran else ""
    if not row.ran:
        bar = "<em>did not run</em>"
    elif broken:
        bar = f"<em>{row.nonfinite:,} NaN or infinite</em>"
    elif row.gradient_rms == 0:
        bar = "<em>no gradient</em>"
    else:
        share = _share(row.gradient_rms, span)
        bar = f'<i style="width:{100 * share:.1f}%"></i>'
    zeros = "-" if row.zero_share is None or not row.ran else f"{100 * row.zero_share:.0f} %"
    cells = (row.gain, row.activation_rms, row.gradient_rms, row.weight_gradient_rms)
    numbers = "".join(f"<td>{number(value)}</td>" for value in cells)
    return (
        f'<tr class="{cls}"><td>{place}</td><th scope="row">{escaped(row.name)}</th>{numbers}'
        f'<td>{zeros}</td><td class="bar">{bar}</td></tr>'
    )


def _parameters(record: RunRecord) -> str:
    before, after = record.initial, record.final
    if not before.parameter_names:
        return ""
    columns = [("weight RMS", before.weight_rms), ("gradient RMS", before.weight_gradient_rms)]
    if after is not None:
        columns += [("weight RMS after", after.weight_rms)]
        columns += [("gradient RMS after", after.weight_gradient_rms)]
    head = "".join(f"<th>{label}</th>" for label, _ in columns)
    values = [np.asarray(column, np.float64) for _, column in columns]
    body = "".join(
        f'<tr><th scope="row">{escaped(name)}</th>'
        + "".join(f"<td>{number(float(column[i]))}</td>" for column in values)
        + "</tr>"
        for i, name in enumerate(before.parameter_names)
    )
    return (
        "<section><details><summary><h2>Parameters</h2>"
        f"<span>{len(before.parameter_names)} leaves</span></summary><div class='scroll'><table>"
        f"<thead><tr><th>leaf</th>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
        "</section>"
    )


def _how_to_read(record: RunRecord) -> str:
    notes = "".join(f"<li>{escaped(note)}</li>" for note in record.notes)
    notes = f"<h3>What this reading leaves out</h3><ul>{notes}</ul>" if notes else ""
    return f"""<section class="reading"><h2>How to read this</h2>
<p>A row is a layer's output. <b>Activation RMS</b> is the root mean square of its entries,
<b>gradient RMS</b> that of the loss's gradient with respect to it: the last row is the gradient at
the model's output, and it travels upward from there. The <b>Jacobian gain</b>, the layer's Jacobian
in the Frobenius norm over the root of its inputs, is the factor by which the layer multiplies the
RMS of a random gradient that passes back through it; a product of gains far from one is a gradient
that vanishes or explodes. <b>Weight-gradient RMS</b> is the largest of the layer's own
parameters'.</p>
<p>Axes are logarithmic. An exact zero is an open triangle on the lower edge; NaN and infinity are
crosses on the upper one.</p>{notes}
<p class="made">Made by <code>{escaped(record.command)}</code></p></section>"""


def _card(record: RunRecord, span: tuple[float, float]) -> str:
    alarm = "alarm" if is_alarming(record.initial, record.initial_loss) else "calm"
    facts = " · ".join(f"{escaped(k)} {escaped(v)}" for k, v in list(record.facts.items())[:3])
    after = (
        ""
        if record.final is None
        else f"After training: {escaped(reading(record.final, record.final_loss))}"
    )
    return f"""<a class="card {alarm}" href="{escaped(record.name)}/report.html">
<h2>{escaped(record.title)}</h2>{_sparkline(record.initial, span)}
<p>{escaped(reading(record.initial, record.initial_loss))}</p><p class="small">{facts}</p>
<p class="small">{after}</p></a>"""


# ------------------------------------------------------------------------------------------- parts


def _sparkline(flow: FlowLike, span: tuple[float, float]) -> str:
    """The gradient's log profile as bars; zero and NaN in the alarm color."""
    table = rows(flow)
    width = 300 / max(len(table), 1)
    bars = []
    for i, row in enumerate(table):
        good = row.gradient_rms > 0 and math.isfinite(row.gradient_rms)
        share = _share(row.gradient_rms, span) if good else 1.0
        height = 4 + 46 * share
        bars.append(
            f'<rect class="{"" if good else "broken"}" x="{i * width:.2f}" y="{50 - height:.2f}" '
            f'width="{max(width - 1.5, 0.5):.2f}" height="{height:.2f}" rx="1"/>'
        )
    label = f"gradient RMS by layer, {_spanescaped(span)}"
    return (
        f'<svg class="spark" role="img" aria-label="{label}" viewBox="0 0 300 50" '
        f'preserveAspectRatio="none">{"".join(bars)}</svg><p class="small scale">{label}</p>'
    )


def _span(values: Iterable[float]) -> tuple[float, float]:
    """Whole powers of ten around the finite positive values."""
    logs = [math.log10(v) for v in values if v > 0 and math.isfinite(v)]
    if not logs:
        return -1.0, 1.0
    low, high = math.floor(min(logs) + 1e-6), math.ceil(max(logs) - 1e-6)
    return (float(low), float(high)) if high > low else (low - 1.0, low + 1.0)


def _share(value: float, span: tuple[float, float]) -> float:
    """Where a value lies between two powers of ten, in [0, 1]."""
    return min(max((math.log10(value) - span[0]) / (span[1] - span[0]), 0.0), 1.0)


def _spanescaped(span: tuple[float, float]) -> str:
    return f"1e{span[0]:.0f} to 1e{span[1]:.0f} (log)"


def _column(table: Sequence[Row], name: str, places: Sequence[int]) -> list[float]:
    values = (getattr(table[i], name) for i in places)
    return [math.nan if value is None else float(value) for value in values]


def _page(title: str, body: str) -> str:
    return PAGE.format(title=escaped(title), style=STYLE, body=body)


def _write(path: Path, text: str) -> Path:
    partial = path.with_suffix(".part")
    _ = partial.write_text(text, encoding="utf-8")
    return partial.replace(path)
