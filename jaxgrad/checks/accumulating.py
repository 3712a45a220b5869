"""The assertion that an accumulation over micro-batches equals one big batch."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxgrad.optim.accumulating import (
    Accumulation,
    combine,
    explain,
    hypotheses,
    judge_step,
    judge_transformation,
    micro_gradients,
)


def assert_accumulates(  # noqa: PLR0913 (every piece of evidence is optional)
    tx_or_step: Any,
    params: PyTree,
    grads: Any = None,
    *,
    every: int,
    loss: Callable[..., Any] | None = None,
    batch: PyTree = None,
    weights: Any = None,
) -> None:
    """Asserts that ``every`` micro-batches do what one big batch does.

    A *transformation* is fed ``every`` gradients and compared with the transformation inside it,
    fed their (weighted) mean once. A *step function* is ``step(params, batch)``; it splits the
    batch into ``every`` parts along the first axis itself, or takes a list, or a stack, of parts.
    It returns the accumulated gradient or the new parameters, alone or first in a tuple. From new
    parameters the learning rate is unknown: there a sum shows only if the step function takes
    parts, since then it can be called with the whole batch as a single part.

    Args:
        tx_or_step: a transformation with ``init`` and ``update``, or a step function.
        params: parameters.
        grads: for a transformation: ``every`` gradients, as a list or stacked; None for random
            ones, or for those of ``loss`` on the parts of ``batch``.
        every: number of micro-batches.
        loss: ``loss(params, batch)``, a mean over the batch; needed for a step function.
        batch: the whole batch; its first axis is split.
        weights: the parts' weights, such as numbers of tokens; None for equal ones. For a step
            function the gradient of ``loss`` on the whole batch is the truth.

    Raises:
        AssertionError: saying whether the accumulation is erased, sums, or is misweighted.
        ValueError: if arguments are missing or do not fit.
    """
    shares = [1.0] * every if weights is None else [float(w) for w in np.ravel(weights)]
    if len(shares) != every:
        raise ValueError(f"weights: expected {every} numbers, got {len(shares)}")
    is_tx = callable(getattr(tx_or_step, "init", None)) and hasattr(tx_or_step, "update")
    if is_tx:
        micro = _micro_gradients(params, grads, every, loss, batch)
        judged = judge_transformation(tx_or_step, params, micro, shares)
    else:
        if loss is None or batch is None:
            raise ValueError("a step function needs loss= and batch= to be compared with")
        judged = _judge_step_function(tx_or_step, params, every, loss, batch)
    if judged.fault != "none":
        raise AssertionError(f"accumulation {judged.fault}: {judged.message}")


def _split(batch: PyTree, every: int) -> list[PyTree]:
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or min(sizes) % every:
        raise ValueError(
            f"batch: expected one size of the first axis, divisible by {every}, got {sizes}"
        )
    n = sizes.pop() // every
    return [jax.tree.map(lambda x, i=i: x[i * n : (i + 1) * n], batch) for i in range(every)]


def _micro_gradients(
    params: PyTree, grads: Any, every: int, loss: Any, batch: PyTree
) -> Sequence[PyTree]:
    if grads is None and loss is not None and batch is not None:
        return [jax.grad(loss)(params, part) for part in _split(batch, every)]
    if grads is None:
        return micro_gradients(params, every)
    listed = isinstance(grads, list | tuple) and len(grads) == every
    if listed and all(_same_structure(g, params) for g in grads):
        return list(grads)
    stacked = [leaf.shape[:1] for leaf in jax.tree.leaves(grads)]
    if _same_structure(grads, params) and all(shape == (every,) for shape in stacked):
        return [jax.tree.map(lambda g, i=i: g[i], grads) for i in range(every)]
    raise ValueError(f"grads: expected {every} gradients, as a list or stacked along a first axis")


def _same_structure(a: PyTree, b: PyTree) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b)


def _protocols(parts: list[PyTree], batch: PyTree) -> Iterator[tuple[Any, Any]]:
    """How a step function may take its batch, and the whole batch as one part (or None)."""
    yield batch, None
    yield parts, [batch]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    yield stack, jax.tree.map(lambda x: x[None], batch)


def _call(step: Callable[..., Any], params: PyTree, argument: Any) -> PyTree | None:
    """The outcome with the structure and shapes of the parameters; None if there is none."""
    try:
        out = step(params, argument)
    except Exception:  # a protocol that this function does not follow
        return None
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    for candidate in [out, *(out if isinstance(out, tuple | list) else ())]:
        if not _same_structure(candidate, params):
            continue
        if [jnp.shape(leaf) for leaf in jax.tree.leaves(candidate)] == shapes:
            return candidate
    return None


def _judge_step_function(
    step: Any, params: PyTree, every: int, loss: Any, batch: PyTree
) -> Accumulation:
    if len(inspect.signature(step).parameters) < 2:
        raise ValueError("a step function takes (params, batch)")
    parts = _split(batch, every)
    micro = [jax.grad(loss)(params, part) for part in parts]
    truth = jax.grad(loss)(params, batch)
    candidates = {"none": truth}
    plain = combine(micro, [1 / every] * every)
    if judge_step(plain, params, {"none": truth}).found["none"] > 1e-6:
        candidates["misweighted"] = plain
    candidates = {**candidates, **hypotheses(micro, [1.0] * every), "none": truth}
    judged: list[Accumulation] = []
    for argument, whole in _protocols(parts, batch):
        outcome = _call(step, params, argument)
        if outcome is None:
            continue
        found, absolute = judge_step(outcome, params, candidates)
        result = explain(found, every)
        if result.fault == "none" and absolute:
            return result
        if result.fault == "none" and whole is not None:
            summed = _sums_over_parts(step, params, whole, (outcome, every))
            if summed is not None:
                return summed
        judged.append(result)
    if not judged:
        raise ValueError(
            "step(params, batch) failed, or returned nothing with the structure and shapes of "
            "params, for the whole batch, for a list of parts and for a stack of them"
        )
    right = [result for result in judged if result.fault == "none"]
    known = [result for result in judged if result.fault != "differs"]
    return (right or known or judged)[0]


def _sums_over_parts(
    step: Any, params: PyTree, whole: Any, outcome: tuple[PyTree, int]
) -> Accumulation | None:
    """New parameters hide the learning rate; the same step on one big part shows it."""
    got, every = outcome
    once = _call(step, params, whole)
    if once is None:
        return None
    change, single = (jax.tree.map(lambda a, b: a - b, tree, params) for tree in (got, once))
    sums = jax.tree.map(lambda x: every * x, single)
    result = explain(judge_step(change, params, {"none": single, "sums": sums}).found, every)
    return result if result.fault == "sums" else None
