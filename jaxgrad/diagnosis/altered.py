"""The user's loss with some of its inner values changed: what would be without them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.passes import inputs_for, tappable
from jaxgrad.diagnosis.problem import Problem
from jaxgrad.graph import rewrite
from jaxgrad.graph.ir import Value


def altered(
    evidence: Evidence, values: Sequence[Value], change: Callable[[jax.Array], jax.Array]
) -> Problem | None:
    """The problem with a function of them in the place of some values of its loss.

    Args:
        evidence: what is known.
        values: of the loss's dataflow.
        change: elementwise; of a value's shape and dtype.

    Returns:
        The problem; None if one of the values cannot be reached.
    """
    wiring, problem = evidence.wiring, evidence.problem
    places = [at for at in (tappable(value, wiring) for value in values) if at is not None]
    if not places or len(places) < len(values):
        return None
    taps = {at: i for i, at in enumerate(dict.fromkeys(places))}
    lengths = {i: wiring.lengths[wiring.producer[at]] for at, i in taps.items()}
    tapped = rewrite.Tapped(
        wiring.table, taps, lambda x, slot: (change(x).astype(x.dtype), slot), jnp.zeros_like
    )

    def loss(params: Any, batch: Any, *key: Any) -> jax.Array:
        args = inputs_for(problem, problem.flat(params), batch, *key)
        slots = {i: jnp.zeros(length) for i, length in lengths.items()}
        return tapped.run(wiring.block, args, slots)[0][0]

    return replace(problem, loss=loss, has_aux=False)
