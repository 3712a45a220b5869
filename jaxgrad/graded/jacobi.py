"""One-sided Jacobi on a matrix with graded columns: singular values of any range.

Columns whose scales lie far apart are orthogonal already after a few steps of LQ, so a sweep only
visits pairs as far apart in the order as the farthest pair that is not: a band, for deep products.

Relative accuracy for every singular value, as long as the columns are well-conditioned once their
scales are taken out (J. Demmel, K. Veselic, "Jacobi's method is more accurate than QR", 1992). The
scales never enter the arithmetic, only the ratio of two of them does.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgrad.graded import scale

_MOST_SWEEPS = 40


def one_sided_jacobi(
    vectors: Float[Array, "*batch r m"],
    mantissa: Float[Array, "*batch r"],
    exponent: Int[Array, "*batch r"],
) -> tuple[Float[Array, "*batch r"], Int[Array, "*batch r"]]:
    """Singular values of the matrix whose columns are `mantissa * 2**exponent * vectors`.

    Args:
        vectors: The columns, one a row.
        mantissa: Mantissas of their scales; zero for an absent column, NaN for an unknown one.
        exponent: Exponents of their scales.

    Returns:
        Mantissas and exponents of the singular values, in no order.
    """
    count = vectors.shape[-2]
    if count == 0:
        return mantissa, exponent
    poisoned = jnp.any(jnp.isnan(mantissa), axis=-1, keepdims=True)
    mantissa = jnp.where(poisoned, 0, mantissa)
    state = _normalized(vectors, mantissa, exponent)
    tolerance = jnp.finfo(vectors.dtype).eps * jnp.sqrt(float(vectors.shape[-1]))

    def unfinished(carry):
        _, band, sweep = carry
        return (sweep < _MOST_SWEEPS) & (band > 0)

    def swept(carry):
        columns, band, sweep = carry
        columns = jax.lax.fori_loop(0, 2 * band, lambda k, c: _round(c, k, tolerance), columns)
        return columns, _band(*columns[:2], tolerance), sweep + 1

    start = state, _band(*state[:2], tolerance), jnp.int32(0)
    (_, mantissa, exponent), _, _ = jax.lax.while_loop(unfinished, swept, start)
    return jnp.where(poisoned, jnp.nan, mantissa), exponent


def _normalized(vectors, mantissa, exponent):
    """Unit vectors, their norms moved into the scales; a zero vector has scale zero."""
    norms = jnp.linalg.norm(vectors, axis=-1)
    norms = jnp.where(mantissa == 0, 0, norms)
    vectors = jnp.where(norms == 0, 0, 1)[..., None] * vectors
    vectors = vectors / jnp.where(norms == 0, 1, norms)[..., None]
    return (vectors, *scale.split(mantissa * norms, exponent))


def _band(vectors, mantissa, tolerance):
    """The largest distance, in the order, of two columns that are not orthogonal."""
    gram = jnp.einsum("...im,...jm->...ij", vectors, vectors, precision="highest")
    index = jnp.arange(vectors.shape[-2], dtype=jnp.int32)
    distance = jnp.abs(index[:, None] - index)
    coupled = (mantissa != 0)[..., None] & (jnp.abs(gram) > tolerance)
    return jnp.max(jnp.where(coupled, distance, 0))


def _round(columns, number, tolerance):
    """Rotates pairs of columns at one distance: half of all such pairs, no column in two of them.

    With `rho <= 1` the ratio of the scales and `c` the cosine, the tangent of the rotation is
    `rho * tau`, and only `tau` and `rho**2 * tau` meet the unit vectors.
    """
    vectors, mantissa, exponent = columns
    distance, phase = number // 2 + 1, number % 2
    index = jnp.arange(vectors.shape[-2])
    is_x = (index // distance + phase) % 2 == 0
    partner = jnp.where(is_x, index + distance, index - distance)
    paired = (partner >= 0) & (partner < vectors.shape[-2])
    partner = jnp.where(paired, partner, index)
    others = jnp.take(vectors, partner, axis=-2)
    cosine = jnp.sum(vectors * others, axis=-1)
    other = jnp.take(mantissa, partner, axis=-1), jnp.take(exponent, partner, axis=-1)
    x_mantissa, y_mantissa = (jnp.where(is_x, *ab) for ab in _swaps(mantissa, other[0]))
    x_exponent, y_exponent = (jnp.where(is_x, *ab) for ab in _swaps(exponent, other[1]))
    active = (mantissa != 0) & (other[0] != 0) & paired & (jnp.abs(cosine) > tolerance)
    ratio = y_mantissa / jnp.where(active, x_mantissa, 1)
    ratio = scale.shifted(ratio, y_exponent - x_exponent)
    x_is_larger = ratio <= 1
    rho = jnp.where(x_is_larger, ratio, 1 / jnp.where(x_is_larger, 1, ratio))
    gap = (1 - rho) * (1 + rho)
    root = jnp.sqrt(gap**2 + 4 * (rho * cosine) ** 2)
    tau = jnp.where(active, 2 * cosine / jnp.where(active, gap + root, 1), 0)
    coefficient = jnp.where(x_is_larger == is_x, rho**2 * tau, -tau)
    moved = vectors + coefficient[..., None] * others
    inverse_length = jax.lax.rsqrt(1 + (rho * tau) ** 2)
    return _rescaled(moved, mantissa, exponent, inverse_length, active)


def _swaps(own, other):
    return (own, other), (other, own)


def _rescaled(vector, mantissa, exponent, factor, active):
    norm = jnp.sqrt(jnp.sum(vector**2, axis=-1))
    norm = jnp.where(active & (norm > 0), norm, 1)
    moved, shift = scale.split(mantissa * norm * jnp.where(active, factor, 1), exponent)
    return vector / norm[..., None], moved, shift
