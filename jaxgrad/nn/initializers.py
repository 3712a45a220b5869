"""How weights are drawn: a rule for the kernel and one for the bias, by name.

Kernels have shape (..., fan_in, fan_out), with the spatial axes of a convolution in front, as
`jax.nn.initializers` has them; with the same key the draws are the same, bit for bit, where that
module has the rule. "Normal" is the normal distribution, not the truncated one that JAX and flax
mean by it ("..._truncated" is theirs): the exact laws of `jaxgrad.theory` hold for Gaussian
weights.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

Draw = Callable[[Array, tuple[int, ...], Any], Array]

_TRUNCATED_STD = 0.87962566103423978  # of a standard normal truncated to (-2, 2)


def _zero_bias(key: Array, shape: tuple[int, ...], fan_in: int, dtype: Any) -> Array:
    del key, fan_in
    return jnp.zeros(shape, dtype)


@dataclass(frozen=True)
class Initializer:
    """A way to draw a layer's parameters.

    Attributes:
        name: in `INITIALIZERS`, or the user's own.
        weight: (key, shape, dtype) -> kernel of that shape.
        bias: (key, shape, fan_in of the kernel, dtype) -> bias of that shape.
    """

    name: str
    weight: Draw
    bias: Callable[[Array, tuple[int, ...], int, Any], Array] = _zero_bias


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan_in, fan_out) of a kernel (..., in, out), receptive field included.

    Raises:
        ValueError: for fewer than two axes.
    """
    if len(shape) < 2:
        raise ValueError(f"a kernel needs a shape (..., fan_in, fan_out), got {tuple(shape)}")
    field = math.prod(shape[:-2])
    return shape[-2] * field, shape[-1] * field


def variance_scaling(scale: float, mode: str, distribution: str) -> Draw:
    """Draws of variance `scale / fan`.

    Args:
        scale: numerator of the variance.
        mode: "fan_in", "fan_out" or "fan_avg", the fan that divides.
        distribution: "normal", "uniform", or "truncated_normal" (at two standard deviations).

    Raises:
        ValueError: for an unknown mode or distribution.
    """
    if mode not in ("fan_in", "fan_out", "fan_avg"):
        raise ValueError(f"mode: expected 'fan_in', 'fan_out' or 'fan_avg', got {mode!r}")
    if distribution not in ("normal", "uniform", "truncated_normal"):
        raise ValueError(
            "distribution: expected 'normal', 'uniform' or 'truncated_normal', "
            f"got {distribution!r}"
        )

    def draw(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        fan_in, fan_out = fans(shape)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
        variance = jnp.array(scale / fan, dtype)
        if distribution == "normal":
            return jax.random.normal(key, shape, dtype) * jnp.sqrt(variance)
        if distribution == "uniform":
            return jax.random.uniform(key, shape, dtype, -1) * jnp.sqrt(3 * variance)
        std = jnp.sqrt(variance) / jnp.array(_TRUNCATED_STD, dtype)
        return jax.random.truncated_normal(key, -2, 2, shape, dtype) * std

    return draw


def _torch_weight(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    return jax.random.uniform(key, shape, dtype, -1) / math.sqrt(fans(shape)[0])


def _torch_bias(key: Array, shape: tuple[int, ...], fan_in: int, dtype: Any) -> Array:
    return jax.random.uniform(key, shape, dtype, -1) / math.sqrt(fan_in)


def orthogonal_weight(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Orthonormal columns, or rows where there are fewer of them, uniform in Haar's measure.

    Saxe et al. 2013 (arXiv 1312.6120). QR of a Gaussian matrix, with the signs of R's diagonal
    moved into Q: without that the law is not uniform (Mezzadri 2006, arXiv math-ph/0609050).
    Spatial axes count as rows.
    """
    columns = shape[-1]
    rows = math.prod(shape) // columns
    normal = jax.random.normal(key, (max(rows, columns), min(rows, columns)), dtype)
    q, r = jnp.linalg.qr(normal)
    diagonal = jnp.diagonal(r)
    q = q * (diagonal / jnp.abs(diagonal))
    return (q.T if rows < columns else q).reshape(shape)


def delta_orthogonal_weight(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """A convolution that is one orthogonal matrix at its center and zero around it.

    Xiao et al. 2018 (arXiv 1806.05393): the convolution then preserves norms, at any depth.

    Raises:
        ValueError: for shapes without a spatial axis, or with more inputs than outputs, which no
            norm-preserving matrix maps.
    """
    if len(shape) < 3:
        raise ValueError(
            f"delta_orthogonal is for convolutions (spatial..., in, out), got {tuple(shape)}: "
            "expected at least 3 axes; use 'orthogonal' for a matrix"
        )
    if shape[-2] > shape[-1]:
        raise ValueError(
            f"delta_orthogonal: expected at most as many inputs as outputs, got {shape[-2]} inputs "
            f"and {shape[-1]} outputs"
        )
    center = tuple((side - 1) // 2 for side in shape[:-2])
    matrix = orthogonal_weight(key, shape[-2:], dtype)
    return jnp.zeros(shape, dtype).at[center].set(matrix)


def constant(value: float) -> Initializer:
    """Every weight has one value; biases are zero."""

    def draw(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        del key
        return jnp.full(shape, value, dtype)

    return Initializer(f"constant({value})", draw)


def normal(std: float) -> Initializer:
    """Weights from N(0, std^2), whatever the fans."""

    def draw(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.normal(key, shape, dtype) * jnp.array(std, dtype)

    return Initializer(f"normal({std})", draw)


_RULES = (("xavier", 1.0, "fan_avg"), ("he", 2.0, "fan_in"), ("lecun", 1.0, "fan_in"))
_DISTRIBUTIONS = {"uniform": "uniform", "normal": "normal", "truncated": "truncated_normal"}
_ALL = (
    *(
        Initializer(f"{name}_{short}", variance_scaling(scale, mode, distribution))
        for name, scale, mode in _RULES
        for short, distribution in _DISTRIBUTIONS.items()
    ),
    Initializer("torch_linear", _torch_weight, _torch_bias),
    Initializer("orthogonal", orthogonal_weight),
    Initializer("delta_orthogonal", delta_orthogonal_weight),
    Initializer("zeros", constant(0.0).weight),
)
INITIALIZERS = {rule.name: rule for rule in _ALL}
"""xavier: variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010); he: 2 / fan_in (He et al. 2015,
arXiv 1502.01852); lecun: 1 / fan_in (LeCun et al. 1998); torch_linear: weights and biases uniform
in +-1 / sqrt(fan_in), what `torch.nn.Linear` does, of variance 1 / (3 fan_in): a sixth of He's."""


def initializer(rule: str | Initializer, gain: float = 1.0) -> Initializer:
    """Looks an initializer up, scaled.

    Args:
        rule: a name in `INITIALIZERS`, or an `Initializer`.
        gain: factor of the weights' standard deviation; biases keep theirs. Zero gives zeros.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(rule, str):
        if rule not in INITIALIZERS:
            raise ValueError(
                f"unknown initializer {rule!r}: expected one of {', '.join(sorted(INITIALIZERS))}, "
                "or an Initializer"
            )
        rule = INITIALIZERS[rule]
    if gain == 1:
        return rule
    if gain == 0:
        return Initializer(f"0 x {rule.name}", INITIALIZERS["zeros"].weight, rule.bias)
    draw = rule.weight

    def scaled(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return draw(key, shape, dtype) * jnp.array(gain, dtype)

    return Initializer(f"{gain} x {rule.name}", scaled, rule.bias)
