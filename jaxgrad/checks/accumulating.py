"""The assertion that an accumulation over micro-batches equals one big batch."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxgrad.optim.accumulating import (
    Accumulation,
    combine,
    distance,
    explain,
    hypotheses,
    judge_step,
    judge_transformation,
    micro_gradients,
    tolerance,
)
from jaxgrad.tree import map_inexact


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
    It returns the accumulated gradient or the new parameters, alone, in a tuple or in a dict. From
    new parameters the learning rate is unknown: there a sum shows only if the step function takes
    parts, since then it can be called with the whole batch as a single part. Where the rule hides
    even the gradient's direction (Adam), examples are exchanged between micro-batches instead.

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
        ValueError: if arguments are missing or do not fit, or no update ever comes out.

    Warns:
        UserWarning: if a sum could not be told from a mean.
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
    if judged.limits:
        warnings.warn(f"assert_accumulates: {judged.limits}", UserWarning, stacklevel=2)


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


def _whole(parts: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _stacked(parts: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


# How a step function may take its micro-batches: as one batch, as a list, as a stack.
_PROTOCOLS = (_whole, list, _stacked)


class _StepFunction:
    """A user's step function, called with copies: it may donate what it is given."""

    def __init__(self, step: Callable[..., Any], params: PyTree):
        self.step, self.params = step, params
        self.errors: list[str] = []

    def __call__(self, argument: Any) -> PyTree | None:
        """The outcome with the structure and shapes of the parameters; None if there is none."""
        try:
            out = self.step(*jax.tree.map(_copy, (self.params, argument)))
        except Exception as error:  # a protocol that this function does not follow
            self.errors.append(f"{type(error).__name__}: {error}".split("\n")[0])
            return None
        wanted = jax.tree.map(jnp.shape, self.params)
        within = out.values() if isinstance(out, dict) else out
        for candidate in [out, *(within if isinstance(out, tuple | list | dict) else ())]:
            same = _same_structure(candidate, self.params)
            if same and jax.tree.map(jnp.shape, candidate) == wanted:
                return candidate
        self.errors.append("it returned nothing with the structure and shapes of params")
        return None


def _copy(x: Any) -> Any:
    return jnp.array(x) if isinstance(x, jax.Array) else x


def _judge_step_function(
    step: Any, params: PyTree, every: int, loss: Any, batch: PyTree
) -> Accumulation:
    if len(inspect.signature(step).parameters) < 2:
        raise ValueError("a step function takes (params, batch)")
    parts = _split(batch, every)
    micro = [jax.grad(loss)(params, part) for part in parts]
    truth = jax.grad(loss)(params, batch)
    close = tolerance(params)
    candidates = {"none": truth}
    plain = combine(micro, [1 / every] * every)
    # Mean losses over equal parts agree to rounding; else the parts weigh differently.
    uneven = judge_step(plain, params, {"none": truth}).found["none"]
    if uneven > (1e-6 if close <= 1e-3 else close):
        candidates["misweighted"] = plain
    candidates = {**candidates, **hypotheses(micro, [1.0] * every), "none": truth}
    judged: list[Accumulation] = []
    call = _StepFunction(step, params)
    for protocol in _PROTOCOLS:
        outcome = call(protocol(parts))
        if outcome is None:
            continue
        found, absolute = judge_step(outcome, params, candidates)
        result = explain(found, every, close)
        if result.fault == "none" and not absolute and protocol is not _whole:
            summed = _sums_over_parts(call, protocol([batch]), (outcome, every))
            if summed is not None:
                return summed
        if result.fault == "differs" and not absolute:
            result = _judge_by_exchange(call, protocol, (parts, outcome), result)
        judged.append(result)
        if result.fault == "none" and absolute and len(judged) == 1:
            return result
    if not judged:
        tried = "; ".join(
            f"{name}: {error}"
            for name, error in zip(("whole batch", "list", "stack"), call.errors, strict=True)
        )
        raise ValueError(
            "step(params, batch) failed, or returned nothing with the structure and shapes of "
            f"params, for the whole batch, for a list of parts and for a stack of them. {tried}"
        )
    return min(judged, key=_preference)


def _preference(result: Accumulation) -> int:
    """The protocol that is meant is the one under which the outcome makes most sense.

    What equals a single micro-batch under any of them has lost the others.
    """
    if result.fault == "none":
        return 3 if result.limits else 1
    return {"erased": 0, "differs": 4}.get(result.fault, 2)


def _sums_over_parts(
    call: _StepFunction, whole: Any, outcome: tuple[PyTree, int]
) -> Accumulation | None:
    """New parameters hide the learning rate; the same step on one big part shows it."""
    got, every = outcome
    once = call(whole)
    if once is None:
        return None
    change, single = (_change(tree, call.params) for tree in (got, once))
    sums = map_inexact(lambda x: every * x, single)
    result = explain(judge_step(change, call.params, {"none": single, "sums": sums}).found, every)
    return result if result.fault == "sums" else None


def _change(new: PyTree, old: PyTree) -> PyTree:
    return map_inexact(lambda a, b: a - b, new, old)


def _judge_by_exchange(
    call: _StepFunction, protocol: Any, first: tuple[list[PyTree], PyTree], result: Accumulation
) -> Accumulation:
    """New parameters of a rule like Adam: exchanges examples and repeats micro-batches.

    A right accumulation does not mind which example is in which micro-batch; one that erases does
    the same with the micro-batch that it kept, repeated.
    """
    parts, outcome = first
    every = len(parts)
    dealt = _dealt(_whole(parts), every)
    arguments = {"none": dealt, "last": parts[-1:] * every, "first": parts[:1] * every}
    outcomes = {name: call(protocol(argument)) for name, argument in arguments.items()}
    if any(other is None for other in outcomes.values()):
        return result
    got, close = _change(outcome, call.params), tolerance(call.params)
    gaps = {name: distance(got, _change(other, call.params)) for name, other in outcomes.items()}
    start = f"exchanging examples between {every} micro-batches changes the step by"
    measured = f"{start} {gaps['none']:.2g} (relative)"
    if gaps["none"] <= close:
        limits = (
            "the step hides the size of its gradient: a sum could not be told from a mean; "
            "return the accumulated gradient to judge that too"
        )
        return Accumulation("none", measured, gaps["none"], limits)
    for name in ("last", "first"):
        if gaps[name] <= close:
            words = f"{measured}; it is the step of the {name} micro-batch only"
            return Accumulation("erased", words, gaps["none"])
    return Accumulation("differs", f"{measured}, and fits no known fault", gaps["none"])


def _dealt(batch: PyTree, every: int) -> list[PyTree]:
    """The batch dealt out like cards: example i goes to micro-batch i modulo their number."""
    return [jax.tree.map(lambda x, i=i: x[i::every], batch) for i in range(every)]
