"""The user's loss with some of its inner values changed: what would be without them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxgrad.diagnosis.passes import tappable
from jaxgrad.diagnosis.problem import Problem
from jaxgrad.diagnosis.wiring import Wiring, inputs_for
from jaxgrad.graph import rewrite
from jaxgrad.graph.ir import Value

# Of a value and the parameters, in the order of the problem's leaves; of the value's shape.
Change = Callable[[jax.Array, Sequence[jax.Array]], jax.Array]


def altered(
    problem: Problem, wiring: Wiring, values: Sequence[Value], change: Change
) -> Problem | None:
    """The problem with a function of them in the place of some values of its loss.

    Args:
        problem: the problem.
        wiring: its dataflow.
        values: of the dataflow.
        change: elementwise.

    Returns:
        The problem; None if one of the values cannot be reached.
    """
    places = [at for at in (tappable(value, wiring) for value in values) if at is not None]
    if not places or len(places) < len(values):
        return None
    taps = {at: i for i, at in enumerate(dict.fromkeys(places))}
    lengths = {i: wiring.lengths[wiring.producer[at]] for at, i in taps.items()}

    def loss(params: Any, batch: Any, *key: Any) -> jax.Array:
        parameters = problem.flat(params)

        def tap(x: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
            return change(x, parameters).astype(x.dtype), slot

        tapped = rewrite.Tapped(wiring.table, taps, tap, jnp.zeros_like)
        slots = {i: jnp.zeros(length) for i, length in lengths.items()}
        return tapped.run(wiring.block, inputs_for(problem, parameters, batch, *key), slots)[0][0]

    return replace(problem, loss=loss, has_aux=False)


def reachable(values: Sequence[Value], wiring: Wiring) -> list[Value]:
    """Those of some values that `altered` can change."""
    return [value for value in values if tappable(value, wiring) is not None]
