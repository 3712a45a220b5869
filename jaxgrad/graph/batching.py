"""Are the examples of a batch independent, and where do they lie in every state of a chain?

The batch axis is followed through the whole program by one rule a primitive (`batch_rules`), into
loops, branches and derivative rules (`batch_walk`). That is a proof. Where an operation is unknown
it is probed (`batch_probe`).
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.graph import compat
from jaxgrad.graph.batch_layout import Coupled, Shape, Unfollowable, candidates, strides
from jaxgrad.graph.batch_probe import Prober
from jaxgrad.graph.batch_walk import Walk
from jaxgrad.graph.cuts import Chained
from jaxgrad.graph.flatten import Line
from jaxgrad.graph.ir import Op, Table, Value, value_inputs
from jaxgrad.graph.names import Labels


@dataclass(frozen=True)
class Layout:
    """Where the examples lie in one state, a tuple of arrays.

    Attributes:
        shapes: the arrays' shapes.
        strides: elements between two examples, in row-major order: the flat index is
            `outer * (count * stride) + example * stride + inner`.
        dtypes: the arrays' types.
        count: number of examples.
    """

    shapes: tuple[Shape, ...]
    strides: tuple[int, ...]
    dtypes: tuple[Any, ...]
    count: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of one example, array by array."""
        return tuple(prod(shape) // self.count for shape in self.shapes)

    @property
    def size(self) -> int:
        """Elements of one example."""
        return sum(self.sizes)

    def to_examples(self, state: tuple[Any, ...]) -> jax.Array:
        """The state as rows (count, size): each example's elements, array after array, row-major.

        A plain reshape where one array holds the batch along its first axis.
        """
        rows = []
        for leaf, stride, size in zip(state, self.strides, self.sizes, strict=True):
            if size == stride:
                rows.append(jnp.reshape(leaf, (self.count, size)))
            else:
                parts = jnp.reshape(leaf, (size // stride, self.count, stride))
                rows.append(jnp.reshape(jnp.swapaxes(parts, 0, 1), (self.count, size)))
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)

    def from_examples(self, rows: jax.Array) -> tuple[jax.Array, ...]:
        """The state whose rows these are: the inverse of `to_examples`."""
        if rows.shape != (self.count, self.size):
            raise ValueError(f"expected rows of shape {(self.count, self.size)}, got {rows.shape}")
        state, start = [], 0
        for shape, stride, size, dtype in zip(
            self.shapes, self.strides, self.sizes, self.dtypes, strict=True
        ):
            own = rows if size == self.size else rows[:, start : start + size]
            start += size
            if size != stride:
                own = jnp.swapaxes(jnp.reshape(own, (self.count, size // stride, stride)), 0, 1)
            state.append(jnp.reshape(own, shape).astype(dtype))
        return tuple(state)


def layouts(  # noqa: PLR0913, PLR0917 - what a trace consists of
    chained: Chained,
    line: Line,
    table: Table,
    inputs: list[Value],
    leaves: list[Any],
    batch_axis: int,
    labels: Labels,
) -> tuple[dict[tuple[Value, ...], Layout], str]:
    """Verify that the examples of a batch are independent, and find them in every state.

    Args:
        chained: the chain, cut.
        line: the program it was cut from.
        table: types of the program's values.
        inputs: the values that hold the batch.
        leaves: their arrays, at which operations without a rule are probed.
        batch_axis: the axis of every leaf that numbers the examples.
        labels: names of the layers, for errors.

    Returns:
        The layout of each state, keyed by its values (`chained.start` and every segment's
        `after`), and "proved", or "probed" if an operation had to be.

    Raises:
        ValueError: if a leaf has no such axis, if leaves disagree on the number of examples, or
            if examples are coupled; it names the operation that couples them, its layer and its
            source line.
    """
    count = _count_examples(leaves, batch_axis)
    states = [chained.start, *(segment.after for segment in chained.segments)]
    if count == 1:
        return {state: _layout(state, table, count, {}) for state in states}, "proved"
    walk = Walk(count, table, chained.depends.smooth)
    for value, leaf in zip(inputs, leaves, strict=True):
        walk.specs[value] = strides(leaf.shape)[batch_axis] if leaf.size else None
    prober, verdict = Prober(line, table, inputs, leaves), "proved"
    begin = _needed(chained)
    boundary = {v for state in states for v in state}
    for op in line.ops:
        walk.strict = not begin.isdisjoint(op.outputs)
        try:
            walk.visit(op)
        except Unfollowable:
            walk.store(op, prober.probe(walk, op))
            verdict = "probed"
        for value in boundary.intersection(op.outputs):
            _pin(walk, value, op)
    for state in states:
        for value in state:
            if isinstance(spec := walk.spec(value), Coupled):
                raise ValueError(_explain(spec, batch_axis, labels))
    return {state: _layout(state, table, count, walk.specs) for state in states}, verdict


def _count_examples(leaves: list[Any], batch_axis: int) -> int:
    counts = set()
    for leaf in leaves:
        if not -leaf.ndim <= batch_axis < leaf.ndim:
            raise ValueError(
                f"batch_axis={batch_axis}: expected every array of the input to have this axis, "
                f"got one of shape {leaf.shape}. Close over what is no batch, or pass it as "
                "another argument."
            )
        counts.add(leaf.shape[batch_axis])
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"batch_axis={batch_axis}: expected one number of examples, at least 1, "
            f"got {sorted(counts)} in arrays of shape {[leaf.shape for leaf in leaves]}"
        )
    return counts.pop()


def _needed(chained: Chained) -> set[Value]:
    """What the first state is made from: there, too, the examples must be found."""
    needed = set(chained.start)
    for op in reversed(chained.prelude):
        if not needed.isdisjoint(op.outputs):
            needed.update(value_inputs(op))
    return needed


def _pin(walk: Walk, value: Value, op: Op) -> None:
    """Give a state through which no gradient passes a layout; what follows is judged by it."""
    spec, shape = walk.spec(value), walk.shape(value)
    blocked = isinstance(spec, Coupled) and not spec.smooth and not walk.strict
    if (spec is None or blocked) and prod(shape):
        places = candidates(shape, walk.count)
        why = f"its result has no place for {walk.count} examples"
        walk.specs[value] = places[0] if places else Coupled(why, (op,))


def _layout(state: tuple[Value, ...], table: Table, count: int, specs: dict[Value, Any]) -> Layout:
    avals = [table.avals[v] for v in state]
    places = [specs.get(v) for v in state]
    found = [prod(a.shape) // count if s is None else s for a, s in zip(avals, places, strict=True)]
    shapes = tuple(tuple(int(d) for d in a.shape) for a in avals)
    return Layout(shapes, tuple(found), tuple(np.dtype(a.dtype) for a in avals), count)


def _explain(spec: Coupled, batch_axis: int, labels: Labels) -> str:
    path = next((labels.path[op] for op in spec.ops if labels.path.get(op)), ())
    lines = (compat.source_line(op.eqn) for op in spec.ops if op.eqn is not None)
    line = next(filter(None, lines), "")
    layer = f" in layer {'/'.join(path)}" if path else ""
    return (
        f"batch_axis={batch_axis}: the examples of the batch are coupled by "
        f"`{spec.ops[0].name}`{layer}{f' ({line})' if line else ''}: {spec.why}. Factorize one "
        "example (batch_axis=None), or use running statistics / inference mode, so that every "
        "example's output depends on that example alone."
    )
