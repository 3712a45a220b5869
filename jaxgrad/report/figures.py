"""The pictures: the one file that imports matplotlib.

A figure is an SVG whose colors are CSS variables, so one file serves light, dark and print:
matplotlib draws with placeholder colors, and every placeholder becomes `var(--name)`. Text stays
text. The page that embeds a figure defines the variables; `html.py` does.

What a logarithm cannot show is shown all the same: an exact zero stands on the lower edge as an
open triangle, NaN and infinity on the upper edge as a cross.
"""

# pyright: reportUnusedCallResult=false
# (matplotlib's methods return what they drew, and drawing is their effect)

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from jaxgrad.report.page import escaped

Numbers = Sequence[float] | Sequence[int] | np.ndarray

# Placeholders, unlikely to meet by chance, and the CSS variables that take their place.
INK, FAINT, GRID = "#010203", "#040506", "#070809"
FIRST, LAST, ALARM = "#0a0b0c", "#0d0e0f", "#101112"
_VARIABLES = {
    INK: "--ink", FAINT: "--faint", GRID: "--grid", FIRST: "--first", LAST: "--last",
    ALARM: "--alarm",
}  # fmt: skip

# What every figure looks like, whatever its colors.
LAYOUT: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
_STYLE: dict[Any, Any] = LAYOUT | {
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.titlecolor": INK,
    "axes.labelsize": 9.5,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.color": GRID,
}


def profile(title: str, initial: Numbers, final: Numbers | None) -> str:
    """The log-RMS of one quantity by layer, at initialization and after training.

    Args:
        title: what is drawn.
        initial: RMS of every layer in forward order; zero, NaN and infinity are allowed, and so is
            an empty sequence.
        final: the same layers after training, or None.

    Returns:
        SVG text, colors as CSS variables.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.9, 2.9), layout="constrained")
        axes = figure.add_subplot()
        series = [("at initialization", np.asarray(initial, np.float64), FIRST, "o", "-")]
        if final is not None:
            series.append(("after training", np.asarray(final, np.float64), LAST, "s", "--"))
        low, high = limits([values for _, values, *_ in series])
        for label, values, color, marker, line in series:
            _draw_profile(axes, values, (low, high), (label, color, marker, line))
        axes.set_title(title)
        axes.set_xlabel("layer, in forward order")
        axes.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
        powers_of_ten(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
        if final is not None:
            axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")
        return to_svg(figure, f"{title} by layer, on a logarithmic scale")


def heat_map(
    names: Sequence[str],
    steps: Numbers,
    gradient_rms: np.ndarray,
    title: str = "gradient RMS by layer and step",
) -> str:
    """The logarithm of every layer's gradient RMS at every measured step.

    Args:
        names: the layers, in forward order, drawn from the top.
        steps: the measured steps, ascending.
        gradient_rms: of shape (len(steps), len(names)).
        title: above the map.

    Returns:
        SVG text; a zero is left open (the page shows through), NaN and infinity are crossed.

    Raises:
        ValueError: the shape does not fit the names and steps.
    """
    values = np.asarray(gradient_rms, np.float64)
    if values.shape != (len(steps), len(names)):
        raise ValueError(
            f"gradient_rms: expected shape {(len(steps), len(names))}, one row a step and one "
            f"column a layer; got {values.shape}."
        )
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(
            figsize=(6.2, min(3.1 + 0.05 * max(0, len(names) - 20), 6)), layout="constrained"
        )
        axes = figure.add_subplot()
        low, high = limits([values.ravel()])
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log10(values.T)
        image = colored(logs, (low, high))
        axes.imshow(image, aspect="auto", interpolation="nearest", extent=extent(logs.shape))
        broken = ~np.isfinite(values.T)
        mark_cells(axes, broken, "x", ALARM)
        mark_cells(axes, values.T == 0, "v", FAINT)
        axes.set_title(title)
        axes.set_xlabel("step")
        name_ticks(axes, names)
        step_ticks(axes, steps)
        color_bar(figure, axes, (low, high), powers=True)
        return to_svg(
            figure, "Heat map of the gradient RMS, layers from the top, steps to the right"
        )


def loss_curve(losses: Numbers) -> str:
    """The loss of every step; a step without a finite loss is marked on the upper edge.

    Returns:
        SVG text.
    """
    values = np.asarray(losses, np.float64)
    finite = np.isfinite(values)
    steps = np.arange(len(values))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.9, 2.9), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(steps, np.where(finite, values, np.nan), color=LAST, lw=0.8, alpha=0.45)
        smooth = _smooth(values)
        if smooth is not None:
            axes.plot(steps, smooth, color=LAST, lw=1.8)
        if finite.any():
            low, high = values[finite].min(), values[finite].max()
            pad = 0.06 * (high - low) or 0.05 * max(abs(high), 1e-6)
            axes.set_ylim(low - pad, high + pad)
        if not finite.all():
            top = axes.get_ylim()[1]
            axes.plot(
                steps[~finite], np.full((~finite).sum(), top), "x", color=ALARM, ms=6, mew=1.6,
                clip_on=False, label="NaN or infinite",
            )  # fmt: skip
            axes.legend(frameon=False, fontsize=9, labelcolor=INK)
        axes.set_title("loss while training")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        return to_svg(figure, "Loss by step")


@contextmanager
def panel(
    title: str, xlabel: str, size: tuple[float, float] = (3.9, 2.9), *, grid: bool = True
) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one plot in the house style, to be drawn into and handed to `to_svg`.

    Args:
        title: above the plot.
        xlabel: below it.
        size: width and height in inches.
        grid: whether it has a grid.
    """
    with mpl.rc_context({**_STYLE, "axes.grid": grid}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        axes.set_xlabel(xlabel)
        yield figure, axes


def whole_ticks(axes: Axes, count: int = 6) -> None:
    """Ticks of the horizontal axis at whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=count, min_n_ticks=1))


def color_bar(figure: Figure, axes: Axes, span: tuple[float, float], *, powers: bool) -> None:
    """The scale of a map's colors, logarithms as powers of ten."""
    scale = ScalarMappable(Normalize(*span), mpl.colormaps["cividis"])
    bar = figure.colorbar(scale, ax=axes, pad=0.02, aspect=24)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    if powers:
        powers_of_ten(bar.ax)


def colored(values: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """The colors of a map, (..., 4); what is not finite stays transparent."""
    image = np.zeros((*values.shape, 4))
    finite = np.isfinite(values)
    width = max(span[1] - span[0], 1e-12)
    image[finite] = mpl.colormaps["cividis"]((values[finite] - span[0]) / width)
    return image


def to_svg(figure: Figure, description: str, variables: Mapping[str, str] = _VARIABLES) -> str:
    """The figure as an element to embed: scalable, described, colored by variables.

    Args:
        figure: drawn with placeholder colors, and with `svg.fonttype` "none" in force.
        description: what a reader who does not see it is told.
        variables: {placeholder, in lower-case hexadecimal: the CSS variable in its place}.

    Returns:
        SVG text without a size of its own.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": description}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for color, variable in variables.items():
        text = text.replace(color, f"var({variable})")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{escaped(description)}"', 1)


# ------------------------------------------------------------------------------------------ parts


def _draw_profile(
    axes: Axes, values: np.ndarray, limits: tuple[float, float], style: tuple[str, str, str, str]
) -> None:
    label, color, marker, line = style
    place = np.arange(1, len(values) + 1)
    good = np.isfinite(values) & (values > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(good, np.log10(values), np.nan)
    size = 4.5 if len(values) <= 40 else 2.5
    axes.plot(place, logs, line, color=color, marker=marker, ms=size, lw=1.6, label=label)
    zero, broken = values == 0, ~np.isfinite(values)
    for where, edge, mark, edge_color in (
        (zero, limits[0], "v", color), (broken, limits[1], "x", ALARM),
    ):  # fmt: skip
        if where.any():
            axes.plot(
                place[where], np.full(where.sum(), edge), mark, mec=edge_color, mfc="none", ms=6.5,
                mew=1.5, clip_on=False,
            )  # fmt: skip


def limits(series: Sequence[np.ndarray]) -> tuple[float, float]:
    """Powers of ten around all finite positive values, at least one decade apart."""
    values = np.concatenate([np.ravel(s) for s in series]) if series else np.zeros(0)
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return -1.0, 1.0
    low, high = float(np.log10(values.min())), float(np.log10(values.max()))
    if high - low < 1:
        middle = (low + high) / 2
        return middle - 0.5, middle + 0.5
    return low, high


def _power(exponent: float, _position: int | None = None) -> str:
    """10 to a whole power in Unicode superscripts: SVG text has no mathtext."""
    digits = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return "10" + str(round(exponent)).translate(digits)


def powers_of_ten(axes: Axes) -> None:
    """Ticks at powers of ten, or at 1, 2, 5 times them where the axis spans less than two."""
    low, high = axes.get_ylim()
    if high - low >= 2:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.yaxis.set_major_formatter(FuncFormatter(_power))
        return
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [power + math.log10(digit) for power in powers for digit in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(inside, [f"{10**tick:.1g}" for tick in inside])


def extent(shape: tuple[int, ...]) -> tuple[float, float, float, float]:
    """The edges of a map's cells, rows from the top."""
    return (-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5)


def mark_cells(axes: Axes, where: np.ndarray, mark: str, color: str) -> None:
    """Marks cells of a map."""
    rows, columns = np.nonzero(where)
    if len(rows):
        size = float(np.clip(120 / max(where.shape), 1.5, 6))
        axes.plot(columns, rows, mark, mec=color, mfc="none", ms=size, mew=1.0, ls="none")


def name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Names on the vertical axis, every so-manyth where there are many."""
    every = max(1, -(-len(names) // 16))
    places = list(range(0, len(names), every))
    axes.set_yticks(places, [plain(names[i], 22) for i in places])


def step_ticks(axes: Axes, steps: Numbers) -> None:
    """Steps on the horizontal axis of a map."""
    places = range(0, len(steps), max(1, -(-len(steps) // 6)))
    axes.set_xticks(places, [str(steps[i]) for i in places])


def plain(text: str, width: int) -> str:
    """A user's name as a label: no mathtext, nothing unprintable, its middle left out if long."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    if len(text) > width:
        text = f"{text[: width // 2 - 1]}…{text[-(width - width // 2) :]}"
    return text.replace("$", r"\$")


def _smooth(values: np.ndarray) -> np.ndarray | None:
    """A running mean over a twentieth of the run; None where the run is short or broken."""
    width = len(values) // 20
    if width < 3 or not np.isfinite(values).all():
        return None
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
