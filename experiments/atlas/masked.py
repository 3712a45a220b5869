"""Perceptrons of any depth and width in arrays of one size: one compilation for all of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad import nn


class Setting(NamedTuple):
    """One net and its rule; all of it is traced.

    Attributes:
        rate: of gradient descent.
        depth: hidden layers.
        width: units of each.
        bias: first value of all hidden biases.
        momentum: of the rule.
    """

    rate: float = 0.3
    depth: int = 4
    width: int = 32
    bias: float = 0.0
    momentum: float = 0.0


def init(key: Array, setting: Setting, shape: tuple[int, int]) -> dict[str, Any]:
    """He's initialization of a net of the setting's size, in arrays of the largest size."""
    depth, width = shape
    keys = jax.random.split(key, 3)
    inner = jnp.sqrt(2 / setting.width)
    return {
        "embed": {
            "kernel": jnp.sqrt(2 / 64) * jax.random.normal(keys[0], (64, width)),
            "bias": jnp.full(width, setting.bias),
        },
        "blocks": {
            "kernel": inner * jax.random.normal(keys[1], (depth - 1, width, width)),
            "bias": jnp.full((depth - 1, width), setting.bias),
        },
        "readout": {
            "kernel": inner * jax.random.normal(keys[2], (width, 10)), "bias": jnp.zeros(10),
        },
    }  # fmt: skip


def forward(params: Any, x: Array, setting: Setting, phi: Any) -> tuple[Array, Array]:
    """(logits, pre-activations (layers, examples, units)).

    Units beyond the width are multiplied by zero and layers beyond the depth skipped, so the net,
    its gradient and its steps are those of the smaller one.
    """
    exists = jnp.arange(params["embed"]["bias"].shape[0]) < setting.width
    z = nn.linear(params["embed"], x)

    def layer(h: Array, both: Any) -> tuple[Array, Array]:
        block, k = both
        z = nn.linear(block, h)
        return jnp.where(k < setting.depth, exists * phi(z), h), z

    count = params["blocks"]["bias"].shape[0]
    h, rest = lax.scan(layer, exists * phi(z), (params["blocks"], 1 + jnp.arange(count)))
    return nn.linear(params["readout"], h), jnp.concatenate([z[None], rest])
