"""Singular values of a graded product, and how far they can be trusted."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgrad.graded import scale
from jaxgrad.graded.jacobi import one_sided_jacobi
from jaxgrad.graded.pivoting import GradedLQ, Rows, graded_lq, permuted

# The accuracy that the certificate vouches for, in nats.
TOLERANCE = {"float32": 1e-3, "float64": 1e-10}
# Alternating LQ steps before Jacobi; each one moves the factor closer to the diagonal.
_LQ_PASSES = 5
# Errors in units of the estimated standard deviation: over ill-conditioned chains of both dtypes
# the largest ratio seen was 9, in a mode that shares the error of a weaker one.
_ERRORS_AT_MOST = 10.0
_LN2 = 0.6931471805599453


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Evidence:
    """What the certificate is made of, for the r modes of a product. Logarithms are to base 2."""

    peak: Float[Array, "*batch p p"]  # how far the mode at place i has ever led that at place j
    overtaken: Float[Array, "*batch p"]  # the largest lead lost again, over all partners
    mode: Int[Array, "*batch p"]  # at every place: places stay when modes change their order
    variance: Float[Array, "*batch r"]  # squared relative rounding errors, summed over the layers

    @staticmethod
    def none(batch: tuple[int, ...], count: int, dtype) -> "Evidence":
        """Nothing has happened yet."""
        zero = jnp.zeros((*batch, count), dtype)
        mode = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), zero.shape)
        return Evidence(jnp.zeros((*zero.shape, count), dtype), zero, mode, zero)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Certificate:
    """How far the singular values of a product can be trusted.

    Attributes:
        error: Estimated absolute error of every natural log singular value, in their order.
        overtaken: The largest lead, in nats, that one mode had over another and lost again. When it
            exceeds `limit`, rounding one factor changes the answer: no algorithm in this precision
            can know it. Use `log_singular_values_mp` then.
        limit: ln(1/eps) of the dtype.
        trusted: Where `error` is at most the tolerance: 1e-3 in float32, 1e-10 in float64.
    """

    error: Float[Array, "*batch count"]
    overtaken: Float[Array, "*batch"]
    limit: Float[Array, ""]
    trusted: Bool[Array, "*batch count"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Spectrum:
    """Singular values as pairs, `mantissa * 2**exponent`, descending, and their certificate."""

    mantissa: Float[Array, "*batch count"]
    exponent: Int[Array, "*batch count"]
    certificate: Certificate

    def log(self) -> Float[Array, "*batch count"]:
        """Natural logarithms; -inf for zero."""
        return scale.log_of(self.mantissa, self.exponent)


def spectrum_of(product) -> Spectrum:
    """All singular values of a `Graded`."""
    count = min(product.shape[-2:])
    state = product.mantissa, product.exponent, product.evidence
    # left diag(d) right: first the left factor becomes orthonormal, then the right one; what is
    # left is triangular, and every further LQ of its transpose moves it closer to the diagonal.
    lq, state = _settled(transposed(product.left), *state)
    right = permuted(product.right, lq.order, -2)
    factor = jnp.matmul(transposed(lq.unit), right, precision="highest")
    while factor.shape[-2] != factor.shape[-1]:  # at most twice
        lq, state = _settled(factor, *state)
        factor = transposed(lq.unit)

    def again(_, carry):
        factor, *state = carry
        lq, state = _settled(factor, *state)
        return transposed(lq.unit), *state

    factor, *state = jax.lax.fori_loop(0, _LQ_PASSES, again, (factor, *state))
    mantissa, exponent, evidence = state
    mantissa, exponent = _singular_values(factor, mantissa, exponent)
    eps = jnp.finfo(mantissa.dtype).eps
    # A lead of 2**lost that was lost again has magnified one rounding by as much.
    overtaken = permuted(evidence.overtaken, jnp.argsort(evidence.mode, axis=-1), -1)
    error = jnp.sqrt(evidence.variance) + eps * jnp.exp2(jnp.minimum(overtaken, 100.0))
    error = _ERRORS_AT_MOST * error
    mantissa, exponent, error = _descending(mantissa, exponent, error, count)
    overtaken = jnp.max(evidence.overtaken, axis=-1, initial=0) * _LN2
    limit = -jnp.log(eps)
    trusted = error <= TOLERANCE[mantissa.dtype.name]
    return Spectrum(mantissa, exponent, Certificate(error, overtaken, limit, trusted))


def _singular_values(factor, mantissa, exponent) -> tuple:
    """Of `factor^T diag(d)`: by a plain SVD where the range of d allows it, else by Jacobi."""
    if 0 in factor.shape[-2:]:
        return mantissa, exponent
    name = mantissa.dtype.name
    present = mantissa != 0
    unbounded = 2**30
    top = jnp.max(jnp.where(present, exponent, -unbounded), axis=-1)
    bottom = jnp.min(jnp.where(present, exponent, unbounded), axis=-1)
    # A plain SVD errs by eps times the largest singular value.
    narrow = top - bottom < math.floor(math.log2(0.1 * TOLERANCE[name] / jnp.finfo(name).eps))
    narrow |= ~jnp.any(present, axis=-1)
    poisoned = jnp.any(jnp.isnan(mantissa), axis=-1)
    dense = (narrow & ~poisoned)[..., None]
    sizes = jnp.where(dense, scale.shifted(mantissa, exponent - top[..., None]), 0)
    values = jax.lax.cond(
        jnp.any(dense),
        lambda: jnp.linalg.svd(factor * sizes[..., None], compute_uv=False),
        lambda: jnp.zeros_like(sizes),
    )
    rank = jnp.sum(present, axis=-1, keepdims=True)
    values = jnp.where(jnp.arange(values.shape[-1]) < rank, values, 0)
    by_svd = scale.split(values, top[..., None])
    by_jacobi = one_sided_jacobi(factor, jnp.where(dense, 0, mantissa), exponent)
    return tuple(jnp.where(dense, a, b) for a, b in zip(by_svd, by_jacobi, strict=True))


def _settled(values, mantissa, exponent, evidence) -> tuple[GradedLQ, tuple]:
    nan = jnp.isnan(mantissa)
    rows = Rows.exact(values, jnp.where(nan, 0.5, mantissa), exponent)
    lq = graded_lq(rows, orthonormal=True)
    return lq, after(lq, nan, evidence)


def after(lq: GradedLQ, nan, evidence: Evidence) -> tuple:
    """Mantissas, exponents and evidence of the modes, with NaN put back."""
    mantissa = jnp.where(nan[..., : lq.mantissa.shape[-1]], jnp.nan, lq.mantissa)
    return mantissa, lq.exponent, updated(evidence, lq)


def _descending(mantissa, exponent, error, count):
    """Sorted exactly, by exponent and then mantissa, and padded with zeros to the full count."""
    missing = [(0, 0)] * (mantissa.ndim - 1) + [(0, count - mantissa.shape[-1])]
    mantissa, exponent = jnp.pad(mantissa, missing), jnp.pad(exponent, missing)
    error = jnp.pad(error, missing)
    nan = jnp.any(jnp.isnan(mantissa), axis=-1, keepdims=True)
    lowest = jnp.iinfo(jnp.int32).max
    key = jnp.where(mantissa == 0, lowest, -exponent)
    key, negative, error = jax.lax.sort((key, -mantissa, error), dimension=-1, num_keys=2)
    exponent = jnp.where(key == lowest, 0, -key)
    return jnp.where(nan, jnp.nan, -negative), exponent, jnp.where(nan, jnp.inf, error)


def updated(evidence: Evidence, lq: GradedLQ) -> Evidence:
    """The evidence after one more orthogonalization."""
    evidence = _of_modes(evidence, lq)
    # Vectors are brought to the order of the places: that is cheaper than to move the matrix.
    present = permuted(lq.mantissa != 0, evidence.mode, -1)
    level = scale.log2_of(jnp.where(lq.mantissa == 0, 1, lq.mantissa), lq.exponent)
    level = permuted(level, evidence.mode, -1)
    lead = level[..., None] - level[..., None, :]
    pairs = present[..., None] & present[..., None, :]
    # An error that the leading mode i leaves in mode j matters as much as the lead that is gone,
    # and no more than the lead that there was: diag(d) with one entry beside it has the singular
    # values d up to (entry / max(d))**2.
    lost = jnp.where(pairs, evidence.peak - jnp.maximum(lead, 0), 0)
    lost = jnp.maximum(jnp.max(lost, axis=-1, initial=0), jnp.max(lost, axis=-2, initial=0))
    return Evidence(
        jnp.where(pairs, jnp.maximum(evidence.peak, lead), 0),
        jnp.maximum(evidence.overtaken, lost),
        evidence.mode,
        evidence.variance + lq.error**2,
    )


def _of_modes(evidence: Evidence, lq: GradedLQ) -> Evidence:
    """Of the modes that remain, in their new order."""
    order = lq.order[..., : lq.mantissa.shape[-1]]
    variance = permuted(evidence.variance, order, -1)
    if order.shape[-1] == evidence.mode.shape[-1]:
        mode = permuted(lq.inverse, evidence.mode, -1).astype(jnp.int32)
        return replace(evidence, mode=mode, variance=variance)
    place = permuted(jnp.argsort(evidence.mode, axis=-1), order, -1)
    peak = permuted(permuted(evidence.peak, place, -2), place[..., None, :], -1)
    mode = Evidence.none(order.shape[:-1], order.shape[-1], variance.dtype).mode
    return Evidence(peak, permuted(evidence.overtaken, place, -1), mode, variance)


def transposed(matrix):
    """The last two axes swapped."""
    return jnp.swapaxes(matrix, -1, -2)
