"""Clipping, of gradients or of updates.

What a clip really does depends on the rule after it. Measured, 100 steps of gradients of norm one
with one outlier of norm 1000 (``python -m experiments.benchmarks.clipping_effect``): the largest
step over the median step, and how far the outlier moved the parameters, in median steps.

========  ===============  ===============  ===============
rule      no clip          clip before      clip after
========  ===============  ===============  ===============
sgd       1030, 1030       1.00, 0          100, 99
momentum  143, 1410        1.02, 0          13.8, 419
adam      1.61, 42         1.61, 0          1.61, 42
lion      1.00, 48         1.00, 0          1.00, 48
rmsprop   3.22, 27         3.21, 0          3.22, 27
muon      1.06, 43         1.08, 0          1.06, 43
========  ===============  ===============  ===============

Adam, Lion, RMSprop and Muon make the same step for g and for 1000 g: their largest step needs no
clip. What a clip *before* them prevents is that one outlier fills the moving averages and steers
dozens of steps; a clip *after* them prevents nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jaxgrad.optim.arguments import check_nonnegative, concrete
from jaxgrad.optim.base import Arithmetic, arithmetic, narrow, real_dtype, square
from jaxgrad.tree import inexact_leaves, map_inexact, scaled_norm


def _stateless(update: Any) -> optax.GradientTransformationExtraArgs:
    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **_: Any) -> Any:
        return update(updates, params), state

    def init_fn(params: PyTree) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _loud(threshold: Any) -> Any:
    """A negative threshold that appears only inside jit cannot raise: it makes the result NaN."""
    if concrete(threshold) is not None:
        return threshold
    return jnp.where(threshold >= 0, threshold, jnp.nan)


def clip_by_value(
    max_delta: Any, *, numerics: str = "exact"
) -> optax.GradientTransformationExtraArgs:
    """Clips every entry to ``[-max_delta, max_delta]``; NaN stays NaN.

    Args:
        max_delta: number >= 0.
        numerics: ``"exact"`` or ``"optax"`` (the same here).

    Returns:
        A stateless optax transformation.

    Raises:
        ValueError: for a negative threshold; by update, for complex leaves, which have no order.
    """
    _ = arithmetic(numerics)
    check_nonnegative(max_delta=max_delta)

    def update(updates: PyTree, params: PyTree) -> PyTree:
        del params
        limit = _loud(max_delta)
        if any(jnp.iscomplexobj(leaf) for leaf in inexact_leaves(updates)):
            raise ValueError(
                "clip_by_value: expected real leaves, got complex ones; use clip_by_global_norm"
            )
        return map_inexact(lambda g: jnp.clip(g, -limit, limit).astype(g.dtype), updates)

    return _stateless(update)


def _multiplier(scale: Any, relative: Any, limit: Any) -> tuple[Any, Any]:
    """Two factors with product ``min(1, limit / (scale * relative))``.

    The first is a power of two. They stay apart because their product may leave the range of
    float32 where the clipped gradient does not.
    """
    over = relative > limit / scale
    factor = limit / jnp.where(over, relative, 1)
    # Comparisons with NaN are false, yet a NaN norm or limit must reach every entry.
    broken = jnp.isnan(relative) | jnp.isnan(limit)
    return (
        jnp.where(over, 1 / scale, 1),
        jnp.where(broken, jnp.nan, jnp.where(over, factor, 1)),
    )


def _rescaled(arith: Arithmetic, g: Any, factors: tuple[Any, Any]) -> Any:
    """A leaf times both factors, in the wide dtype."""
    wide = arith.widen(g)
    first, second = (f.astype(real_dtype(wide.dtype)) for f in factors)
    return wide * first * second


def clip_by_global_norm(
    max_norm: Any, *, numerics: str = "exact"
) -> optax.GradientTransformationExtraArgs:
    """Scales all leaves by ``min(1, max_norm / n)`` with ``n`` the norm of all of them together.

    Pascanu et al., arXiv:1211.5063. Exact: the norm is accumulated in float32 with a scale, and
    the clip is a scalar multiplier, which XLA fuses into the rule that follows (optax's division
    costs a copy of the gradients). torch adds 1e-6 to the norm.

    Args:
        max_norm: number >= 0; 0 gives zeros, infinity the identity.
        numerics: ``"exact"`` or ``"optax"``.

    Returns:
        A stateless optax transformation. An infinite entry gives NaN, as in optax and torch.

    Raises:
        ValueError: for a negative threshold.
    """
    arith = arithmetic(numerics)
    check_nonnegative(max_norm=max_norm)

    def update(updates: PyTree, params: PyTree) -> PyTree:
        del params
        if not arith.exact:
            return _optax_clip_by_global_norm(updates, max_norm)
        factors = _multiplier(*scaled_norm(updates), _loud(max_norm))
        clipped = map_inexact(lambda g: _rescaled(arith, g, factors), updates)
        return narrow(arith, clipped, updates)

    return _stateless(update)


def _optax_clip_by_global_norm(updates: PyTree, max_norm: Any) -> PyTree:
    """Follows optax's operations in optax's order, wrong results included."""
    norm = jnp.sqrt(sum(jnp.sum(square(g)) for g in inexact_leaves(updates)))
    below = jnp.squeeze(norm < max_norm)
    return map_inexact(
        lambda g: jax.lax.select(below, g, (g / norm.astype(g.dtype)) * max_norm), updates
    )


def unit_norms(x: Any, axes: tuple[int, ...] | None) -> tuple[Any, Any]:
    """``(scale, relative)`` over some axes, which are kept with size 1; see `scaled_norm`."""
    limits = jnp.finfo(real_dtype(x.dtype))
    largest = jnp.max(jax.lax.stop_gradient(jnp.abs(x)), axis=axes, keepdims=True, initial=0)
    usable = jnp.isfinite(largest) & (largest > 0)
    _, exponent = jnp.frexp(jnp.where(usable, largest, 1))
    exponent = jnp.clip(exponent, limits.minexp, -limits.minexp)
    scale = jnp.where(usable, jnp.ldexp(jnp.ones_like(largest), exponent), 1)
    squares = jnp.sum(square(x * (1 / scale)), axis=axes, keepdims=True)
    return scale, arithmetic("exact").root(squares)


def block_rms_clip(arith: Arithmetic, u: Any, threshold: Any) -> Any:
    """One leaf scaled to a root mean square of at most ``threshold``, in the wide dtype."""
    if not arith.exact:
        return u / jnp.maximum(1.0, jnp.sqrt(jnp.mean(square(u))) / threshold)
    if u.size == 0:
        return u
    scale, relative = (jnp.squeeze(n) for n in unit_norms(u, None))
    return _rescaled(arith, u, _multiplier(scale, relative / u.size**0.5, threshold))


def clip_by_block_rms(
    threshold: Any, *, numerics: str = "exact"
) -> optax.GradientTransformationExtraArgs:
    """Scales every leaf to a root mean square of at most ``threshold`` (arXiv:1804.04235, §6).

    Args:
        threshold: number >= 0.
        numerics: ``"exact"`` or ``"optax"``.

    Returns:
        A stateless optax transformation.

    Raises:
        ValueError: for a negative threshold.
    """
    arith = arithmetic(numerics)
    check_nonnegative(threshold=threshold)

    def update(updates: PyTree, params: PyTree) -> PyTree:
        del params
        limit = _loud(threshold) if arith.exact else threshold
        clipped = map_inexact(lambda g: block_rms_clip(arith, arith.widen(g), limit), updates)
        return narrow(arith, clipped, updates)

    return _stateless(update)


def _unit_axes(x: Any, axis: Any) -> tuple[int, ...] | None:
    """Axes of a unit's norm; a dense unit is a column, a filter all axes but the last."""
    if axis is not None:
        return (axis,) if isinstance(axis, int) else tuple(axis)
    if sum(n != 1 for n in x.shape) <= 1:
        return None
    if x.ndim > 5:
        raise ValueError(f"adaptive_clip: a leaf of shape {x.shape} needs the argument axis")
    return (0,) if x.ndim in (2, 3) else tuple(range(x.ndim - 1))


def adaptive_clip(
    clipping: Any, eps: Any = 1e-3, axis: Any = None, *, numerics: str = "exact"
) -> optax.GradientTransformationExtraArgs:
    """Adaptive gradient clipping: a unit's gradient has at most ``clipping`` times its weight norm.

    Brock et al., arXiv:2102.06171, equation 3. A unit is a column of a matrix, a filter of a
    convolution, or a whole vector.

    Args:
        clipping: largest ratio of the two norms, >= 0.
        eps: smallest weight norm that counts, so that zero-initialized units can move.
        axis: axes that a unit's norm runs over; None infers them from the rank, as optax does.
        numerics: ``"exact"`` or ``"optax"`` (which never divides by less than 1e-6).

    Returns:
        A stateless optax transformation; its update needs ``params``.

    Raises:
        ValueError: for negative thresholds; by update, without ``params``.
    """
    arith = arithmetic(numerics)
    check_nonnegative(clipping=clipping, eps=eps)

    def clipped(g: Any, p: Any) -> Any:
        if g.size == 0:
            return g
        axes = _unit_axes(g, axis)
        if not arith.exact:
            return _optax_unit_clip(g, p, axes, (clipping, eps))
        g, p = arith.widen(g), arith.widen(p)
        p_scale, p_relative = unit_norms(p, axes)
        limit = _loud(clipping) * jnp.maximum(p_scale * p_relative, eps)
        return _rescaled(arith, g, _multiplier(*unit_norms(g, axes), limit))

    def update(updates: PyTree, params: PyTree) -> PyTree:
        if params is None:
            raise ValueError(
                "adaptive_clip compares with the parameters: call update(grads, state, params)"
            )
        return narrow(arith, map_inexact(clipped, updates, params), updates)

    return _stateless(update)


def _optax_unit_clip(g: Any, p: Any, axes: Any, options: tuple[Any, Any]) -> Any:
    def norm(x: Any) -> Any:
        return jnp.broadcast_to(jnp.sqrt(jnp.sum(square(x), axis=axes, keepdims=True)), x.shape)

    g_norm, max_norm = norm(g), options[0] * jnp.maximum(norm(p), options[1])
    return jnp.where(g_norm < max_norm, g, g * (max_norm / jnp.maximum(g_norm, 1e-6)))
