"""The pictures of a diagnosis: what Cockpit, Karpathy's lecture and the tuning playbook draw.

matplotlib itself is imported by `figures` only; here its axes are drawn into.
"""

# pyright: reportUnusedCallResult=false
# (matplotlib's methods return what they drew, and drawing is their effect)

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxgrad.monitor.summary import EXPONENTS
from jaxgrad.precision import limits as limits_of
from jaxgrad.report.figures import (
    ALARM,
    FAINT,
    FIRST,
    INK,
    LAST,
    color_bar,
    colored,
    extent,
    limits,
    name_ticks,
    panel,
    powers_of_ten,
    step_ticks,
    to_svg,
    whole_ticks,
)

Band = tuple[float, float, str, str]  # first step, last step, label, severity
_SEVERITY = {"error": ALARM, "warning": LAST, "info": FIRST}
_WIDE = (6.2, 3.1)
_MAX_CELLS = 4000  # columns of a unit map


def loss_with_bands(
    steps: np.ndarray, losses: np.ndarray, bands: Sequence[Band], chance: float | None
) -> str:
    """The loss by step, with a band where each finding holds.

    Args:
        steps: numbers of the steps, (T,).
        losses: loss of each, (T,).
        bands: first and last step, label and severity.
        chance: the loss of a guess, or None.
    """
    with panel("loss, and what was found", "step", _WIDE) as (figure, axes):
        values = np.asarray(losses, np.float64)
        good = np.isfinite(values)
        axes.plot(steps, np.where(good, values, np.nan), color=FIRST, lw=1.6)
        if good.any():
            low, high = values[good].min(), values[good].max()
            if chance is not None and low <= 2 * chance and high >= 0.3 * chance:
                low, high = min(low, chance), max(high, chance)
                axes.axhline(chance, color=FAINT, lw=0.9, ls=":")
                axes.annotate(
                    "a guess", (1, chance), xycoords=("axes fraction", "data"), ha="right",
                    va="bottom", fontsize=8.5, color=FAINT,
                )  # fmt: skip
            pad = 0.08 * (high - low) or 0.05 * max(abs(high), 1e-6)
            axes.set_ylim(low - pad, high + pad * (1 + 2.0 * len(bands)))
        if not good.all():
            top = axes.get_ylim()[1]
            axes.plot(
                steps[~good], np.full((~good).sum(), top), "x", color=ALARM, ms=5, mew=1.4,
                clip_on=False,
            )  # fmt: skip
        width = max(float(steps[-1] - steps[0]), 1.0) if len(steps) else 1.0
        for k, (first, last, label, severity) in enumerate(bands):
            color = _SEVERITY[severity]
            axes.axvspan(first, max(last, first + 0.012 * width), color=color, alpha=0.13, lw=0)
            axes.annotate(
                label, ((first if first - steps[0] < 0.6 * width else last), 0.97 - 0.085 * k),
                xycoords=("data", "axes fraction"), fontsize=8.5, color=color, va="top",
                ha="left" if first - steps[0] < 0.6 * width else "right",
                xytext=(3 if first - steps[0] < 0.6 * width else -3, 0), textcoords="offset points",
            )  # fmt: skip
        whole_ticks(axes)
        return to_svg(figure, "Loss by step, with a band where each finding holds")


def update_ratios(names: Sequence[str], steps: np.ndarray, ratios: np.ndarray) -> str:
    """Update RMS over weight RMS by step, a line a parameter, with the guide at a thousandth.

    Args:
        names: the parameters.
        steps: numbers of the steps, (S,).
        ratios: of shape (S, parameters); NaN and zero where nothing moved.
    """
    with panel("update over weight", "step", _WIDE) as (figure, axes):
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log10(np.where(ratios > 0, ratios, np.nan))
        for k in range(len(names)):
            axes.plot(
                steps, logs[:, k], color=FIRST, lw=0.8, alpha=0.35, marker="." * (len(steps) < 3)
            )
        known = np.isfinite(logs).any(1)
        if known.any():
            middle = np.nanmedian(logs[known], axis=1)
            axes.plot(steps[known], middle, color=FIRST, lw=2.0, label="median")
        axes.axhline(-3, color=LAST, lw=1.2, ls="--", label="guide, 10⁻³")
        low, high = limits([ratios, np.asarray([1e-4, 1e-2])])
        axes.set_ylim(low - 0.1, high + 0.1)
        powers_of_ten(axes)
        whole_ticks(axes)
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
        return to_svg(figure, "Ratio of update to weight by step, with a guide at one thousandth")


def norms(steps: np.ndarray, raw: np.ndarray, clipped: np.ndarray) -> str:
    """The gradient's norm before and behind the clip, and the share of steps that are clipped.

    Args:
        steps: numbers of the steps, (T,).
        raw: norms as they came, (T,).
        clipped: what the clips left, (T,); NaN without a clip.
    """
    known = np.isfinite(clipped) & np.isfinite(raw)
    title = "gradient norm"
    if known.any():
        share = float(np.mean(raw[known] > clipped[known] * (1 + 1e-6)))
        title = f"gradient norm, {share:.0%} of the steps clipped"
    with panel(title, "step", _WIDE) as (figure, axes):
        with np.errstate(divide="ignore", invalid="ignore"):
            axes.plot(steps, np.log10(np.where(raw > 0, raw, np.nan)), color=FIRST, lw=1.4,
                      label="raw")  # fmt: skip
            if known.any():
                axes.plot(steps, np.log10(np.where(clipped > 0, clipped, np.nan)), color=LAST,
                          lw=1.4, ls="--", label="clipped")  # fmt: skip
        finite = raw[np.isfinite(raw) & (raw > 0)]
        if finite.size:
            high = float(np.log10(np.quantile(finite, 0.9)))
            axes.axhline(high, color=FAINT, lw=0.9, ls=":", label="90th percentile of raw")
        low, high = limits([raw, clipped])
        axes.set_ylim(low - 0.1, high + 0.1)
        powers_of_ten(axes)
        whole_ticks(axes)
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
        return to_svg(figure, "Norm of the gradient by step, raw and clipped")


def unit_map(units: Sequence[tuple[str, np.ndarray]]) -> str:
    """By layer, the share of the data on which each unit works, units in ascending order.

    Args:
        units: layer and shares in [0, 1] of its units; a rectifier works where it is not silent, a
            bounded unit where it is not at its bounds.
    """
    width = min(max(len(shares) for _, shares in units), _MAX_CELLS)
    table = np.full((len(units), width), np.nan)
    for k, (_, shares) in enumerate(units):
        ordered = np.sort(np.asarray(shares, np.float64))
        places = np.linspace(0, len(ordered) - 1, width).round().astype(int)
        table[k] = ordered[places]  # stretched: layers of unequal width fill the map
    none = float(np.mean([np.mean(np.asarray(s) == 0) for _, s in units]))
    title = f"units at work, {none:.0%} never"
    size = (6.2, min(2.2 + 0.09 * len(units), 6))
    with panel(title, "units of the layer, in ascending order", size, grid=False) as (figure, axes):
        axes.imshow(
            colored(table, (0.0, 1.0)), aspect="auto", interpolation="nearest",
            extent=(0, 1, len(units) - 0.5, -0.5),
        )  # fmt: skip
        name_ticks(axes, [name for name, _ in units])
        axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        color_bar(figure, axes, (0.0, 1.0), powers=False)
        return to_svg(figure, "Share of the data on which each unit works, layers from the top")


def zero_map(names: Sequence[str], steps: np.ndarray, shares: np.ndarray) -> str:
    """Share of exact zeros among the outputs of every layer at every step.

    Args:
        names: the layers.
        steps: numbers of the steps, (S,).
        shares: of shape (S, layers).
    """
    size = (6.2, min(2.6 + 0.05 * max(0, len(names) - 20), 6))
    with panel("exact zeros by layer and step", "step", size, grid=False) as (figure, axes):
        axes.imshow(
            colored(np.asarray(shares, np.float64).T, (0.0, 1.0)), aspect="auto",
            interpolation="nearest", extent=extent(shares.T.shape),
        )  # fmt: skip
        name_ticks(axes, names)
        step_ticks(axes, steps)
        color_bar(figure, axes, (0.0, 1.0), powers=False)
        return to_svg(figure, "Share of exact zeros, layers from the top, steps to the right")


def exponent_histogram(tables: Mapping[str, np.ndarray]) -> str:
    """How many gradient elements have which power of two, with the limits of the dtypes.

    Args:
        tables: label -> counts by power of two, then of exact zeros.
    """
    where = "power of two (bf16 ends at -133, f32 at -149, both at 128)"
    with panel("size of the gradient's elements", where, _WIDE) as (figure, axes):
        powers = np.arange(EXPONENTS.start, EXPONENTS.stop)
        seen = np.zeros(len(powers), bool)
        for (label, table), color in zip(tables.items(), (FIRST, LAST), strict=False):
            total = max(float(np.sum(table)), 1.0)
            share = np.asarray(table[:-1], np.float64) / total
            seen |= share > 1e-6
            zeros = float(table[-1]) / total
            text = f"{label}, {zeros:.0%} exact zeros" if zeros else label
            axes.step(powers, 100 * share, where="mid", color=color, lw=1.5, label=text)
        low = min(int(powers[seen].min()) if seen.any() else -30, -26) - 2
        high = max(int(powers[seen].max()) if seen.any() else 0, 17) + 2
        axes.set_xlim(low, high)
        top = axes.get_ylim()[1] * 1.6
        axes.set_ylim(0, top)
        for place, text in _dtype_limits().items():
            if low <= place <= high:
                axes.axvline(place, color=FAINT, lw=0.9, ls=":")
                axes.annotate(
                    text, (place, 0.99 * top), rotation=90, fontsize=8, color=FAINT, va="top",
                    ha="right",
                )  # fmt: skip
        axes.set_ylabel("% of all elements")
        whole_ticks(axes, 9)
        place: Any = "outside lower center"
        figure.legend(frameon=False, fontsize=9, labelcolor=INK, loc=place, ncols=len(tables))
        return to_svg(figure, "Histogram of the gradient elements' exponents, with dtype limits")


def _dtype_limits() -> dict[int, str]:
    """Where types end: below its smallest number all is zero, above its largest infinite."""
    found: dict[tuple[int, str], list[str]] = {}
    for short, dtype in (("f16", "float16"), ("bf16", "bfloat16"), ("f32", "float32")):
        reach = limits_of(dtype)
        marks = {
            "zero below": reach.smallest, "fewer bits below": reach.smallest_normal,
            "inf above": reach.largest,
        }  # fmt: skip
        for words, value in marks.items():
            found.setdefault((math.floor(math.log2(value)), words), []).append(short)
    return {place: f"{', '.join(types)}: {words}" for (place, words), types in found.items()}
