"""What rounding does to a product later on: sampled errors, carried through the layers.

An error that a layer makes is a relative perturbation `I + X` of the product's left factor, and the
next layer, with the triangular factor R of its QR, turns X into `R X R^-1`. Where layers are far
from normal and repeated (powers of a Jordan block), that grows by orders of magnitude, and no bound
made of norms tells it from chains where it does not. So random errors of the size that rounding
has are carried along, and what they did in the end to the singular values is the estimate.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgrad.graded import scale
from jaxgrad.graded.pivoting import GradedQR

# One sample is close to zero by accident once in a while; three never were in 2,000 values.
SAMPLES = 3
# In units of eps: beyond it nothing is known, in either dtype.
_MOST = 1e18


def no_drift(batch: tuple[int, ...], count: int, dtype) -> Float[Array, "*batch samples r r"]:
    """That of a product without rounding errors."""
    return jnp.zeros((*batch, SAMPLES, count, count), dtype)


def carried(
    drift: Float[Array, "*batch samples r r"], qr: GradedQR, layers: Int[Array, "*batch"]
) -> Float[Array, "*batch samples s s"]:
    """The drift after one more orthogonalization: `R X R^-1`, and the errors made in it.

    Args:
        drift: relative perturbations of the left factor, in units of eps and the old modes' basis.
            An entry (i, j) above the diagonal is kept as it acts on the right of the scales, where
            it stays as it is while mode i leads mode j more and more.
        qr: the orthogonalization.
        layers: how many there were before it, which selects the random signs.
    """
    count, height = qr.mantissa.shape[-1], qr.left.shape[-2]
    if count == 0:
        return no_drift(drift.shape[:-3], 0, drift.dtype)
    # R X R^-1 in the old order of the modes, as R P^T X P R^-1: nothing but products
    place = jnp.argsort(qr.order, axis=-1)
    triangle = jnp.take_along_axis(qr.triangle, place[..., None, :], axis=-1)
    inverse = jnp.take_along_axis(_inverse(qr), place[..., None], axis=-2)
    signs = _signs((SAMPLES, height, place.shape[-1]), jnp.max(layers, initial=0), drift.dtype)
    errors = qr.spread[..., None, :, :] * signs + qr.residual[..., None, :, :]
    moved = jnp.matmul(triangle[..., None, :, :], drift)
    moved = moved + jnp.matmul(jnp.swapaxes(qr.left, -1, -2)[..., None, :, :], errors)
    drift = jnp.matmul(moved, inverse[..., None, :, :])
    damping = jnp.minimum(_ratios(qr.mantissa, qr.exponent), 1)[..., None, :, :]
    damped = jnp.where(damping == 0, 0, drift * damping)
    # too large for the dtype: all that counts is that nothing is known
    return jnp.clip(jnp.nan_to_num(damped, nan=_MOST), -_MOST, _MOST)


def inherited(
    drift: Float[Array, "*batch samples r r"], left: Array, other: Array, basis: Array
) -> Float[Array, "*batch samples r r"]:
    """The drift of a product with that of a factor to its left, whose left factor is `basis`.

    Args:
        drift: of the whole, whose left factor is `left`.
        left: (batch..., n, r).
        other: the drift of the factor, (batch..., samples, q, q).
        basis: (batch..., n, q).
    """
    inner = jnp.einsum("...ni,...nj->...ij", left, basis)[..., None, :, :]
    return drift + jnp.matmul(jnp.matmul(inner, other), jnp.swapaxes(inner, -1, -2))


def log_errors(
    drift: Float[Array, "*batch samples r r"],
    mantissa: Float[Array, "*batch r"],
    exponent: Int[Array, "*batch r"],
) -> Float[Array, "*batch r"]:
    """Errors of the natural log singular values of a nearly diagonal product, in units of eps.

    To first order that of a mode is its diagonal entry, and modes of nearly the same size mix: the
    rest of the symmetric part counts by the ratio of the scales.
    """
    symmetric = (drift + jnp.swapaxes(drift, -1, -2)) / 2
    ratios = _ratios(mantissa, exponent)
    weight = jnp.minimum(ratios, jnp.swapaxes(ratios, -1, -2))
    weight = jnp.where(jnp.isnan(weight), 1, weight)[..., None, :, :]
    return jnp.sqrt(jnp.mean(jnp.sum((weight * symmetric) ** 2, axis=-1), axis=-2))


def _signs(shape: tuple[int, ...], layers: Int[Array, ""], dtype) -> Array:
    """Random signs, other ones after every layer.

    By an integer hash (C. Wellons, "hash-prospector", lowbias32): a counter-based generator would
    take longer to compile than all the rest.
    """
    bits = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    bits = bits + layers.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    signs = jnp.where((bits ^ (bits >> 16)) & 1 == 0, -1, 1).astype(dtype)
    return jax.lax.optimization_barrier(signs)  # hashed once, not once for every example


def _ratios(mantissa: Array, exponent: Array) -> Array:
    """Entry (i, j): the scale of mode j over that of mode i; 0 where one is absent."""
    present = mantissa != 0
    both = present[..., None] & present[..., None, :]
    ratio = mantissa[..., None, :] / jnp.where(present, mantissa, 1)[..., None]
    return jnp.where(both, scale.shifted(ratio, exponent[..., None, :] - exponent[..., None]), 0)


def _inverse(qr: GradedQR) -> Array:
    """`R^-1`, with rows of zero for columns beyond its square part; absent modes have no part."""
    count, width = qr.triangle.shape[-2:]
    absent = (qr.mantissa == 0)[..., None] * jnp.eye(count, dtype=qr.triangle.dtype)
    square = qr.triangle[..., :count] + absent
    eye = jnp.broadcast_to(jnp.eye(count, dtype=square.dtype), square.shape)
    inverse = jax.lax.linalg.triangular_solve(square, eye)
    widths = [(0, 0)] * (inverse.ndim - 2) + [(0, width - count), (0, 0)]
    return jnp.pad(inverse, widths)
