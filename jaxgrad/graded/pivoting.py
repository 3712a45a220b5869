"""LQ of a matrix with graded rows, `diag(d) C`, pivoted in the logarithmic domain.

The rows stay in their order as long as it is nearly that of `log d + log |row|`, are sorted by it
where it is not, and an LQ without pivoting follows. Where its factor shows that the order was
wrong, the rows are sorted by what it left of them, and only then by true pivoting, row by row (in
the field of determinant quantum Monte Carlo this is known as pre-pivoting: A. Tomas et al., IPDPS
2012). Rows, not columns: they lie together in memory.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from jaxgrad.graded import scale
from jaxgrad.graded.gram_schmidt import lq

# Entries of the unit triangular factor that are larger than this mean a wrong order of rows.
_LARGEST_COUPLING = 16.0
# A remainder smaller than this many times its own rounding error is zero.
_ZERO_BELOW = 4.0
# Rows that are larger than an earlier one by no more than this, in powers of two, keep their place.
_DISORDER = 2.0
# Outputs of a layer whose mean squares differ by less than this factor count as alike.
_UNEVEN = 2.0
# Squared norms of rows within these powers of two need no rescaling.
_COMFORTABLE = 60


class GradedLQ(NamedTuple):
    """`diag(d) C = P unit diag(d') vectors`, with `P` the order of the rows."""

    vectors: Float[Array, "*batch s m"]  # well-conditioned unit rows; zero where d' is
    mantissa: Float[Array, "*batch s"]
    exponent: Int[Array, "*batch s"]
    unit: Float[Array, "*batch r s"]  # unit lower triangular, entries of order one
    order: Int[Array, "*batch r"]
    inverse: Int[Array, "*batch r"]  # where the rows have gone
    moved: Bool[Array, "*batch"]  # whether any has
    error: Float[Array, "*batch s"]  # estimated relative rounding error of d'
    died: Bool[Array, "*batch s"]  # d was not zero, d' is
    wrong: Bool[Array, "*batch"]  # the order of the rows was wrong, and was left so


class Rows(NamedTuple):
    """A matrix with graded rows, and what rounding has done to it so far.

    The rounding error of entry (k, i) is about `eps * weights[i] * noise[k]`, where `weights**2`
    sums to one: a weak output of a Jacobian (a saturated unit) carries small errors, and keeps its
    digits.
    """

    values: Float[Array, "*batch r m"]
    mantissa: Float[Array, "*batch r"]
    exponent: Int[Array, "*batch r"]
    weights: Float[Array, "*batch m"]
    noise: Float[Array, "*batch r"]

    @staticmethod
    def exact(values: Array, mantissa: Array, exponent: Array) -> "Rows":
        """Rows without rounding errors; those of the next LQ are spread like the columns' norms."""
        weights = column_scales(values)
        return Rows(values, mantissa, exponent, weights, jnp.zeros_like(mantissa))


def graded_lq(
    rows: Rows, repair: bool | Bool[Array, ""] = True, orthonormal: bool = False
) -> GradedLQ:
    """The pivoted LQ of a matrix with graded rows. Every value must be finite.

    Args:
        rows: The matrix.
        repair: Whether a wrong order of the rows is mended, by the slow path.
        orthonormal: Whether `vectors` are to be orthonormal to rounding, at twice the cost.
    """
    if 0 in rows.values.shape[-2:]:
        return _empty_lq(rows)
    pivoted = _pivoted_orthonormal_lq if orthonormal else _pivoted_lq
    return pivoted(rows, jnp.asarray(repair))


def column_scales(matrix: Float[Array, "*batch m n"]) -> Float[Array, "*batch n"]:
    """Norms of the columns, over the norm of the matrix."""
    squares = jnp.sum(matrix**2, axis=-2)
    total = jnp.sum(squares, axis=-1, keepdims=True)
    return jnp.sqrt(squares / jnp.where(total == 0, 1, total))


def permuted(values: Array, order: Int[Array, "*batch r"], axis: int) -> Array:
    """The entries along an axis, counted from the end, in a given order for every batch entry."""
    index = order.reshape(*order.shape, *[1] * (-axis - 1))
    return jnp.take_along_axis(values, index, axis=axis)


def _empty_lq(rows: Rows) -> GradedLQ:
    *batch, count, width = rows.values.shape
    none = jnp.zeros((*batch, 0), rows.values.dtype)
    return GradedLQ(
        vectors=jnp.zeros((*batch, 0, width), none.dtype),
        mantissa=none,
        exponent=none.astype(jnp.int32),
        unit=jnp.zeros((*batch, count, 0), none.dtype),
        order=jnp.broadcast_to(jnp.arange(count), (*batch, count)),
        inverse=jnp.broadcast_to(jnp.arange(count), (*batch, count)),
        moved=jnp.zeros(tuple(batch), bool),
        error=none,
        died=none.astype(bool),
        wrong=jnp.zeros(tuple(batch), bool),
    )


def _batched(function):
    """`function` of pytrees, one batch for all of them, so that its branches stay real branches."""
    function = custom_vmap(function)

    @function.def_vmap
    def _rule(axis_size, in_batched, *arguments):
        results = function(*with_batch_axis(axis_size, in_batched, arguments))
        return results, jax.tree.map(lambda _: True, results)

    return function


def with_batch_axis(axis_size, in_batched, arguments):
    """Every leaf with the leading batch axis that some of them have."""
    leaves, structure = jax.tree.flatten(arguments)
    leaves = [
        leaf if batched else jnp.broadcast_to(leaf, (axis_size, *jnp.shape(leaf)))
        for leaf, batched in zip(leaves, jax.tree.leaves(in_batched), strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def _pivoted(rows: Rows, repair, orthonormal: bool) -> GradedLQ:
    """See `graded_lq`. A batch shares one decision, so that the slow path is a real branch."""
    rows, squares = _in_comfortable_range(rows)
    # From here on, noise counts the rounding errors of the LQ too.
    rows = rows._replace(noise=jnp.sqrt(rows.noise**2 + squares))
    score = _levels(rows.mantissa, rows.exponent) + 0.5 * jnp.log2(squares)
    ahead = jax.lax.cummax(score, axis=score.ndim - 1, reverse=True)
    disorder = jnp.any(ahead[..., 1:] - score[..., :-1] > _DISORDER)
    first = jnp.broadcast_to(jnp.arange(score.shape[-1]), score.shape)
    first = jax.lax.cond(disorder, lambda: jnp.argsort(-score, axis=-1), lambda: first)

    def unfinished(state):
        attempt, _, _, result = state
        return (attempt == 0) | (jnp.any(result[-1]) & jnp.any(repair) & (attempt < 3))

    def attempt(state):
        index, order, moved, _ = state
        ordered = jax.lax.cond(moved, lambda: _in_order(rows, order), lambda: rows)
        result = _lq_in_order(ordered, orthonormal)
        again = jnp.any(result[-1]) & jnp.any(repair) & (index < 2)
        following = jax.lax.cond(
            again, lambda: _better_order(index, rows, order, result), lambda: order
        )
        return index + 1, following, moved | again, result

    shapes = jax.eval_shape(partial(_lq_in_order, orthonormal=orthonormal), rows)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    start = jnp.int32(0), first, disorder, nothing
    _, order, moved, result = jax.lax.while_loop(unfinished, attempt, start)
    vectors, mantissa, exponent, unit, error, died, wrong = result
    wrong = wrong & ~jnp.any(repair)
    inverse = jax.lax.cond(moved, lambda: jnp.argsort(order, axis=-1), lambda: order)
    moved = jnp.broadcast_to(moved, wrong.shape)
    return GradedLQ(vectors, mantissa, exponent, unit, order, inverse, moved, error, died, wrong)


_pivoted_lq = _batched(lambda rows, repair: _pivoted(rows, repair, orthonormal=False))
_pivoted_orthonormal_lq = _batched(lambda rows, repair: _pivoted(rows, repair, orthonormal=True))


def _levels(mantissa, exponent):
    """Binary logarithms, up to a common summand that would cost digits."""
    lowest = -(2**30)
    top = jnp.max(jnp.where(mantissa == 0, lowest, exponent), axis=-1, keepdims=True)
    return scale.log2_of(mantissa, jnp.where(mantissa == 0, 0, exponent - top))


def _in_comfortable_range(rows: Rows):
    """Norms of order one, where one has moved far away from it; and the squares of the norms."""
    squares = jnp.sum(rows.values**2, axis=-1)

    def rescaled():
        shift = jnp.frexp(jnp.max(jnp.abs(rows.values), axis=-1))[1].astype(jnp.int32)
        near = rows._replace(
            values=scale.shifted(rows.values, -shift[..., None]),
            exponent=rows.exponent + shift,
            noise=scale.shifted(rows.noise, -shift),
        )
        return near, jnp.sum(near.values**2, axis=-1)

    comfortable = (squares > 2.0**-_COMFORTABLE) & (squares < 2.0**_COMFORTABLE)
    far = jnp.any((rows.mantissa != 0) & ~comfortable)
    return jax.lax.cond(far, rescaled, lambda: (rows, squares))


def _in_order(rows: Rows, order) -> Rows:
    return Rows(
        permuted(rows.values, order, -2),
        permuted(rows.mantissa, order, -1),
        permuted(rows.exponent, order, -1),
        rows.weights,
        permuted(rows.noise, order, -1),
    )


def _lq_in_order(rows: Rows, orthonormal: bool):
    """LQ with the rows in their order: the fields of GradedLQ without the order."""
    lower, vectors = lq(rows.values, orthonormal)
    count = vectors.shape[-2]
    diagonal = jnp.diagonal(lower, axis1=-2, axis2=-1)
    zero, error, stray = _rounding(rows, lower, vectors)
    was_zero = rows.mantissa[..., :count] == 0
    zero = zero | was_zero
    unit, coupling = _unit_triangle(rows, lower, zero)
    mantissa, exponent = scale.split(
        jnp.where(zero, 0, diagonal * rows.mantissa[..., :count]), rows.exponent[..., :count]
    )
    vectors = jax.lax.cond(
        jnp.any(zero), lambda: jnp.where(zero[..., None], 0, vectors), lambda: vectors
    )
    wrong = stray | ~(coupling <= _LARGEST_COUPLING)
    error = jnp.where(zero, 0, error)
    return vectors, mantissa, exponent, unit, error, zero & ~was_zero, wrong


def _rounding(rows: Rows, lower, vectors):
    """Which diagonal entries are zero to rounding, the error of the others, and stray content.

    Stray content is a column without a diagonal that holds more than rounding errors: a dependent
    row came before an independent one.
    """
    count, width = vectors.shape[-2:]
    eps = jnp.finfo(lower.dtype).eps
    diagonal = jnp.diagonal(lower, axis1=-2, axis2=-1)
    weight = jax.lax.cond(
        jnp.any(rows.weights**2 * width > _UNEVEN),
        lambda: jnp.sqrt(jnp.sum(vectors**2 * rows.weights[..., None, :] ** 2, axis=-1)),
        lambda: jnp.full(diagonal.shape, width**-0.5, lower.dtype),
    )
    squares = rows.noise**2
    own = eps * weight * jnp.sqrt(squares[..., :count])
    remaining = jnp.sqrt(jnp.arange(width, width - count, -1).astype(lower.dtype))
    zero = diagonal <= _ZERO_BELOW * own * remaining
    # An error in an earlier row turns the direction that later rows are freed from.
    relative = jnp.where(zero, 0, squares[..., :count] / jnp.where(zero, 1, diagonal) ** 2)
    turned = jnp.sum(lower**2 * relative[..., None, :], axis=-1)
    with_own = jnp.pad(zero, [(0, 0)] * (zero.ndim - 1) + [(0, lower.shape[-2] - count)])
    with_own = with_own | (jnp.arange(lower.shape[-2]) >= count)
    squares = turned + jnp.where(with_own, squares, 0)
    own = eps * weight * jnp.sqrt(squares[..., :count])
    zero = diagonal <= _ZERO_BELOW * own * remaining

    def stray():
        limit = _ZERO_BELOW * eps * jnp.sqrt(squares * width)
        below = jnp.tril(jnp.ones(lower.shape[-2:], bool), -1)
        weighty = (rows.mantissa != 0)[..., None] & below & zero[..., None, :]
        return jnp.any(weighty & (jnp.abs(lower) > limit[..., None]), axis=(-2, -1))

    nowhere = jnp.zeros(zero.shape[:-1], bool)
    lost = jax.lax.cond(jnp.any(zero), stray, lambda: nowhere)
    return zero, own / jnp.where(zero, 1, diagonal), lost


def _unit_triangle(rows: Rows, lower, zero):
    """`diag(d) L diag(d')^-1`, columns of zero where d' is, and its largest entry."""
    length, count = lower.shape[-2:]
    diagonal = jnp.diagonal(lower, axis1=-2, axis2=-1)
    divisor = jnp.where(zero, 1, diagonal * rows.mantissa[..., :count])
    inverse = jnp.where(zero, 0, 1 / divisor)
    difference = rows.exponent[..., None] - rows.exponent[..., None, :count]
    # What lies below the dtype's range does not matter here: 1e-38 beside a one.
    factor = scale.power_of_two(jnp.clip(difference, *_exponents(lower.dtype)), lower.dtype)
    ratio = lower * rows.mantissa[..., None] * inverse[..., None, :] * factor
    row, column = jnp.arange(length)[:, None], jnp.arange(count)
    ones = jnp.where(row == column, jnp.where(zero, 0, 1)[..., None, :], 0)
    # Without the barrier the compiler computes all of it twice, for the maximum too.
    unit = jax.lax.optimization_barrier(jnp.where(row > column, ratio, ones))
    return unit, jnp.max(jnp.abs(unit), axis=(-2, -1), initial=0)


def _exponents(dtype) -> tuple[int, int]:
    info = jnp.finfo(dtype)
    return int(info.minexp), int(info.maxexp) - 1


def _better_order(attempt, rows: Rows, order, result) -> Int[Array, "*batch r"]:
    """After a wrong order: first by what it left of the rows, then by true pivoting."""
    _, mantissa, exponent, *_ = result
    if mantissa.shape[-1] < order.shape[-1]:  # what would be left of the others is not known
        return _pivot_order(rows)
    levels = _levels(mantissa, exponent)
    return jax.lax.cond(
        attempt == 0,
        lambda: permuted(order, jnp.argsort(-levels, axis=-1), -1),
        lambda: _pivot_order(rows),
    )


def _pivot_order(rows: Rows) -> Int[Array, "*batch r"]:
    """The order in which true pivoting takes the rows: the largest remainder next."""
    length, width = rows.values.shape[-2:]
    eps = jnp.finfo(rows.values.dtype).eps
    level = _levels(rows.mantissa, rows.exponent)
    squares = rows.noise**2

    def step(index, state):
        remainder, position = state
        norms = jnp.sum(remainder**2, axis=-1)
        weighted = jnp.einsum("...ki,...i->...k", remainder**2, rows.weights**2)
        floor = (_ZERO_BELOW * eps) ** 2 * (width - index) * squares
        independent = (norms**2 > floor * weighted) & (norms > 0)
        score = jnp.where(independent, level + 0.5 * jnp.log2(norms), -jnp.inf)
        score = jnp.where(position < length, -jnp.inf, jnp.maximum(score, -1e30))
        pick = jnp.argmax(score, axis=-1)[..., None]
        norm = jnp.sqrt(jnp.take_along_axis(norms, pick, axis=-1))
        row = jnp.take_along_axis(remainder, pick[..., None], axis=-2)[..., 0, :]
        direction = row / jnp.where(norm == 0, 1, norm)
        along = jnp.einsum("...i,...ki->...k", direction, remainder, precision="highest")
        remainder = remainder - along[..., None] * direction[..., None, :]
        return remainder, jnp.where(jnp.arange(length) == pick, index, position)

    unpicked = jnp.broadcast_to(length + jnp.arange(length), rows.mantissa.shape)
    count = min(length, width)
    _, position = jax.lax.fori_loop(0, count, step, (rows.values, unpicked))
    return jnp.argsort(position, axis=-1)
