"""Activation functions by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

Activation = Callable[[Array], Array]


def identity(x: Array) -> Array:
    """`x`."""
    return x


def gelu(x: Array) -> Array:
    """`x Phi(x)` with the exact normal distribution function, as PyTorch's default.

    Hendrycks and Gimpel 2016 (arXiv 1606.08415). JAX's default is the tanh approximation: here
    "gelu_tanh".
    """
    return jax.nn.gelu(x, approximate=False)


def leaky_relu(x: Array) -> Array:
    """`x` above zero, `0.01 x` below."""
    return jax.nn.leaky_relu(x, 0.01)


def hard_tanh(x: Array) -> Array:
    """`x` clipped to [-1, 1]."""
    return jnp.clip(x, -1, 1)


ACTIVATIONS: dict[str, Activation] = {
    "identity": identity,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "leaky_relu": leaky_relu,
    "gelu": gelu,
    "gelu_tanh": jax.nn.gelu,
    "silu": jax.nn.silu,
    "selu": jax.nn.selu,
    "softplus": jax.nn.softplus,
    "erf": jax.scipy.special.erf,
    "hard_tanh": hard_tanh,
}


def activation(phi: str | Activation) -> Activation:
    """Looks an activation up; a function is returned as it is.

    Raises:
        ValueError: for an unknown name.
    """
    if callable(phi):
        return phi
    if phi not in ACTIVATIONS:
        raise ValueError(
            f"unknown activation {phi!r}: expected one of {', '.join(sorted(ACTIVATIONS))}, or an "
            "elementwise function"
        )
    return ACTIVATIONS[phi]
