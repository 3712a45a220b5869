"""One look for every figure: the report's style, series told apart by color and by marker."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxgrad.report.figures import LAYOUT

# Okabe and Ito's colors, which color-blind readers tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7f7f7f", "#B8A800")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, FAINT, GRID = "#1b1f24", "#57606a", "#d8dee4"

STYLE: dict[Any, Any] = LAYOUT | {
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}
# Titles, legends and texts take their look when they are made, not from their figure.
styled = mpl.rc_context(STYLE)


@styled
def panels(count: int = 1, *, width: float = 7.2, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes side by side, in the house style."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, [figure.add_subplot(1, count, i + 1) for i in range(count)]


@styled
def line(axes: Axes, index: int, x: Any, values: Any, label: str = "", **options: Any) -> None:
    """A series: mean over the seeds (first axis of values) and the band of its 95 % interval."""
    from experiments.atlas.frame import interval

    mean, low, high = interval(values)
    color = COLORS[index % len(COLORS)]
    marker = MARKERS[index % len(MARKERS)]
    axes.plot(x, mean, color=color, marker=marker, label=label, **options)
    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


@styled
def dots(axes: Axes, index: int, x: Any, values: Any, label: str = "") -> None:
    """Points without a line, for an axis of names: mean over the seeds and its 95 % interval."""
    from experiments.atlas.frame import interval

    mean, low, high = interval(values)
    axes.errorbar(
        x, mean, (mean - low, high - mean), color=COLORS[index % len(COLORS)], label=label,
        marker=MARKERS[index % len(MARKERS)], linestyle="none", capsize=3,
    )  # fmt: skip


@styled
def theory(axes: Axes, x: Any, values: Any, label: str = "theory") -> None:
    """A prediction: a dashed line without markers, in ink."""
    axes.plot(x, values, color=INK, linestyle="--", linewidth=1.2, label=label)


@styled
def words(axes: Axes, title: str, x: str, y: str, *, legend: bool = True) -> None:
    """Title, labels and, where asked for, a legend."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if legend:
        axes.legend()


@styled
def grid(
    axes: Axes, values: Any, rows: Sequence[str], columns: Sequence[str], *, form: str = "{:.2f}",
    limits: tuple[float, float] | None = None,
) -> Any:  # fmt: skip
    """A matrix of numbers, each written in its cell; returns the image for a color bar."""
    low, high = limits or (None, None)
    image = axes.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    for i in range(len(rows)):
        for j in range(len(columns)):
            value = values[i][j]
            light = image.norm(value) < 0.55 if np.isfinite(value) else True
            axes.text(
                j, i, form.format(value), ha="center", va="center", fontsize=8.5,
                color="white" if light else "black",
            )  # fmt: skip
    return image
