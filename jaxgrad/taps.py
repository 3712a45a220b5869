"""Taps: identities that let a gradient be read where it passes.

`tap` is for users. `gradient_tap` is what the rewritten program uses: an identity whose backward
pass returns, as "the gradient with respect to the slot", what the gradient that came by adds up to.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, PyTree

from jaxgrad.statistics import GRADIENT, accumulation_dtype, sums


def tap(x: PyTree, name: str) -> PyTree:
    """Names a tensor, so that jaxgrad measures it and cuts there; an identity everywhere else.

    It is JAX's `checkpoint_name`: valid under jvp, vjp, vmap, jit, scan and remat, and at no cost.

    Args:
        x: an array, or a pytree of arrays, which share the name.
        name: name of the site.

    Returns:
        `x`.

    Raises:
        TypeError: if the name is not a non-empty string.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"tap(x, name): expected a non-empty string as the name, got {name!r}")
    return checkpoint_name(x, name)


def make_tap(measure: Callable[[Array], PyTree]) -> Callable[[Array, PyTree], Array]:
    """An identity `tap(x, slot)` whose gradient with respect to `slot` is `measure(gradient at x)`.

    Args:
        measure: function of the cotangent; its result must have the slot's structure, shapes
            and dtypes.
    """

    @jax.custom_vjp
    def gradient_tap(x: Array, slot: PyTree) -> Array:
        del slot
        return x

    def forward(x: Array, slot: PyTree) -> tuple[Array, None]:
        del slot
        return x, None

    def backward(_: None, cotangent: Array) -> tuple[Array, PyTree]:
        return cotangent, measure(cotangent)

    _ = gradient_tap.defvjp(forward, backward)
    return gradient_tap


statistics_tap = make_tap(lambda cotangent: sums(cotangent, GRADIENT))
full_tap = make_tap(lambda cotangent: cotangent)


def statistics_slot(dtype: Any, lengths: tuple[int, ...] = ()) -> Array:
    """The slot of a `statistics_tap`: zeros of shape `(*lengths, 1 + number of sums)`."""
    return jnp.zeros((*lengths, 1 + len(GRADIENT)), accumulation_dtype(dtype))
