"""The atlas as Markdown: the same statements, verdicts, ranks and intuitions, as tables."""

from collections.abc import Sequence

from experiments.atlas.chapters import Chapter, Entry, counts, ranked
from experiments.atlas.page import TITLE, provenance
from experiments.atlas.pictures import Picture
from experiments.atlas.wording import cell, factor, nats, parts, spoken

_MARKS = {"holds": "✓", "holds if": "◐", "false": "✗"}


def render(chapters: Sequence[Chapter], page: str) -> str:
    """The text of ATLAS.md.

    Args:
        chapters: what was read and judged.
        page: name of the HTML file beside it, which holds the figures.
    """
    facts = "; ".join(f"{label}: {value}" for label, value in provenance(chapters).items())
    tally = ", ".join(f"{number} {state}" for state, number in counts(chapters).items() if number)
    return "\n".join(
        [
            f"# {TITLE}", "",
            f"{tally}. Verdicts are computed from the stored measurements; brackets are 95 % "
            f"intervals over the seeds unless a text says otherwise. {cell(facts)}.", "",
            *_statements(chapters, page), "", *_divergences(chapters, page), "",
            *_intuitions(chapters, page), "", *_measurements(chapters), "",
            "Made by `python -m experiments report`.", "",
        ]
    )  # fmt: skip


def _statements(chapters: Sequence[Chapter], page: str) -> list[str]:
    lines = [
        "| statement | verdict | predicted | measured | off by | figure | command |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for chapter in chapters:
        for entry in chapter.entries:
            lines.append(_row(_cells(entry, chapter, page)))
    return lines


def _cells(entry: Entry, chapter: Chapter, page: str) -> list[str]:
    verdict = entry.verdict
    if verdict is None:
        word, measured, off = entry.state, cell(entry.reason), ""
    else:
        word = cell(spoken(verdict))
        measured = "; ".join(map(cell, parts(verdict.measured)))
        off = "" if verdict.divergence is None else cell(factor(verdict.divergence))
    for preset, other in (entry.others or {}).items():
        measured += f". With --preset {preset}: {cell(spoken(other))}: {cell(other.measured)}"
    return [
        cell(entry.claim.statement), f"{_MARKS.get(entry.state, '·')} {word}",
        cell(entry.claim.predicted), measured, off, _figures(chapter.pictures, page),
        f"`{chapter.command}`",
    ]  # fmt: skip


def _divergences(chapters: Sequence[Chapter], page: str) -> list[str]:
    lines = [
        "## Where the idealization diverges most", "",
        "| | off by | nats | statement | verdict | figure |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for place, (chapter, entry, value) in enumerate(ranked(chapters), 1):
        lines.append(
            _row([
                str(place), cell(factor(value)), nats(value).removesuffix(" nats"),
                cell(entry.claim.statement), cell(entry.state),
                _figures(chapter.pictures, page),
            ])
        )  # fmt: skip
    return lines


def _intuitions(chapters: Sequence[Chapter], page: str) -> list[str]:
    lines = ["## What the definitions do not say", ""]
    for chapter in chapters:
        for entry in chapter.entries:
            if entry.verdict is not None and entry.claim.intuition:
                links = _figures(chapter.pictures, page)
                where = f" ({links})" if links else ""
                lines.append(f"- {cell(entry.claim.intuition)}{where}")
    return lines


def _measurements(chapters: Sequence[Chapter]) -> list[str]:
    lines = [
        "## The measurements", "",
        "| experiment | preset | device | cores | date | took | versions |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    notes = []
    for chapter in chapters:
        name, record = chapter.experiment.name, chapter.record
        notes += [f"- {name}: {cell(note)}" for note in (*chapter.notes, *chapter.faults)]
        if record is None:
            lines.append(
                _row([name, "not run yet" if not chapter.faults else "no result", *[""] * 5])
            )
            continue
        versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
        seconds = f"{sum(record['seconds'].values()):.0f} s"
        lines.append(
            _row([
                name, chapter.preset, cell(record["device"]), str(record["cores"]),
                cell(record["date"]), seconds, cell(versions),
            ])
        )  # fmt: skip
    return [*lines, "", *notes] if notes else lines


def _figures(pictures: Sequence[Picture], page: str) -> str:
    return ", ".join(f"[{p.label}]({page}#figure-{p.label})" for p in pictures)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
