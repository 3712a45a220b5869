"""Singular values of a graded product, and how far they can be trusted."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgrad.graded import scale
from jaxgrad.graded.drift import carried, log_errors
from jaxgrad.graded.jacobi import one_sided_jacobi
from jaxgrad.graded.pivoting import Columns, GradedQR, graded_qr, row_scales

# The accuracy that the certificate vouches for, in nats.
TOLERANCE = {"float32": 1e-3, "float64": 1e-10}
# Alternating QR steps before Jacobi; each one moves the factor closer to the diagonal.
_QR_PASSES = 4
# Errors in units of the estimated standard deviation, which a few samples know to a factor.
_ERRORS_AT_MOST = 10.0
# Errors of an SVD, over eps: relative ones grow with the size (0.25 of it where most, measured with
# LAPACK for sizes from 48 to 256); other ones, by the theory, go with the largest singular value.
_SVD_TO_SIZE, _SVD_TO_NORM = 0.1, 0.25
_LN2 = 0.6931471805599453


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Evidence:
    """What the certificate is made of, for the r modes of a product. Logarithms are to base 2."""

    peak: Float[Array, "*batch r r"]  # how far mode i has ever led mode j
    overtaken: Float[Array, "*batch r"]  # the largest lead lost again, over all partners of a mode
    variance: Float[Array, "*batch r"]  # squared relative rounding errors, summed over the layers
    drift: Float[Array, "*batch samples r r"]  # sampled errors, carried through all layers
    layers: Int[Array, "*batch"]  # how many orthogonalizations there were


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Certificate:
    """How far the singular values of a product can be trusted.

    An estimate, of ten standard deviations: of the rounding errors of every layer, and of what
    later layers make of them, for which sampled errors are carried along. Over 350 chains of both
    dtypes, of 6 to 128 units, powers of Jordan blocks among them, no error was more than the
    estimate.

    Attributes:
        error: Estimated absolute error of every natural log singular value, in their order. It is
            infinite where -inf stands for a value that fell below rounding, and 0 or so where the
            value must be zero, as by dead units.
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
    # left is triangular, and every further QR of its transpose moves it closer to the diagonal.
    qr, state = _settled(product.left, *state)
    factor = jnp.take_along_axis(product.right, qr.order[..., None], axis=-2)
    factor = jnp.matmul(qr.unit, factor, precision="highest")
    qr, state = _settled_transposed(factor, *state)

    def again(_, carry):
        unit, *state = carry
        qr, state = _settled_transposed(unit, *state)
        return qr.unit, *state

    if qr.unit.shape[-2] < qr.unit.shape[-1]:  # fewer inputs than modes: one more makes it square
        qr, state = _settled_transposed(qr.unit, *state)
    factor, *state = jax.lax.fori_loop(0, _QR_PASSES, again, (qr.unit, *state))
    mantissa, exponent, evidence = state
    eps = jnp.finfo(mantissa.dtype).eps
    sampled = eps * log_errors(evidence.drift, mantissa, exponent)
    mantissa, exponent, last = _singular_values(factor, mantissa, exponent)
    # A lead of 2**lost that was lost again has magnified one rounding by as much.
    error = eps * jnp.exp2(jnp.minimum(evidence.overtaken, 100.0))
    error = error + jnp.maximum(jnp.sqrt(evidence.variance), sampled)
    error = _ERRORS_AT_MOST * (error + eps * last)
    mantissa, exponent, error = _descending(mantissa, exponent, error, count)
    overtaken = jnp.max(evidence.overtaken, axis=-1, initial=0) * _LN2
    limit = -jnp.log(eps)
    trusted = error <= TOLERANCE[mantissa.dtype.name]
    return Spectrum(mantissa, exponent, Certificate(error, overtaken, limit, trusted))


def _singular_values(factor, mantissa, exponent) -> tuple:
    """Of `factor^T diag(d)`: by a plain SVD where the range of d allows it, else by Jacobi.

    And the relative errors that these make, in units of eps.
    """
    if 0 in factor.shape[-2:]:
        return mantissa, exponent, jnp.zeros_like(mantissa)
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
    values = jnp.linalg.svd(factor * sizes[..., None], compute_uv=False)
    rank = jnp.sum(present, axis=-1, keepdims=True)
    values = jnp.where(jnp.arange(values.shape[-1]) < rank, values, 0)
    by_svd = scale.split(values, top[..., None])
    by_jacobi = one_sided_jacobi(factor, jnp.where(dense, 0, mantissa), exponent)
    found = [jnp.where(dense, a, b) for a, b in zip(by_svd, by_jacobi, strict=True)]
    beside_largest = jnp.where(values > 0, values[..., :1] / jnp.where(values > 0, values, 1), 0)
    error = _SVD_TO_SIZE * factor.shape[-1] + jnp.where(dense, _SVD_TO_NORM * beside_largest, 0)
    return *found, error


def _settled(values, mantissa, exponent, evidence) -> tuple[GradedQR, tuple]:
    nan = jnp.isnan(mantissa)
    noise = jnp.zeros_like(mantissa)
    rows, spread = row_scales(values), jnp.zeros_like(values)
    columns = Columns(values, jnp.where(nan, 0.5, mantissa), exponent, rows, noise, spread)
    qr = graded_qr(columns)
    return qr, after(qr, nan, evidence)


def _settled_transposed(values, mantissa, exponent, evidence) -> tuple[GradedQR, tuple]:
    return _settled(transposed(values), mantissa, exponent, of_transposed(evidence))


def of_transposed(evidence: Evidence) -> Evidence:
    """The evidence of the transposed product."""
    return replace(evidence, drift=transposed(evidence.drift))


def after(qr: GradedQR, nan, evidence: Evidence, most: Int[Array, "*batch"] | None = None) -> tuple:
    """Mantissas, exponents and evidence of the modes, with NaN put back.

    A mode that fell below rounding is zero, or it is only small: the certificate does not vouch for
    it, unless the rank can be no larger than it is now.

    Args:
        qr: the new orthogonalization.
        nan: which modes are NaN.
        evidence: what there was before it.
        most: a bound of the rank; None: unknown.
    """
    mantissa = jnp.where(nan[..., : qr.mantissa.shape[-1]], jnp.nan, qr.mantissa)
    doubtful = qr.died
    if most is not None:
        doubtful &= (jnp.sum(qr.mantissa != 0, axis=-1) < most)[..., None]
    evidence = updated(evidence, qr)
    doubtful |= qr.wrong[..., None]
    variance = jnp.where(doubtful, jnp.inf, evidence.variance)
    return mantissa, qr.exponent, replace(evidence, variance=variance)


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


def updated(evidence: Evidence, qr: GradedQR) -> Evidence:
    """The evidence after one more orthogonalization."""
    count = qr.mantissa.shape[-1]
    order = qr.order[..., :count]
    peak = jnp.take_along_axis(evidence.peak, order[..., None], axis=-2)
    peak = jnp.take_along_axis(peak, order[..., None, :], axis=-1)
    overtaken = jnp.take_along_axis(evidence.overtaken, order, axis=-1)
    variance = jnp.take_along_axis(evidence.variance, order, axis=-1)
    present = qr.mantissa != 0
    level = scale.log2_of(jnp.where(present, qr.mantissa, 1), qr.exponent)
    lead = level[..., None] - level[..., None, :]
    pairs = present[..., None] & present[..., None, :]
    # An error that the leading mode i leaves in mode j matters as much as the lead that is gone,
    # and no more than the lead that there was: diag(d) with one entry beside it has the singular
    # values d up to (entry / max(d))**2.
    lost = jnp.where(pairs, peak - jnp.maximum(lead, 0), 0)
    lost = jnp.maximum(jnp.max(lost, axis=-1, initial=0), jnp.max(lost, axis=-2, initial=0))
    return Evidence(
        jnp.where(pairs, jnp.maximum(peak, lead), 0),
        jnp.maximum(overtaken, lost),
        variance + qr.error**2,
        carried(evidence.drift, qr, evidence.layers),
        evidence.layers + 1,
    )


def transposed(matrix):
    """The last two axes swapped."""
    return jnp.swapaxes(matrix, -1, -2)
