"""Gradient accumulation: one step of the rule for several micro-batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxgrad.optim.arguments import check_nonnegative, concrete
from jaxgrad.optim.base import arithmetic, increment, zeros_like
from jaxgrad.tree import map_inexact


class AccumulateState(NamedTuple):
    """State of an accumulation (the first four names are those of optax's MultiSteps).

    Attributes:
        mini_step: micro-batches in the accumulator, int32 scalar; 0 right after a real step.
        gradient_step: real steps done, int32 scalar.
        inner_opt_state: state of the wrapped transformation.
        acc_grads: weighted mean (or sum) of the micro-batches' gradients so far.
        weight: sum of their weights.
    """

    mini_step: Any
    gradient_step: Any
    inner_opt_state: Any
    acc_grads: Any
    weight: Any


def _weight_reader(weights: Any) -> Callable[[Any, dict[str, Any]], Any]:
    """How a micro-batch's weight is found: a function of its index and the extra arguments."""
    if weights is None:
        return lambda _index, _extra: 1.0
    if isinstance(weights, str):

        def named(index: Any, extra: dict[str, Any]) -> Any:
            del index
            if weights not in extra:
                raise TypeError(
                    f"accumulate(weights={weights!r}): call update(grads, state, params, "
                    f"{weights}=number of tokens of this micro-batch)"
                )
            return extra[weights]

        return named
    if callable(weights):
        return lambda index, _extra: weights(index)
    table = jnp.asarray(weights)
    check_nonnegative(weights=table.min())
    return lambda index, _extra: table[index]


def _check_every(every: Any, weights: Any) -> Callable[[Any], Any]:
    if callable(every):
        return every
    number = concrete(every)
    if number is not None and (number < 1 or number != int(number)):
        raise ValueError(f"every: expected a whole number of micro-batches >= 1, got {every}")
    size = np.shape(weights) if hasattr(weights, "__len__") and not isinstance(weights, str) else 0
    if size and (number is None or size != (int(number),)):
        raise ValueError(f"weights: expected {every} numbers, one a micro-batch, got shape {size}")
    return lambda _step: every


def accumulate(
    tx: Any,
    every: Any,
    *,
    mean: bool = True,
    weights: Any = None,
    accumulator_dtype: Any = jnp.float32,
    numerics: str = "exact",
) -> optax.GradientTransformationExtraArgs:
    """Feeds ``tx`` one gradient for every ``every`` micro-batches; updates are zero in between.

    ``tx`` runs on real steps only (``lax.cond``), so that its schedules and moments count real
    steps, and an intermediate step costs one pass over the accumulator. With the micro-batches'
    *mean* gradients and ``weights`` their numbers of tokens, the result is the mean gradient of
    the whole batch, however unevenly it was split; one of weight 0 counts for nothing, NaN
    included. The accumulator starts afresh after each real step: a NaN spoils that step only.

    Args:
        tx: the transformation to be fed.
        every: number of micro-batches, or a schedule of it over real steps.
        mean: feed the (weighted) mean; False feeds the (weighted) sum.
        weights: None for equal ones; ``every`` numbers; a function of the micro-batch's index; or
            the name of an extra argument of ``update``: with ``weights="tokens"`` call
            ``update(grads, state, params, tokens=n)``.
        accumulator_dtype: dtype of the accumulator; double and complex leaves stay so.
        numerics: ``"exact"``, or ``"optax"`` for the operations of ``optax.MultiSteps`` (inside a
            cond XLA may contract products that it does not beside one: the last bit may differ).

    Returns:
        An optax transformation with state `AccumulateState`; extra arguments reach ``tx``.

    Raises:
        ValueError: for a number of micro-batches below 1, or weights that do not match it.
        TypeError: by update, if the named weight is missing.
    """
    exact = arithmetic(numerics).exact
    k_of = _check_every(every, weights)
    weight_of = _weight_reader(weights)
    inner = optax.with_extra_args_support(tx)

    def dtype_of(own: Any) -> Any:
        keeps = exact and (own == jnp.float64 or jnp.issubdtype(own, jnp.complexfloating))
        return jnp.promote_types(own, accumulator_dtype) if keeps else accumulator_dtype

    def init(params: PyTree) -> AccumulateState:
        # No array twice: a state that is donated must not hold a buffer twice.
        return AccumulateState(
            mini_step=jnp.zeros([], jnp.int32),
            gradient_step=jnp.zeros([], jnp.int32),
            inner_opt_state=inner.init(params),
            acc_grads=zeros_like(params, dtype_of),
            weight=jnp.zeros([], jnp.float32),
        )

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, AccumulateState]:
        weight = jnp.asarray(weight_of(state.mini_step, extra), jnp.float32)
        weight = jnp.where(weight >= 0, weight, jnp.nan)  # a negative one would subtract, unseen
        total = state.weight + weight
        share = jnp.where(total == 0, 0, weight / jnp.where(total == 0, 1, total))

        def add(g: Any, a: Any) -> Any:
            real = jnp.finfo(a.dtype).dtype
            if weights is None and not mean:
                return a + g
            if weights is None and not exact:  # optax's operations
                return a + (g - a) / (state.mini_step + 1)
            g = g.astype(a.dtype)
            new = a + (g - a) * share.astype(real) if mean else a + weight.astype(real) * g
            # The mean loss of no tokens is 0 / 0: what weighs nothing must not spoil the rest.
            return new if weights is None else jnp.where(weight == 0, a, new)

        # The sum is formed inside the branches: there it is fused with the rule, or done in place.
        def real_step() -> tuple[PyTree, Any, PyTree]:
            fed = map_inexact(lambda g, a: add(g, a).astype(g.dtype), updates, state.acc_grads)
            out, new = inner.update(fed, state.inner_opt_state, params, **extra)
            fresh = jax.tree.map(jnp.zeros_like, state.acc_grads)
            return out, _like(new, state.inner_opt_state), fresh

        def only_add() -> tuple[PyTree, Any, PyTree]:
            shapes = jax.eval_shape(lambda: real_step()[0])
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            acc = map_inexact(add, updates, state.acc_grads, keep=1)
            return zeros, state.inner_opt_state, _like(acc, state.acc_grads)

        emit = state.mini_step + 1 >= k_of(state.gradient_step)
        out, new_inner, acc = jax.lax.cond(emit, real_step, only_add)
        return out, AccumulateState(
            mini_step=jnp.where(emit, 0, state.mini_step + 1),
            gradient_step=jnp.where(emit, increment(state.gradient_step), state.gradient_step),
            inner_opt_state=new_inner,
            acc_grads=acc,
            weight=jnp.where(emit, 0, total),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _like(new: PyTree, old: PyTree) -> PyTree:
    """New state in the old one's dtypes; both branches of a cond must agree."""
    return jax.tree.map(lambda n, o: jnp.asarray(n, jnp.asarray(o).dtype), new, old)


def has_updated(state: AccumulateState) -> Any:
    """Whether the last call was a real step.

    Args:
        state: state of `accumulate`.

    Returns:
        Boolean scalar.
    """
    return (state.mini_step == 0) & (state.gradient_step > 0)
