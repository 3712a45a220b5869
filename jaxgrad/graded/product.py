"""`Graded`: a matrix product as `left diag(d) right`, with `d` on a logarithmic scale.

`left` and `right` are well-conditioned, and every bit of range lives in `d`, a mantissa and an
integer exponent for every mode. A layer multiplies `left`, and a pivoted QR moves what it did to
the modes into `d`. The method is the stratified product of determinant quantum Monte Carlo (E. Loh
et al. 1992; Z. Bai et al., "Stable solutions of linear systems involving long chain of matrix
multiplications", 2011), here for rectangular and singular factors, and with a certificate.
"""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxgrad.graded import scale
from jaxgrad.graded.jacobi import one_sided_jacobi
from jaxgrad.graded.pivoting import Columns, GradedQR, graded_qr, row_scales

# The accuracy that the certificate vouches for, in nats.
_TOLERANCE = {"float32": 1e-3, "float64": 1e-10}
# Alternating QR steps before Jacobi; each one moves the factor closer to the diagonal.
_QR_PASSES = 4
# Errors in units of the estimated standard deviation: over ill-conditioned chains of both dtypes
# the largest ratio seen was 9, in a mode that shares the error of a weaker one.
_ERRORS_AT_MOST = 10.0
_LN2 = 0.6931471805599453


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Evidence:
    """What the certificate is made of, for the r modes of a product. Logarithms are to base 2."""

    peak: Float[Array, "*batch r r"]  # how far mode i has ever led mode j
    overtaken: Float[Array, "*batch r"]  # the largest lead lost again, over all partners of a mode
    variance: Float[Array, "*batch r"]  # squared relative rounding errors, summed over the layers


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Graded:
    """A matrix product at extended range, `left @ diag(mantissa * 2**exponent) @ right`.

    Leading axes are a batch. The range of the product is that of 32-bit integers, as an exponent
    of two; NaN or inf in a factor turns the affected batch entry into NaN, and stays.
    A pytree: it passes through jit, vmap and scan. It is not differentiable.

    Attributes:
        left: Well-conditioned columns, (batch..., n_out, r).
        mantissa: Mantissas of the r modes, in [1/2, 1) or zero.
        exponent: Their exponents.
        right: Well-conditioned rows, (batch..., r, n_in).
        evidence: What rounding may have done so far.
    """

    left: Float[Array, "*batch n_out r"]
    mantissa: Float[Array, "*batch r"]
    exponent: Int[Array, "*batch r"]
    right: Float[Array, "*batch r n_in"]
    evidence: Evidence

    @staticmethod
    def identity(n: int, batch_shape: tuple[int, ...] = (), dtype=jnp.float32) -> "Graded":
        """The empty product of a state of size n.

        Args:
            n: Number of rows and columns; zero is allowed.
            batch_shape: Leading axes.
            dtype: float32, or float64 under `jax.enable_x64`.
        """
        dtype = _supported(dtype)
        eye = jnp.broadcast_to(jnp.eye(n, dtype=dtype), (*batch_shape, n, n))
        half = jnp.full((*batch_shape, n), 0.5, dtype)
        zero = jnp.zeros((*batch_shape, n), dtype)
        evidence = Evidence(jnp.zeros_like(eye), zero, zero)
        return Graded(eye, half, jnp.ones(half.shape, jnp.int32), eye, evidence)

    @staticmethod
    def from_dense(matrix: Float[ArrayLike, "..."]) -> "Graded":
        """The product of one factor, (batch..., n_out, n_in)."""
        matrix = jnp.asarray(matrix)
        if matrix.ndim < 2:
            raise ValueError(f"a matrix (batch..., n_out, n_in) is needed, got {matrix.shape}.")
        dtype = jnp.promote_types(matrix.dtype, jnp.float32)
        return Graded.identity(matrix.shape[-1], matrix.shape[:-2], dtype).left_multiply(matrix)

    @property
    def shape(self) -> tuple[int, ...]:
        """(batch..., n_out, n_in)."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def dtype(self):
        """The floating dtype of the factors."""
        return self.left.dtype

    @property
    def T(self) -> "Graded":
        """The transposed product."""
        return replace(self, left=_transposed(self.right), right=_transposed(self.left))

    def left_multiply(self, matrix: Float[ArrayLike, "..."]) -> "Graded":
        """`matrix @ self`: one more layer at the output end.

        Args:
            matrix: (n, n_out) or (batch..., n, n_out).
        """
        return Pending.of(self).pushed(matrix).settled()[0]

    def right_multiply(self, matrix: Float[ArrayLike, "..."]) -> "Graded":
        """`self @ matrix`: one more layer at the input end.

        Args:
            matrix: (n_in, n) or (batch..., n_in, n).
        """
        return self.T.left_multiply(_transposed(jnp.asarray(matrix))).T

    def __matmul__(self, other: "Graded") -> "Graded":
        """The product of two graded products.

        The scales of `self` enter in steps of moderate range, one QR each: costly for products of
        many layers. Multiplying layer by layer costs less.
        """
        if self.shape[-1] != other.shape[-2]:
            raise ValueError(
                f"`@` needs the inner sizes to agree: {self.shape} @ {other.shape}. "
                "The left operand is applied last."
            )
        product = other.left_multiply(self.right)
        product = _left_multiplied_by_scales(product, self.mantissa, self.exponent)
        product = product.left_multiply(self.left)
        inherited = jnp.max(self.evidence.overtaken, axis=-1, initial=0)[..., None]
        variance = jnp.max(self.evidence.variance, axis=-1, initial=0)[..., None]
        evidence = product.evidence
        evidence = replace(
            evidence,
            overtaken=jnp.maximum(evidence.overtaken, inherited),
            variance=evidence.variance + variance,
        )
        return replace(product, evidence=evidence)

    def to_dense(self) -> Float[Array, "*batch n_out n_in"]:
        """The matrix itself; entries beyond the dtype's range become 0 or inf."""
        matrix, exponent = self._dense()
        return scale.shifted(matrix, exponent[..., None, None])

    def log_norm(self) -> Float[Array, "*batch"]:
        """Natural logarithm of the Frobenius norm; -inf for a zero matrix."""
        matrix, exponent = self._dense()
        norm = jnp.sqrt(jnp.sum(matrix**2, axis=(-2, -1)))
        return scale.log_of(*scale.split(norm, exponent))

    def spectrum(self) -> Spectrum:
        """All min(n_out, n_in) singular values as pairs, descending, with their certificate."""
        return _spectrum(self)

    def log_singular_values(self) -> Float[Array, "*batch count"]:
        """Natural logarithms of all min(n_out, n_in) singular values, descending.

        -inf beyond the rank. `spectrum()` has the same as pairs, and the certificate with it.
        """
        return _spectrum(self).log()

    @property
    def certificate(self) -> Certificate:
        """How far each singular value can be trusted; computes the spectrum."""
        return _spectrum(self).certificate

    @property
    def rank(self) -> Int[Array, "*batch"]:
        """Number of singular values above rounding; -1 where the product is NaN."""
        rank = jnp.sum(self.mantissa != 0, axis=-1)
        return jnp.where(jnp.any(jnp.isnan(self.mantissa), axis=-1), -1, rank)

    def log_abs_det(self) -> Float[Array, "*batch"]:
        """Natural logarithm of the absolute determinant of a square product; 0 for size zero."""
        if self.shape[-1] != self.shape[-2]:
            raise ValueError(f"log_abs_det needs a square product, got the shape {self.shape}.")
        spectrum = _spectrum(self)
        if spectrum.mantissa.shape[-1] == 0:
            return jnp.zeros(self.shape[:-2], self.dtype)
        # Exponents add as integers; the mantissas, in [1/2, 1), cannot cancel.
        exponent = jnp.sum(spectrum.exponent, axis=-1)
        fractions = jnp.sum(jnp.log(spectrum.mantissa), axis=-1)
        ones = jnp.ones_like(fractions)
        return scale.log_of(ones, exponent) + fractions

    def _dense(self) -> tuple[Array, Array]:
        """A matrix within range, and the exponent that it lacks."""
        present = self.mantissa != 0
        lowest = jnp.iinfo(jnp.int32).min // 2
        top = jnp.max(jnp.where(present, self.exponent, lowest), axis=-1, initial=lowest)
        top = jnp.where(jnp.any(present, axis=-1), top, 0)
        sizes = scale.shifted(self.mantissa, self.exponent - top[..., None])
        matrix = jnp.matmul(self.left * sizes[..., None, :], self.right, precision="highest")
        return matrix, top


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pending:
    """A product that layers have been multiplied to without orthogonalizing again."""

    columns: Columns
    right: Float[Array, "*batch r n_in"]
    evidence: Evidence

    @staticmethod
    def of(product: Graded) -> "Pending":
        """Nothing is pending."""
        noise = jnp.zeros_like(product.mantissa)
        rows = row_scales(product.left)
        columns = Columns(product.left, product.mantissa, product.exponent, rows, noise)
        return Pending(columns, product.right, product.evidence)

    def pushed(self, matrix: Float[ArrayLike, "..."]) -> "Pending":
        """One more layer, as a plain product."""
        matrix = jnp.asarray(matrix)
        old = self.columns
        batch, height = old.values.shape[:-2], old.values.shape[-2]
        if matrix.ndim < 2 or matrix.shape[-1] != height or not _fits(matrix.shape[:-2], batch):
            raise ValueError(
                f"a layer Jacobian of shape (batch..., n, {height}) with the batch axes {batch} is "
                f"needed, or one without batch axes; got the shape {matrix.shape}."
            )
        matrix = jnp.broadcast_to(matrix.astype(old.values.dtype), (*batch, *matrix.shape[-2:]))
        finite = jnp.all(jnp.isfinite(matrix), axis=(-2, -1))
        matrix = jnp.where(finite[..., None, None], matrix, 0)
        shift = scale.largest_exponent(matrix)
        matrix = scale.shifted(matrix, -shift[..., None, None])
        values = jnp.matmul(matrix, old.values, precision="highest")
        inner = jnp.sum(matrix**2, axis=-2)
        fresh = jnp.einsum("...j,...jk->...k", inner, old.values**2)
        # Isotropic noise grows by the root mean square singular value.
        gain = jnp.sum(inner, axis=-1, keepdims=True) / max(height, 1)
        mantissa = jnp.where(finite[..., None], old.mantissa, jnp.nan)
        noise = jnp.sqrt(gain * old.noise**2 + fresh)
        columns = Columns(
            values, mantissa, old.exponent + shift[..., None], row_scales(matrix), noise
        )
        return replace(self, columns=columns)

    def settled(
        self, repair: bool | Bool[Array, ""] = True
    ) -> tuple[Graded, Float[Array, "*batch"]]:
        """Moves what the pending layers did into the scales.

        Args:
            repair: Whether a wrong order of the columns is mended, by a slow path. Without it the
                loss of such a product is inf.

        Returns:
            The product, and the largest relative rounding error that the pending layers made: inf
            when a mode fell below rounding.
        """
        nan = jnp.isnan(self.columns.mantissa)
        columns = self.columns._replace(mantissa=jnp.where(nan, 0.5, self.columns.mantissa))
        qr = graded_qr(columns, repair)
        mantissa, exponent, evidence = _after(qr, nan, self.evidence)
        right = jnp.take_along_axis(self.right, qr.order[..., None], axis=-2)
        right = jnp.matmul(qr.unit, right, precision="highest")
        lost = qr.wrong | jnp.any(qr.died, axis=-1)
        loss = jnp.where(lost, jnp.inf, jnp.max(qr.error, axis=-1, initial=0))
        loss = jnp.where(jnp.any(nan, axis=-1), 0, loss)  # nothing is left to lose
        return Graded(qr.left, mantissa, exponent, right, evidence), loss


def _updated(evidence: Evidence, qr: GradedQR) -> Evidence:
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
    )


def _left_multiplied_by_scales(product: Graded, mantissa, exponent) -> Graded:
    """`diag(mantissa * 2**exponent) @ product`, the range taken in steps that QR can resolve."""
    top = jnp.max(jnp.where(mantissa != 0, exponent, -(2**30)), axis=-1, initial=-(2**30))
    top = jnp.where(jnp.all(mantissa == 0, axis=-1), 0, top)
    diagonal = jnp.eye(mantissa.shape[-1], dtype=product.dtype)
    product = product.left_multiply(mantissa[..., None] * diagonal)
    remaining = jnp.where(mantissa == 0, 0, exponent - top[..., None])
    widest = jnp.finfo(product.dtype).nmant // 2

    def step(state):
        current, left = state
        part = jnp.maximum(left, -widest)
        factor = scale.power_of_two(part, current.dtype)
        return current.left_multiply(factor[..., None] * diagonal), left - part

    product, _ = jax.lax.while_loop(lambda state: jnp.any(state[1] < 0), step, (product, remaining))
    return replace(product, exponent=product.exponent + top[..., None])


def _spectrum(product: Graded) -> Spectrum:
    count = min(product.shape[-2:])
    state = product.mantissa, product.exponent, product.evidence
    # left diag(d) right: first the left factor becomes orthonormal, then the right one; what is
    # left is triangular, and every further QR of its transpose moves it closer to the diagonal.
    qr, state = _settled(product.left, *state)
    factor = jnp.take_along_axis(product.right, qr.order[..., None], axis=-2)
    factor = jnp.matmul(qr.unit, factor, precision="highest")
    qr, state = _settled(_transposed(factor), *state)

    def again(_, carry):
        unit, *state = carry
        qr, state = _settled(_transposed(unit), *state)
        return qr.unit, *state

    if qr.unit.shape[-2] < qr.unit.shape[-1]:  # fewer inputs than modes: one more makes it square
        qr, state = _settled(_transposed(qr.unit), *state)
    factor, *state = jax.lax.fori_loop(0, _QR_PASSES, again, (qr.unit, *state))
    mantissa, exponent, evidence = state
    mantissa, exponent = _singular_values(factor, mantissa, exponent)
    eps = jnp.finfo(mantissa.dtype).eps
    # A lead of 2**lost that was lost again has magnified one rounding by as much.
    error = jnp.sqrt(evidence.variance) + eps * jnp.exp2(jnp.minimum(evidence.overtaken, 100.0))
    error = _ERRORS_AT_MOST * error
    mantissa, exponent, error = _descending(mantissa, exponent, error, count)
    overtaken = jnp.max(evidence.overtaken, axis=-1, initial=0) * _LN2
    limit = -jnp.log(eps)
    trusted = error <= _TOLERANCE[mantissa.dtype.name]
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
    narrow = top - bottom < math.floor(math.log2(0.1 * _TOLERANCE[name] / jnp.finfo(name).eps))
    narrow |= ~jnp.any(present, axis=-1)
    poisoned = jnp.any(jnp.isnan(mantissa), axis=-1)
    dense = (narrow & ~poisoned)[..., None]
    sizes = jnp.where(dense, scale.shifted(mantissa, exponent - top[..., None]), 0)
    values = jnp.linalg.svd(factor * sizes[..., None], compute_uv=False)
    rank = jnp.sum(present, axis=-1, keepdims=True)
    values = jnp.where(jnp.arange(values.shape[-1]) < rank, values, 0)
    by_svd = scale.split(values, top[..., None])
    by_jacobi = one_sided_jacobi(factor, jnp.where(dense, 0, mantissa), exponent)
    return tuple(jnp.where(dense, a, b) for a, b in zip(by_svd, by_jacobi, strict=True))


def _settled(values, mantissa, exponent, evidence) -> tuple[GradedQR, tuple]:
    nan = jnp.isnan(mantissa)
    noise = jnp.zeros_like(mantissa)
    columns = Columns(values, jnp.where(nan, 0.5, mantissa), exponent, row_scales(values), noise)
    qr = graded_qr(columns)
    return qr, _after(qr, nan, evidence)


def _after(qr: GradedQR, nan, evidence: Evidence) -> tuple:
    """Mantissas, exponents and evidence of the modes, with NaN put back."""
    mantissa = jnp.where(nan[..., : qr.mantissa.shape[-1]], jnp.nan, qr.mantissa)
    return mantissa, qr.exponent, _updated(evidence, qr)


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


def _supported(dtype):
    dtype = jnp.dtype(dtype)
    if dtype.name not in _TOLERANCE:
        raise TypeError(f"a graded product is kept in float32 or float64, not in {dtype.name}.")
    return dtype


def _transposed(matrix):
    return jnp.swapaxes(matrix, -1, -2)


def _fits(shape, batch) -> bool:
    return shape in ((), batch)
