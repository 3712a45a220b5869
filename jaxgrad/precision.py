"""Which elements a floating-point type loses, and the scale at which it loses fewest."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxgrad.tree import inexact_leaves, is_inexact_array, leaf_names


class Limits(NamedTuple):
    """Range of a type.

    Attributes:
        largest: largest finite number.
        smallest_normal: smallest number of full precision.
        smallest: smallest number above zero.
    """

    largest: float
    smallest_normal: float
    smallest: float


class Loss(NamedTuple):
    """Shares of a tensor's elements, of those that are not zero.

    Attributes:
        underflow: become zero.
        subnormal: stay, with fewer bits.
        overflow: become infinite.
    """

    underflow: float
    subnormal: float
    overflow: float


def limits(dtype: Any) -> Limits:
    """The range of a floating-point type.

    >>> limits("float16")
    Limits(largest=65504.0, smallest_normal=6.103515625e-05, smallest=5.960464477539063e-08)
    """
    info = jnp.finfo(dtype)
    return Limits(float(info.max), float(info.tiny), float(info.smallest_subnormal))


def _magnitudes(leaf: Any) -> np.ndarray:
    x = np.abs(np.asarray(leaf).astype(np.float64))
    return x[(x > 0) & np.isfinite(x)]


def losses(tree: PyTree, dtype: Any, scale: float | int = 1.0) -> dict[str, Loss]:
    """What a type would lose of every leaf, were it multiplied by `scale` and stored.

    Args:
        tree: pytree of floating-point arrays, such as gradients computed in float32.
        dtype: the narrower type.
        scale: factor before the cast, as of a loss scale.

    Returns:
        Leaf name -> shares; zeros for a leaf without any finite element other than zero.

    Raises:
        ValueError: if the scale is not a positive finite number.
    """
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"losses(tree, dtype, scale): expected 0 < scale < inf, got {scale}")
    reach = limits(dtype)
    # halfway to zero and to infinity, where rounding to nearest decides
    to_zero = reach.smallest / 2
    to_infinity = reach.largest * (1 + float(jnp.finfo(dtype).eps) / 4)
    names = leaf_names(tree, root="x")
    found = {}
    for name, leaf in zip(names, jax.tree.leaves(tree), strict=True):
        if not is_inexact_array(leaf):
            continue
        x = _magnitudes(leaf) * scale
        count = max(x.size, 1)
        below = int(np.sum(x <= to_zero))
        small = int(np.sum(x < reach.smallest_normal)) - below
        above = int(np.sum(x >= to_infinity))
        found[name] = Loss(below / count, small / count, above / count)
    return found


def exponents(tree: PyTree) -> tuple[np.ndarray, np.ndarray]:
    """A histogram of binary exponents, for a picture with the limits of types in it.

    Args:
        tree: pytree of floating-point arrays.

    Returns:
        Exponents e, ascending, and how many finite elements have 2^e <= |x| < 2^(e + 1).
    """
    parts = [_magnitudes(leaf) for leaf in inexact_leaves(tree)]
    x = np.concatenate(parts) if parts else np.zeros(0)
    if not x.size:
        return np.zeros(0, int), np.zeros(0, int)
    found = np.frexp(x)[1] - 1
    values = np.arange(found.min(), found.max() + 1)
    return values, np.bincount(found - found.min(), minlength=values.size)


def suggested_scale(tree: PyTree, dtype: Any, headroom: float | int = 8.0) -> float:
    """The largest power of two that keeps every element `headroom` below the type's largest number.

    Args:
        tree: gradients computed in a wide type.
        dtype: the narrow type that the backward pass is to be computed in.
        headroom: factor left for larger gradients later on.

    Returns:
        The scale; 1 where all elements are zero.
    """
    largest = max((float(_magnitudes(x).max(initial=0)) for x in inexact_leaves(tree)), default=0.0)
    if largest == 0:
        return 1.0
    return 2.0 ** math.floor(math.log2(limits(dtype).largest / (headroom * largest)))
