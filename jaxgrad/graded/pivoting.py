"""QR of a matrix with graded columns, `C diag(d)`, pivoted in the logarithmic domain.

LAPACK's pivoted QR cannot be lowered for TPU and knows no extended range. Here the columns are
sorted by `log d + log |column|` and a plain blocked QR follows; only where its triangular factor
shows that the order was wrong does the true pivoting, column by column, run (in the field of
determinant quantum Monte Carlo this is known as pre-pivoting: A. Tomas et al., IPDPS 2012).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from jaxgrad.graded import scale

# Entries of the unit triangular factor that are larger than this mean a wrong order of columns.
_LARGEST_COUPLING = 16.0
# A remainder smaller than this many times its own rounding error is zero.
_ZERO_BELOW = 4.0
# How often the zeros are told apart anew, given the zeros of the rows before.
_ZERO_PASSES = 3


class GradedQR(NamedTuple):
    """`C diag(d) = left diag(d') unit P^T`, with `P` the order of the columns."""

    left: Float[Array, "*batch m s"]  # orthonormal columns; zero where d' is
    mantissa: Float[Array, "*batch s"]
    exponent: Int[Array, "*batch s"]
    unit: Float[Array, "*batch s r"]  # unit upper triangular, entries of order one
    order: Int[Array, "*batch r"]
    error: Float[Array, "*batch s"]  # estimated relative rounding error of d'
    died: Bool[Array, "*batch s"]  # d was not zero, d' is
    wrong: Bool[Array, "*batch"]  # the order of the columns was wrong, and was left so


class Columns(NamedTuple):
    """A matrix with graded columns, and what rounding has done to it so far.

    The rounding error of entry (i, k) is about `eps * rows[i] * noise[k]`, where `rows**2` sums to
    one: small rows of a Jacobian (a saturated unit) carry small errors, and keep their digits.
    """

    values: Float[Array, "*batch m r"]
    mantissa: Float[Array, "*batch r"]
    exponent: Int[Array, "*batch r"]
    rows: Float[Array, "*batch m"]
    noise: Float[Array, "*batch r"]


def graded_qr(columns: Columns, repair: bool | Bool[Array, ""] = True) -> GradedQR:
    """The pivoted QR of a matrix with graded columns. Every value must be finite.

    Args:
        columns: The matrix.
        repair: Whether a wrong order of the columns is mended, by the slow path.
    """
    if 0 in columns.values.shape[-2:]:
        return _empty_qr(columns)
    columns = _with_normalized_columns(columns)
    return GradedQR(*_pivoted_qr(*columns, jnp.asarray(repair)))


def row_scales(matrix: Float[Array, "*batch m n"]) -> Float[Array, "*batch m"]:
    """Norms of the rows, over the norm of the matrix."""
    squares = jnp.sum(matrix**2, axis=-1)
    total = jnp.sum(squares, axis=-1, keepdims=True)
    return jnp.sqrt(squares / jnp.where(total == 0, 1, total))


def _empty_qr(columns: Columns) -> GradedQR:
    *batch, height, width = columns.values.shape
    none = jnp.zeros((*batch, 0), columns.values.dtype)
    return GradedQR(
        left=jnp.zeros((*batch, height, 0), none.dtype),
        mantissa=none,
        exponent=none.astype(jnp.int32),
        unit=jnp.zeros((*batch, 0, width), none.dtype),
        order=jnp.broadcast_to(jnp.arange(width), (*batch, width)),
        error=none,
        died=none.astype(bool),
        wrong=jnp.zeros(tuple(batch), bool),
    )


def _with_normalized_columns(columns: Columns) -> Columns:
    largest = jnp.max(jnp.abs(columns.values), axis=-2, initial=0)
    shift = jnp.frexp(largest)[1].astype(jnp.int32)
    return columns._replace(
        values=scale.shifted(columns.values, -shift[..., None, :]),
        exponent=columns.exponent + shift,
        noise=scale.shifted(columns.noise, -shift),
    )


@custom_vmap
def _pivoted_qr(values, mantissa, exponent, rows, noise, repair):
    """See `graded_qr`. A batch shares one decision, so that the slow path is a real branch."""
    columns = Columns(values, mantissa, exponent, rows, noise)
    norms = jnp.linalg.norm(values, axis=-2)
    top = jnp.max(exponent, axis=-1, keepdims=True)
    score = jnp.log2(norms) + scale.log2_of(mantissa, exponent - top)
    order = jnp.argsort(-score, axis=-1)
    result = _qr_in_order(columns, order)

    def repaired(_):
        mended = _qr_in_order(columns, _pivot_order(columns, top))
        return mended._replace(wrong=jnp.zeros_like(mended.wrong))

    needed = jnp.any(result.wrong) & jnp.any(repair)
    return tuple(jax.lax.cond(needed, repaired, lambda kept: kept, result))


@_pivoted_qr.def_vmap
def _pivoted_qr_of_batch(axis_size, in_batched, *arguments):
    arguments = [
        argument if batched else jnp.broadcast_to(argument, (axis_size, *jnp.shape(argument)))
        for argument, batched in zip(arguments, in_batched, strict=True)
    ]
    results = _pivoted_qr(*arguments)
    return results, (True,) * len(results)


def _qr_in_order(columns: Columns, order) -> GradedQR:
    """QR with the columns in a given order."""
    columns = Columns(
        jnp.take_along_axis(columns.values, order[..., None, :], axis=-1),
        jnp.take_along_axis(columns.mantissa, order, axis=-1),
        jnp.take_along_axis(columns.exponent, order, axis=-1),
        columns.rows,
        jnp.take_along_axis(columns.noise, order, axis=-1),
    )
    left, triangle = _qr_with_sorted_rows(columns.values)
    count = triangle.shape[-2]
    diagonal = jnp.diagonal(triangle, axis1=-2, axis2=-1)
    zero, error, stray = _rounding(columns, left, triangle)
    was_zero = columns.mantissa[..., :count] == 0
    zero = zero | was_zero
    unit, coupling = _unit_triangle(columns, triangle, zero)
    mantissa, exponent = scale.split(
        jnp.where(zero, 0, jnp.abs(diagonal) * columns.mantissa[..., :count]),
        columns.exponent[..., :count],
    )
    left = jnp.where(zero[..., None, :], 0, left * jnp.where(diagonal < 0, -1, 1)[..., None, :])
    wrong = stray | (coupling > _LARGEST_COUPLING)
    error = jnp.where(zero, 0, error)
    return GradedQR(left, mantissa, exponent, unit, order, error, zero & ~was_zero, wrong)


def _qr_with_sorted_rows(matrix):
    """QR with large rows first: Householder's method then keeps the digits of small rows.

    Source: A. Cox, N. Higham, "Stability of Householder QR factorization for weighted least
    squares", 1998.
    """
    order = jnp.argsort(-jnp.max(jnp.abs(matrix), axis=-1), axis=-1)
    q, r = jnp.linalg.qr(jnp.take_along_axis(matrix, order[..., None], axis=-2))
    back = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(q, back[..., None], axis=-2), r


def _rounding(columns: Columns, left, triangle):
    """Which diagonal entries are zero to rounding, the error of the others, and stray content.

    Stray content is a row without a diagonal that holds more than rounding errors: a dependent
    column came before an independent one.
    """
    count, height = triangle.shape[-2], left.shape[-2]
    eps = jnp.finfo(triangle.dtype).eps
    diagonal = jnp.abs(jnp.diagonal(triangle, axis1=-2, axis2=-1))
    weight = jnp.sqrt(jnp.einsum("...ik,...i->...k", left**2, columns.rows**2))
    own = columns.noise**2 + jnp.sum(columns.values**2, axis=-2)
    remaining = jnp.sqrt(jnp.arange(height, height - count, -1).astype(triangle.dtype))
    strict = jnp.triu(jnp.ones(triangle.shape[-2:], bool), 1)

    def with_inherited(zero):
        # An error in an earlier column turns the direction that later columns are freed from.
        safe = jnp.where(zero, 1, diagonal)
        ratios = jnp.where(strict & ~zero[..., None], triangle / safe[..., None], 0)
        squares = own + jnp.einsum("...ik,...i->...k", ratios**2, own[..., :count])
        return squares, eps * weight * jnp.sqrt(squares[..., :count])

    def is_zero(error):
        return diagonal <= _ZERO_BELOW * error * remaining

    # What is zero depends on earlier rows alone: a noise row that is taken for one with content
    # would drown every later column in its ratios. The last pass must find nothing new.
    before = zero = is_zero(eps * weight * jnp.sqrt(own[..., :count]))
    for _ in range(_ZERO_PASSES):
        before, zero = zero, is_zero(with_inherited(zero)[1])
    squares, error = with_inherited(zero)
    limit = _ZERO_BELOW * eps * jnp.sqrt(squares * height)
    weighty = (columns.mantissa != 0)[..., None, :] & strict & zero[..., None]
    stray = jnp.any(weighty & (jnp.abs(triangle) > limit[..., None, :]), axis=(-2, -1))
    stray |= jnp.any(before != zero, axis=-1)
    return zero, error / jnp.where(zero, 1, diagonal), stray


def _unit_triangle(columns: Columns, triangle, zero):
    """`diag(d')^-1 R diag(d)`, rows of zero where d' is; and its largest entry off the diagonal."""
    count, width = triangle.shape[-2:]
    diagonal = jnp.diagonal(triangle, axis1=-2, axis2=-1)
    divisor = jnp.where(zero, 1, diagonal * columns.mantissa[..., :count])
    ratio = triangle * columns.mantissa[..., None, :] / divisor[..., None]
    difference = columns.exponent[..., None, :] - columns.exponent[..., :count, None]
    strict = jnp.triu(jnp.ones((count, width), bool), 1)
    above = jnp.where(strict & ~zero[..., None], scale.shifted(ratio, difference), 0)
    coupling = jnp.max(jnp.abs(above), axis=(-2, -1), initial=0)
    ones = jnp.eye(count, width, dtype=triangle.dtype)
    return above + jnp.where(zero[..., None], 0, ones), coupling


def _pivot_order(columns: Columns, top) -> Int[Array, "*batch r"]:
    """The order in which true column pivoting takes the columns: the largest remainder next."""
    height, width = columns.values.shape[-2:]
    count = min(height, width)
    eps = jnp.finfo(columns.values.dtype).eps
    level = scale.log2_of(columns.mantissa, columns.exponent - top)
    squares = columns.noise**2 + jnp.sum(columns.values**2, axis=-2)

    def step(index, state):
        remainder, position = state
        norms = jnp.sum(remainder**2, axis=-2)
        weighted = jnp.einsum("...ij,...i->...j", remainder**2, columns.rows**2)
        floor = (_ZERO_BELOW * eps) ** 2 * (height - index) * squares
        independent = (norms**2 > floor * weighted) & (norms > 0)
        score = jnp.where(independent, level + 0.5 * jnp.log2(norms), -jnp.inf)
        score = jnp.where(position < width, -jnp.inf, jnp.maximum(score, -1e30))
        pick = jnp.argmax(score, axis=-1)[..., None]
        norm = jnp.sqrt(jnp.take_along_axis(norms, pick, axis=-1))
        column = jnp.take_along_axis(remainder, pick[..., None, :], axis=-1)[..., 0]
        direction = column / jnp.where(norm == 0, 1, norm)
        along = jnp.einsum("...i,...ij->...j", direction, remainder, precision="highest")
        remainder = remainder - direction[..., None] * along[..., None, :]
        return remainder, jnp.where(jnp.arange(width) == pick, index, position)

    unpicked = jnp.broadcast_to(width + jnp.arange(width), columns.mantissa.shape)
    _, position = jax.lax.fori_loop(0, count, step, (columns.values, unpicked))
    return jnp.argsort(position, axis=-1)
