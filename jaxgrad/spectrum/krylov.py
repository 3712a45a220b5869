"""The largest singular values of an operator: block Golub-Kahan-Lanczos, restarted.

With `V` and `U` orthonormal, the method keeps `A V = U H` and `A^T U = V H^T + (next V) C`. The
singular values of the small `H` approach the largest ones of `A` from below. Every new vector is
orthogonalized against all former ones, twice, and all coefficients are kept in `H`, not only the
bidiagonal ones: so a thick restart (J. Baglama, L. Reichel 2005) needs no special case.

Blocks find a value of multiplicity up to the block's size, which single vectors miss: convolutions
have every value twice or more. Where a block loses rank, random vectors take the free places: `A`
then splits in two, and the other part is searched too.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgrad.graded import scale

# rows (count, examples, n) -> products with largest entries in [1/2, 1), and their exponents
Product = Callable[[Array], tuple[Array, Array]]

_BASIS_BYTES = 2**29  # for both bases together
_BREAKDOWN = 10.0  # in eps: what is left of a vector that lies in the basis already
_FLOOR = 100.0  # in eps: what a value must have, relative to the largest, to be resolved


@dataclass(frozen=True)
class Problem:
    """What the search is compiled for.

    Attributes:
        size_in: elements of a right vector.
        size_out: elements of a left vector.
        examples: how many operators are searched at once.
        count: how many values are wanted.
        tolerance: relative residual at which a value counts as found.
        max_products: products with A, and as many with its transpose, after which it stops.
        dtype: of the vectors.
        layers: how many matrices a product consists of, for the estimate of its rounding.
        block: vectors in one product.
    """

    size_in: int
    size_out: int
    examples: int
    count: int
    tolerance: float
    max_products: int
    dtype: str
    layers: int = 1
    block: int = 1

    @property
    def rounding(self) -> float:
        """Error of a product relative to the largest value; 1.7 eps sqrt(L) was measured."""
        return 2 * float(jnp.finfo(self.dtype).eps) * math.sqrt(self.layers + 1)

    @property
    def kept(self) -> int:
        """Vectors that survive a restart: those wanted, and one block."""
        return self.block * (math.ceil(self.count / self.block) + 1)

    @property
    def basis(self) -> int:
        """Vectors between two restarts."""
        floats = self.examples * (self.size_in + self.size_out)
        room = _BASIS_BYTES // (jnp.dtype(self.dtype).itemsize * max(floats, 1))
        wanted = max(4 * self.count, 64)
        blocks = max(min(wanted, room) // self.block, self.kept // self.block + 2)
        return self.block * blocks

    @property
    def is_small(self) -> bool:
        """Whether the whole matrix takes no more products than the search."""
        return 2 * self.basis >= min(self.size_in, self.size_out)


class Triplets(NamedTuple):
    """Singular triplets of `A / 2**power`, the largest values first, and their residuals."""

    left: Float[Array, "examples count n_out"]
    values: Float[Array, "examples count"]
    right: Float[Array, "examples count n_in"]
    power: Int[Array, " examples"]
    residuals: Float[Array, "examples count"]


class _State(NamedTuple):
    right: Array  # (examples, basis, n_in)
    left: Array  # (examples, basis, n_out)
    small: Array  # H, (examples, basis, basis)
    ahead: Array  # the next right vectors, (examples, block, n_in)
    filled: Array
    products: Array
    done: Array
    key: Array


def largest(push: Product, pull: Product, problem: Problem, key: Array) -> Triplets:
    """The largest singular triplets, with residuals that were measured afterwards.

    The rounding of the products themselves, which a residual sees in part, is added as an estimate.
    Non-finite products make the example's results NaN.
    """
    if problem.is_small:
        left, values, right, power = _by_whole_matrix(push, pull, problem)
    else:
        left, values, right, power = _by_search(push, pull, problem, key)
    residuals = _measured(push, pull, (left, values, right, power))
    residuals = residuals + problem.rounding * values[:, :1]
    return Triplets(left, values, right, power, residuals)


def apply(product: Product, vectors: Array, power: Array) -> Array:
    """`A v / 2**power` for vectors (examples, count, n)."""
    rows, exponents = product(jnp.swapaxes(vectors, 0, 1))
    shift = jnp.swapaxes(exponents, 0, 1) - power[:, None]
    return scale.shifted(jnp.swapaxes(rows, 0, 1), shift[..., None])


def _measured(push: Product, pull: Product, triplets: tuple) -> Array:
    """`|A v - s u|` and `|A^T u - s v|` together, from fresh products."""
    left, values, right, power = triplets
    forward = apply(push, right, power) - values[..., None] * left
    backward = apply(pull, left, power) - values[..., None] * right
    squares = jnp.sum(forward**2, axis=-1) + jnp.sum(backward**2, axis=-1)
    return jnp.sqrt(squares / 2)


def _by_whole_matrix(push: Product, pull: Product, problem: Problem) -> tuple:
    """All products with the unit vectors of the smaller side, and a dense SVD."""
    transposed = problem.size_out < problem.size_in
    n = min(problem.size_in, problem.size_out)
    eye = jnp.broadcast_to(jnp.eye(n, dtype=problem.dtype), (problem.examples, n, n))
    product = pull if transposed else push
    rows, exponents = product(jnp.swapaxes(eye, 0, 1))
    power = _largest_power(exponents, jnp.any(rows != 0, axis=-1))
    matrix = scale.shifted(rows, (exponents - power)[..., None])
    matrix = jnp.swapaxes(matrix, 0, 1)  # rows are A e_i, or A^T e_i
    finite = jnp.all(jnp.isfinite(matrix), axis=(1, 2), keepdims=True)
    first, values, second = jnp.linalg.svd(jnp.where(finite, matrix, 0), full_matrices=False)
    values = jnp.where(finite[..., 0], values, jnp.nan)
    k = problem.count
    of_side = jnp.swapaxes(first, 1, 2)[:, :k]
    of_other = second[:, :k]
    left, right = (of_side, of_other) if transposed else (of_other, of_side)
    return left, values[:, :k], right, power


def _largest_power(exponents: Array, nonzero: Array) -> Array:
    """The largest exponent of each example; 0 where everything is zero."""
    lowest = jnp.iinfo(jnp.int32).min // 2
    top = jnp.max(jnp.where(nonzero, exponents, lowest), axis=0)
    return jnp.where(jnp.any(nonzero, axis=0), top, 0)


def _by_search(push: Product, pull: Product, problem: Problem, key: Array) -> tuple:
    start, power = _started(push, problem, key)

    def advance(state: _State) -> _State:
        state = _expanded(push, pull, state, power, problem)
        full = state.filled >= problem.basis
        return jax.lax.cond(
            full & ~state.done, lambda s: _restarted(s, problem), lambda s: s, state
        )

    def unfinished(state: _State) -> Array:
        return ~state.done & (state.products < problem.max_products)

    state = jax.lax.while_loop(unfinished, advance, start)
    k = problem.count
    first, values, second = _small_svd(state.small)
    left = jnp.einsum("eak,ean->ekn", first[..., :k], state.left, precision="highest")
    right = jnp.einsum("eka,ean->ekn", second[:, :k], state.right, precision="highest")
    return left, values[:, :k], right, power


def _started(push: Product, problem: Problem, key: Array) -> tuple[_State, Array]:
    key, own = jax.random.split(key)
    shape = (problem.examples, problem.block, problem.size_in)
    vectors = jax.random.normal(own, shape, problem.dtype)
    ahead = jnp.swapaxes(jnp.linalg.qr(jnp.swapaxes(vectors, 1, 2))[0], 1, 2)
    rows, exponents = push(jnp.swapaxes(ahead, 0, 1))
    power = _largest_power(exponents, jnp.any(rows != 0, axis=-1))

    def zeros(*sizes: int) -> Array:
        return jnp.zeros((problem.examples, *sizes), problem.dtype)

    m = problem.basis
    state = _State(
        right=zeros(m, problem.size_in),
        left=zeros(m, problem.size_out),
        small=zeros(m, m),
        ahead=ahead,
        filled=jnp.int32(0),
        products=jnp.int32(0),
        done=jnp.bool_(False),
        key=key,
    )
    return state, power


def _expanded(
    push: Product, pull: Product, state: _State, power: Array, problem: Problem
) -> _State:
    """One block more on both sides, and whether the wanted values are found."""
    key, of_left, of_right = jax.random.split(state.key, 3)
    at = state.filled
    right = jax.lax.dynamic_update_slice_in_dim(state.right, state.ahead, at, axis=1)
    block, inside, own = orthonormalized(apply(push, state.ahead, power), state.left, of_left)
    left = jax.lax.dynamic_update_slice_in_dim(state.left, block, at, axis=1)
    column = jnp.swapaxes(inside, 1, 2)
    column = jax.lax.dynamic_update_slice_in_dim(column, own, at, axis=1)
    small = jax.lax.dynamic_update_slice_in_dim(state.small, column, at, axis=2)
    ahead, _, coupling = orthonormalized(apply(pull, block, power), right, of_right)
    first, values = _svd_of_filled(small, at + problem.block)
    last = jax.lax.dynamic_slice_in_dim(first, at, problem.block, axis=1)
    outside = jnp.einsum("eij,ejk->eik", coupling, last[..., : problem.count])
    residuals = jnp.sqrt(jnp.sum(outside**2, axis=1))
    values = values[:, : problem.count]
    eps = float(jnp.finfo(problem.dtype).eps)
    enough = jnp.maximum(0.5 * problem.tolerance * values, _FLOOR * eps * values[:, :1])
    open_ = jnp.any(residuals > enough) | (at + problem.block < problem.count)
    spoilt = ~jnp.all(jnp.isfinite(small)) | ~jnp.all(jnp.isfinite(coupling))
    grown = at + problem.block
    products = state.products + problem.block
    return _State(right, left, small, ahead, grown, products, ~open_ | spoilt, key)


def _restarted(state: _State, problem: Problem) -> _State:
    """Keeps the best triplets of the basis."""
    p = problem.kept
    first, values, second = _small_svd(state.small)
    left = jnp.einsum("eak,ean->ekn", first[..., :p], state.left, precision="highest")
    right = jnp.einsum("eka,ean->ekn", second[:, :p], state.right, precision="highest")
    missing = ((0, 0), (0, problem.basis - p), (0, 0))
    square = ((0, 0), (0, problem.basis - p), (0, problem.basis - p))
    return state._replace(
        left=jnp.pad(left, missing),
        right=jnp.pad(right, missing),
        small=jnp.pad(values[:, None, :p] * jnp.eye(p, dtype=values.dtype), square),
        filled=jnp.int32(p),
    )


def _svd_of_filled(small: Array, filled: Array) -> tuple[Array, Array]:
    """Left vectors and values, from the smallest of four corners that holds what is filled."""
    m = small.shape[-1]
    sizes = sorted({-(-m * quarter // 4) for quarter in (1, 2, 3, 4)})

    def of_corner(size: int) -> tuple[Array, Array]:
        first, values, _ = _small_svd(small[:, :size, :size])
        more = (0, m - size)
        return jnp.pad(first, ((0, 0), more, more)), jnp.pad(values, ((0, 0), more))

    corner = jnp.sum(filled > jnp.asarray(sizes[:-1]))
    return jax.lax.switch(corner, [functools.partial(of_corner, size) for size in sizes])


def _small_svd(small: Array) -> tuple[Array, Array, Array]:
    finite = jnp.all(jnp.isfinite(small), axis=(1, 2), keepdims=True)
    first, values, second = jnp.linalg.svd(jnp.where(finite, small, 0), full_matrices=False)
    return first, jnp.where(finite[..., 0], values, jnp.nan), second


def orthonormalized(
    vectors: Float[Array, "examples count n"], basis: Float[Array, "examples m n"], key: Array
) -> tuple[Array, Array, Array]:
    """New basis vectors for what lies outside of a basis.

    Args:
        vectors: what is to be expressed.
        basis: orthonormal rows, or zeros where a place is free.
        key: for the random vectors that replace those which lie in the basis already.

    Returns:
        `(new, inside, own)` with `vectors = inside basis + own^T new`, `new` orthonormal and
        orthogonal to the basis; rows of `own` are zero for the random ones.
    """
    before = jnp.sqrt(jnp.max(jnp.sum(vectors**2, axis=-1), axis=-1))[:, None]
    inside, outside = _projected(vectors, basis)
    new, own = _rows_qr(outside)
    eps = jnp.finfo(vectors.dtype).eps
    dead = jnp.max(jnp.abs(own), axis=-1) <= _BREAKDOWN * eps * before
    own = jnp.where(dead[..., None], 0, own)

    def replaced(new: Array) -> Array:
        random = jax.random.normal(key, vectors.shape, vectors.dtype)
        random = random / math.sqrt(vectors.shape[-1])
        return jnp.where(dead[..., None], _projected(random, basis)[1], new)

    new = jax.lax.cond(jnp.any(dead), replaced, lambda new: new, new)
    again, new = _projected(new, basis)
    new, turned = _rows_qr(new)
    inside = inside + jnp.einsum("eij,eim->ejm", own, again, precision="highest")
    return new, inside, jnp.matmul(turned, own, precision="highest")


def _projected(vectors: Array, basis: Array) -> tuple[Array, Array]:
    """Coefficients in the basis, and what is outside of it."""
    inside = jnp.einsum("ein,emn->eim", vectors, basis, precision="highest")
    return inside, vectors - jnp.einsum("eim,emn->ein", inside, basis, precision="highest")


def _rows_qr(vectors: Array) -> tuple[Array, Array]:
    """`vectors = own^T new` with orthonormal rows."""
    new, own = jnp.linalg.qr(jnp.swapaxes(vectors, 1, 2))
    return jnp.swapaxes(new, 1, 2), own
