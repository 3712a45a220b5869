"""Muon: momentum whose matrices are replaced by the nearest orthogonal ones."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxgrad.optim.adaptive import AdamState, adamw
from jaxgrad.optim.arguments import check_decay, check_nonnegative, check_rate
from jaxgrad.optim.base import (
    Arithmetic,
    DecayPlan,
    arithmetic,
    average,
    cast_like,
    finish,
    increment,
    rule,
    zero_count,
    zeros_like,
)
from jaxgrad.optim.clipping import unit_norms
from jaxgrad.tree import is_inexact_array, map_inexact

_QUINTIC = (3.4445, -4.775, 2.0315)


class MuonState(NamedTuple):
    """State of Muon.

    Attributes:
        count: number of updates done, int32 scalar.
        mu: moving average of the gradients of the matrices, None elsewhere.
        adam: state of Adam for all other leaves.
    """

    count: Any
    mu: Any
    adam: AdamState


def _iterate(x: Any, c: Any) -> Any:
    """One odd polynomial ``c0 X + c1 (X Xᴴ) X + c2 (X Xᴴ)² X``; it acts on singular values only."""
    a = x @ x.T.conj()
    b = c[1] * a + c[2] * a @ a
    return c[0] * x + b @ x


def orthogonalize(
    x: Float[Array, "m n"], coefficients: Any = _QUINTIC, steps: int = 5, eps: Any = 1e-8
) -> Float[Array, "m n"]:
    """Moves all singular values of a matrix towards one, by Newton-Schulz iterations.

    Args:
        x: matrix.
        coefficients: three numbers, or ``steps`` rows of three.
        steps: number of iterations.
        eps: added to the Frobenius norm that the matrix is divided by first.

    Returns:
        Matrix with the singular vectors of ``x`` and, by default, singular values in about
        [0.7, 1.2] (those below 1e-3 of the norm stay smaller).
    """
    scale, relative = unit_norms(x, None)
    x = (x * (1 / scale)) / (relative + eps / scale)
    return _newton_schulz(x, coefficients, steps)


def _newton_schulz(x: Any, coefficients: Any, steps: int) -> Any:
    transposed = x.shape[0] > x.shape[1]
    x = x.T if transposed else x
    table = jnp.asarray(coefficients).astype(x.dtype)
    for i in range(steps):
        x = _iterate(x, table if table.ndim == 1 else table[i - steps])
    return x.T if transposed else x


def _optax_orthogonalize(x: Any, coefficients: Any, steps: int, eps: Any) -> Any:
    """As optax does it, in a batch of one: the batched product may round differently."""

    def one(x: Any) -> Any:
        transposed = x.shape[0] > x.shape[1]
        x = x.T if transposed else x
        x = x / (jnp.linalg.norm(x, ord="fro") + eps)
        x = _newton_schulz(x, coefficients, steps)
        return x.T if transposed else x

    return jax.vmap(one)(x[None])[0]


def _check_coefficients(ns_coeffs: Any, ns_steps: int) -> None:
    shape = list(jnp.shape(jnp.asarray(ns_coeffs)))
    if len(shape) > 2 or shape[-1:] != [3] or (len(shape) == 2 and shape[0] < ns_steps):
        raise ValueError(
            f"ns_coeffs: expected shape (3,) or (at least {ns_steps}, 3), got {tuple(shape)}"
        )


def muon(  # noqa: PLR0913, PLR0917 (optax's signature)
    learning_rate: Any,
    ns_coeffs: Any = _QUINTIC,
    ns_steps: int = 5,
    beta: Any = 0.95,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: Any = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    adam_b1: Any = 0.9,
    adam_b2: Any = 0.999,
    adam_eps_root: Any = 0.0,
    adam_weight_decay: Any = 0.0,
    adam_learning_rate: Any = None,
    consistent_rms: Any = None,
    numerics: str = "exact",
) -> optax.GradientTransformationExtraArgs:
    """Muon (Jordan et al., 2024) for matrices, AdamW for every other leaf, as in optax.contrib.

    ``m = beta m + (1 - beta) g``; the direction is `orthogonalize` of its bias-corrected look
    ahead, times ``sqrt(max(1, columns / rows))``.

    Args:
        learning_rate: number or schedule.
        ns_coeffs: coefficients of the Newton-Schulz polynomial.
        ns_steps: its number of iterations.
        beta: decay of the moving average.
        eps: added to the Frobenius norm, and Adam's eps.
        weight_decay: for matrices.
        weight_decay_mask: matrices that decay.
        mu_dtype: dtype of first moments; None for the parameters'.
        nesterov: look ahead, also in Adam.
        adaptive: multiply by the dual norm (Bernstein and Newhouse, arXiv:2409.20325).
        adam_b1: for the other leaves.
        adam_b2: for the other leaves.
        adam_eps_root: for the other leaves.
        adam_weight_decay: for the other leaves.
        adam_learning_rate: for the other leaves; None for ``learning_rate``.
        consistent_rms: scale by ``consistent_rms sqrt(max(rows, columns))`` instead.
        numerics: ``"exact"`` or ``"optax"``.

    Returns:
        An optax transformation with state `MuonState`. optax's other preconditionings and its
        dimension numbers for tensors are not offered.
    """
    arith = arithmetic(numerics)
    check_decay(beta=beta)
    check_rate(learning_rate)
    check_nonnegative(eps=eps, weight_decay=weight_decay)
    _check_coefficients(ns_coeffs, ns_steps)
    decay = DecayPlan(weight_decay, weight_decay_mask)
    other = adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        adam_b1,
        adam_b2,
        eps,
        adam_eps_root,
        mu_dtype,
        weight_decay=adam_weight_decay,
        nesterov=nesterov,
        numerics=numerics,
    )

    def init(params: PyTree) -> MuonState:
        mu = zeros_like(_matrices(params), mu_dtype)
        return MuonState(zero_count(), mu, cast(Any, other.init(_others(params))))

    def shaped(x: Any) -> Any:
        rows, columns = x.shape
        if consistent_rms is None:
            return jnp.sqrt(jnp.maximum(1, columns / rows)) * x
        return jnp.sqrt(jnp.maximum(rows, columns)) * consistent_rms * x

    def update(grads: PyTree, state: MuonState, params: PyTree) -> tuple[PyTree, MuonState]:
        count = increment(state.count)
        g = map_inexact(arith.widen, _matrices(grads))
        mu = average(arith, g, state.mu, beta)
        look_ahead = (
            _look_ahead(arith, (g, mu), beta, count)
            if nesterov
            else _debiased(arith, mu, beta, count)
        )

        def direction(m: Any) -> Any:
            if arith.exact:
                o = orthogonalize(m, ns_coeffs, ns_steps, eps)
            else:
                o = _optax_orthogonalize(m, ns_coeffs, ns_steps, eps)
            return shaped(jnp.sum(m.conj() * o) * o if adaptive else o)

        directions = map_inexact(direction, look_ahead)
        matrices = None if params is None else _matrices(params)
        directions = decay(arith, directions, matrices, state.count)
        u = finish(arith, directions, learning_rate, state.count, _matrices(grads))
        rest = None if params is None else _others(params)
        v, adam = other.update(_others(grads), state.adam, rest)
        return _merge(u, v, grads), MuonState(count, cast_like(mu, state.mu), cast(Any, adam))

    return rule(init, update)


def _is_matrix(leaf: Any) -> bool:
    return is_inexact_array(leaf) and leaf.ndim == 2 and leaf.size > 0


def _matrices(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x if _is_matrix(x) else None, tree)


def _others(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: None if _is_matrix(x) or not is_inexact_array(x) else x, tree)


def _merge(matrices: PyTree, others: PyTree, grads: PyTree) -> PyTree:
    none = lambda leaf: leaf is None  # noqa: E731

    def choose(g: Any, m: Any, o: Any) -> Any:
        if not is_inexact_array(g):
            return g
        return m if _is_matrix(g) else o

    return jax.tree.map(choose, grads, matrices, others, is_leaf=none)


def _debiased(arith: Arithmetic, values: PyTree, beta: Any, count: Any) -> PyTree:
    correction = arith.correction(beta, count)
    return map_inexact(lambda m: m / correction.astype(m.dtype), values)


def _look_ahead(arith: Arithmetic, pair: tuple[PyTree, PyTree], beta: Any, count: Any) -> PyTree:
    """Nesterov's look ahead, each part with its own bias correction."""
    g = _debiased(arith, pair[0], beta, count)
    m = _debiased(arith, pair[1], beta, increment(count))
    return map_inexact(lambda g, m: beta * m + (1 - beta) * g, g, m)
