"""Perceptrons in the standard parametrization and in muP, of any width in arrays of one size."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array

from jaxgrad import nn, optim


class Parametrization(NamedTuple):
    """Factors by which a width differs from the standard; scalars, traced.

    Attributes:
        readout: of the readout's first weights.
        rate_hidden: of the hidden layers' learning rate.
        rate_readout: of the readout's.
    """

    readout: float
    rate_hidden: float
    rate_readout: float


def parametrizations(width: int, base: int) -> Parametrization:
    """Standard and muP for Adam, as arrays (2,).

    Yang et al. 2022 (arXiv 2203.03466), table 3: hidden and output learning rates go as 1 / n, the
    output's first variance as 1 / n^2; what is written here is relative to the base width.
    """
    ratio = base / width
    rows = (Parametrization(1.0, 1.0, 1.0), Parametrization(ratio**0.5, ratio, ratio))
    return Parametrization(*(jnp.asarray(c) for c in zip(*rows, strict=True)))


def init(
    key: Array, size: int, width: Array | int, hidden: int, way: Parametrization
) -> dict[str, Array]:
    """Weights of variance 1 / fan_in, the readout's times a factor; no biases.

    Args:
        key: PRNG key.
        size: of the arrays.
        width: of the net in them, at most the size; may be traced.
        hidden: hidden-to-hidden layers.
        way: the parametrization.
    """
    keys, scale = jax.random.split(key, 3), 1 / jnp.sqrt(width)
    return {
        "embed": jax.random.normal(keys[0], (64, size)) / 8,
        "hidden": scale * jax.random.normal(keys[1], (hidden, size, size)),
        "readout": way.readout * scale * jax.random.normal(keys[2], (size, 10)),
    }


def forward(params: dict[str, Array], x: Array, width: Array | int) -> tuple[Array, Array]:
    """(logits, the last pre-activations); units beyond the width are multiplied by zero."""
    exists = jnp.arange(params["embed"].shape[1]) < width
    z = x @ params["embed"]

    def layer(z: Array, kernel: Array) -> tuple[Array, None]:
        return nn.linear({"kernel": kernel}, exists * jnp.tanh(z)), None

    z, _ = lax.scan(layer, z, params["hidden"])
    return (exists * jnp.tanh(z)) @ params["readout"], exists * z


def adam(rate: Array, way: Parametrization) -> optax.GradientTransformation:
    """Adam with a learning rate for each kind of layer."""
    adam = optim.adam(rate)
    factors = {"embed": 1.0, "hidden": way.rate_hidden, "readout": way.rate_readout}

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(grads, state, params)
        return jax.tree.map(lambda u, f: f * u, updates, factors), state

    return optax.GradientTransformation(adam.init, update)
