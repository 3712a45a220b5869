"""The Jacobian of a chain as an operator on vectors, at extended range.

Every layer is linearized once, at the state that the chain's input leads to; its transpose comes
from the same linear program. After every layer the vectors are rescaled by a power of two whose
exponent is kept as an integer: no rounding, and 1,000 layers neither overflow nor underflow.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgrad.graded import scale
from jaxgrad.spectrum.plan import Arrays, Plan, Segment, Step

Vectors = Float[Array, "count examples n"]
Products = tuple[Float[Array, "count examples m"], Int[Array, "count examples"]]
# What happens after a layer: (vectors, state, extra) -> (vectors, state, record).
Visit = Callable[[Array, Any, Any], tuple[Array, Any, Any]]


@dataclass(frozen=True, eq=False)
class _Map:
    """One layer's linear program: its structure, and which of its arrays the layer was given."""

    backward_only: bool
    tree: Any
    given: tuple[int | None, ...]
    like_in: Any
    like_out: Any

    def push(self, values: Sequence[Array], residuals: Sequence[Array]) -> Callable[[Array], Array]:
        linear, transposed = self._both(values, residuals)
        return transposed if self.backward_only else linear

    def pull(self, values: Sequence[Array], residuals: Sequence[Array]) -> Callable[[Array], Array]:
        linear, transposed = self._both(values, residuals)
        return linear if self.backward_only else transposed

    def _both(self, values: Sequence[Array], residuals: Sequence[Array]) -> tuple:
        own = iter(residuals)
        leaves = [next(own) if j is None else values[j] for j in self.given]
        made = jax.tree.unflatten(self.tree, leaves)
        linear = (lambda ct: made(ct)[0]) if self.backward_only else made
        like = self.like_out if self.backward_only else self.like_in
        return linear, lambda rows: jax.linear_transpose(linear, like)(rows)[0]


@dataclass(frozen=True, eq=False)
class _Part:
    """A segment, linearized."""

    maps: tuple[_Map, ...]
    repeats: int
    shared: tuple[tuple[bool, ...], ...]
    values: tuple[tuple[Array, ...], ...]
    residuals: list[list[Array]]


@dataclass(frozen=True, eq=False)
class Operator:
    """The Jacobian of a chain, linearized; it lives within one trace.

    Vectors are rows (count, examples, n): `count` of them for every example.
    """

    plan: Plan
    parts: tuple[_Part, ...]

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return sum(len(part.maps) * part.repeats for part in self.parts)

    def push(self, vectors: Vectors) -> Products:
        """`J v` as vectors with largest entries in [1/2, 1), and their exponents."""
        return self._product(vectors, backward=False)

    def pull(self, vectors: Vectors) -> Products:
        """`J^T u`, in the same form."""
        return self._product(vectors, backward=True)

    def _product(self, vectors: Array, backward: bool) -> tuple[Array, Array]:
        def visit(vectors: Array, power: Array, _: None) -> tuple[Array, Array, None]:
            vectors, shift = rescaled(vectors)
            return vectors, power + shift, None

        vectors, power, _ = self.traverse(*rescaled(vectors), visit, backward)
        return vectors, power

    def traverse(
        self, vectors: Array, state: Any, visit: Visit, backward: bool = False, extras: Any = None
    ) -> tuple[Array, Any, Any]:
        """Takes vectors through all layers.

        Args:
            vectors: (count, examples, n_0), or n_L backward.
            state: what the visits hand on, a pytree of arrays of fixed shapes, or None.
            visit: called after every layer; it may rescale or orthogonalize the vectors.
            backward: whether from the last layer to the first, by the transposes.
            extras: pytree with a leading axis of layers, an entry of which each visit gets.

        Returns:
            The vectors, the last state, and the records of all visits, stacked in the order of the
            layers; None for a chain without layers.
        """
        lengths = [len(part.maps) * part.repeats for part in self.parts]
        starts = np.cumsum([0, *lengths[:-1]]) if lengths else []
        places = list(zip(self.parts, starts, lengths, strict=True))
        records = []
        for part, start, length in reversed(places) if backward else places:
            own = jax.tree.map(lambda a, s=start, n=length: a[s : s + n], extras)
            with jax.default_matmul_precision("highest"):
                vectors, state, record = _through(part, (vectors, state), visit, backward, own)
            records.append(record)
        if not records:
            return vectors, state, None
        records = records[::-1] if backward else records
        return vectors, state, jax.tree.map(lambda *all_: jnp.concatenate(all_), *records)


def rescaled(vectors: Array) -> tuple[Array, Array]:
    """Largest entries in [1/2, 1), and the exponents taken out."""
    shift = scale.largest_exponent(vectors[..., None, :])
    return scale.shifted(vectors, -shift[..., None]), shift


def linearized(plan: Plan, arrays: Arrays) -> Operator:
    """Linearizes every layer, once."""
    dtype = jnp.dtype(plan.dtype)
    with jax.default_matmul_precision("highest"):
        parts = [
            _linearized_part(segment, values, dtype)
            for segment, values in zip(plan.segments, arrays, strict=True)
        ]
    return Operator(plan, tuple(parts))


def _linearized_part(segment: Segment, values: Any, dtype: Any) -> _Part:
    maps: dict[int, _Map] = {}

    def linearize(given: Sequence[Sequence[Array]]) -> list[list[Array]]:
        residuals = []
        for i, (step, leaves) in enumerate(zip(segment.steps, given, strict=True)):
            maps[i], own = _linear_map(step, leaves, dtype)
            residuals.append(own)
        return residuals

    if segment.repeats == 1:
        residuals = linearize(values)
    else:
        _, residuals = jax.lax.scan(
            lambda _, own: (None, linearize(_merged(values, own, segment.shared))),
            None,
            _stacked(values, segment.shared),
        )
    ordered = tuple(maps[i] for i in range(len(segment.steps)))
    return _Part(ordered, segment.repeats, segment.shared, values, residuals)


def _linear_map(step: Step, leaves: Sequence[Array], dtype: Any) -> tuple[_Map, list[Array]]:
    """A layer's linear program, without the arrays that the layer was given."""
    program = step.program
    fixed = len(program.literals) + len(program.constants)
    sides = fixed + len(program.sides)
    state = tuple(leaves[sides:])

    def layer(rows: Array) -> Array:
        before = _from_rows(rows, state, step.batch_in)
        after, _ = program.run(tuple(leaves[:fixed]), tuple(leaves[fixed:sides]), before)
        return to_rows(after, step.batch_out, dtype)

    rows = to_rows(state, step.batch_in, dtype)
    out, linear = (jax.vjp if step.backward_only else jax.linearize)(layer, rows)
    found, tree = jax.tree.flatten(linear)
    given = [next((j for j, v in enumerate(leaves) if v is leaf), None) for leaf in found]
    likes = [jax.ShapeDtypeStruct(a.shape, dtype) for a in (rows, out)]
    own = [leaf for leaf, j in zip(found, given, strict=True) if j is None]
    return _Map(step.backward_only, tree, tuple(given), *likes), own


def to_rows(state: Sequence[Array], layout: Any, dtype: Any) -> Array:
    """A state as (examples, n)."""
    if layout is not None:
        return layout.to_examples(tuple(state)).astype(dtype)
    parts = [jnp.asarray(a).ravel().astype(dtype) for a in state]
    return jnp.concatenate(parts)[None] if len(parts) != 1 else parts[0][None]


def _from_rows(rows: Array, like: Sequence[Array], layout: Any) -> tuple[Array, ...]:
    if layout is not None:
        return layout.from_examples(rows)
    parts = jnp.split(rows[0], np.cumsum([a.size for a in like])[:-1])
    return tuple(p.reshape(a.shape).astype(a.dtype) for p, a in zip(parts, like, strict=True))


def _through(part: _Part, carry: tuple, visit: Visit, backward: bool, extras: Any) -> tuple:
    """All layers of a part; records with a leading axis of layers."""
    period = len(part.maps)

    def once(carry: tuple, values: Any, residuals: Any, extras: Any) -> tuple[tuple, Any]:
        vectors, state = carry
        records: list[Any] = [None] * period
        for i in reversed(range(period)) if backward else range(period):
            layer = part.maps[i].pull if backward else part.maps[i].push
            vectors = jax.vmap(layer(values[i], residuals[i]))(vectors)
            extra = jax.tree.map(lambda a, i=i: a[i], extras)
            vectors, state, records[i] = visit(vectors, state, extra)
        return (vectors, state), jax.tree.map(lambda *all_: jnp.stack(all_), *records)

    if part.repeats == 1:
        carry, records = once(carry, part.values, part.residuals, extras)
        return *carry, records

    def body(carry: tuple, own: Any) -> tuple[tuple, Any]:
        values, residuals, extras = own
        return once(carry, _merged(part.values, values, part.shared), residuals, extras)

    stacked = _stacked(part.values, part.shared)
    extras = jax.tree.map(lambda a: a.reshape(part.repeats, period, *a.shape[1:]), extras)
    carry, records = jax.lax.scan(body, carry, (stacked, part.residuals, extras), reverse=backward)
    return *carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), records)


def _stacked(values: Any, shared: Any) -> list[list[Array]]:
    return [
        [v for v, same in zip(step, flags, strict=True) if not same]
        for step, flags in zip(values, shared, strict=True)
    ]


def _merged(values: Any, own: Any, shared: Any) -> list[list[Array]]:
    """The arrays of one repeat: the shared ones, and its own."""
    merged = []
    for step, mine, flags in zip(values, own, shared, strict=True):
        rest = iter(mine)
        merged.append([v if same else next(rest) for v, same in zip(step, flags, strict=True)])
    return merged
