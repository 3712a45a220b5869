"""Numbers as pairs (mantissa, integer exponent): a range no float has, and no rounding in it.

The number is `mantissa * 2**exponent`, the mantissa in [1/2, 1) or zero. Sums of logarithms would
round at every layer; an integer exponent is exact, which is worth two digits at 2,000 layers.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# ln 2 = _LN2_HIGH + _LN2_LOW; an exponent of up to 15 (20) bits times the high part is exact in
# float32 (float64), so the sum of both rounds once (W. Cody, W. Waite 1980, chapter 6).
_LN2_HIGH = {"float32": 0.693359375, "float64": 6.93147180369123816490e-01}
_LN2_LOW = {"float32": -2.12194440054690583e-4, "float64": 1.90821492927058770002e-10}


def power_of_two(exponent: Int[Array, "*shape"], dtype) -> Float[Array, "*shape"]:
    """`2**exponent`, exactly; the exponent must lie in the dtype's normal range."""
    info = jnp.finfo(dtype)
    integer = jnp.int32 if info.bits == 32 else jnp.int64
    bits = (exponent.astype(integer) + (info.maxexp - 1)) << info.nmant
    return jax.lax.bitcast_convert_type(bits, dtype)


def shifted(values: Float[Array, "*shape"], exponent: Int[Array, "..."]) -> Float[Array, "*shape"]:
    """`values * 2**exponent`, zero below the dtype's range and inf above it."""
    info = jnp.finfo(values.dtype)
    exponent = jnp.clip(exponent, 2 * info.minexp, 2 * (info.maxexp - 1))
    half = exponent // 2
    values = values * power_of_two(half, values.dtype)
    return values * power_of_two(exponent - half, values.dtype)


def split(
    values: Float[Array, "*shape"], exponent: Int[Array, "..."]
) -> tuple[Float[Array, "*shape"], Int[Array, "*shape"]]:
    """The pair of `values * 2**exponent`; zero has exponent 0, NaN and inf become NaN."""
    finite = jnp.isfinite(values)
    mantissa, shift = jnp.frexp(jnp.where(finite, values, 1))
    shift = jnp.where(values == 0, 0, shift + exponent)
    return jnp.where(finite, mantissa, jnp.nan), shift.astype(jnp.int32)


def largest_exponent(matrix: Float[Array, "*batch m n"]) -> Int[Array, "*batch"]:
    """The exponent of the largest magnitude of each matrix; 0 for a zero or an empty one."""
    largest = jnp.max(jnp.abs(matrix), axis=(-2, -1), initial=0)
    return jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 1))[1].astype(jnp.int32)


def log2_of(
    mantissa: Float[Array, "*shape"], exponent: Int[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Base-2 logarithm, for comparisons; -inf for zero."""
    return jnp.log2(mantissa) + exponent.astype(mantissa.dtype)


def log_of(
    mantissa: Float[Array, "*shape"], exponent: Int[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Natural logarithm, correct to about half a unit in its last place; -inf for zero."""
    name = jnp.dtype(mantissa.dtype).name
    # A value just above one, mantissa 1/2 and exponent 1, would cancel: take [1/sqrt2, sqrt2).
    low = mantissa < 0.7071067811865476
    mantissa, exponent = (
        jnp.where(low, 2 * mantissa, mantissa),
        jnp.where(low, exponent - 1, exponent),
    )
    count = exponent.astype(mantissa.dtype)
    return count * _LN2_HIGH[name] + (count * _LN2_LOW[name] + jnp.log(mantissa))


def is_nonzero(values: Float[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """Whether the numbers are not zero, by their bits: devices take subnormal numbers for zero."""
    integer = jnp.int32 if jnp.finfo(values.dtype).bits == 32 else jnp.int64
    return (jax.lax.bitcast_convert_type(values, integer) << 1) != 0
