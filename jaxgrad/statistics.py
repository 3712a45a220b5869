"""What is measured of a tensor: one function a statistic, array in, scalar out.

Half-precision tensors are accumulated in float32; squares are taken after division by the largest
magnitude, so that a root mean square survives from the smallest normal number to the largest (a
plain float32 sum of squares is 0 below 1e-19 and inf above 1e19).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

FLOAT16_TINY = float(jnp.finfo(jnp.float16).tiny)
BFLOAT16_TINY = float(jnp.finfo(jnp.bfloat16).tiny)


def accumulation_dtype(dtype: Any) -> Any:
    """float64 for float64 and complex128, else float32."""
    wide = jnp.dtype(dtype) in (jnp.dtype("float64"), jnp.dtype("complex128"))
    return jnp.dtype("float64" if wide else "float32")


def _magnitudes(x: Inexact[Array, "..."]) -> Float[Array, "..."]:
    return jnp.abs(x).astype(accumulation_dtype(x.dtype))


def max_abs(x: Inexact[Array, "..."]) -> Float[Array, ""]:
    """The largest magnitude; NaN if the tensor holds a NaN, 0 if it is empty."""
    return jnp.max(_magnitudes(x), initial=0.0)


def rms(x: Inexact[Array, "..."]) -> Float[Array, ""]:
    """Root mean square, `sqrt(mean |x|^2)`, without overflow or underflow of the squares.

    Args:
        x: real or complex tensor of any shape.

    Returns:
        A float32 scalar (float64 for a float64 tensor): inf or NaN if the tensor holds one, 0 if it
        is empty.
    """
    largest = max_abs(x)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    return scale * jnp.sqrt(jnp.sum(jnp.square(_magnitudes(x) / scale)) / max(x.size, 1))


def mean(x: Inexact[Array, "..."]) -> Float[Array, ""]:
    """Arithmetic mean; 0 if the tensor is empty."""
    return jnp.sum(jnp.real(x), dtype=accumulation_dtype(x.dtype)) / max(x.size, 1)


def zero_share(x: Inexact[Array, "..."]) -> Float[Array, ""]:
    """Share of the elements that are exactly zero."""
    return _share(x == 0, x)


def nonfinite_count(x: Inexact[Array, "..."]) -> Int[Array, ""]:
    """Number of elements that are NaN or infinite."""
    return jnp.sum(~jnp.isfinite(x), dtype=jnp.int32)


def below_share(x: Inexact[Array, "..."], tiny: float) -> Float[Array, ""]:
    """Share of all elements that are not zero and yet smaller in magnitude than `tiny`.

    Args:
        x: tensor.
        tiny: the smallest normal number of the format in question.
    """
    size = _magnitudes(x)
    return _share((size > 0) & (size < tiny), x)


def _share(mask: Array, x: Array) -> Array:
    # counted as integers: a float32 count stands still at 2^24
    count = jnp.sum(mask, dtype=jnp.int32).astype(accumulation_dtype(x.dtype))
    return count / max(x.size, 1)


# What a tap records, in this order, after a leading 1 that says "the tap was reached".
ACTIVATION = (rms, mean, max_abs, zero_share, nonfinite_count)


def below_float16(x: Inexact[Array, "..."]) -> Float[Array, ""]:
    """Share below float16's smallest normal number, 2^-14."""
    return below_share(x, FLOAT16_TINY)


def below_bfloat16(x: Inexact[Array, "..."]) -> Float[Array, ""]:
    """Share below bfloat16's smallest normal number, 2^-126."""
    return below_share(x, BFLOAT16_TINY)


GRADIENT = (rms, max_abs, nonfinite_count, below_float16, below_bfloat16)


def record(x: Inexact[Array, "..."], statistics: tuple) -> Float[Array, " n"]:
    """`[1, statistics...]` as one vector; the 1 tells a measured zero from a tap never reached."""
    dtype = accumulation_dtype(x.dtype)
    x = jax.lax.stop_gradient(x)
    return jnp.stack([jnp.ones((), dtype), *(f(x).astype(dtype) for f in statistics)])
