"""Adafactor: a second moment kept as one row and one column per matrix."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxgrad.optim.arguments import check_decay, check_nonnegative
from jaxgrad.optim.base import (
    Arithmetic,
    DecayPlan,
    arithmetic,
    average,
    cast_like,
    descend,
    increment,
    narrow,
    real_dtype,
    rule,
    second_moment_dtype,
    square,
    zero_count,
    zeros_like,
)
from jaxgrad.optim.clipping import block_rms_clip
from jaxgrad.tree import is_inexact_array, map_inexact


class AdafactorState(NamedTuple):
    """State of Adafactor.

    Attributes:
        count: number of updates done, int32 scalar.
        v_row: mean squares over the columns, of shape (1,) where a leaf is not factored.
        v_col: mean squares over the rows, of shape (1,) where a leaf is not factored.
        v: squares of the leaves that are not factored, of shape (1,) elsewhere.
        ema: moving average of the updates, None without momentum.
    """

    count: Any
    v_row: Any
    v_col: Any
    v: Any
    ema: Any


def _factored_axes(shape: tuple[int, ...], factored: bool, smallest: int) -> tuple[int, int] | None:
    """The two largest axes ``(second, first)``, or None where the second is too small."""
    if not factored or len(shape) < 2:
        return None
    order = np.argsort(shape)
    return None if shape[order[-2]] < smallest else (int(order[-2]), int(order[-1]))


class _Moments(NamedTuple):
    """The second moments of one leaf, and its gradient divided by their root."""

    update: Any
    row: Any
    col: Any
    full: Any


def _stored(arith: Arithmetic, new: Any, old: Any) -> Any:
    """Rounds as optax does: the moments to their stored dtype before it uses them."""
    return new if arith.exact else new.astype(old.dtype)


def _factored(arith: Arithmetic, g: Any, old: _Moments, axes: tuple[int, int], options: Any) -> Any:
    """Algorithm 4 of the paper: the second moment as the outer product of two means."""
    (d1, d0), (rate, eps) = axes, options
    squares = square(g) + eps
    row = rate * arith.widen(old.row) + (1.0 - rate) * jnp.mean(squares, axis=d0)
    col = rate * arith.widen(old.col) + (1.0 - rate) * jnp.mean(squares, axis=d1)
    row, col = _stored(arith, row, old.row), _stored(arith, col, old.col)
    mean = jnp.mean(row, axis=d1 - 1 if d1 > d0 else d1, keepdims=True)
    row_factor, col_factor = (row / mean) ** -0.5, col**-0.5
    update = g * jnp.expand_dims(row_factor, axis=d0) * jnp.expand_dims(col_factor, axis=d1)
    return _Moments(update, row, col, old.full)


def _unfactored(arith: Arithmetic, g: Any, old: _Moments, options: Any) -> _Moments:
    rate, eps = options
    full = rate * arith.widen(old.full) + (1.0 - rate) * (square(g) + eps)
    full = _stored(arith, full, old.full)
    return _Moments(g * full**-0.5, old.row, old.col, full)


def _parameter_rms(arith: Arithmetic, p: Any) -> Any:
    """The root mean square of a parameter, at least 1e-3."""
    if p.size == 0:
        return jnp.zeros((), real_dtype(p.dtype))
    if arith.exact:
        return jnp.maximum(arith.root(jnp.mean(square(arith.widen(p)))), 1e-3)
    small = jnp.sqrt(jnp.mean(square(p))) <= 1e-3
    filled = jnp.where(small, jnp.ones_like(p), p)
    return jnp.where(small, 1e-3, jnp.sqrt(jnp.mean(square(filled))))


def adafactor(  # noqa: PLR0913, PLR0917 (optax's signature)
    learning_rate: Any = None,
    min_dim_size_to_factor: int = 128,
    decay_rate: Any = 0.8,
    decay_offset: Any = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: Any = 1.0,
    momentum: Any = None,
    dtype_momentum: Any = jnp.float32,
    weight_decay_rate: Any = None,
    eps: Any = 1e-30,
    factored: bool = True,
    weight_decay_mask: Any = None,
    *,
    nu_dtype: Any = None,
    numerics: str = "exact",
) -> optax.GradientTransformationExtraArgs:
    """Adafactor (Shazeer and Stern, arXiv:1804.04235, algorithm 5, with optax's options).

    The scaled update is clipped to a root mean square of ``clipping_threshold`` by design: a clip
    of the update, which the order of things (`jaxgrad.checks.clip_order`) calls intentional.

    Args:
        learning_rate: number or schedule; None for none.
        min_dim_size_to_factor: a matrix is factored if its second largest side has this size.
        decay_rate: the second moment's decay at step t is ``1 - t**-decay_rate``.
        decay_offset: step at which a fine-tuning phase starts.
        multiply_by_parameter_scale: multiply by the parameter's root mean square, at least 1e-3.
        clipping_threshold: largest root mean square of a leaf's scaled update; None for none.
        momentum: decay of a moving average of the updates; None for none.
        dtype_momentum: its dtype.
        weight_decay_rate: decay, *not* multiplied by the learning rate; None for none.
        eps: added to the squared gradients.
        factored: False keeps full second moments.
        weight_decay_mask: leaves that decay.
        nu_dtype: dtype of the second moments; None for float32 at least.
        numerics: ``"exact"`` or ``"optax"``.

    Returns:
        An optax transformation with state `AdafactorState`; its update needs ``params``.
    """
    arith = arithmetic(numerics)
    check_decay(momentum=momentum)
    check_nonnegative(clipping_threshold=clipping_threshold, eps=eps, decay_rate=decay_rate)
    check_nonnegative(weight_decay_rate=weight_decay_rate)
    moment_dtype = second_moment_dtype(arith, nu_dtype)
    decay = DecayPlan(0.0 if weight_decay_rate is None else weight_decay_rate, weight_decay_mask)

    def axes_of(p: Any) -> tuple[int, int] | None:
        return _factored_axes(p.shape, factored, min_dim_size_to_factor)

    def init(params: PyTree) -> AdafactorState:
        def moment(p: Any, which: int) -> Any:
            if not is_inexact_array(p):
                return None
            axes, dtype = axes_of(p), moment_dtype(p.dtype)
            if (axes is None) != (which == 2):
                return jnp.zeros((1,), dtype)
            if axes is None:
                return jnp.zeros_like(p, dtype=dtype)  # keeps the leaf's sharding
            return jnp.zeros(tuple(map(int, np.delete(p.shape, axes[1 - which]))), dtype)

        rows, cols, full = (jax.tree.map(lambda p, i=i: moment(p, i), params) for i in range(3))
        ema = None if momentum is None else zeros_like(params, dtype_momentum)
        return AdafactorState(zero_count(), rows, cols, full, ema)

    def moments_of(g: Any, p: Any, rate: Any, *old: Any) -> _Moments:
        kept = _Moments(g, *old)
        if not is_inexact_array(g):
            return kept
        axes = axes_of(p)
        if axes is None:
            return _unfactored(arith, g, kept, (rate, eps))
        return _factored(arith, g, kept, axes, (rate, eps))

    def update(grads: PyTree, state: AdafactorState, params: PyTree) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("adafactor needs the parameters: call update(grads, state, params)")
        step_dtype = jnp.result_type(float) if arith.exact else jnp.float32
        rate = 1.0 - jnp.array(state.count - decay_offset + 1, step_dtype) ** (-decay_rate)
        wide = map_inexact(arith.widen, grads)
        g, treedef = jax.tree.flatten(wide, is_leaf=lambda leaf: leaf is None)
        old = [treedef.flatten_up_to(tree) for tree in (params, *state[1:4])]
        new = [moments_of(g, p, rate, *m) for g, p, *m in zip(g, *old, strict=True)]
        columns = zip(*new, strict=True) if new else [()] * 4  # an empty tree
        u, *moments = (treedef.unflatten(column) for column in columns)
        if clipping_threshold is not None:
            u = map_inexact(lambda u: block_rms_clip(arith, u, clipping_threshold), u)
        u = descend(u, learning_rate, state.count, sign=1)
        if multiply_by_parameter_scale:
            u = map_inexact(lambda u, p: u * _parameter_rms(arith, p), u, params)
        ema = None
        if momentum is not None:
            u = ema = average(arith, u, state.ema, momentum)
        moments = [cast_like(n, o) for n, o in zip((*moments, ema), state[1:], strict=True)]
        u = map_inexact(lambda u: -1 * u, decay(arith, u, params, state.count))
        return narrow(arith, u, grads), AdafactorState(increment(state.count), *moments)

    return rule(init, update)
