"""QR of a matrix with graded columns, `C diag(d)`, pivoted in the logarithmic domain.

LAPACK's pivoted QR cannot be lowered for TPU and knows no extended range. Here the columns are
sorted by `log d + log |column|` and a plain blocked QR follows; only where its triangular factor
shows that the order was wrong does the true pivoting, column by column, run (in the field of
determinant quantum Monte Carlo this is known as pre-pivoting: A. Tomas et al., IPDPS 2012).
"""

import math
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
# The rounding error of a sum of n products, over eps and the root of the sum of their squares: it
# grows with the root of n (0.15 of it for equal terms, measured on CPUs for n from 16 to 512; a
# large first term makes it 0.2), and is not below the first number.
_ROUNDING, _ROUNDING_OF_LONG_SUMS = 0.5, 0.2
_LIFT = 2.0**40
# How often the zeros are told apart anew, given the zeros of the rows before.
_ZERO_PASSES = 3


class GradedQR(NamedTuple):
    """`C diag(d) = left diag(d') unit P^T`, with `P` the order of the columns."""

    left: Float[Array, "*batch m s"]  # orthonormal columns; zero where d' is
    triangle: Float[Array, "*batch s r"]  # of C P, zero where d' is
    spread: Float[Array, "*batch m r"]  # rounding errors of C and of this QR, in units of eps
    residual: Float[Array, "*batch m r"]  # what left * triangle lacks, in the same units
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
    spread: Float[Array, "*batch m r"]  # the same entry by entry, where that is known


def graded_qr(columns: Columns, repair: bool | Bool[Array, ""] = True) -> GradedQR:
    """The pivoted QR of a matrix with graded columns. Every value must be finite.

    Args:
        columns: The matrix.
        repair: Whether a wrong order of the columns is mended, by the slow path.
    """
    if 0 in columns.values.shape[-2:]:
        return _empty_qr(columns)
    normalized = _with_normalized_columns(columns)
    qr = _pivoted_qr(normalized, jnp.asarray(repair))
    shift = normalized.exponent - columns.exponent
    in_order = jnp.take_along_axis(shift, qr.order, axis=-1)
    return qr._replace(
        triangle=scale.shifted(qr.triangle, in_order[..., None, :]),
        spread=scale.shifted(qr.spread, shift[..., None, :]),
        residual=scale.shifted(qr.residual, shift[..., None, :]),
    )


def row_scales(matrix: Float[Array, "*batch m n"]) -> Float[Array, "*batch m"]:
    """Norms of the rows, over the norm of the matrix; squares of small rows would underflow."""
    largest = jnp.max(jnp.abs(matrix), axis=-1, initial=0)
    unit = matrix / jnp.where(largest == 0, 1, largest)[..., None]
    norms = largest * jnp.sqrt(jnp.sum(unit**2, axis=-1))
    total = jnp.linalg.norm(norms, axis=-1, keepdims=True)
    return norms / jnp.where(total == 0, 1, total)


def rounding_of_sums(terms: int) -> float:
    """Error of a rounded sum of products, over eps and the root of the sum of their squares."""
    return max(_ROUNDING, _ROUNDING_OF_LONG_SUMS * math.sqrt(terms))


def _empty_qr(columns: Columns) -> GradedQR:
    *batch, height, width = columns.values.shape
    none = jnp.zeros((*batch, 0), columns.values.dtype)
    return GradedQR(
        left=jnp.zeros((*batch, height, 0), none.dtype),
        triangle=jnp.zeros((*batch, 0, width), none.dtype),
        spread=jnp.zeros_like(columns.values),
        residual=jnp.zeros_like(columns.values),
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
        spread=scale.shifted(columns.spread, -shift[..., None, :]),
    )


@custom_vmap
def _pivoted_qr(columns, repair):
    """See `graded_qr`. A batch shares one decision, so that the slow path is a real branch."""
    norms = jnp.linalg.norm(columns.values, axis=-2)
    top = jnp.max(columns.exponent, axis=-1, keepdims=True)
    score = jnp.log2(norms) + scale.log2_of(columns.mantissa, columns.exponent - top)
    order = jnp.argsort(-score, axis=-1)

    result = _qr_in_order(columns, order)

    def repaired(_):
        return _qr_in_order(columns, _pivot_order(columns, top))

    needed = jnp.any(result.wrong) & jnp.any(repair)
    return jax.lax.cond(needed, repaired, lambda kept: kept, result)


@_pivoted_qr.def_vmap
def _pivoted_qr_of_batch(axis_size, in_batched, *arguments):
    def spread(argument, batched):
        return (
            argument if batched else jnp.broadcast_to(argument, (axis_size, *jnp.shape(argument)))
        )

    result = _pivoted_qr(*jax.tree.map(spread, arguments, tuple(in_batched)))
    return result, jax.tree.map(lambda _: True, result)


def _qr_in_order(columns: Columns, order) -> GradedQR:
    """QR with the columns in a given order."""
    before, columns = columns, _in_order(columns, order)
    left, triangle = _qr_with_sorted_rows(columns.values)
    lacking = columns.values - jnp.matmul(left, triangle, precision="highest")
    spread, residual = _errors(before, lacking, order)
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
    sign = jnp.where(zero, 0, jnp.where(diagonal < 0, -1, 1))
    left, triangle = left * sign[..., None, :], triangle * sign[..., None]
    wrong = stray | (coupling > _LARGEST_COUPLING)
    error = jnp.where(zero, 0, error)
    died = zero & ~was_zero
    return GradedQR(
        left, triangle, spread, residual, mantissa, exponent, unit, order, error, died, wrong
    )


def _errors(columns: Columns, lacking, order):
    """Spread and residual of a QR, in units of eps and in the columns' own order.

    No rule foretells the errors of the QR: in an order of columns that the scales demand, small
    rows take on errors up to hundreds of times larger than the rows are. So they are measured; but
    what measures them is rounded likewise, so that they count as known (where equal layers follow
    each other, the same error comes back at every one) and as unknown.
    """
    sizes = jnp.linalg.norm(columns.values, axis=-2)
    rule = _ROUNDING * row_scales(columns.values)[..., None] * sizes[..., None, :]
    back = jnp.argsort(order, axis=-1)[..., None, :]
    residual = jnp.take_along_axis(lacking, back, axis=-1) / jnp.finfo(lacking.dtype).eps
    return jnp.sqrt(columns.spread**2 + rule**2 + residual**2), residual


def _in_order(columns: Columns, order) -> Columns:
    def taken(values):
        return jnp.take_along_axis(values, order, axis=-1)

    def columns_of(matrix):
        return jnp.take_along_axis(matrix, order[..., None, :], axis=-1)

    return Columns(
        columns_of(columns.values),
        taken(columns.mantissa),
        taken(columns.exponent),
        columns.rows,
        taken(columns.noise),
        columns_of(columns.spread),
    )


def _qr_with_sorted_rows(matrix):
    """QR with large rows first: Householder's method then keeps the digits of small rows.

    Source: A. Cox, N. Higham, "Stability of Householder QR factorization for weighted least
    squares", 1998.
    """
    order = jnp.argsort(-jnp.max(jnp.abs(matrix), axis=-1), axis=-1)
    q, r = jnp.linalg.qr(jnp.take_along_axis(matrix, order[..., None], axis=-2))
    back = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(q, back[..., None], axis=-2), r


def _row_weights(left, rows):
    """The size of the rows that every column of `left` lives on; lifted, as squares underflow."""
    squares = jnp.einsum("...ik,...i->...k", left**2, (_LIFT * rows) ** 2)
    return jnp.sqrt(squares) / _LIFT


def _rounding(columns: Columns, left, triangle):
    """Which diagonal entries are zero to rounding, the error of the others, and stray content.

    Stray content is a row without a diagonal that holds more than rounding errors: a dependent
    column came before an independent one.
    """
    count, height = triangle.shape[-2], left.shape[-2]
    eps = jnp.finfo(triangle.dtype).eps
    diagonal = jnp.abs(jnp.diagonal(triangle, axis1=-2, axis2=-1))
    weight = _row_weights(left, columns.rows)
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
    """The order in which true column pivoting takes the columns: the largest remainder next.

    By Householder reflections that bring the largest entry of the column up: rounding errors of
    large rows then stay out of small ones (A. Cox, N. Higham 1998), deep into a graded matrix.
    """
    height, width = columns.values.shape[-2:]
    count = min(height, width)
    eps = jnp.finfo(columns.values.dtype).eps
    level = scale.log2_of(columns.mantissa, columns.exponent - top)
    squares = columns.noise**2 + jnp.sum(columns.values**2, axis=-2)

    def step(index, state):
        rest, rows, position = state
        below = jnp.arange(height)[:, None] >= index
        largest = jnp.max(jnp.abs(jnp.where(below, rest, 0)), axis=-2)
        unit = jnp.where(below, rest, 0) / jnp.where(largest == 0, 1, largest)[..., None, :]
        norms = jnp.linalg.norm(unit, axis=-2)
        weighted = jnp.linalg.norm(unit * rows[..., None], axis=-2)
        floor = _ZERO_BELOW * eps * jnp.sqrt((height - index) * squares)
        independent = (largest * norms**2 > floor * weighted) & (norms > 0)
        score = jnp.where(independent, level + jnp.log2(norms) + jnp.log2(largest), -jnp.inf)
        score = jnp.where(position < width, -jnp.inf, jnp.maximum(score, -1e30))
        pick = jnp.argmax(score, axis=-1)[..., None]
        column = jnp.take_along_axis(unit, pick[..., None, :], axis=-1)[..., 0]
        rest, rows = _eliminated(rest, rows, column, index)
        return rest, rows, jnp.where(jnp.arange(width) == pick, index, position)

    unpicked = jnp.broadcast_to(width + jnp.arange(width), columns.mantissa.shape)
    start = columns.values, columns.rows, unpicked
    *_, position = jax.lax.fori_loop(0, count, step, start)
    return jnp.argsort(position, axis=-1)


def _eliminated(rest, rows, column, index):
    """The row of the column's largest entry swapped up to `index`, and the rows below reflected."""
    here = jnp.arange(column.shape[-1])
    chosen = jnp.argmax(jnp.abs(column), axis=-1)[..., None]
    swap = jnp.where(here == index, chosen, jnp.where(here == chosen, index, here))
    column, rows = (jnp.take_along_axis(values, swap, axis=-1) for values in (column, rows))
    rest = jnp.take_along_axis(rest, swap[..., None], axis=-2)
    norm = jnp.linalg.norm(column, axis=-1, keepdims=True)
    head = jnp.where(jnp.sum(jnp.where(here == index, column, 0), -1, keepdims=True) < 0, -1, 1)
    mirror = column + jnp.where(here == index, head * norm, 0)
    squares = jnp.sum(mirror**2, axis=-1, keepdims=True)
    mirror = mirror * jnp.sqrt(2 / jnp.where(squares == 0, 1, squares))
    along = jnp.einsum("...i,...ij->...j", mirror, rest, precision="highest")
    return rest - mirror[..., None] * along[..., None, :], rows
