"""Writes the atlas: atlas.html and ATLAS.md, from the results that lie in a folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.atlas import chapters, frame, markdown, page

HTML, MARKDOWN = "atlas.html", "ATLAS.md"


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        html: path of the page.
        markdown: path of the table.
        counts: {state: how many statements have it}.
        faults: what could not be read, judged or drawn; the page says the same.
    """

    html: Path
    markdown: Path
    counts: dict[str, int]
    faults: tuple[str, ...]


def write(
    experiments: Sequence[frame.Experiment], folder: Path, output: Path,
    progress: Callable[[str], None] | None = None,
) -> Written:  # fmt: skip
    """The atlas of the results in a folder.

    Args:
        experiments: what the atlas is about, in its order; those without a result are listed too.
        folder: where the results lie.
        output: folder for the two files; made if missing.
        progress: takes a line an experiment; None is silence.
    """
    read = chapters.read_all(experiments, folder, progress)
    output.mkdir(parents=True, exist_ok=True)
    html = _replace(output / HTML, page.render(read))
    table = _replace(output / MARKDOWN, markdown.render(read, HTML))
    faults = tuple(f"{c.experiment.name}: {fault}" for c in read for fault in c.faults)
    return Written(html, table, chapters.counts(read), faults)


def _replace(path: Path, text: str) -> Path:
    partial = path.with_suffix(".part")
    _ = partial.write_text(text, encoding="utf-8")
    return partial.replace(path)
