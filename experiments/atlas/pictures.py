"""Figures as elements of a page: colored by its variables, described in words, and small."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.atlas import drawing, frame
from jaxgrad.report import figures

# Colors of drawing.py and the page's variables in their place, so that the dark page has its own.
_VARIABLES = {
    drawing.INK: "--ink", drawing.FAINT: "--faint", drawing.GRID: "--grid",
    **{color.lower(): f"--series-{i}" for i, color in enumerate(drawing.COLORS)},
}  # fmt: skip
_COORDINATES = re.compile(r' (?:d|x|y|x1|y1|x2|y2|transform|points)="[^"]*"')
_LONG = re.compile(r"-?\d+\.\d{3,}")
_BANDS = ("PolyCollection", "FillBetweenPolyCollection")


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        label: as the text refers to it: "2a".
        svg: the element, with colors as CSS variables.
        caption: what its panels show.
        width: in points, at which its text has its own size.
    """

    label: str
    svg: str
    caption: str
    width: float


@drawing.styled
def draw(
    experiment: frame.Experiment, config: Any, data: frame.Data, number: int
) -> tuple[Picture, ...]:
    """The figures of an experiment, made of its data.

    Args:
        experiment: whose.
        config: that the data were measured with.
        data: {name of a point: its arrays}.
        number: of the chapter.
    """
    drawn = experiment.figures(config, data)
    labels = (
        [str(number)] if len(drawn) == 1 else [f"{number}{c}" for c in "abcdefgh"[: len(drawn)]]
    )
    return tuple(
        _picture(experiment.name, label, figure)
        for label, figure in zip(labels, drawn, strict=True)
    )


def _picture(name: str, label: str, figure: Any) -> Picture:
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    svg = figures.to_svg(figure, f"{name}: {_described(panels)}", _VARIABLES)
    svg = svg.replace("stroke: #000000", "stroke: var(--ink)")
    return Picture(label, rounded(svg), _caption(panels), 72 * figure.get_figwidth())


def rounded(svg: str) -> str:
    """The same picture with its coordinates to a hundredth of a point; texts stay as they are."""

    def short(attribute: re.Match[str]) -> str:
        return _LONG.sub(lambda m: f"{float(m[0]):.2f}", attribute[0])

    return _COORDINATES.sub(short, svg)


def _described(panels: Sequence[Any]) -> str:
    """For readers who do not see it: what each panel draws against what, and its series."""
    sentences = []
    for axes in panels:
        x, y = plain(axes.get_xlabel()), plain(axes.get_ylabel())
        series = [plain(label) for label in axes.get_legend_handles_labels()[1]]
        kind = "matrix of numbers" if axes.images else " against ".join(filter(None, (y, x)))
        names = f"; series: {', '.join(series)}" if series else ""
        title = plain(axes.get_title(loc="left") or axes.get_title())
        sentences.append(": ".join(filter(None, (title, kind))) + names)
    return ". ".join(filter(None, sentences)) or "a figure"


def _caption(panels: Sequence[Any]) -> str:
    titles = [plain(axes.get_title(loc="left") or axes.get_title()) for axes in panels]
    text = "; ".join(dict.fromkeys(filter(None, titles)))
    bands = any(type(c).__name__ in _BANDS for axes in panels for c in axes.collections)
    return f"{text}. Bands: 95 % intervals over the seeds." if bands else f"{text}."


def plain(text: str) -> str:
    """A label without the marks of mathtext and without line breaks."""
    return " ".join(re.sub(r"[$\\{}]", "", text).split())
