"""Rules with at most a first moment: gradient descent, momentum, Nesterov's momentum, Lion."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jaxgrad.optim.arguments import check_decay, check_nonnegative, check_rate
from jaxgrad.optim.base import (
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
from jaxgrad.tree import map_inexact


class MomentumState(NamedTuple):
    """State of gradient descent.

    Attributes:
        count: number of updates done, int32 scalar.
        trace: the velocity ``v``, or None without momentum.
    """

    count: Any
    trace: Any


class LionState(NamedTuple):
    """State of Lion: ``count``, the number of updates done, and ``mu``, the moving average."""

    count: Any
    mu: Any


def sgd(
    learning_rate: Any,
    momentum: Any = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    numerics: str = "exact",
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent, ``u = -lr g``, with optional momentum ``v = mu v + g``, ``u = -lr v``.

    The learning rate stands outside the velocity, as in torch; Keras has it inside, which differs
    under a schedule.

    Args:
        learning_rate: number or schedule.
        momentum: decay ``mu`` of the velocity; None keeps no velocity.
        nesterov: look ahead, ``u = -lr (g + mu v)`` (Sutskever et al., ICML 2013).
        accumulator_dtype: dtype of the velocity; None for the parameters'.
        numerics: ``"exact"`` or ``"optax"``.

    Returns:
        An optax transformation with state `MomentumState`.
    """
    arith = arithmetic(numerics)
    check_rate(learning_rate)
    check_nonnegative(momentum=momentum)

    def init(params: PyTree) -> MomentumState:
        trace = None if momentum is None else zeros_like(params, accumulator_dtype)
        return MomentumState(zero_count(), trace)

    def update(grads: PyTree, state: MomentumState, params: PyTree) -> tuple[PyTree, Any]:
        del params
        g = v = map_inexact(arith.widen, grads)
        trace = None
        if momentum is not None:
            v = map_inexact(lambda g, v: g + momentum * arith.widen(v), g, state.trace, keep=1)
            trace = cast_like(v, state.trace)
            v = map_inexact(lambda g, v: g + momentum * v if nesterov else v, g, v)
        updates = finish(arith, v, learning_rate, state.count, grads)
        return updates, MomentumState(increment(state.count), trace)

    return rule(init, update)


def momentum(
    learning_rate: Any,
    momentum: Any = 0.9,
    accumulator_dtype: Any = None,
    *,
    numerics: str = "exact",
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent with momentum: ``v = mu v + g``, ``u = -lr v`` (Polyak, 1964).

    Args:
        learning_rate: number or schedule.
        momentum: decay ``mu`` of the velocity.
        accumulator_dtype: dtype of the velocity; None for the parameters'.
        numerics: ``"exact"`` or ``"optax"``.

    Returns:
        An optax transformation with state `MomentumState`.
    """
    return sgd(learning_rate, momentum, False, accumulator_dtype, numerics=numerics)


def nesterov(
    learning_rate: Any,
    momentum: Any = 0.9,
    accumulator_dtype: Any = None,
    *,
    numerics: str = "exact",
) -> optax.GradientTransformationExtraArgs:
    """Nesterov's momentum: ``v = mu v + g``, ``u = -lr (g + mu v)`` (Sutskever et al., 2013).

    Args:
        learning_rate: number or schedule.
        momentum: decay ``mu`` of the velocity.
        accumulator_dtype: dtype of the velocity; None for the parameters'.
        numerics: ``"exact"`` or ``"optax"``.

    Returns:
        An optax transformation with state `MomentumState`.
    """
    return sgd(learning_rate, momentum, True, accumulator_dtype, numerics=numerics)


def lion(  # noqa: PLR0913 (optax's signature)
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.99,
    mu_dtype: Any = None,
    weight_decay: Any = 1e-3,
    mask: Any = None,
    *,
    numerics: str = "exact",
) -> optax.GradientTransformationExtraArgs:
    """Lion: ``u = -lr (sign(b1 m + (1 - b1) g) + wd p)``, ``m = b2 m + (1 - b2) g``.

    Chen et al., arXiv:2302.06675, algorithm 2. Where ``b1 m`` and ``(1 - b1) g`` cancel exactly,
    the sign is decided by how XLA rounds the sum.

    Args:
        learning_rate: number or schedule.
        b1: weight of the moving average inside the sign.
        b2: decay of the moving average.
        mu_dtype: dtype of the moving average; None for the parameters'. In bfloat16 it stands
            still once it is within a third of the gradients; float32 does not.
        weight_decay: number or schedule, multiplied by the learning rate too.
        mask: leaves that decay: None (all), a tree of bools, or a function of the parameters.
        numerics: ``"exact"`` or ``"optax"``.

    Returns:
        An optax transformation with state `LionState`; it needs ``params`` if it decays.
    """
    arith = arithmetic(numerics)
    check_rate(learning_rate)
    check_decay(b1=b1, b2=b2)
    check_nonnegative(weight_decay=weight_decay)
    decay = DecayPlan(weight_decay, mask)

    def init(params: PyTree) -> LionState:
        return LionState(zero_count(), zeros_like(params, mu_dtype))

    def update(grads: PyTree, state: LionState, params: PyTree) -> tuple[PyTree, LionState]:
        g = map_inexact(arith.widen, grads)
        signs = map_inexact(
            lambda g, m: jnp.sign((1.0 - b1) * g + b1 * arith.widen(m)), g, state.mu
        )
        mu = average(arith, g, state.mu, b2)
        directions = decay(arith, signs, params, state.count)
        updates = finish(arith, directions, learning_rate, state.count, grads)
        return updates, LionState(increment(state.count), cast_like(mu, state.mu))

    return rule(init, update)
