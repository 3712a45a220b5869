"""Measurements that several experiments share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

Block = Callable[[PyTree, Array], Array]


def log_gains(
    block: Block, layers: PyTree, h: Float[Array, " n"], g: Float[Array, " n"]
) -> Float[Array, " layers"]:
    """Logarithm of the factor by which each layer multiplies the norm of the gradient.

    The gradient is scaled to norm one after each layer, so depth cannot underflow.

    Args:
        block: (params, h) -> h.
        layers: parameters with a leading axis of layers.
        h: input of the first layer.
        g: gradient at the output of the last.

    Returns:
        One number a layer, in forward order.
    """

    def forward(h: Array, params: PyTree) -> tuple[Array, Array]:
        return block(params, h), h

    def backward(g: Array, both: tuple[PyTree, Array]) -> tuple[Array, Array]:
        params, h = both
        _, pull = jax.vjp(lambda h: block(params, h), h)
        (g,) = pull(g)
        norm = jnp.linalg.norm(g)
        return g / norm, jnp.log(norm)

    _, inputs = lax.scan(forward, h, layers)
    _, gains = lax.scan(backward, g / jnp.linalg.norm(g), (layers, inputs), reverse=True)
    return gains
