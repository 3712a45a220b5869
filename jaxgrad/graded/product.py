"""`Graded`: a matrix product as `left diag(d) right`, with `d` on a logarithmic scale.

`left` and `right` are well-conditioned, and every bit of range lives in `d`, a mantissa and an
integer exponent for every mode. A layer multiplies `left`, and a pivoted QR moves what it did to
the modes into `d`. The method is the stratified product of determinant quantum Monte Carlo (E. Loh
et al. 1992; Z. Bai et al., "Stable solutions of linear systems involving long chain of matrix
multiplications", 2011), here for rectangular and singular factors, and with a certificate.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxgrad.graded import scale
from jaxgrad.graded.drift import inherited, no_drift
from jaxgrad.graded.pivoting import Columns, graded_qr, rounding_of_sums, row_scales
from jaxgrad.graded.spectrum import (
    TOLERANCE,
    Certificate,
    Evidence,
    Spectrum,
    after,
    of_transposed,
    spectrum_of,
    transposed,
)

# Compiled whole: one operation after the other would take many times as long.
_spectrum_of = jax.jit(spectrum_of)


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
        layers = jnp.zeros(batch_shape, jnp.int32)
        drift = no_drift(batch_shape, n, dtype)
        evidence = Evidence(jnp.zeros_like(eye), zero, zero, drift, layers)
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
        left, right = transposed(self.right), transposed(self.left)
        return replace(self, left=left, right=right, evidence=of_transposed(self.evidence))

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
        return self.T.left_multiply(transposed(jnp.asarray(matrix))).T

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
        overtaken = jnp.max(self.evidence.overtaken, axis=-1, initial=0)[..., None]
        known = jnp.where(self.mantissa == 0, 0, self.evidence.variance)
        variance = jnp.max(known, axis=-1, initial=0)[..., None]
        evidence = product.evidence
        evidence = replace(
            evidence,
            overtaken=jnp.maximum(evidence.overtaken, overtaken),
            variance=evidence.variance + variance,
            drift=inherited(evidence.drift, product.left, self.evidence.drift, self.left),
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
        return _spectrum_of(self)

    def log_singular_values(self) -> Float[Array, "*batch count"]:
        """Natural logarithms of all min(n_out, n_in) singular values, descending.

        -inf beyond the rank. `spectrum()` has the same as pairs, and the certificate with it.
        """
        return _spectrum_of(self).log()

    @property
    def certificate(self) -> Certificate:
        """How far each singular value can be trusted; computes the spectrum."""
        return _spectrum_of(self).certificate

    @property
    def rank(self) -> Int[Array, "*batch"]:
        """Number of singular values above rounding; -1 where the product is NaN."""
        rank = jnp.sum(self.mantissa != 0, axis=-1)
        return jnp.where(jnp.any(jnp.isnan(self.mantissa), axis=-1), -1, rank)

    def log_abs_det(self) -> Float[Array, "*batch"]:
        """Natural logarithm of the absolute determinant of a square product; 0 for size zero."""
        if self.shape[-1] != self.shape[-2]:
            raise ValueError(f"log_abs_det needs a square product, got the shape {self.shape}.")
        spectrum = _spectrum_of(self)
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
    """A product that layers have been multiplied to without orthogonalizing again.

    Attributes:
        columns: the left factor, the pending layers multiplied to it, and the scales.
        right: the right factor.
        evidence: what rounding may have done so far.
        most: a bound of the rank that needs no arithmetic: rows and columns of the pending layers
            that are not all zeros.
    """

    columns: Columns
    right: Float[Array, "*batch r n_in"]
    evidence: Evidence
    most: Int[Array, "*batch"]

    @staticmethod
    def of(product: Graded) -> "Pending":
        """Nothing is pending."""
        noise = jnp.zeros_like(product.mantissa)
        rows = row_scales(product.left)
        nothing = jnp.zeros_like(product.left)
        columns = Columns(product.left, product.mantissa, product.exponent, rows, noise, nothing)
        most = jnp.full(product.mantissa.shape[:-1], product.mantissa.shape[-1], jnp.int32)
        return Pending(columns, product.right, product.evidence, most)

    def pushed(self, matrix: Float[ArrayLike, "..."], first: bool = True) -> "Pending":
        """One more layer, as a plain product.

        Args:
            matrix: (n, n_out) or (batch..., n, n_out).
            first: Whether nothing is pending; the errors are then known entry by entry.
        """
        matrix = jnp.asarray(matrix)
        old = self.columns
        batch, height = old.values.shape[:-2], old.values.shape[-2]
        if matrix.ndim < 2 or matrix.shape[-1] != height or not _fits(matrix.shape[:-2], batch):
            raise ValueError(
                f"a layer Jacobian of shape (batch..., n, {height}) with the batch axes {batch} is "
                f"needed, or one without batch axes; got the shape {matrix.shape}."
            )
        matrix = jnp.broadcast_to(matrix.astype(old.values.dtype), (*batch, *matrix.shape[-2:]))
        there = scale.is_nonzero(matrix)
        sides = [jnp.sum(jnp.any(there, axis), -1, dtype=jnp.int32) for axis in (-1, -2)]
        most = jnp.minimum(self.most, jnp.minimum(*sides))
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
        rows = row_scales(matrix)
        spread = old.spread
        if first:
            sizes = jnp.where(rows == 0, 1, rows)[..., None]
            spread = sizes * jnp.sqrt(jnp.matmul((matrix / sizes) ** 2, old.values**2))
            spread = rounding_of_sums(height) * spread
        exponent = old.exponent + shift[..., None]
        columns = Columns(values, mantissa, exponent, rows, noise, spread)
        return replace(self, columns=columns, most=most)

    def settled(
        self, repair: bool | Bool[Array, ""] = True
    ) -> tuple[Graded, Float[Array, "*batch"]]:
        """Moves what the pending layers did into the scales.

        Args:
            repair: Whether a single layer is pending: a wrong order of the columns is then mended,
                by a slow path, and its errors are known entry by entry. Without it the loss of such
                a product is inf.

        Returns:
            The product, and the largest relative rounding error that the pending layers made: inf
            when a mode fell below rounding.
        """
        nan = jnp.isnan(self.columns.mantissa)
        columns = self.columns._replace(mantissa=jnp.where(nan, 0.5, self.columns.mantissa))
        outer = columns.rows[..., None] * columns.noise[..., None, :]
        outer = rounding_of_sums(columns.values.shape[-2]) * outer
        columns = columns._replace(spread=jnp.where(repair, columns.spread, outer))
        qr = graded_qr(columns, repair)
        mantissa, exponent, evidence = after(qr, nan, self.evidence, self.most)
        right = jnp.take_along_axis(self.right, qr.order[..., None], axis=-2)
        right = jnp.matmul(qr.unit, right, precision="highest")
        lost = qr.wrong | jnp.any(qr.died, axis=-1)
        loss = jnp.where(lost, jnp.inf, jnp.max(qr.error, axis=-1, initial=0))
        loss = jnp.where(jnp.any(nan, axis=-1), 0, loss)  # nothing is left to lose
        return Graded(qr.left, mantissa, exponent, right, evidence), loss


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


def _supported(dtype):
    dtype = jnp.dtype(dtype)
    if dtype.name not in TOLERANCE:
        raise TypeError(f"a graded product is kept in float32 or float64, not in {dtype.name}.")
    return dtype


def _fits(shape, batch) -> bool:
    return shape in ((), batch)
