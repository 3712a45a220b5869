"""One-sided Jacobi on a matrix with graded columns: singular values of any range.

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
    if count % 2:
        widths = [(0, 0)] * (mantissa.ndim - 1)
        vectors = jnp.pad(vectors, [*widths, (0, 1), (0, 0)])
        mantissa = jnp.pad(mantissa, [*widths, (0, 1)])
        exponent = jnp.pad(exponent, [*widths, (0, 1)])
    state = _normalized(vectors, mantissa, exponent)
    tolerance = jnp.finfo(vectors.dtype).eps * jnp.sqrt(float(vectors.shape[-1]))

    def unfinished(carry):
        (rows, scales, _), sweep = carry
        return (sweep < _MOST_SWEEPS) & (_largest_cosine(rows, scales) > tolerance)

    def sweep(carry):
        rows, index = carry
        rounds = rows[0].shape[-2] - 1
        return jax.lax.fori_loop(0, rounds, lambda _, s: _round(s, tolerance), rows), index + 1

    (_, mantissa, exponent), _ = jax.lax.while_loop(unfinished, sweep, (state, jnp.int32(0)))
    return jnp.where(poisoned, jnp.nan, mantissa)[..., :count], exponent[..., :count]


def _normalized(vectors, mantissa, exponent):
    """Unit vectors, their norms moved into the scales; a zero vector has scale zero."""
    norms = jnp.linalg.norm(vectors, axis=-1)
    norms = jnp.where(mantissa == 0, 0, norms)
    vectors = jnp.where(norms == 0, 0, 1)[..., None] * vectors
    vectors = vectors / jnp.where(norms == 0, 1, norms)[..., None]
    return (vectors, *scale.split(mantissa * norms, exponent))


def _largest_cosine(vectors, mantissa):
    gram = jnp.einsum("...im,...jm->...ij", vectors, vectors, precision="highest")
    present = (mantissa != 0)[..., None] & ~jnp.eye(vectors.shape[-2], dtype=bool)
    return jnp.max(jnp.where(present, jnp.abs(gram), 0))


def _round(state, tolerance):
    """Rotates the pairs (i, i + r/2), then moves all but the first, as in a round robin."""
    vectors, mantissa, exponent = state
    half = vectors.shape[-2] // 2
    upper = vectors[..., :half, :], mantissa[..., :half], exponent[..., :half]
    lower = vectors[..., half:, :], mantissa[..., half:], exponent[..., half:]
    upper, lower = _rotated(upper, lower, tolerance)
    return (
        _moved(upper[0], lower[0], -2),
        _moved(upper[1], lower[1], -1),
        _moved(upper[2], lower[2], -1),
    )


def _moved(upper, lower, axis):
    half = upper.shape[axis]
    if half == 1:
        return jnp.concatenate([upper, lower], axis)

    def part(values, start, stop):
        return jax.lax.slice_in_dim(values, start, stop, axis=axis)

    return jnp.concatenate(
        [
            part(upper, 0, 1),
            part(lower, 0, 1),
            part(upper, 1, half - 1),
            part(lower, 1, half),
            part(upper, half - 1, half),
        ],
        axis,
    )


def _rotated(a, b, tolerance):
    """Makes the columns a and b orthogonal, pair by pair.

    With `rho <= 1` the ratio of the scales and `c` the cosine, the tangent of the rotation is
    `rho * tau`, and only `tau` and `rho**2 * tau` meet the unit vectors.
    """
    (x, x_mantissa, x_exponent), (y, y_mantissa, y_exponent) = a, b
    cosine = jnp.sum(x * y, axis=-1)
    present = (x_mantissa != 0) & (y_mantissa != 0)
    ratio = y_mantissa / jnp.where(present, x_mantissa, 1)
    ratio = scale.shifted(ratio, y_exponent - x_exponent)
    x_is_larger = ratio <= 1
    rho = jnp.where(x_is_larger, ratio, 1 / jnp.where(x_is_larger, 1, ratio))
    active = present & (jnp.abs(cosine) > tolerance)
    gap = (1 - rho) * (1 + rho)
    root = jnp.sqrt(gap**2 + 4 * (rho * cosine) ** 2)
    tau = jnp.where(active, 2 * cosine / jnp.where(active, gap + root, 1), 0)
    inverse_length = jax.lax.rsqrt(1 + (rho * tau) ** 2)
    into_x = jnp.where(x_is_larger, rho**2 * tau, -tau)
    into_y = jnp.where(x_is_larger, -tau, rho**2 * tau)
    new_x = x + into_x[..., None] * y
    new_y = y + into_y[..., None] * x
    return (
        _rescaled(new_x, x_mantissa, x_exponent, inverse_length, active),
        _rescaled(new_y, y_mantissa, y_exponent, inverse_length, active),
    )


def _rescaled(vector, mantissa, exponent, factor, active):
    norm = jnp.sqrt(jnp.sum(vector**2, axis=-1))
    norm = jnp.where(active & (norm > 0), norm, 1)
    moved, shift = scale.split(mantissa * norm * jnp.where(active, factor, 1), exponent)
    return vector / norm[..., None], moved, shift
