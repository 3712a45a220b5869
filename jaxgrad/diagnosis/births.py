"""The first operation that made a NaN or an infinity."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxgrad.diagnosis.passes import tappable
from jaxgrad.diagnosis.problem import Problem
from jaxgrad.diagnosis.wiring import Wiring, inputs_for
from jaxgrad.graph import rewrite
from jaxgrad.graph.ir import Op, Value, is_real_dtype, value_inputs


@dataclass(frozen=True)
class Birth:
    """Where a NaN or an infinity was made first.

    Attributes:
        op: the operation.
        backward: whether its derivative made it.
        iteration: of the scans around it.
    """

    op: Op
    backward: bool
    iteration: tuple[int, ...]


def _bad(x: Array) -> Array:
    return jnp.sum(~jnp.isfinite(x.astype(jnp.float32))).astype(jnp.float32)


@jax.custom_vjp
def _counted(x: Array, slot: Array) -> Array:
    del slot
    return x


_ = _counted.defvjp(lambda x, _: (x, None), lambda _, ct: (ct, _bad(ct)))


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
    slots = {i: jnp.zeros(lengths[v]) for v, i in index.items()}
    tapped = rewrite.Tapped(
        wiring.table, index, lambda x, slot: (_counted(x, slot), _bad(x)), jnp.zeros_like
    )

    def objective(values: list[Array], slots: Any) -> Any:
        out, records = tapped.run(wiring.block, inputs_for(problem, values, batch), slots)
        return out[0], records

    run = jax.jit(jax.value_and_grad(objective, argnums=1, has_aux=True))
    (_, forward), backward = jax.device_get(run(list(values), slots))
    made = {v: np.asarray(forward[i]) for v, i in index.items()}
    back = {v: np.asarray(backward[i]) for v, i in index.items()}
    return _first_forward(wiring, made), _first_backward(wiring, made, back)


def _first_forward(wiring: Wiring, made: dict[Value, np.ndarray]) -> Birth | None:
    found: list[Birth] = []
    for op in wiring.ops():
        bad = [made[v] for v in op.outputs if v in made and made[v].any()]
        if not bad:
            continue
        at = _first_index(bad[0], last=False)
        inputs = [tappable(v, wiring) for v in value_inputs(op)]
        if not any(_is_bad(made[v], at) for v in inputs if v is not None and v in made):
            found.append(Birth(op, False, at))
    return min(found, key=lambda birth: birth.iteration, default=None)


def _is_bad(counts: np.ndarray, at: tuple[int, ...]) -> bool:
    """Whether a tensor is bad in one iteration; one of other loops, whether it ever is."""
    return bool(counts[at] > 0) if counts.ndim == len(at) else bool(counts.any())


def _first_backward(
    wiring: Wiring, made: dict[Value, np.ndarray], back: dict[Value, np.ndarray]
) -> Birth | None:
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
