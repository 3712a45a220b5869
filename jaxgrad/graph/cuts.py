"""Where a program narrows to one tensor.

Walk the operations in order and keep the set of live smooth values: those that a gradient with
respect to the input can reach and that a later operation needs in a way a gradient can pass. Where
the set is one value, every path from input to output goes through it: a cut. Between iterations of
an unrolled scan the carried values together are one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from jaxgrad.graph import compat
from jaxgrad.graph.flatten import Dependence, Line, dependence
from jaxgrad.graph.ir import Lit, Op, Table, Value, is_real_dtype, value_inputs


@dataclass(frozen=True, eq=False)
class Segment:
    """What lies between two cuts: `ops` turn the values `before` into the values `after`."""

    before: tuple[Value, ...]
    after: tuple[Value, ...]
    ops: tuple[Op, ...]


@dataclass(frozen=True, eq=False)
class Chained:
    """A program as a chain.

    Attributes:
        start: the values of the first state.
        prelude: operations that make the first state from the input, where they are not the same.
        segments: the links between cuts, in order.
        depends: how values depend on the first state or, outside of it, on the input.
    """

    start: tuple[Value, ...]
    prelude: tuple[Op, ...]
    segments: tuple[Segment, ...]
    depends: Dependence


@dataclass(frozen=True, eq=False)
class _Reading:
    """A line to be cut: its operations that the input reaches, and how to call the input."""

    ops: list[Op]
    line: Line
    table: Table
    overall: Dependence
    what: str


class NoGradientPath(ValueError):
    """The output does not depend on the input in a way that a gradient can pass."""


def find_chain(line: Line, table: Table, inputs: list[Value], what: str) -> Chained:
    """Cut a line at every place where it narrows.

    Args:
        line: the program, scans unrolled.
        table: its values.
        inputs: the input's values; where none is a float, the chain starts at the first float that
            it can.
        what: how to call the input in an error message.

    Raises:
        NoGradientPath: if no gradient can reach the input; it names the operation that stops it.
    """
    overall = dependence(line.ops, table, inputs)
    ops = [op for op in line.ops if any(v in overall.influenced for v in value_inputs(op))]
    reading = _Reading(ops, line, table, overall, what)
    starts = tuple(v for v in inputs if table.is_float(v))
    return _chain_from(starts, 0, reading) if starts else _chain_from_integers(reading)


def _chain_from_integers(reading: _Reading) -> Chained:
    """An integer input: start where all that was embedded from it has come together.

    A mask made from tokens is a float too and lives through the whole model: it is held as a side
    input. What is looked up or multiplied out of a float array is an embedding, and the gradient's
    path begins there.
    """
    ops, line, table = reading.ops, reading.line, reading.table
    roots = _embeddings(ops, table, reading.overall.influenced)
    smooth = dependence(ops, table, [v for v, _ in roots]).smooth
    ends = {v for v in line.outputs if not isinstance(v, Lit) and v in smooth}
    if not ends:
        raise NoGradientPath(
            f"{reading.what} holds integers, and no floating-point value made from it reaches the "
            "output: there is no gradient to follow. Pass the float that you want to "
            "differentiate, for example the embedded tokens."
        )
    last = last_uses(ops, smooth, ends)
    latest = max(i for v, i in roots if v in last)
    single = []
    live: set[Value] = set()
    for i, op in enumerate(ops):
        live.update(v for v in op.outputs if v in smooth and v in last)
        live = {v for v in live if last[v] > i}
        (value,) = live if len(live) == 1 else (None,)
        if value is not None and is_real_dtype(getattr(table.avals[value], "dtype", None)):
            single.append((i, value))
    after_all = [(i, v) for i, v in single if i >= latest and v not in ends]
    chosen = (after_all or single)[:1]
    if not chosen:
        start = tuple(v for v, _ in roots if v in last)
        return _chain_from(start, latest + 1, reading)
    position, value = chosen[0]
    return _chain_from((value,), position + 1, reading)


def _embeddings(ops: list[Op], table: Table, influenced: set[Value]) -> list[tuple[Value, int]]:
    """Floats made from integers and a float array, each with its position; else any float."""
    floats: set[Value] = set()
    found, any_float = [], []
    for i, op in enumerate(ops):
        made = [v for v in op.outputs if is_real_dtype(getattr(table.avals[v], "dtype", None))]
        inputs = value_inputs(op)
        from_floats = any(v in floats for v in inputs)
        arrays = [v for v in inputs if v not in influenced and table.is_float(v)]
        looks_up = op.name not in _ELEMENTWISE and any(table.avals[v].shape for v in arrays)
        product = op.name in ("dot_general", "conv_general_dilated")
        if made and looks_up and (product or not from_floats):
            found += [(v, i) for v in made]
            continue
        if made and not from_floats:
            any_float += [(v, i) for v in made]
        masks_only = all(v not in {r for r, _ in found} for v in inputs)
        if made and masks_only:
            floats.update(made)
    reached = dependence(ops, table, [v for v, _ in found]).smooth
    first = [(v, i) for v, i in found if not any(u in reached for u in value_inputs(ops[i]))]
    return first or any_float


_ELEMENTWISE = {"add", "sub", "mul", "div", "max", "min", "select_n", "pow", "clamp", "atan2"}


def last_uses(ops: list[Op], smooth: set[Value], outputs: Iterable[Value]) -> dict[Value, int]:
    """Position of the last operation that passes a gradient on to each value."""
    last = dict.fromkeys(outputs, len(ops))
    for i in range(len(ops) - 1, -1, -1):
        passes = ops[i].name != "stop_gradient" and any(v in last for v in ops[i].outputs)
        if passes and any(v in smooth for v in ops[i].outputs):
            for v in value_inputs(ops[i]):
                if v in smooth:
                    _ = last.setdefault(v, i)
    return last


def _chain_from(start: tuple[Value, ...], position: int, reading: _Reading) -> Chained:
    ops, line, table = reading.ops, reading.line, reading.table
    rest = ops[position:]
    smooth = dependence(rest, table, start).smooth
    depends = Dependence(reading.overall.influenced, smooth)
    outputs = tuple(
        dict.fromkeys(v for v in line.outputs if not isinstance(v, Lit) and v in smooth)
    )
    if not outputs:
        raise NoGradientPath(_explain(rest, start, reading.overall, reading.what))
    last = last_uses(rest, smooth, outputs)
    live = {v for v in start if v in last}
    segments, before, begun = [], start, 0
    for i, op in enumerate(rest):
        live.update(v for v in op.outputs if v in smooth and v in last)
        live = {v for v in live if last[v] > i}
        after = _cut(live, rest, i, line, table)
        if i == len(rest) - 1:
            after = outputs
        if (
            after
            and after != before
            and (i == len(rest) - 1 or after != outputs or len(outputs) == 1)
        ):
            segments.append(Segment(before, after, tuple(rest[begun : i + 1])))
            before, begun = after, i + 1
    segments = _merge_tail(segments, outputs)
    return Chained(start, tuple(ops[:position]), tuple(segments), depends)


def _merge_tail(segments: list[Segment], outputs: tuple[Value, ...]) -> list[Segment]:
    """Operations after the output was made belong to nothing; the chain ends at the output."""
    for k, segment in enumerate(segments):
        if segment.after == outputs:
            return segments[: k + 1]
    return segments


def _cut(
    live: set[Value], ops: list[Op], i: int, line: Line, table: Table
) -> tuple[Value, ...] | None:
    if len(live) == 1:
        (value,) = live
        return (value,) if is_real_dtype(getattr(table.avals[value], "dtype", None)) else None
    here = ops[i].iteration
    following = ops[i + 1].iteration if i + 1 < len(ops) else ()
    if not live or not here or here == following:
        return None
    for depth in range(len(here), 0, -1):
        carried = line.marks.get(here[:depth])
        if carried is None or following[:depth] == here[:depth]:
            continue
        if live <= set(carried):
            return tuple(dict.fromkeys(v for v in carried if not isinstance(v, Lit) and v in live))
    return None


def _explain(ops: list[Op], start: tuple[Value, ...], overall: Dependence, what: str) -> str:
    smooth: set[Value] = set(start)
    ends = []
    for op in ops:
        if not any(v in smooth for v in value_inputs(op)):
            continue
        kept = [v for v in op.outputs if v in overall.smooth]
        smooth.update(kept)
        if not kept:
            line = compat.source_line(op.eqn) if op.eqn is not None else ""
            ends.append(f"{op.name}" + (f" ({line})" if line else ""))
    stops = "; it ends at " + ", ".join(dict.fromkeys(ends)) if ends else ""
    return (
        f"the output does not depend on {what} in a way that a gradient can pass{stops}. Check for "
        "stop_gradient, integer casts, argmax and rounding, or factorize with respect to another "
        "argument."
    )
