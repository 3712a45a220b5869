"""Where the examples lie after an operation that no rule knows: change one, see what changes.

A probe can only rule layouts out, at the inputs that it tries. The operands are the program's own
values at the example input, then random changes of them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.graph import compat
from jaxgrad.graph.batch_layout import Coupled, Spec, candidates
from jaxgrad.graph.batch_walk import Walk, pullback
from jaxgrad.graph.flatten import Line, run_op
from jaxgrad.graph.ir import Lit, Op, Table, Value, is_float_dtype, value_inputs

_BASES = 3  # random inputs
_EXAMPLES = 4  # examples to change at each


class Prober:
    """Probes operations of a line, which it runs as far as needed."""

    def __init__(self, line: Line, table: Table, inputs: list[Value], leaves: list[Any]) -> None:
        self.line, self.position = line, 0
        self.env = dict(table.constants) | dict(zip(inputs, leaves, strict=True))

    def probe(self, walk: Walk, op: Op) -> list[Spec]:
        """Find where the examples lie in the results of one of the line's operations."""
        effects = getattr(op.eqn, "effects", None)
        if effects:
            why = "no rule is known for it, and it has side effects, so that it cannot be probed"
            return [Coupled(why) for _ in op.outputs]
        if any(isinstance(value, compat.Tracer) for value in self.env.values()):
            why = "no rule is known for it, and it cannot be probed inside another transformation"
            return [Coupled(why) for _ in op.outputs]
        specs = [walk.spec(ref) for ref in op.inputs]
        smooth = [walk.is_smooth(ref) for ref in op.inputs]
        for spec, k in zip(specs, smooth, strict=True):
            if isinstance(spec, Coupled) and k:
                return [spec] * len(op.outputs)
        values = self._operands(op)
        moved = [
            s if isinstance(s, int) and (k or not any(smooth)) else None
            for s, k in zip(specs, smooth, strict=True)
        ]
        found = probe(lambda *v: run_op(op, list(v)), values, moved, walk.count)
        if any(smooth):
            fixed = Coupled("a gradient does not pass", smooth=False)
            found = [
                s if v in walk.smooth else fixed for v, s in zip(op.outputs, found, strict=True)
            ]
            if "custom" in op.name:
                found = self._with_rule(walk, op, values, found)
        return found

    def _with_rule(self, walk: Walk, op: Op, values: list[Any], found: list[Spec]) -> list[Spec]:
        """A derivative rule of its own can couple what the function does not."""
        smooth = [walk.is_smooth(ref) for ref in op.inputs]
        outs = [isinstance(s, int) for s in found]
        rng = np.random.default_rng(0)
        cotangents = [
            jnp.asarray(rng.standard_normal(walk.shape(v)), walk.table.avals[v].dtype)
            for v, k in zip(op.outputs, outs, strict=True)
            if k
        ]
        given = [None] * len(values) + [s for s in found if isinstance(s, int)]
        function = pullback(op, smooth, outs)
        gradients = probe(function, [*values, *cotangents], given, walk.count)
        expected = [walk.spec(ref) for ref, k in zip(op.inputs, smooth, strict=True) if k]
        for gradient, spec in zip(gradients, expected, strict=True):
            if isinstance(spec, int) and gradient not in (None, spec):
                why = "its derivative rule mixes the examples (probed)"
                return [Coupled(why) if isinstance(s, int) else s for s in found]
        return found

    def _operands(self, op: Op) -> list[Any]:
        position = self.line.ops.index(op)
        ops = self.line.ops[self.position : position]
        later = {v for rest in self.line.ops[position:] for v in value_inputs(rest)}
        made = {v for o in ops for v in o.outputs}
        used = {v for o in ops for v in value_inputs(o)} - made

        def run(env: dict[Value, Any]) -> dict[Value, Any]:
            env = dict(env)
            for o in ops:
                values = [r.value if isinstance(r, Lit) else env[r] for r in o.inputs]
                env.update(zip(o.outputs, run_op(o, values), strict=True))
            return {v: env[v] for v in made & later}

        if ops:
            self.env |= jax.jit(run)({v: self.env[v] for v in used})
        self.position = position
        return [ref.value if isinstance(ref, Lit) else self.env[ref] for ref in op.inputs]


def probe(
    function: Callable[..., Any], values: Sequence[Any], specs: Sequence[Spec], count: int
) -> list[Spec]:
    """Find the stride of every result of a function of arrays by changing single examples.

    Args:
        function: arrays -> list of arrays.
        values: the operands to begin with.
        specs: the operands' strides; None for those to be held fixed.
        count: number of examples.

    Returns:
        Per result a stride, None where nothing ever changed and no batch fits in, or `Coupled`.
    """
    run = jax.jit(lambda *v: list(function(*v)))
    rng = np.random.default_rng(0)
    shapes = [r.shape for r in jax.eval_shape(run, *values)]
    left = [candidates(tuple(shape), count) for shape in shapes]
    changed = [False] * len(shapes)
    for base in _bases(values, specs, rng):
        before = [np.asarray(r) for r in run(*base)]
        again = [np.asarray(r) for r in run(*base)]
        noise = [_difference(a, b).max(initial=0.0) for a, b in zip(before, again, strict=True)]
        for example, other in _changes(base, specs, count, rng):
            after = [np.asarray(r) for r in run(*other)]
            for k, (a, b) in enumerate(zip(before, after, strict=True)):
                where = np.flatnonzero(_difference(a, b) > 8 * noise[k])
                changed[k] |= where.size > 0
                left[k] = [s for s in left[k] if np.all(where // s % count == example)]
    return [_verdict(*pair) for pair in zip(left, changed, strict=True)]


def _verdict(left: list[int], changed: bool) -> Spec:
    if left:
        return left[0]
    return (
        Coupled("changing one example changed the results of others (probed)") if changed else None
    )


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Absolute differences in row-major order; infinite where only one is a number."""
    kind = np.complex128 if np.iscomplexobj(a) else np.float64
    a, b = a.astype(kind).ravel(), b.astype(kind).ravel()
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.abs(a - b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return np.where(same, 0.0, np.where(np.isnan(size), np.inf, size))


def _bases(
    values: Sequence[Any], specs: Sequence[Spec], rng: np.random.Generator
) -> Iterator[list]:
    """The operands as they are, then with their floats changed at random."""
    yield list(values)
    for _ in range(_BASES - 1):
        yield [
            v if s is None else _noisy(np.array(v), rng) for v, s in zip(values, specs, strict=True)
        ]


def _noisy(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other numbers of the same signs and sizes; integers stay as they are."""
    if not is_float_dtype(array.dtype):
        return array
    factor = rng.uniform(0.5, 1.5, array.shape)
    return np.asarray(array * factor).astype(array.dtype)


def _changes(
    base: Sequence[Any], specs: Sequence[Spec], count: int, rng: np.random.Generator
) -> Iterator[tuple[int, list]]:
    """Operands that differ from the base in one example: rescaled, moved, or another's own."""
    examples = range(count)
    if count > _EXAMPLES:
        inner = rng.choice(np.arange(1, count - 1), _EXAMPLES - 2, replace=False)
        examples = [0, *inner.tolist(), count - 1]
    for example in examples:
        for how in ("scale", "shift", "swap"):
            yield (
                example,
                [
                    _with_example(np.array(v), s, (example, count), how, rng)
                    if isinstance(s, int)
                    else v
                    for v, s in zip(base, specs, strict=True)
                ],
            )


def _with_example(
    array: np.ndarray, stride: int, which: tuple[int, int], how: str, rng: np.random.Generator
) -> np.ndarray:
    example, count = which
    view = array.reshape(-1, count, stride)
    own = view[:, example]
    if how == "swap" or not is_float_dtype(array.dtype):
        view[:, example] = view[:, (example + 1) % count]
    elif how == "scale":
        view[:, example] = _noisy(own, rng)
    else:
        view[:, example] = (own + rng.standard_normal(own.shape)).astype(array.dtype)
    return view.reshape(array.shape)
