"""Activation functions as the theory needs them: with derivatives and the places of their kinks."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.scipy.special import erf
from jaxtyping import Array

_SELU_SCALE = 1.0507009873554804934193349852946
_SELU_ALPHA = 1.6732632423543772848170429916717


@dataclass(frozen=True)
class Activation:
    """An elementwise function.

    Attributes:
        name: as in `jax.nn`.
        function: phi.
        derivative: phi'.
        kinks: where phi or phi' jumps.
    """

    name: str
    function: Callable[[Array], Array]
    derivative: Callable[[Array], Array]
    kinks: tuple[float, ...] = ()


def _step(x: Array) -> Array:
    """1 above zero, 1/2 at it."""
    return (jnp.sign(x) + 1) / 2


def _normal_cdf(x: Array) -> Array:
    return (1 + erf(x / math.sqrt(2))) / 2


def _normal_density(x: Array) -> Array:
    return jnp.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def _sigmoid_slope(x: Array) -> Array:
    return jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)


def _tanh_slope(x: Array) -> Array:
    small = jnp.exp(-2 * jnp.abs(x))  # 1 - tanh^2 would lose the tail to rounding
    return 4 * small / (1 + small) ** 2


def _selu_slope(x: Array) -> Array:
    return _SELU_SCALE * jnp.where(x > 0, 1, _SELU_ALPHA * jnp.exp(jnp.minimum(x, 0)))


def leaky_relu(slope: float) -> Activation:
    """Leaky ReLU of a given slope below zero."""
    return Activation(
        "leaky_relu",
        lambda x: jnp.where(x > 0, x, slope * x),
        lambda x: slope + (1 - slope) * _step(x),
        (0.0,),
    )


_ALL = (
    Activation("linear", lambda x: x, jnp.ones_like),
    Activation("sigmoid", jax.nn.sigmoid, _sigmoid_slope),
    Activation("tanh", jnp.tanh, _tanh_slope),
    Activation("erf", erf, lambda x: 2 / math.sqrt(math.pi) * jnp.exp(-(x**2))),
    Activation("relu", jax.nn.relu, _step, (0.0,)),
    leaky_relu(0.01),
    Activation(
        "gelu",
        lambda x: x * _normal_cdf(x),
        lambda x: _normal_cdf(x) + x * _normal_density(x),
    ),
    Activation(
        "silu",
        jax.nn.silu,
        lambda x: jax.nn.sigmoid(x) + x * _sigmoid_slope(x),
    ),
    Activation("selu", jax.nn.selu, _selu_slope, (0.0,)),
    Activation(
        "hard_tanh",
        lambda x: jnp.clip(x, -1, 1),
        lambda x: _step(1 - jnp.abs(x)),
        (-1.0, 1.0),
    ),
)
ACTIVATIONS = {a.name: a for a in _ALL}


def activation(phi: "str | Activation | Callable[[Array], Array]") -> Activation:
    """Look an activation up.

    Args:
        phi: a name in `ACTIVATIONS`, an `Activation`, or an elementwise function, whose derivative
            is then JAX's and which must be smooth (give an `Activation` with its kinks otherwise).

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(phi, Activation):
        return phi
    if isinstance(phi, str):
        if phi not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation {phi!r}: expected one of {', '.join(sorted(ACTIVATIONS))}, or "
                "an elementwise function"
            )
        return ACTIVATIONS[phi]

    def derivative(x: Array) -> Array:
        return jax.jvp(phi, (x,), (jnp.ones_like(x),))[1]

    return Activation(getattr(phi, "__name__", "phi"), phi, derivative)
