"""Schedule-free AdamW: an average of the iterates takes the place of a decaying schedule."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jaxgrad.optim.arguments import check_decay, check_nonnegative, check_rate, concrete
from jaxgrad.optim.base import (
    Arithmetic,
    DecayPlan,
    arithmetic,
    at,
    average,
    cast_like,
    descend,
    increment,
    narrow,
    rule,
    second_moment_dtype,
    square,
    zero_count,
    zeros_like,
)
from jaxgrad.optim.schedules import warmup_constant
from jaxgrad.tree import inexact_leaves, is_inexact_array, map_inexact


class ScheduleFreeState(NamedTuple):
    """State of schedule-free AdamW (the field names are optax's).

    Attributes:
        b1: the interpolation, so that `schedule_free_eval_params` needs the state only.
        weight_sum: sum of the weights of the average.
        step_count: number of updates done, plus one.
        count: number of updates done.
        max_lr: largest learning rate so far.
        nu: moving average of squared gradients.
        z: the fast iterate.
    """

    b1: Any
    weight_sum: Any
    step_count: Any
    count: Any
    max_lr: Any
    nu: Any
    z: Any


def schedule_free_adamw(  # noqa: PLR0913, PLR0917 (optax's signature)
    learning_rate: Any = 0.0025,
    warmup_steps: int | None = None,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    weight_lr_power: Any = 2.0,
    state_dtype: Any = None,
    *,
    nu_dtype: Any = None,
    numerics: str = "exact",
) -> optax.GradientTransformationExtraArgs:
    """Schedule-free AdamW (Defazio et al., arXiv:2405.15682, algorithm 1).

    The parameters are ``y``, where gradients are taken: ``z`` follows RMSprop with bias
    correction, ``x`` averages ``z`` with weights ``lr**weight_lr_power``, and
    ``y = b1 x + (1 - b1) z``. Evaluate at ``x``: `schedule_free_eval_params`.

    Args:
        learning_rate: number.
        warmup_steps: steps of linear warm-up from 0; None for none.
        b1: interpolation between ``z`` and ``x``, in (0, 1).
        b2: decay of the second moment.
        eps: added outside the square root.
        weight_decay: decoupled decay, at ``y``.
        weight_lr_power: power of the learning rate in the average's weights.
        state_dtype: dtype of ``z``; None for the parameters'.
        nu_dtype: dtype of the second moment; None for float32 at least.
        numerics: ``"exact"`` or ``"optax"``, whose average takes each learning rate one step
            before the update does.

    Returns:
        An optax transformation with state `ScheduleFreeState`; its update needs ``params``.

    Raises:
        ValueError: if ``b1`` is 0, where ``x`` cannot be recovered from ``y`` and ``z``.
    """
    arith = arithmetic(numerics)
    check_rate(learning_rate)
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps, weight_decay=weight_decay)
    if concrete(b1) == 0:
        raise ValueError("b1: expected a number in (0, 1), got 0: y would not contain x")
    rate: Any = learning_rate
    if warmup_steps is not None:
        rate = warmup_constant(0, learning_rate, warmup_steps)
    decay = DecayPlan(weight_decay, None)
    schedule: Any = rate  # a number, or a function of the count
    falling = (lambda count: -1 * schedule(count)) if callable(rate) else -1 * schedule

    def init(params: PyTree) -> ScheduleFreeState:
        dtype = _scalar_dtype(arith, params)
        z = jax.tree.map(
            lambda p: jnp.array(p, dtype=state_dtype or p.dtype) if is_inexact_array(p) else None,
            params,
        )
        nu = zeros_like(params, second_moment_dtype(arith, nu_dtype))
        weight_sum, max_lr = jnp.zeros([], dtype), jnp.zeros([], dtype)
        one = jnp.ones([], jnp.int32)
        return ScheduleFreeState(jnp.array(b1, dtype), weight_sum, one, zero_count(), max_lr, nu, z)

    def fast_step(grads: PyTree, state: ScheduleFreeState, params: PyTree) -> tuple[PyTree, PyTree]:
        """RMSprop with bias correction and decoupled decay, without momentum."""
        g = map_inexact(arith.widen, grads)
        nu = average(arith, map_inexact(square, g), state.nu, b2)
        correction = arith.correction(b2, increment(state.count))

        def direction(g: Any, v: Any) -> Any:
            root = arith.root(v / correction.astype(v.dtype)) + eps
            return arith.ratio(g, root) if arith.exact else 1 / root * g

        directions = decay(arith, map_inexact(direction, g, nu), params, state.count)
        return descend(directions, falling, state.count, sign=1), cast_like(nu, state.nu)

    def update(grads: PyTree, state: ScheduleFreeState, params: PyTree) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("schedule_free_adamw: call update(grads, state, params)")
        max_lr, weight_sum, share = _weights(arith, state, rate, weight_lr_power)
        step, nu = fast_step(grads, state, params)
        z = map_inexact(lambda u, z: _add(arith, z, u), step, state.z, keep=1)

        def move(g: Any, y: Any, z_old: Any, z_new: Any) -> Any:
            del g
            y, z_old, z_new = arith.widen(y), arith.widen(z_old), arith.widen(z_new)
            x = (y - (1.0 - b1) * z_old) / b1
            x = (1.0 - share) * x + share * z_new
            return b1 * x + (1.0 - b1) * z_new - y

        updates = narrow(arith, map_inexact(move, grads, params, state.z, z), grads)
        counts = increment(state.step_count), increment(state.count)
        return updates, ScheduleFreeState(state.b1, weight_sum, *counts, max_lr, nu, z)

    return rule(init, update)


def _scalar_dtype(arith: Arithmetic, params: PyTree) -> Any:
    """In optax the lowest dtype of the parameters, where bfloat16 ruins the sums of weights."""
    dtypes = [leaf.dtype for leaf in inexact_leaves(params)]
    if arith.exact or not dtypes:
        return jnp.float64 if dtypes and all(d == jnp.float64 for d in dtypes) else jnp.float32
    return optax.tree.dtype(params, "lowest")


def _add(arith: Arithmetic, z: Any, u: Any) -> Any:
    return (arith.widen(z) + u).astype(z.dtype)


def _weights(arith: Arithmetic, state: ScheduleFreeState, rate: Any, power: Any) -> tuple:
    """The largest learning rate, the sum of weights, and the new iterate's share of the average."""
    dtype = state.max_lr.dtype
    lr = at(rate, state.count if arith.exact else state.step_count)
    lr = jnp.asarray(lr, dtype=dtype) if callable(rate) else lr
    max_lr = jnp.maximum(state.max_lr, lr).astype(dtype)
    weight = max_lr**power
    total = state.weight_sum + weight
    broken = jnp.isnan(weight) | jnp.isnan(total)
    share = jnp.nan_to_num(weight / total, nan=0.0, posinf=jnp.inf)
    return max_lr, total, jnp.where(broken, jnp.nan, share)


def schedule_free_eval_params(state: ScheduleFreeState, params: PyTree) -> PyTree:
    """The averaged parameters ``x``, at which a schedule-free model is evaluated.

    Args:
        state: state of `schedule_free_adamw`.
        params: the parameters ``y`` that were trained.

    Returns:
        ``x = (y - (1 - b1) z) / b1``.
    """

    def average_of(y: Any, z: Any) -> Any:
        return ((y - (1.0 - state.b1) * z) / state.b1).astype(y.dtype)

    return map_inexact(average_of, params, state.z)
