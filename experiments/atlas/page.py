"""The atlas as one HTML page: every statement, its verdict, and the evidence beside it.

No request leaves the page and no script runs in it: the filter is radio buttons and CSS, and where
a browser lacks `:has()` the buttons are a tally. Every text passes through `wording`.
"""

import math
from collections.abc import Mapping, Sequence

from experiments.atlas import frame
from experiments.atlas.chapters import FAILED, NOT_RUN, STATES, Chapter, Entry, counts, ranked
from experiments.atlas.pictures import Picture
from experiments.atlas.style import ATLAS_STYLE, ICONS
from experiments.atlas.wording import factor, nats, parts, rich
from jaxgrad.report.html import embed
from jaxgrad.report.page import PAGE, STYLE, escaped

TITLE = "What is true of gradient flow"
# Up to this width, in points, a figure stands beside its claims; a wider one above them.
_BESIDE = 560
_RANKS = 12
_TITLES = {"layer_norm": "LayerNorm", "pre_post_ln": "Pre-LN and Post-LN"}


def render(chapters: Sequence[Chapter]) -> str:
    """The page's text, UTF-8, self-contained."""
    body = "\n".join(
        [
            ICONS, _header(chapters), _bar(chapters), _statements(chapters), _divergences(chapters),
            _intuitions(chapters), _evidence(chapters), _reading(),
        ]
    )  # fmt: skip
    return PAGE.format(
        title=escaped(f"jaxgrad atlas: {TITLE}"), style=STYLE + ATLAS_STYLE + _filters(), body=body
    )


# ------------------------------------------------------------------------------------------- parts


def _header(chapters: Sequence[Chapter]) -> str:
    facts = "".join(
        f"<div><dt>{escaped(label)}</dt><dd>{escaped(value)}</dd></div>"
        for label, value in provenance(chapters).items()
    )
    total = sum(counts(chapters).values())
    return f"""<header><p class="kicker">jaxgrad atlas</p><h1>{TITLE}</h1>
<p class="lead">{total} statements of the field about gradients in deep networks, each put as a
prediction, measured on real networks, and judged by a rule that reads the measurements. Every
verdict here was computed from the stored data when this page was made.</p>
<dl class="facts">{facts}</dl></header>"""


def provenance(chapters: Sequence[Chapter]) -> dict[str, str]:
    """Where the numbers come from: dates, devices, versions, time, over all chapters."""
    records = [chapter.record for chapter in chapters if chapter.record is not None]
    if not records:
        return {"measured": "nothing yet"}
    dates = sorted({str(record["date"]) for record in records})
    seconds = sum(sum(record["seconds"].values()) for record in records)
    return {
        "experiments measured": f"{len(records)} of {len(chapters)}",
        "measured on": " and ".join(sorted({_device(record) for record in records})),
        "dates": dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
        "JAX": ", ".join(sorted({record["versions"]["jax"] for record in records})),
        "measuring took": f"{seconds / 60:.1f} min in all",
    }


def _device(record: Mapping) -> str:
    platform, _, kind = str(record["device"]).partition(": ")
    name = platform.upper() if kind in ("", platform) else kind
    return f"{name}, {record['cores']} cores" if platform == "cpu" else name


def _bar(chapters: Sequence[Chapter]) -> str:
    """Contents, and a tally whose tiles filter the statements."""
    tally = {"all": sum(counts(chapters).values()), **counts(chapters)}
    tiles = "".join(
        f'<input type="radio" name="show" id="show-{_slug(state)}"{checked}>'
        f'<label for="show-{_slug(state)}" class="tile {_slug(state)}">{_icon(state)}'
        f"<b>{number}</b> {state}</label>"
        for state, number in tally.items()
        if number or state in ("all", *frame.WORDS)
        for checked in [" checked" if state == "all" else ""]
    )
    links = "".join(
        f'<a href="#{anchor}">{text}</a>'
        for anchor, text in (
            ("statements", "Statements"), ("divergence", "Where the idealization diverges"),
            ("practice", "What the definitions do not say"), ("evidence", "Evidence"),
        )
    )  # fmt: skip
    return f"""<div class="bar"><nav aria-label="Contents">{links}</nav>
<fieldset class="tiles"><legend>Show the statements of a verdict</legend>{tiles}</fieldset></div>"""


def _filters() -> str:
    """One rule a state: its button hides what is of another state, and chapters left empty."""
    return "@supports selector(:has(a)) {\n" + "\n".join(
        f'main:has(#show-{s}:checked) :is([data-state]:not([data-state="{s}"]), '
        f'[data-group]:not(:has([data-state="{s}"]))) {{ display: none; }}'
        for s in map(_slug, STATES)
    ) + "\n}\n"  # fmt: skip


def _statements(chapters: Sequence[Chapter]) -> str:
    groups = "".join(_group(chapter) for chapter in chapters)
    return f"""<section id="statements"><h2>The statements</h2>
<table class="glance"><thead><tr><th scope="col">verdict</th><th scope="col">statement</th>
<th scope="col">measured</th><th scope="col">off by</th></tr></thead>{groups}</table></section>"""


def _group(chapter: Chapter) -> str:
    name, links = chapter.experiment.name, _figure_links(chapter.pictures)
    rows = "".join(_row(entry, chapter) for entry in chapter.entries)
    return f"""<tbody data-group><tr class="group"><th colspan="4" scope="rowgroup">
<a href="#{name}">{chapter.number}. {escaped(_title(name))}</a>
<span class="small">{rich(chapter.experiment.question)}{links}</span></th></tr>{rows}</tbody>"""


def _row(entry: Entry, chapter: Chapter) -> str:
    verdict = entry.verdict
    condition, off = _condition(verdict), _off(verdict)
    if verdict is not None:
        measured = rich("; ".join(parts(verdict.measured)))
    elif entry.state == NOT_RUN:
        measured = f"<code>{escaped(chapter.command)}</code>"
    else:
        measured = escaped(entry.reason)
    return f"""<tr data-state="{_slug(entry.state)}"><td>{_badge(entry.state)}</td>
<th scope="row"><a href="#{entry.key}">{rich(entry.claim.statement)}</a>{condition}</th>
<td class="measured"><span>{measured}</span></td><td class="off">{off}</td></tr>"""


def _divergences(chapters: Sequence[Chapter]) -> str:
    found = ranked(chapters)
    judged = sum(entry.verdict is not None for c in chapters for entry in c.entries)
    if not found:
        return """<section id="divergence"><h2>Where the idealization diverges most</h2>
<p>No statement that predicts a ratio has been measured yet.</p></section>"""
    largest = max((math.log1p(v) for *_, v in found if math.isfinite(v)), default=0)
    rows = [
        _rank(place, entry, chapter.pictures, value, math.log1p(value) / largest if largest else 0)
        for place, (chapter, entry, value) in enumerate(found, 1)
    ]
    more = len(rows) - _RANKS
    table = f'<ol class="ranks">{"".join(rows[:_RANKS])}</ol>'
    if more > 0:
        table += f"""<details><summary><span>{more} more, down to
{rich(factor(found[-1][2]))}</span></summary>
<ol class="ranks" start="{_RANKS + 1}">{"".join(rows[_RANKS:])}</ol></details>"""
    return f"""<section id="divergence"><h2>Where the idealization diverges most</h2>
<p class="lead">Ranked by the largest |ln(measured / predicted)| among a statement's cases, in nats
and as the factor between the two. {len(found)} of {judged} judged statements predict a ratio; a
bar's length is ln(1 + nats).</p>{table}</section>"""


def _rank(place: int, entry: Entry, pictures: Sequence[Picture], value: float, share: float) -> str:
    width = 100 * share if math.isfinite(share) else 100
    return f"""<li data-state="{_slug(entry.state)}" value="{place}">
<span class="value"><b>{rich(factor(value))}</b> {nats(value)}</span>
<i class="gauge"><i style="width:{width:.1f}%"></i></i>
<p>{_badge(entry.state)} <a href="#{entry.key}">{rich(entry.claim.statement)}</a>
{_figure_links(pictures)}</p></li>"""


def _intuitions(chapters: Sequence[Chapter]) -> str:
    items = []
    for chapter in chapters:
        lines = "".join(
            f'<li data-state="{_slug(e.state)}">{rich(e.claim.intuition)} '
            f'<a class="small" href="#{e.key}">{_icon(e.state)}the statement</a></li>'
            for e in chapter.entries
            if e.verdict is not None and e.claim.intuition
        )
        title, links = escaped(_title(chapter.experiment.name)), _figure_links(chapter.pictures)
        if lines:
            heading = f'<h3>{title} <span class="small">{links}</span></h3>'
            items.append(f"<div data-group>{heading}<ul>{lines}</ul></div>")
    body = "".join(items) or "<p>Nothing has been measured yet.</p>"
    return f"""<section id="practice"><h2>What the definitions do not say</h2>
<p class="lead">What a practitioner should take from the measurements, beside the figures that show
it.</p><div class="practice">{body}</div></section>"""


def _evidence(chapters: Sequence[Chapter]) -> str:
    return '<section id="evidence"><h2>The evidence</h2></section>' + "".join(
        _chapter(chapter) for chapter in chapters
    )


def _chapter(chapter: Chapter) -> str:
    name = chapter.experiment.name
    claims = "".join(_claim(entry, chapter) for entry in chapter.entries)
    notes = "".join(f'<p class="note">{escaped(note)}</p>' for note in chapter.notes)
    notes += "".join(f'<p class="note fault">{escaped(fault)}</p>' for fault in chapter.faults)
    wide = any(picture.width > _BESIDE for picture in chapter.pictures)
    drawn = "".join(_figure(picture) for picture in chapter.pictures)
    drawn = drawn and f'<div class="pictures">{drawn}</div>'
    layout = "above" if wide or not drawn else "beside"
    return f"""<section class="chapter" id="{name}" data-group>
<p class="kicker">{chapter.number}. {escaped(_title(name))}</p>
<h3>{rich(chapter.experiment.question)}</h3>{notes}
<div class="evidence {layout}">{drawn}<div class="claims">{claims}</div></div>
{_made(chapter)}</section>"""


def _figure(picture: Picture) -> str:
    """At least so wide on a small screen that its text can be read; then it scrolls by itself."""
    element = embed(picture.svg, "atlas")
    element = element.replace("<figure ", f'<figure id="figure-{picture.label}" ', 1)
    element = element.replace(
        "<svg ", f'<svg style="min-width:{0.8 * picture.width:.0f}px;'
        f'max-width:{1.3 * picture.width:.0f}px" ', 1,
    )  # fmt: skip
    caption = f"<figcaption><b>Figure {picture.label}.</b> {escaped(picture.caption)}</figcaption>"
    return element.replace("<svg ", '<div class="scroll" tabindex="0"><svg ', 1).replace(
        "</figure>", f"</div>{caption}</figure>"
    )


def _claim(entry: Entry, chapter: Chapter) -> str:
    verdict, claim = entry.verdict, entry.claim
    rows = [("Predicted", rich(claim.predicted))]
    if verdict is not None:
        rows.append(("Measured", _list(parts(verdict.measured))))
        if verdict.divergence is not None:
            d = verdict.divergence
            rows.append(("Off by", f"{rich(factor(d))} <span class='small'>({nats(d)})</span>"))
    else:
        rows.append(("Verdict", escaped(entry.reason)))
        if entry.state != FAILED:
            rows.append(("To measure", f"<code>{escaped(chapter.command)}</code>"))
    for preset, other in (entry.others or {}).items():
        words = f"{_badge(other.word)}{_condition(other)} {_list(parts(other.measured))}"
        rows.append((f"Otherwise with --preset {preset}", words))
    table = "".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in rows)
    said = verdict is not None and claim.intuition
    intuition = (
        f'<p class="intuition"><b>In practice</b> {rich(claim.intuition)}</p>' if said else ""
    )
    slug = _slug(entry.state)
    return f"""<article class="claim {slug}" id="{entry.key}" data-state="{slug}">
<p class="verdict">{_badge(entry.state)}{_condition(verdict)}</p>
<h4>{rich(claim.statement)}</h4><dl>{table}</dl>{intuition}</article>"""


def _made(chapter: Chapter) -> str:
    record, command = chapter.record, f"<code>{escaped(chapter.command)}</code>"
    if record is None:
        return f'<p class="made small">Not measured yet. To measure: {command}</p>'
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    seconds = sum(record["seconds"].values())
    settings = "".join(
        f"<div><dt>{escaped(key)}</dt><dd>{escaped(_setting(value))}</dd></div>"
        for key, value in record["config"].items()
    )
    return f"""<details class="made small"><summary><span>{command} · {chapter.preset} preset ·
{escaped(_device(record))} · {escaped(record["date"])} · {seconds:.0f} s</span></summary>
<dl class="facts">{settings}<div><dt>versions</dt><dd>{escaped(versions)}</dd></div></dl>
</details>"""


def _setting(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _reading() -> str:
    return """<section class="reading"><h2>How to read this</h2>
<p><b>Holds</b>: in every case that was measured. <b>Holds if</b>: in the cases named, not in the
others. <b>False</b>: in none of them. The rule is a function beside the experiment that sees
nothing but the measurements; brackets are 95 % intervals over the seeds unless a text says
otherwise. <b>Off by</b>, where a statement predicts a ratio, is the largest factor between what it
predicts and what was measured.</p>
<p class="made">Made by <code>python -m experiments report</code></p></section>"""


def _figure_links(pictures: Sequence[Picture]) -> str:
    return "".join(f' · <a href="#figure-{p.label}">Figure {p.label}</a>' for p in pictures)


def _list(items: Sequence[str]) -> str:
    if len(items) == 1:
        return rich(items[0])
    many = ' class="many"' if len(items) > 6 and max(map(len, items)) < 36 else ""
    return f"<ul{many}>" + "".join(f"<li>{rich(item)}</li>" for item in items) + "</ul>"


def _condition(verdict: frame.Verdict | None) -> str:
    if verdict is None or not verdict.condition:
        return ""
    return f' <span class="condition">{rich(verdict.condition)}</span>'


def _off(verdict: frame.Verdict | None) -> str:
    if verdict is None or verdict.divergence is None:
        return ""
    return rich(factor(verdict.divergence))


def _badge(state: str) -> str:
    return f'<span class="badge {_slug(state)}">{_icon(state)}{state}</span>'


def _icon(state: str) -> str:
    if state == "all":
        return ""
    return f'<svg class="icon" aria-hidden="true"><use href="#icon-{_slug(state)}"/></svg>'


def _slug(state: str) -> str:
    return state.replace(" ", "-")


def _title(name: str) -> str:
    return _TITLES.get(name, name.replace("_", " ").capitalize())
