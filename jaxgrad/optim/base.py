"""What every hand-written rule shares: its arithmetic, its checks, its learning rate.

A rule is an ordinary optax transformation. Its formula is written once, over an `Arithmetic`:

* ``"exact"`` computes in float32 at least, corrects the bias of a moving average by
  ``-expm1(t log beta)`` and never divides zero by zero;
* ``"optax"`` performs optax's own operations in optax's own order, so that both give the same
  bits under one jit.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from jaxgrad.optim.arguments import check_trainable, check_update, concrete
from jaxgrad.tree import is_array, is_inexact_array, map_inexact

Schedule = Callable[[Any], Any]
Count = Int[Array, ""]


class Arithmetic(NamedTuple):
    """The operations in which the two numerics differ.

    Attributes:
        widen: a leaf in the dtype that is computed in.
        correction: ``1 - decay**count``.
        ratio: a quotient.
        root: a square root.
        exact: whether this is the exact arithmetic.
    """

    widen: Callable[[Any], Any]
    correction: Callable[[Any, Any], Any]
    ratio: Callable[[Any, Any], Any]
    root: Callable[[Any], Any]
    exact: bool


def wide_dtype(dtype: Any) -> Any:
    """The dtype computed in: half precision goes to float32, all else stays."""
    return jnp.promote_types(dtype, jnp.float32)


def real_dtype(dtype: Any) -> Any:
    """The dtype of a complex number's parts; real dtypes stay."""
    return jnp.finfo(dtype).dtype


def _exact_correction(decay: Any, count: Any) -> Any:
    """``1 - decay**count`` without cancellation; the logarithm is taken in float64 if it can be."""
    value = concrete(decay)
    if value == 0:
        return jnp.ones(())
    log = jnp.log1p(jnp.asarray(decay) - 1) if value is None else math.log(value)
    return -jnp.expm1(jnp.asarray(count, dtype=jnp.result_type(float)) * log)


def _safe_ratio(numerator: Any, denominator: Any) -> Any:
    zero = denominator == 0
    return jnp.where(zero, 0, numerator / jnp.where(zero, 1, denominator))


def _safe_root(x: Any) -> Any:
    """The square root, with slope zero at zero where the real one is infinite."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), x)


_ARITHMETIC = {
    "exact": Arithmetic(
        widen=lambda x: x.astype(wide_dtype(x.dtype)),
        correction=_exact_correction,
        ratio=_safe_ratio,
        root=_safe_root,
        exact=True,
    ),
    "optax": Arithmetic(
        widen=lambda x: x,
        correction=lambda decay, count: 1 - decay**count,
        ratio=lambda numerator, denominator: numerator / denominator,
        root=jnp.sqrt,
        exact=False,
    ),
}


def arithmetic(numerics: str) -> Arithmetic:
    """Looks up an arithmetic.

    Args:
        numerics: ``"exact"`` or ``"optax"``.

    Returns:
        Its operations.

    Raises:
        ValueError: for any other name.
    """
    if numerics not in _ARITHMETIC:
        raise ValueError(f"numerics: expected 'exact' or 'optax', got {numerics!r}")
    return _ARITHMETIC[numerics]


def zeros_like(params: PyTree, dtype: Any = None) -> PyTree:
    """Zeros for every leaf that carries a gradient, None for the others.

    Args:
        params: parameters.
        dtype: dtype of the zeros, or a function of the leaf's dtype; None for the leaf's own.

    Returns:
        A pytree with the structure of ``params``.
    """
    choose: Any = (
        dtype if callable(dtype) and not isinstance(dtype, type) else lambda own: dtype or own
    )

    def zeros(leaf: Any) -> Any:
        return jnp.zeros_like(leaf, dtype=choose(leaf.dtype)) if is_inexact_array(leaf) else None

    return jax.tree.map(zeros, params)


def second_moment_dtype(arith: Arithmetic, nu_dtype: Any) -> Callable[[Any], Any]:
    """Where squares are averaged: float32 at least, real for complex leaves.

    In bfloat16 an average with decay 0.999 never decays, since 0.999 rounds to 1. optax keeps
    second moments in the parameters' dtype, complex leaves included.
    """
    if nu_dtype is not None:
        return lambda _own: nu_dtype
    return (lambda own: real_dtype(wide_dtype(own))) if arith.exact else lambda own: own


def square(x: Any) -> Any:
    """``x**2``, or ``|x|**2`` for complex leaves, which stays real."""
    return jnp.real(jnp.conj(x) * x) if jnp.iscomplexobj(x) else x**2


def average(arith: Arithmetic, values: PyTree, moments: PyTree, decay: Any) -> PyTree:
    """The exponential moving average ``(1 - decay) value + decay moment``.

    Where ``values`` has no gradient (None, integer, float0) the moment is kept.
    """
    return map_inexact(
        lambda g, m: (1 - decay) * g + decay * arith.widen(m), values, moments, keep=1
    )


def cast_like(new: PyTree, old: PyTree) -> PyTree:
    """New state in the dtypes of the old one: a state's dtypes never change under scan."""
    return jax.tree.map(lambda n, o: n.astype(o.dtype) if is_array(o) else n, new, old)


def increment(count: Any) -> Any:
    """The next count; it stays at the largest integer instead of wrapping around."""
    largest = jnp.iinfo(count.dtype).max
    return jnp.where(count < largest, count + jnp.array(1, count.dtype), largest)


def zero_count() -> Count:
    """The count of a fresh state, an int32 scalar."""
    return jnp.zeros([], jnp.int32)


def at(value: Any, count: Any) -> Any:
    """A hyperparameter at a step: schedules are called with the number of steps done before."""
    return value(count) if callable(value) else value


def descend(directions: PyTree, learning_rate: Any, count: Any, sign: int = -1) -> PyTree:
    """Multiplies by minus the learning rate (optax's order and dtypes of operations)."""
    if learning_rate is None:
        return directions
    step = sign * at(learning_rate, count)
    if callable(learning_rate):
        return map_inexact(lambda u: jnp.array(step, dtype=u.dtype) * u, directions)
    return map_inexact(lambda u: step * u, directions)


def decay_mask(mask: Any, params: PyTree) -> PyTree:
    """A mask as a tree of bools with the structure of the parameters.

    Args:
        mask: None (all), a tree of bools, a prefix of one, or a function of the parameters.
        params: parameters.

    Returns:
        Tree of bools.
    """
    tree = mask(params) if callable(mask) else mask
    if tree is None:
        return jax.tree.map(lambda _: True, params)
    return jax.tree.map(lambda m, part: jax.tree.map(lambda _: bool(m), part), tree, params)


class DecayPlan(NamedTuple):
    """Decoupled weight decay: a coefficient or schedule, and the leaves it applies to."""

    weight_decay: Any
    mask: Any

    def __call__(self, arith: Arithmetic, directions: PyTree, params: PyTree, count: Any) -> PyTree:
        """Adds ``weight_decay * p`` (Loshchilov and Hutter, arXiv:1711.05101, line 12)."""
        if isinstance(self.weight_decay, int | float) and self.weight_decay == 0:
            return directions
        if params is None:
            raise ValueError("weight decay needs the parameters: call update(grads, state, params)")
        rate = at(self.weight_decay, count)

        def decayed(u: Any, p: Any, decays: Any) -> Any:
            return u + rate * arith.widen(p) if decays else u

        return map_inexact(decayed, directions, params, decay_mask(self.mask, params))


def _still(update: Any, param: Any) -> Any:
    """The update of a leaf that was passed by: nothing, in a form that can be added."""
    if is_inexact_array(update) or update is None:
        return update
    if is_array(param):
        return jnp.zeros_like(param)
    return jnp.zeros_like(update) if is_array(update) and update.dtype.names is None else update


def rule(
    init: Callable[[PyTree], Any], update: Callable[[PyTree, Any, PyTree], tuple[PyTree, Any]]
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation of a rule, checking what goes in.

    Args:
        init: function of the parameters; returns the state.
        update: function ``(grads, state, params)``; returns the updates and the new state.

    Returns:
        A transformation that accepts, and ignores, optax's extra arguments.
    """

    def checked_init(params: PyTree) -> Any:
        check_trainable(params)
        return init(params)

    def checked_update(
        updates: PyTree, state: Any, params: PyTree = None, **_: Any
    ) -> tuple[PyTree, Any]:
        if params is not None:
            check_update(updates, params)
        new_updates, new_state = update(updates, state, params)
        if params is None:
            return jax.tree.map(lambda u: _still(u, None), new_updates), new_state
        none = lambda leaf: leaf is None  # noqa: E731
        return jax.tree.map(_still, new_updates, params, is_leaf=none), new_state

    return optax.GradientTransformationExtraArgs(checked_init, checked_update)


def narrow(arith: Arithmetic, updates: PyTree, grads: PyTree) -> PyTree:
    """Exact updates come back in the gradients' dtypes, rounded once; optax's stay as they are."""
    if not arith.exact:
        return updates
    return map_inexact(lambda u, g: u.astype(g.dtype), updates, grads)


def finish(
    arith: Arithmetic, directions: PyTree, learning_rate: Any, count: Any, grads: PyTree
) -> PyTree:
    """The last two steps of every rule: the learning rate, and back to the gradients' dtypes."""
    return narrow(arith, descend(directions, learning_rate, count), grads)
