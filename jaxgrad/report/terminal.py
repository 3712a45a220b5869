"""One table a model, in the terminal: rich where there is one, plain text where it is piped.

Functions return what a caller prints. The plain text holds no control characters and is at most
100 columns wide, so that it can be kept in a log and compared.
"""

import math
from collections.abc import Sequence
from typing import Any

from jaxgrad.report.record import Row

PLAIN_WIDTH = 100
MAX_ROWS = 25
_BAR = 16
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def plain_table(
    rows: Sequence[Row], title: str, *, max_rows: int = MAX_ROWS, elsewhere: str = "report.html"
) -> str:
    """The table as text.

    Args:
        rows: from `record.rows`.
        title: the line above.
        max_rows: a longer table is folded in its middle, and says so.
        elsewhere: where the whole table stands.

    Returns:
        Lines of at most 100 characters, ASCII but for the names.
    """
    scale = _scale(rows)
    width = PLAIN_WIDTH - 4 * 12 - _BAR - 2
    header = f"{'layer':<{width}}" + "".join(f"{label:>12}" for label in _LABELS) + "  gradient RMS"
    lines = [title, f"bar: {_scale_text(scale)}", header, "-" * PLAIN_WIDTH]
    shown, hidden = _fold(rows, max_rows)
    for row in shown:
        if row is None:
            lines.append(f"{hidden}; see {elsewhere}"[:PLAIN_WIDTH])
        else:
            cells = "".join(f"{cell:>12}" for cell in _cells(row))
            lines.append(f"{_shorten(row.name, width):<{width}}{cells}  {_plain_bar(row, scale)}")
    return "\n".join(line.rstrip() for line in lines)


def rich_table(
    rows: Sequence[Row], title: str, *, max_rows: int = MAX_ROWS, elsewhere: str = "report.html"
) -> Any:
    """The table as a `rich.table.Table`; arguments as of `plain_table`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    scale = _scale(rows)
    shown, hidden = _fold(rows, max_rows)
    caption = f"bar: {_scale_text(scale)}" + (f"\n{hidden}; see {elsewhere}" if hidden else "")
    table = Table(
        title=Text(title), caption=Text(caption), box=box.SIMPLE_HEAD,
        title_justify="left", title_style="bold", caption_justify="left", pad_edge=False,
    )  # fmt: skip
    table.add_column("layer", no_wrap=True, overflow="ellipsis", min_width=12)
    for label in _LABELS:
        table.add_column(label, justify="right", no_wrap=True, min_width=len(label))
    table.add_column("gradient RMS", no_wrap=True, min_width=_BAR, style="default")
    for row in shown:
        if row is None:
            table.add_row(Text("...", style="dim"))
            continue
        style = _style(row)
        cells = [Text(cell, style=style) for cell in _cells(row)]
        table.add_row(Text(row.name), *cells, Text(_block_bar(row, scale), style=style or "cyan"))
    return table


_LABELS = ("Jacobian", "activation", "gradient", "weight grad")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        number(row.gain), number(row.activation_rms), number(row.gradient_rms),
        number(row.weight_gradient_rms),
    )  # fmt: skip


def number(value: float | None) -> str:
    """Three digits, whatever the size; zero, NaN and infinity in words that cannot be overlooked.

    >>> [number(v) for v in (0.04567, 1.0, 12345.6, 1e-30, 0.0, float("nan"), float("-inf"), None)]
    ['0.0457', '1.00', '1.23e+04', '1.00e-30', '0', 'NaN', '-inf', '-']
    """
    if value is None:
        return "-"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    if 0.01 <= abs(value) < 1000:
        return f"{value:#.3g}".rstrip(".")
    return f"{value:.2e}"


def _scale(rows: Sequence[Row]) -> tuple[int, int] | None:
    """Whole powers of ten that hold every finite, positive gradient of the table."""
    logs = [math.log10(g) for g in (row.gradient_rms for row in rows) if g > 0 and math.isfinite(g)]
    if not logs:
        return None
    # 1e-8 is a little below 1e-8 in float32
    low, high = math.floor(min(logs) + 1e-6), math.ceil(max(logs) - 1e-6)
    return (low, high) if high > low else (low - 1, low + 1)


def _scale_text(scale: tuple[int, int] | None) -> str:
    if scale is None:
        return "no layer has a finite gradient other than zero"
    return f"gradient RMS on a log scale, 1e{scale[0]} (empty) to 1e{scale[1]} (full)"


def _fill(row: Row, scale: tuple[int, int] | None) -> float | str:
    """How full the bar is, in [0, 1], or the word that stands in its place."""
    if not row.ran:
        return "did not run"
    if not math.isfinite(row.gradient_rms) or row.nonfinite:
        return f"{row.nonfinite:,} NaN/inf" if row.nonfinite else "NaN/inf"
    if row.gradient_rms == 0 or scale is None:
        return "no gradient"
    fill = (math.log10(row.gradient_rms) - scale[0]) / (scale[1] - scale[0])
    return min(max(fill, 0.0), 1.0)


def _plain_bar(row: Row, scale: tuple[int, int] | None) -> str:
    fill = _fill(row, scale)
    return fill[:_BAR] if isinstance(fill, str) else "#" * round(fill * _BAR)


def _block_bar(row: Row, scale: tuple[int, int] | None) -> str:
    fill = _fill(row, scale)
    if isinstance(fill, str):
        return fill
    full, part = divmod(round(fill * _BAR * 8), 8)
    return "█" * full + _EIGHTHS[part].strip()


def _style(row: Row) -> str:
    if not row.ran:
        return "dim"
    if row.nonfinite or not math.isfinite(row.gradient_rms):
        return "bold red"
    return "yellow" if row.gradient_rms == 0 else ""


def _fold(rows: Sequence[Row], max_rows: int) -> tuple[list[Row | None], str]:
    """The rows, with None for a long middle, and a line that says what it hides."""
    if len(rows) <= max_rows:
        return list(rows), ""
    head = max_rows // 2
    tail = max_rows - 1 - head
    hidden = rows[head : len(rows) - tail]
    text = f"... {len(hidden)} more rows"
    finite = [row.gradient_rms for row in hidden if math.isfinite(row.gradient_rms)]
    if finite:
        text += f", gradient {number(min(finite))} to {number(max(finite))}"
    bad = sum(row.nonfinite > 0 for row in hidden)
    if bad:
        text += f", {bad} of them with NaN/inf"
    return [*rows[:head], None, *rows[len(rows) - tail :]], text


def _shorten(name: str, width: int) -> str:
    """A name within a width, its middle left out; control characters become visible."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    if len(name) < width:
        return name
    head = (width - 4) // 2
    return f"{name[:head]}...{name[-(width - 4 - head) :]}"
