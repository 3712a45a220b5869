"""Singular values that lie further apart than a float can tell: orthogonalized at every layer.

A vector in float32 holds nothing of a mode that is 1e7 times smaller than the largest. A deep
product has such modes after a few dozen layers, so its second singular value is out of reach for
every method that multiplies vectors through all layers. Here the vectors are orthogonalized after
every layer (as for Lyapunov exponents, G. Benettin et al. 1980); the triangular factors multiply to
a small graded product, whose values are relatively accurate; and alternating sweeps through the
chain and back turn the vectors into the leading singular ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgrad.graded import graded_product, scale
from jaxgrad.spectrum.operator import Operator

_MOST_SWEEPS = 30
_RANK = 8.0  # in eps: a row of a triangular factor below it is rounding


class Found(NamedTuple):
    """Values as `mantissa * 2**exponent`, descending, and their relative residuals."""

    mantissa: Float[Array, "examples count"]
    exponent: Int[Array, "examples count"]
    residuals: Float[Array, "examples count"]


class _State(NamedTuple):
    right: Array
    factors: Array  # of `A V = U R`, (layers, examples, count, count), the first layer's first
    power: Array
    live: Array  # how many of the vectors reach the end
    residuals: Array
    sweeps: Array


def graded_largest(
    operator: Operator, right: Float[Array, "examples count n_in"], tolerance: float, needed: Array
) -> Found:
    """The largest singular values at any distance from each other.

    With `V` orthonormal, `A V = U R` and `A^T U = Z S`, both factored, `A` has the form
    `[[R, X], [0, F]]` in bases that begin with `U` and `V`, and `R^-1 X` is the tangent `t` of the
    angles between the spans of `V` and `Z`: for `R^T = V^T A^T U = (V^T Z) S`. So
    `A = diag(R, F) [[I, R^-1 X], [0, I]]`, and since the norm of the second factor and of its
    inverse is `e^asinh(t/2)`, every singular value of `diag(R, F)` is one of `A` up to that factor
    (S. Eisenstat, I. Ipsen 1995): `|log s - log s'| <= asinh(t / 2) <= t / 2`, however small it is.
    The same holds for the first j vectors of `V`, for every j.

    Args:
        operator: the chain.
        right: orthonormal rows to start from.
        tolerance: the largest `t` at which it stops.
        needed: which examples ask for it, (examples,).

    Returns:
        Values and `t`; the value 0, with residual inf, beyond the rank.
    """

    def advance(state: _State) -> _State:
        left, factors, power = _swept(operator, state.right, backward=False)
        reached = jnp.all(jnp.diagonal(factors, axis1=-2, axis2=-1) != 0, axis=0)
        live = jnp.sum(jnp.cumprod(reached, axis=-1), axis=-1, dtype=jnp.int32)
        back, _, _ = _swept(operator, left, backward=True)
        residuals = _tangents(state.right, back, live)
        return _State(back, factors, power, live, residuals, state.sweeps + 1)

    def unfinished(state: _State) -> Array:
        wanted = needed[:, None] & (jnp.arange(right.shape[1]) < state.live[:, None])
        open_ = jnp.any(wanted & (state.residuals > tolerance))
        return open_ & (state.sweeps < _MOST_SWEEPS)

    state = jax.lax.while_loop(unfinished, advance, _start(operator, right))
    # Outside of the loop: inside, XLA for CPU (jaxlib 0.10) crashes when it compiles it.
    spectrum = graded_product(state.factors).spectrum()
    zero = spectrum.mantissa == 0
    exponent = jnp.where(zero, 0, spectrum.exponent + state.power[:, None])
    return Found(spectrum.mantissa, exponent, jnp.where(zero, jnp.inf, state.residuals))


def _start(operator: Operator, right: Array) -> _State:
    examples, count = right.shape[:2]
    layers = max(1, operator.layers)
    none, live = jnp.zeros(examples, jnp.int32), jnp.full(examples, count, jnp.int32)
    factors = jnp.zeros((layers, examples, count, count), right.dtype)
    open_ = jnp.full((examples, count), jnp.inf, right.dtype)
    return _State(right, factors, none, live, open_, jnp.int32(0))


def _swept(operator: Operator, vectors: Array, backward: bool) -> tuple[Array, Array, Array]:
    """Orthonormal vectors at the other end, the triangular factors, and their powers of two."""
    rows = jnp.swapaxes(vectors, 0, 1)
    rows, _, records = operator.traverse(rows, None, _orthogonalized, backward)
    if records is None:
        eye = jnp.eye(vectors.shape[1], dtype=vectors.dtype)
        factors = jnp.broadcast_to(eye, (1, vectors.shape[0], *eye.shape))
        return vectors, factors, jnp.zeros(vectors.shape[:1], jnp.int32)
    factors, powers = records
    return jnp.swapaxes(rows, 0, 1), factors, jnp.sum(powers, axis=0, dtype=jnp.int32)


def _orthogonalized(vectors: Array, *_: None) -> tuple[Array, None, tuple[Array, Array]]:
    """Orthonormal vectors with the same spans, one by one; the factor, and its power of two."""
    columns = jnp.transpose(vectors, (1, 2, 0))
    power = scale.largest_exponent(columns)
    columns = scale.shifted(columns, -power[:, None, None])
    new, factor = jnp.linalg.qr(columns)
    count = vectors.shape[0]
    missing = count - new.shape[-1]  # a bottleneck narrower than the number of vectors
    new = jnp.pad(new, ((0, 0), (0, 0), (0, missing)))
    factor = jnp.pad(factor, ((0, 0), (0, missing), (0, 0)))
    sizes = jnp.max(jnp.sqrt(jnp.sum(columns**2, axis=1)), axis=-1)
    eps = jnp.finfo(vectors.dtype).eps
    noise = jnp.max(jnp.abs(factor), axis=-1) <= _RANK * eps * sizes[:, None]
    factor = jnp.where(noise[..., None], 0, factor)
    return jnp.transpose(new, (2, 0, 1)), None, (factor, power)


def _tangents(first: Array, second: Array, live: Array) -> Array:
    """For every value the least tangent between the spans of the first j vectors, over j."""
    count = first.shape[1]
    inner = jnp.einsum("ein,ejn->eij", first, second, precision="highest")
    outside = second - jnp.einsum("eij,ein->ejn", inner, first, precision="highest")
    across = jnp.einsum("ein,ejn->eij", outside, outside, precision="highest")

    def of_span(j: Array) -> Array:
        head = jnp.arange(count) < j
        both = head[:, None] & head
        eye = jnp.eye(count, dtype=inner.dtype)
        square = jnp.where(both, inner, eye)
        # what sticks out of the first j vectors, into the other ones and out of all of them
        beside = jnp.where(~head[:, None] & head, inner, 0)
        gram = jnp.where(both, across, 0) + jnp.matmul(
            jnp.swapaxes(beside, 1, 2), beside, precision="highest"
        )
        inverse = jnp.linalg.inv(square)
        tangents = jnp.matmul(jnp.swapaxes(inverse, 1, 2), gram, precision="highest")
        tangents = jnp.einsum("eij,eji->e", tangents, inverse, precision="highest")
        return jnp.where(j <= live, jnp.sqrt(jnp.maximum(tangents, 0)), jnp.inf)

    each = jax.vmap(of_span, out_axes=1)(jnp.arange(1, count + 1))
    each = jnp.where(jnp.isnan(each), jnp.inf, each)
    return jax.lax.cummin(each, axis=1, reverse=True)
