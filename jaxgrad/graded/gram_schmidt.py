"""Orthogonalization of rows by matrix products: block Gram-Schmidt over small Cholesky factors.

LAPACK's QR, one matrix of a batch after the other, costs as much as 30 products of 256 x 256 on a
CPU; this costs two to three, and lowers for every platform. Its residual is as small as
Householder's, row by row. Its rows are orthonormal only to rounding times the condition
number (A. Bjorck, "Solving linear least squares problems by Gram-Schmidt orthogonalization", 1967),
which a stratified product can bear: what it needs is a well-conditioned basis.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Rows that are orthogonalized through their Gram matrix; more would square a larger condition
# number, fewer would make the products small.
_LEAF = 32
# A pivot of a Gram matrix below this many eps is noise. Beside small pivots one pass has not made
# the rows orthogonal to rounding, and what they miss of a later row would drown its remainder.
_FLOOR = 64.0
_BENIGN = 0.02
_LOSS = 1e4
_MOST_PASSES = 4


def lq(
    rows: Float[Array, "*batch r m"], orthonormal: bool = False
) -> tuple[Float[Array, "*batch r s"], Float[Array, "*batch s m"]]:
    """`rows = lower @ vectors`, with s = min(r, m) well-conditioned unit rows in `vectors`.

    Args:
        rows: Finite, of moderate range. A row of zeros gives a row of zeros in both factors.
        orthonormal: Whether to pay twice for rows that are orthonormal to rounding, as they always
            are if r > m: then the later rows are known by their projections only.
    """
    count = min(rows.shape[-2:])
    first = rows[..., :count, :]
    if orthonormal or count < rows.shape[-2]:
        unit = jnp.broadcast_to(jnp.eye(count, dtype=rows.dtype), (*first.shape[:-1], count))

        def again(_, factors):
            lower, vectors = _orthogonalized(factors[1])
            return _times(factors[0], lower), vectors

        lower, vectors = jax.lax.fori_loop(0, 2, again, (unit, first))
    else:
        lower, vectors = _orthogonalized(first)
        if count > _LEAF:
            lower, vectors = _mended(first, lower, vectors)
    if count == rows.shape[-2]:
        return lower, vectors
    lowest = _times(rows[..., count:, :], _transposed(vectors))
    return jnp.concatenate([lower, lowest], axis=-2), vectors


def _mended(rows, lower, vectors):
    """Once more, if blocks may have lost their orthogonality.

    Several blocks are projected out at once (classical Gram-Schmidt), so that the loss is some ten
    eps over the square of the smallest relative pivot, of all blocks that others come after.
    """
    before = (rows.shape[-2] - 1) // _LEAF * _LEAF
    pivots = jnp.diagonal(lower, axis1=-2, axis2=-1)[..., :before] ** 2
    squares = jnp.sum(rows[..., :before, :] ** 2, axis=-1)
    lost = jnp.any(pivots < _LOSS * jnp.finfo(rows.dtype).eps * squares)

    def again():
        factor, better = _orthogonalized(vectors)
        return _times(lower, factor), better

    return jax.lax.cond(lost, again, lambda: (lower, vectors))


def _orthogonalized(rows):
    """Halves: the first one, then what the second one has beyond it."""
    count = rows.shape[-2]
    if count <= _LEAF:
        return _leaf(rows)
    half = -(-count // (2 * _LEAF)) * _LEAF
    upper_factor, upper = _orthogonalized(rows[..., :half, :])
    along = _times(rows[..., half:, :], _transposed(upper))
    lower_factor, lower = _orthogonalized(rows[..., half:, :] - _times(along, upper))
    right = [(0, 0)] * (rows.ndim - 1) + [(0, count - half)]
    upper_factor = jnp.pad(upper_factor, right)
    lower_factor = jnp.concatenate([along, lower_factor], axis=-1)
    factor = jnp.concatenate([upper_factor, lower_factor], axis=-2)
    return factor, jnp.concatenate([upper, lower], axis=-2)


def _leaf(rows):
    """Few rows, by the Cholesky factor of their Gram matrix, again until that was benign.

    Source: T. Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of
    ill-conditioned matrices", 2020; here small pivots are raised instead of all of them.
    """

    def magnified(state):
        _, _, smallest, passes = state
        return (smallest < _BENIGN) & (passes < _MOST_PASSES)

    def improved(state):
        factors, vectors, _, passes = state
        (lower, inverse), vectors, smallest = _pass(vectors)
        factors = _times(factors[0], lower), _times(inverse, factors[1])
        return factors, vectors, smallest, passes + 1

    first = *_pass(rows), jnp.int32(1)
    (lower, inverse), vectors, _, passes = jax.lax.while_loop(magnified, improved, first)

    def refined():
        return vectors + _times(inverse, rows - _times(lower, vectors))

    return lower, jax.lax.cond(passes > 1, refined, lambda: vectors)


def _pass(rows):
    """`rows = lower @ vectors`, the inverse of `lower`, and the smallest squared pivot."""
    gram = _times(rows, _transposed(rows))
    norms = jnp.sqrt(jnp.diagonal(gram, axis1=-2, axis2=-1))
    safe = jnp.where(norms == 0, 1, norms)
    gram = gram / (safe[..., None] * safe[..., None, :])
    lower, inverse = _cholesky(jnp.where(jnp.eye(rows.shape[-2], dtype=bool), 1, gram))
    inverse = inverse / safe[..., None, :]
    smallest = jnp.min(jnp.diagonal(lower, axis1=-2, axis2=-1)) ** 2
    return (norms[..., None] * lower, inverse), _times(inverse, rows), smallest


def _cholesky(gram):
    """The lower factor of a Gram matrix of unit vectors, and its inverse. Pivots stay positive.

    Elimination of [gram, identity] to [lower^T, inverse], in place: step k empties column k of the
    one and begins column k of the other.
    """
    count = gram.shape[-1]
    floor = _FLOOR * jnp.finfo(gram.dtype).eps
    index = jnp.arange(count)
    row_index = index[:, None]

    def step(k, both):
        row = jax.lax.dynamic_slice_in_dim(both, k, 1, -2)
        pivot = jnp.maximum(jax.lax.dynamic_slice_in_dim(row, k, 1, -1), floor)
        scale = jax.lax.rsqrt(pivot)
        row = jnp.where(index == k, 1, row) * scale
        below = jax.lax.dynamic_slice_in_dim(both, k, 1, -1) * scale
        rest = jnp.where(index == k, 0, both) - below * row
        return jnp.where(row_index > k, rest, jnp.where(row_index == k, row, both))

    both = jax.lax.fori_loop(0, count, step, gram)
    inverse = jnp.tril(both)
    lower = jnp.tril(_transposed(both), -1)
    pivots = 1 / jnp.diagonal(inverse, axis1=-2, axis2=-1)
    return jnp.where(index == row_index, pivots[..., None, :], lower), inverse


def _times(a, b):
    return jnp.matmul(a, b, precision="highest")


def _transposed(a):
    return jnp.swapaxes(a, -1, -2)
