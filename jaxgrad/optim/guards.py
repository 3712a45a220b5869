"""Guards around a rule: skip what is not finite, scale the loss for half precision."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from jaxgrad.optim.base import arithmetic, increment
from jaxgrad.tree import inexact_leaves, is_array, map_inexact


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every entry of every inexact leaf is finite.

    Args:
        tree: any pytree.

    Returns:
        Boolean scalar; True for an empty tree.
    """
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in inexact_leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.array(True)


class ApplyIfFiniteState(NamedTuple):
    """State of `apply_if_finite` (optax's field names).

    Attributes:
        notfinite_count: rejections in a row, int32 scalar.
        last_finite: whether the last update was finite.
        total_notfinite: rejections in all, int32 scalar.
        inner_state: state of the wrapped transformation.
    """

    notfinite_count: Any
    last_finite: Any
    total_notfinite: Any
    inner_state: Any


def _choose(condition: Any, yes: PyTree, no: PyTree) -> PyTree:
    def select(a: Any, b: Any) -> Any:
        return jnp.where(condition, a, b).astype(jnp.asarray(b).dtype) if is_array(b) else b

    return jax.tree.map(select, yes, no)


def apply_if_finite(
    inner: Any, max_consecutive_errors: int, *, numerics: str = "exact"
) -> optax.GradientTransformationExtraArgs:
    """Rejects steps that are not finite: zero updates, and the state as it was.

    As in optax, after ``max_consecutive_errors`` rejections in a row the next bad step is let
    through, so that a broken run shows. Exact also looks at the updates that ``inner`` makes;
    optax looks at the gradients only, and lets a NaN born inside ``inner`` pass.

    Args:
        inner: the wrapped transformation.
        max_consecutive_errors: number of rejections in a row, >= 0.
        numerics: ``"exact"`` or ``"optax"``.

    Returns:
        An optax transformation with state `ApplyIfFiniteState`.

    Raises:
        ValueError: for a negative number.
    """
    exact = arithmetic(numerics).exact
    if max_consecutive_errors < 0:
        raise ValueError(f"max_consecutive_errors: expected >= 0, got {max_consecutive_errors}")
    wrapped = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> ApplyIfFiniteState:
        rejected, total = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        return ApplyIfFiniteState(rejected, jnp.array(True), total, wrapped.init(params))

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, ApplyIfFiniteState]:
        out, new_inner = wrapped.update(updates, state.inner_state, params, **extra)
        finite = all_finite(updates)
        finite = finite & all_finite(out) if exact else finite
        count = jnp.where(finite, 0, increment(state.notfinite_count))
        accept = finite | (count > max_consecutive_errors)
        out = map_inexact(lambda u: jnp.where(accept, u, jnp.zeros_like(u)), out)
        total = jnp.where(finite, state.total_notfinite, increment(state.total_notfinite))
        new_inner = _choose(accept, new_inner, state.inner_state)
        return out, ApplyIfFiniteState(count, finite, total, new_inner)

    return optax.GradientTransformationExtraArgs(init, update)


class LossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`.

    Attributes:
        scale: what the loss is to be multiplied by, float32 scalar, a power of two.
        good_steps: finite steps since the scale last changed, int32 scalar.
        skipped: steps skipped in all, int32 scalar.
        inner_state: state of the wrapped transformation.
    """

    scale: Any
    good_steps: Any
    skipped: Any
    inner_state: Any


def dynamic_loss_scale(
    inner: Any,
    initial_scale: float | int = 2.0**15,
    period: int = 2000,
    factor: float | int = 2.0,
    *,
    min_scale: float | int = 1.0,
    max_scale: float | int = 2.0**24,
) -> optax.GradientTransformationExtraArgs:
    """Divides gradients of a scaled loss by the scale, in float32, and adapts the scale.

    Multiply the loss by `loss_scale` of the state before differentiating it. A step with a
    non-finite gradient is skipped and the scale divided by ``factor``; after ``period`` finite
    steps it is multiplied by it (Micikevicius et al., arXiv:1710.03740). With scales that are
    powers of two, scaling changes no bit of a gradient that neither overflows nor underflows.

    Args:
        inner: the wrapped transformation; it receives float32 gradients for half-precision ones.
        initial_scale: first scale.
        period: finite steps before the scale grows.
        factor: by which the scale changes, > 1.
        min_scale: smallest scale.
        max_scale: largest scale.

    Returns:
        An optax transformation with state `LossScaleState`; updates are in the gradients' dtypes.

    Raises:
        ValueError: for a factor of at most 1, or scales out of order.
    """
    if factor <= 1:
        raise ValueError(f"factor: expected a number > 1, got {factor}")
    if not 0 < min_scale <= initial_scale <= max_scale:
        raise ValueError(
            "expected 0 < min_scale <= initial_scale <= max_scale, got "
            f"{min_scale}, {initial_scale}, {max_scale}"
        )
    wrapped = optax.with_extra_args_support(inner)
    wide = arithmetic("exact").widen

    def init(params: PyTree) -> LossScaleState:
        good, skipped = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        scale = jnp.asarray(initial_scale, jnp.float32)
        return LossScaleState(scale, good, skipped, wrapped.init(params))

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, LossScaleState]:
        finite = all_finite(updates)
        grads = map_inexact(lambda g: wide(g) / state.scale, updates)
        out, new_inner = wrapped.update(grads, state.inner_state, params, **extra)
        out = map_inexact(
            lambda u, g: jnp.where(finite, u, jnp.zeros_like(u)).astype(g.dtype), out, updates
        )
        good = jnp.where(finite, state.good_steps + 1, 0)
        grow = good >= period
        grown = jnp.where(grow, jnp.minimum(state.scale * factor, max_scale), state.scale)
        scale = jnp.where(finite, grown, jnp.maximum(state.scale / factor, min_scale))
        skipped = jnp.where(finite, state.skipped, increment(state.skipped))
        new_inner = _choose(finite, new_inner, state.inner_state)
        return out, LossScaleState(scale, jnp.where(grow, 0, good), skipped, new_inner)

    return optax.GradientTransformationExtraArgs(init, update)


def loss_scale(opt_state: Any) -> Any:
    """The scale that the loss is to be multiplied by before the next step.

    Args:
        opt_state: state of an optimizer with one `dynamic_loss_scale` anywhere inside.

    Returns:
        float32 scalar.

    Raises:
        ValueError: if there is none, or more than one.
    """

    def is_scale(node: Any) -> bool:
        return isinstance(node, LossScaleState)

    found = [n for n in jax.tree.leaves(opt_state, is_leaf=is_scale) if is_scale(n)]
    if len(found) != 1:
        raise ValueError(f"expected one dynamic_loss_scale in the state, found {len(found)}")
    return found[0].scale
