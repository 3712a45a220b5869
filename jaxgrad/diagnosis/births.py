"""The first operation that made a NaN or an infinity."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxgrad.diagnosis.passes import record, tappable
from jaxgrad.diagnosis.problem import Problem, arrays_of
from jaxgrad.diagnosis.wiring import Wiring, inputs_for
from jaxgrad.graph import rewrite
from jaxgrad.graph.ir import Lit, Op, Ref, Value, is_real_dtype, value_inputs
from jaxgrad.taps import make_tap

_KINDS = 2  # counted of every value: NaN, infinities


@dataclass(frozen=True)
class Birth:
    """Where a NaN or an infinity was made first.

    Attributes:
        op: the operation.
        backward: whether its derivative made it.
        iteration: of the scans around it.
        written: whether it met an infinity, or a NaN, that the program writes itself, such as the
            minus infinity of a mask: then no size of weights or data is to blame.
    """

    op: Op
    backward: bool
    iteration: tuple[int, ...]
    written: bool = False


def _bad(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return jnp.stack([jnp.sum(jnp.isnan(x)), jnp.sum(jnp.isinf(x))]).astype(jnp.float32)


_counted = make_tap(_bad)


def births(
    problem: Problem, wiring: Wiring, values: Sequence[Array], batch: PyTree
) -> tuple[Birth | None, Birth | None]:
    """Finds the first operation that made a NaN or an infinity, forward and backward.

    Args:
        problem: the problem.
        wiring: its dataflow.
        values: parameters.
        batch: the batch.

    Returns:
        The birth in the forward pass and the birth in the backward pass, None where there is none.
    """
    watched = [
        v
        for op in wiring.ops()
        for v in op.outputs
        if is_real_dtype(getattr(wiring.table.avals[v], "dtype", None))
    ]
    index = {v: i for i, v in enumerate(watched)}
    lengths = {v: wiring.lengths[wiring.producer[v]] for v in watched}
    slots = {i: jnp.zeros((*lengths[v], _KINDS)) for v, i in index.items()}
    tapped = rewrite.Tapped(
        wiring.table, index, lambda x, slot: (_counted(x, slot), _bad(x)), jnp.zeros_like
    )

    def objective(values: list[Array], slots: Any) -> Any:
        out, records = tapped.run(wiring.block, inputs_for(problem, values, batch), slots)
        return out[0], records

    run = jax.jit(jax.value_and_grad(objective, argnums=1, has_aux=True))
    (loss, forward), backward = jax.device_get(run(list(values), slots))
    made = {v: np.asarray(forward[i]) for v, i in index.items()}
    back = {v: _total(np.asarray(backward[i])) for v, i in index.items()}
    made |= _given(wiring, [*values, *arrays_of(batch)])
    first = None if np.isfinite(loss) else _first_forward(wiring, made)
    totals = {v: _total(m) for v, m in made.items()}
    found = _first_backward(wiring, totals, back)
    if found is None and np.isfinite(loss):
        found = _first_backward(wiring, {}, back)  # what the forward pass discards, as `where` does
    return first, found


def overflows(problem: Problem, wiring: Wiring) -> tuple[Op | None, list[Value]]:
    """Infinities of float16 in the forward pass, whatever becomes of them on the way to the loss.

    Returns:
        The first operation that made one of finite operands, and all values of float16 that hold
        one.
    """
    watched = [
        v
        for op in wiring.ops()
        for v in op.outputs
        if v in wiring.reaching and is_real_dtype(getattr(wiring.table.avals[v], "dtype", None))
    ]
    counts = record(inputs_for(problem, problem.values, problem.batch), wiring, watched, _bad)
    made = counts | _given(wiring, [*problem.values, *arrays_of(problem.batch)])
    half = [v for v in watched if wiring.dtype(v) == "float16"]
    infinite = dict.fromkeys(v for v in half if made[v][..., 1].any())
    for op in wiring.ops():
        if not any(v in infinite for v in op.outputs):
            continue
        operands = [made[v] for v in _seen(wiring, value_inputs(op)) if v in made]
        if not any(m.any() for m in operands) and not _has_bad_literal(op, wiring):
            return op, list(infinite)
    return None, []


def _given(wiring: Wiring, arrays: list[Array]) -> dict[Value, np.ndarray]:
    """The counts of what no operation makes: parameters, data and constants."""
    known = dict(zip(wiring.block.inputs, arrays, strict=False)) | dict(wiring.table.constants)
    return {
        v: np.asarray(_bad(jnp.asarray(x)))
        for v, x in known.items()
        if is_real_dtype(getattr(x, "dtype", None))
    }


def _first_forward(wiring: Wiring, made: dict[Value, np.ndarray]) -> Birth | None:
    """Behind a loss that is no number: the operation that turned finite operands bad.

    Infinities that the program writes, as a mask does, are no birth; what takes their difference,
    or their product with zero, is one.
    """
    path = _bad_path(wiring, made)
    born: list[Birth] = []
    met: list[Birth] = []
    for op in wiring.ops():
        bad = [made[v] for v in op.outputs if v in path]
        if not bad:
            continue
        at = _first_index(_total(bad[0]), last=False)
        operands = [made[v] for v in _seen(wiring, value_inputs(op)) if v in made]
        nan = bool(bad[0][..., 0].any())
        if not any(_is_bad(_total(m), at) for m in operands) and not _has_bad_literal(op, wiring):
            born.append(Birth(op, False, at))
        elif nan and not any(_is_bad(np.asarray(m[..., 0]), at) for m in operands):
            met.append(Birth(op, False, at, True))
    if born:
        return min(born, key=lambda birth: birth.iteration)
    return min(met, key=lambda birth: birth.iteration, default=_picked(wiring, made, path))


def _picked(wiring: Wiring, made: dict[Value, np.ndarray], path: set[Value]) -> Birth | None:
    """The first operation that let a written NaN or infinity through to the loss."""
    if any(v in made and made[v].any() for v in wiring.block.inputs):
        return None  # it came with the parameters or the data
    varied = path & (wiring.depends | wiring.from_data)
    for op in wiring.ops():
        chosen = [v for v in op.outputs if v in varied]
        if chosen:
            return Birth(op, False, _first_index(_total(made[chosen[0]]), last=False), True)
    return None


def _bad_path(wiring: Wiring, made: dict[Value, np.ndarray]) -> set[Value]:
    """The bad values that the loss is computed from through bad values alone."""
    found: set[Value] = set()
    queue: list[Ref] = [wiring.loss]
    while queue:
        value = queue.pop()
        if isinstance(value, Lit) or value in found or not made.get(value, np.ones(1)).any():
            continue
        found.add(value)
        queue += wiring.inputs_of(value)
    return {v for v in found if v in made and v in wiring.producer}


def _seen(wiring: Wiring, refs: Iterable[Value]) -> list[Value]:
    """Values as they are counted: those of operations, and what is given from outside."""
    places = []
    for ref in refs:
        at = tappable(ref, wiring)
        places.append(_given_behind(ref, wiring) if at is None else at)
    return places


def _given_behind(value: Value, wiring: Wiring) -> Value:
    """The input or constant that a value inside a call stands for."""
    while len(wiring.sources.get(value, ())) == 1:
        behind = wiring.sources[value][0]
        if isinstance(behind, Lit):
            break
        value = behind
    return value


def _has_bad_literal(op: Op, wiring: Wiring) -> bool:
    """Whether an operand is a NaN or an infinity written into the program."""
    behind = [wiring.origin(ref)[0] for ref in op.inputs]
    values = [np.asarray(ref.value) for ref in behind if isinstance(ref, Lit)]
    return any(np.issubdtype(v.dtype, np.inexact) and not np.isfinite(v).all() for v in values)


def _total(counts: np.ndarray) -> np.ndarray:
    """NaN and infinities together."""
    return np.asarray(counts.sum(-1))


def _is_bad(counts: np.ndarray, at: tuple[int, ...]) -> bool:
    """Whether a tensor is bad in one iteration; one of other loops, whether it ever is."""
    return bool(counts[at] > 0) if counts.ndim == len(at) else bool(counts.any())


def _first_backward(
    wiring: Wiring, made: dict[Value, np.ndarray], back: dict[Value, np.ndarray]
) -> Birth | None:
    """The operation whose derivative turned finite cotangents bad, its outputs good by `made`."""
    suspects = []
    for op in reversed(wiring.ops()):
        outputs = [v for v in op.outputs if v in back and v in wiring.live]
        if not outputs or any(made[v].any() for v in outputs if v in made):
            continue
        inputs = [tappable(v, wiring) for v in value_inputs(op)]
        bad = [back[v] for v in inputs if v is not None and v in back and back[v].any()]
        if not bad:
            continue
        at = _first_index(bad[0], last=True)
        if not all(_is_bad(back[v], at) for v in outputs):
            suspects.append(Birth(op, True, at))
    latest = max((s.iteration for s in suspects if s.iteration), default=())
    suspects = [s for s in suspects if s.iteration in ((), latest)]
    risky = {"sqrt", "rsqrt", "log", "div", "pow", "atan2", "asin", "acos", "cbrt", "log1p", "exp"}
    for suspect in suspects:
        if suspect.op.name in risky or suspect.op.kind == "opaque":
            return suspect
    return suspects[0] if suspects else None


def _first_index(counts: np.ndarray, *, last: bool) -> tuple[int, ...]:
    where = np.argwhere(np.asarray(counts) > 0)
    if counts.ndim == 0 or not len(where):
        return ()
    return tuple(int(i) for i in where[-1 if last else 0])
