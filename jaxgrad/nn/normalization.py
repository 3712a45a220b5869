"""Normalizations: LayerNorm in its two forms, RMSNorm, BatchNorm with its state in the open.

All of them compute in float32 at least and return the type of their input; variances are those of
the centered values, since `E[x^2] - E[x]^2` in float32 is negative for a mean of 1e4.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

EPSILON = 1e-5

Params = dict[str, Array]
State = dict[str, Array]


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _affine(params: PyTree, y: Array, like: Array) -> Array:
    if "scale" in params:
        y = y * params["scale"]
    if "bias" in params:
        y = y + params["bias"]
    return y.astype(like.dtype)


def _centered(x: Array) -> tuple[Array, Array]:
    """(x - mean, variance), both over the last axis."""
    centered = x - jnp.mean(x, -1, keepdims=True)
    return centered, jnp.mean(jnp.square(centered), -1, keepdims=True)


def layer_norm(
    params: PyTree, x: Float[Array, "... n"], epsilon: float = EPSILON
) -> Float[Array, "... n"]:
    """`scale (x - mean) / sqrt(variance + epsilon) + bias` over the last axis, as practiced.

    Ba et al. 2016 (arXiv 1607.06450), with epsilon where PyTorch and flax have it. At zero variance
    its derivative is `(I - 1 1^T / n) / sqrt(epsilon)`, a gain of 316 at 1e-5.

    Args:
        params: {"scale": (n,), "bias": (n,)}; what is missing is left out.
        x: activations.
        epsilon: added to the variance.
    """
    centered, variance = _centered(_wide(x))
    return _affine(params, centered * lax.rsqrt(variance + epsilon), x)


def layer_norm_as_written(
    params: PyTree, x: Float[Array, "... n"], epsilon: float = EPSILON
) -> Float[Array, "... n"]:
    """`scale (x - mean) / (sigma + epsilon) + bias`: epsilon added to the deviation.

    The formula of many texts. At zero variance its derivative is `(I - 1 1^T / n) / epsilon`, a
    gain of 1e5 at 1e-5. Automatic differentiation of a plain square root gives NaN there; sigma's
    part of the derivative, which vanishes, is taken as zero.

    Args:
        params: {"scale": (n,), "bias": (n,)}; what is missing is left out.
        x: activations.
        epsilon: added to the standard deviation.
    """
    centered, variance = _centered(_wide(x))
    positive = variance > 0
    sigma = jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)
    return _affine(params, centered / (sigma + epsilon), x)


def rms_norm(
    params: PyTree, x: Float[Array, "... n"], epsilon: float = EPSILON
) -> Float[Array, "... n"]:
    """`scale x / sqrt(mean(x^2) + epsilon)` over the last axis.

    Zhang and Sennrich 2019 (arXiv 1910.07467).

    Args:
        params: {"scale": (n,)}; may be empty.
        x: activations.
        epsilon: added to the mean square.
    """
    wide = _wide(x)
    square = jnp.mean(jnp.square(wide), -1, keepdims=True)
    return _affine(params, wide * lax.rsqrt(square + epsilon), x)


def no_norm(params: PyTree, x: Float[Array, "... n"]) -> Float[Array, "... n"]:
    """`x`."""
    del params
    return x


@dataclass(frozen=True)
class Norm:
    """A normalization that carries no state.

    Attributes:
        name: in `NORMS`.
        apply: (params, x) -> y of the same shape and dtype.
        leaves: names of its parameters.
    """

    name: str
    apply: Callable[[Any, Array], Array]
    leaves: tuple[str, ...]

    def init(self, width: int) -> Params:
        """Scale one and bias zero, in float32."""
        values = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
        return {name: values[name].astype(jnp.float32) for name in self.leaves}


_ALL = (
    Norm("none", no_norm, ()),
    Norm("layer", layer_norm, ("scale", "bias")),
    Norm("layer_as_written", layer_norm_as_written, ("scale", "bias")),
    Norm("rms", rms_norm, ("scale",)),
)
NORMS = {norm.name: norm for norm in _ALL}


def norm_of(name: str) -> Norm:
    """Looks a normalization up.

    Raises:
        ValueError: for an unknown name; "batch" carries state and is not among them.
    """
    if name not in NORMS:
        hint = "; 'batch' carries state: see batch_norm" if name == "batch" else ""
        raise ValueError(f"unknown norm {name!r}: expected one of {', '.join(NORMS)}{hint}")
    return NORMS[name]


# ---------------------------------------------------------------------------------------- BatchNorm


def batch_norm_init(width: int) -> tuple[Params, State]:
    """(parameters: scale 1 and bias 0, state: running mean 0 and variance 1), float32 (width,)."""
    ones, zeros = jnp.ones(width, jnp.float32), jnp.zeros(width, jnp.float32)
    return {"scale": ones, "bias": zeros}, {"mean": zeros, "variance": ones}


def batch_norm_training(
    params: PyTree,
    state: State,
    x: Float[Array, "... n"],
    momentum: float = 0.9,
    epsilon: float = EPSILON,
    unbiased: bool = False,
) -> tuple[Float[Array, "... n"], State]:
    """Normalizes every feature by its statistics over all other axes, and updates the averages.

    Ioffe and Szegedy 2015 (arXiv 1502.03167). Examples of the batch are coupled.

    Args:
        params: {"scale": (n,), "bias": (n,)}.
        state: {"mean": (n,), "variance": (n,)}, running averages.
        x: activations, the features last.
        momentum: share of the averages that is kept (PyTorch names the share that is replaced).
        epsilon: added to the variance.
        unbiased: whether the running variance divides by N - 1, as PyTorch's, or by N, as flax's.

    Returns:
        (y, the new state).

    Raises:
        ValueError: for one value a feature, whose output would be zero whatever the input.
    """
    count = x.size // x.shape[-1]
    if count < 2:
        raise ValueError(
            f"batch_norm_training: expected at least 2 values a feature, got {count} in shape "
            f"{x.shape}; use batch_norm (running averages) or a larger batch"
        )
    wide = _wide(x)
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(wide, axes)
    variance = jnp.mean(jnp.square(wide - mean), axes)
    observed = variance * (count / (count - 1)) if unbiased else variance
    new = {
        "mean": momentum * state["mean"] + (1 - momentum) * lax.stop_gradient(mean),
        "variance": momentum * state["variance"] + (1 - momentum) * lax.stop_gradient(observed),
    }
    return _affine(params, (wide - mean) * lax.rsqrt(variance + epsilon), x), new


def batch_norm(
    params: PyTree, state: State, x: Float[Array, "... n"], epsilon: float = EPSILON
) -> Float[Array, "... n"]:
    """Normalizes by the running averages: an affine map of each example alone.

    Args:
        params: {"scale": (n,), "bias": (n,)}.
        state: {"mean": (n,), "variance": (n,)}.
        x: activations, the features last.
        epsilon: added to the variance.
    """
    y = (_wide(x) - state["mean"]) * lax.rsqrt(state["variance"] + epsilon)
    return _affine(params, y, x)
