"""Rules that divide by a second moment: Adam, AdamW, RMSprop, Adagrad."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jaxgrad.optim.arguments import check_decay, check_nonnegative, check_rate
from jaxgrad.optim.base import (
    DecayPlan,
    arithmetic,
    average,
    cast_like,
    descend,
    finish,
    increment,
    narrow,
    rule,
    second_moment_dtype,
    square,
    zero_count,
    zeros_like,
)
from jaxgrad.tree import map_inexact


class AdamState(NamedTuple):
    """State of Adam.

    Attributes:
        count: number of updates done, int32 scalar.
        mu: moving average of the gradients.
        nu: moving average of their squares; float32 at least, unless asked for otherwise.
    """

    count: Any
    mu: Any
    nu: Any


def adam(  # noqa: PLR0913 (optax's signature)
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    nu_dtype: Any = None,
    numerics: str = "exact",
) -> optax.GradientTransformationExtraArgs:
    """Adam (Kingma and Ba, arXiv:1412.6980, algorithm 1).

    ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g²`` and
    ``u = -lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t) + eps_root) + eps)``.

    Args:
        learning_rate: number or schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added outside the square root (Keras adds it before the bias correction).
        eps_root: added inside the square root.
        mu_dtype: dtype of the first moment; None for the parameters'.
        nesterov: Dozat's variant, without the extra ``b2`` (and not torch's NAdam).
        nu_dtype: dtype of the second moment; None for float32 at least.
        numerics: ``"exact"`` or ``"optax"``.

    Returns:
        An optax transformation with state `AdamState`. In float32 the second moment of a gradient
        beyond 2**63 overflows, and that entry's updates are 0 from then on: clip first.
    """
    return adamw(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype,
        weight_decay=0.0,
        nesterov=nesterov,
        nu_dtype=nu_dtype,
        numerics=numerics,
    )


def adamw(  # noqa: PLR0913, PLR0917 (optax's signature)
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    mu_dtype: Any = None,
    weight_decay: Any = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
    nu_dtype: Any = None,
    numerics: str = "exact",
) -> optax.GradientTransformationExtraArgs:
    """Adam with decoupled weight decay: ``u = -lr (adam + weight_decay p)``.

    Loshchilov and Hutter, arXiv:1711.05101. ``p`` is the parameter before the update, and the
    decay is multiplied by the scheduled learning rate.

    Args:
        learning_rate: number or schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added outside the square root.
        eps_root: added inside the square root.
        mu_dtype: dtype of the first moment; None for the parameters'.
        weight_decay: number or schedule (torch's default is 1e-2, optax's 1e-4).
        mask: leaves that decay: None (all, biases and norms too), a tree of bools, or a function
            of the parameters.
        nesterov: Dozat's variant, without the extra ``b2``.
        nu_dtype: dtype of the second moment; None for float32 at least.
        numerics: ``"exact"`` or ``"optax"``.

    Returns:
        An optax transformation with state `AdamState`; it needs ``params`` if it decays.
    """
    arith = arithmetic(numerics)
    check_decay(b1=b1, b2=b2)
    check_rate(learning_rate)
    check_nonnegative(eps=eps, eps_root=eps_root, weight_decay=weight_decay)
    decay = DecayPlan(weight_decay, mask)

    def init(params: PyTree) -> AdamState:
        nu = zeros_like(params, second_moment_dtype(arith, nu_dtype))
        return AdamState(zero_count(), zeros_like(params, mu_dtype), nu)

    def update(grads: PyTree, state: AdamState, params: PyTree) -> tuple[PyTree, AdamState]:
        count = increment(state.count)
        g = map_inexact(arith.widen, grads)
        mu = average(arith, g, state.mu, b1)
        nu = average(arith, map_inexact(square, g), state.nu, b2)
        c1, c2 = arith.correction(b1, count), arith.correction(b2, count)
        c1_next = arith.correction(b1, increment(count)) if nesterov else None

        def direction(g: Any, m: Any, v: Any) -> Any:
            m_hat = _over(m, c1)
            if nesterov:
                m_hat = b1 * _over(m, c1_next) + (1 - b1) * _over(g, c1)
            return arith.ratio(m_hat, arith.root(_over(v, c2) + eps_root) + eps)

        directions = decay(arith, map_inexact(direction, g, mu, nu), params, state.count)
        updates = finish(arith, directions, learning_rate, state.count, grads)
        return updates, AdamState(count, cast_like(mu, state.mu), cast_like(nu, state.nu))

    return rule(init, update)


def _over(moment: Any, correction: Any) -> Any:
    return moment / correction.astype(moment.dtype)


class RmspropState(NamedTuple):
    """State of RMSprop.

    Attributes:
        count: number of updates done, int32 scalar.
        nu: moving average of the squared gradients.
        mu: moving average of the gradients, None unless centered.
        trace: the velocity, None without momentum.
    """

    count: Any
    nu: Any
    mu: Any
    trace: Any


def rmsprop(  # noqa: PLR0913, PLR0917 (optax's signature)
    learning_rate: Any,
    decay: Any = 0.9,
    eps: Any = 1e-8,
    initial_scale: Any = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: Any = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    nu_dtype: Any = None,
    numerics: str = "exact",
) -> optax.GradientTransformationExtraArgs:
    """RMSprop: ``v = decay v + (1 - decay) g²``, ``u = -lr g / sqrt(v + eps)``.

    Tieleman and Hinton, lecture 6.5, 2012; centered as in Graves, arXiv:1308.0850. torch has
    ``decay=0.99`` and ``eps_in_sqrt=False``; momentum acts on the scaled updates.

    Args:
        learning_rate: number or schedule.
        decay: decay of the moving averages.
        eps: added to the denominator.
        initial_scale: first value of the second moment.
        eps_in_sqrt: whether eps stands inside the square root.
        centered: divide by the standard deviation, ``v - m²``.
        momentum: decay of a velocity of the updates; None for none.
        nesterov: whether that velocity looks ahead.
        bias_correction: whether to correct the averages' bias.
        nu_dtype: dtype of the second moment; None for float32 at least.
        numerics: ``"exact"`` or ``"optax"``.

    Returns:
        An optax transformation with state `RmspropState`.
    """
    arith = arithmetic(numerics)
    check_rate(learning_rate)
    check_decay(decay=decay)
    check_nonnegative(eps=eps, initial_scale=initial_scale, momentum=momentum)

    def init(params: PyTree) -> RmspropState:
        nu = zeros_like(params, second_moment_dtype(arith, nu_dtype))
        nu = jax.tree.map(lambda v: jnp.full_like(v, initial_scale), nu)
        mu = zeros_like(params) if centered else None
        trace = None if momentum is None else zeros_like(params)
        return RmspropState(zero_count(), nu, mu, trace)

    def scaling(n: Any, m: Any) -> Any:
        variance = n if m is None else n - square(m)
        if not arith.exact:
            root = jax.lax.rsqrt(variance + eps) if eps_in_sqrt else None
            return root if eps_in_sqrt else 1 / (jnp.sqrt(variance) + eps)
        variance = jnp.maximum(variance, 0)  # rounding can leave it below zero
        return arith.root(variance + eps) if eps_in_sqrt else arith.root(variance) + eps

    def update(grads: PyTree, state: RmspropState, params: PyTree) -> tuple[PyTree, Any]:
        del params
        count = increment(state.count)
        g = map_inexact(arith.widen, grads)
        nu = average(arith, map_inexact(square, g), state.nu, decay)
        mu = average(arith, g, state.mu, decay) if centered else None
        correction = arith.correction(decay, count)
        hat = (lambda x: _over(x, correction)) if bias_correction else (lambda x: x)

        def direction(g: Any, n: Any, *m: Any) -> Any:
            scale = scaling(hat(n), hat(m[0]) if m else None)
            return arith.ratio(g, scale) if arith.exact else scale * g

        directions = map_inexact(direction, g, nu, *([mu] if centered else []))
        u = descend(directions, learning_rate, state.count)
        v = None
        if momentum is not None:  # the velocity comes after the learning rate
            v = map_inexact(lambda u, v: u + momentum * arith.widen(v), u, state.trace, keep=1)
            u = map_inexact(lambda u, v: u + momentum * v if nesterov else v, u, v)
        moments = (cast_like(nu, state.nu), cast_like(mu, state.mu), cast_like(v, state.trace))
        return narrow(arith, u, grads), RmspropState(count, *moments)

    return rule(init, update)


class AdagradState(NamedTuple):
    """State of Adagrad: ``count``, the number of updates done, and the ``sum_of_squares``."""

    count: Any
    sum_of_squares: Any


def adagrad(
    learning_rate: Any,
    initial_accumulator_value: Any = 0.1,
    eps: Any = 1e-7,
    *,
    nu_dtype: Any = None,
    numerics: str = "exact",
) -> optax.GradientTransformationExtraArgs:
    """Adagrad: ``s = s + g²``, ``u = -lr g / sqrt(s + eps)`` (Duchi et al., JMLR 12, 2011).

    torch starts from 0 and adds its eps of 1e-10 outside the square root.

    Args:
        learning_rate: number or schedule.
        initial_accumulator_value: first value of the sum.
        eps: added inside the square root.
        nu_dtype: dtype of the sum; None for float32 at least.
        numerics: ``"exact"`` or ``"optax"``.

    Returns:
        An optax transformation with state `AdagradState`.
    """
    arith = arithmetic(numerics)
    check_rate(learning_rate)
    check_nonnegative(initial_accumulator_value=initial_accumulator_value, eps=eps)

    def init(params: PyTree) -> AdagradState:
        zeros = zeros_like(params, second_moment_dtype(arith, nu_dtype))
        start = jax.tree.map(lambda s: jnp.full_like(s, initial_accumulator_value), zeros)
        return AdagradState(zero_count(), start)

    def direction(g: Any, s: Any) -> Any:
        if arith.exact:
            return arith.ratio(g, arith.root(s + eps))
        return jnp.where(s > 0, jax.lax.rsqrt(s + eps), 0.0) * g

    def update(grads: PyTree, state: AdagradState, params: PyTree) -> tuple[PyTree, AdagradState]:
        del params
        g = map_inexact(arith.widen, grads)
        total = map_inexact(
            lambda g, s: square(g) + arith.widen(s), g, state.sum_of_squares, keep=1
        )
        directions = map_inexact(direction, g, total)
        updates = finish(arith, directions, learning_rate, state.count, grads)
        total = cast_like(total, state.sum_of_squares)
        return updates, AdagradState(increment(state.count), total)

    return rule(init, update)
