"""Judging an accumulation: does it do what one big batch would have done?"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxgrad.optim.reading import chain_parts, closure, is_transformation
from jaxgrad.tree import count_parameters, inexact_leaves, is_inexact_array, map_inexact

# Sums of float32 in another order, through a rule and back.
_CLOSE = 1e-3


class Accumulation(NamedTuple):
    """What an accumulation does.

    Attributes:
        fault: ``"none"``, ``"erased"``, ``"sums"``, ``"misweighted"``, ``"early"``, ``"late"``
            or ``"differs"``.
        message: what was measured, in words.
        error: relative distance to one big batch.
    """

    fault: str
    message: str
    error: float


def without_accumulation(tx: Any, params: PyTree, depth: int = 0) -> Any | None:
    """The transformation that an accumulator feeds, read from closures; through chains too.

    Args:
        tx: transformation.
        params: parameters; the inner transformation's state must be part of the outer one's.
        depth: for recursion.

    Returns:
        A transformation without the accumulation, or None if none could be read.
    """
    update = tx.update
    holder = getattr(update, "__self__", None)
    held = {**closure(update), **(vars(holder) if hasattr(holder, "__dict__") else {})}
    parts = chain_parts(tx)
    if parts:
        inner = [without_accumulation(part, params, depth + 1) for part in parts]
        if all(part is None for part in inner):
            return None
        return optax.chain(*(new or old for new, old in zip(inner, parts, strict=True)))
    outer = jax.tree.structure(tx.init(params))
    for thing in held.values():
        if is_transformation(thing) and thing is not holder:
            if jax.tree.structure(thing.init(params)) != outer:
                return thing
            if depth < 8:  # a wrapper that adds nothing to the state
                return without_accumulation(thing, params, depth + 1)
    functions = [f for f in held.values() if callable(f) and hasattr(f, "__self__")]
    for f in functions:  # MultiSteps.gradient_transformation() holds bound methods
        if is_transformation(f.__self__) and f.__self__ is not tx and depth < 8:
            return without_accumulation(f.__self__, params, depth + 1)
    return None


def _distance(a: PyTree, b: PyTree) -> float:
    """Largest difference, relative to the larger of both trees."""
    pairs = list(zip(inexact_leaves(a), inexact_leaves(b), strict=True))
    largest = max((_size(x) for pair in pairs for x in pair), default=0.0)
    gap = max((_size(x - y) for x, y in pairs), default=0.0)
    return gap / largest if largest else 0.0


def _size(x: Any) -> float:
    return float(jnp.max(jnp.abs(x), initial=0))


def combine(grads: Sequence[PyTree], weights: Sequence[float]) -> PyTree:
    """A weighted sum of gradients.

    Args:
        grads: gradients.
        weights: one number each.

    Returns:
        Their sum.
    """
    total = map_inexact(lambda g: g * weights[0], grads[0])
    for g, w in zip(grads[1:], weights[1:], strict=True):
        total = map_inexact(lambda a, b, w=w: a + w * b, total, g)
    return total


def micro_gradients(params: PyTree, every: int) -> list[PyTree]:
    """Random gradients of norm 1e-3, too small for a clip to act, one for each micro-batch."""
    size = 1e-3 / max(count_parameters(params), 1) ** 0.5

    def draw(p: Any, seed: int) -> Any:
        if not is_inexact_array(p):
            return None
        rng = np.random.default_rng(seed)
        return jnp.asarray(size * rng.standard_normal(p.shape), p.dtype)

    leaves, treedef = jax.tree.flatten(params)
    return [
        treedef.unflatten([draw(p, 1000 * i + j) for j, p in enumerate(leaves)])
        for i in range(every)
    ]


def hypotheses(grads: Sequence[PyTree], weights: Sequence[float]) -> dict[str, PyTree]:
    """What an accumulator could have handed on, right and wrong.

    Args:
        grads: the micro-batches' mean gradients.
        weights: their weights, such as numbers of tokens.

    Returns:
        Gradients by what they would mean.
    """
    k, total = len(grads), sum(weights)
    found = {"none": combine(grads, [w / total for w in weights])}
    if max(weights) > min(weights):
        found["misweighted"] = combine(grads, [1 / k] * k)
    found["sums"] = combine(grads, [1.0] * k)
    found["sums (weighted)"] = combine(grads, list(weights))
    found["erased (last)"] = grads[-1]
    found["erased (first)"] = grads[0]
    found["erased (last, divided)"] = combine(grads[-1:], [1 / k])
    return found


_WORDS = {
    "misweighted": "the plain mean of the micro-batches, whatever their weights",
    "sums": "the sum of the micro-batches, {k} times their mean",
    "sums (weighted)": "the weighted sum of the micro-batches instead of their mean",
    "erased (last)": "the last micro-batch only: the others were erased",
    "erased (first)": "the first micro-batch only: the others were ignored",
    "erased (last, divided)": "a {k}th of the last micro-batch: the others were erased",
}


def explain(found: dict[str, float], k: int) -> Accumulation:
    """Names the hypothesis that fits.

    Args:
        found: relative distance to every hypothesis.
        k: number of micro-batches.

    Returns:
        The judgment.
    """
    error = found["none"]
    if error <= _CLOSE:
        return Accumulation("none", "equal to one big batch", error)
    best = min(found, key=lambda name: found[name])
    start = f"{k} micro-batches differ from one big batch by {error:.2g} (relative)"
    if found[best] > _CLOSE:
        return Accumulation("differs", f"{start}, and fit no known fault", error)
    words = _WORDS[best].format(k=k)
    return Accumulation(best.split(" ")[0], f"{start}; they equal {words}", error)


def judge_transformation(
    tx: Any, params: PyTree, grads: Sequence[PyTree], weights: Sequence[float]
) -> Accumulation:
    """Feeds a transformation its micro-batches and compares with the inner one fed the mean.

    Args:
        tx: transformation that accumulates.
        params: parameters.
        grads: the micro-batches' gradients.
        weights: their weights.

    Returns:
        The judgment. Where the inner transformation cannot be read, sums cannot be told from
        means: then only the order of the micro-batches and their weights are judged.
    """
    k = len(grads)
    name = _weight_name(tx)
    update = jax.jit(tx.update)  # compiled once; the symmetric test runs it many times

    def run(micro: Sequence[PyTree]) -> tuple[list[float], PyTree]:
        state, sizes, total = tx.init(params), [], None
        for g, w in zip(micro, weights, strict=True):
            u, state = update(g, state, params, **({name: jnp.float32(w)} if name else {}))
            sizes.append(max((_size(x) for x in inexact_leaves(u)), default=0.0))
            total = u if total is None else map_inexact(jnp.add, total, u)
        return sizes, total

    sizes, got = run(grads)
    if max(sizes[:-1], default=0.0) > 0:
        first = next(i for i, size in enumerate(sizes) if size > 0) + 1
        message = f"an update of size {sizes[first - 1]:.2g} came out after {first} of {k}"
        return Accumulation("early", f"{message} micro-batches", 1.0)
    candidates = hypotheses(grads, weights)
    inner = without_accumulation(tx, params)
    if inner is None:
        return _judge_by_symmetry(run, grads, weights, got)
    once = jax.jit(lambda g: inner.update(g, inner.init(params), params)[0])
    wanted = {n: once(g) for n, g in candidates.items()}
    moves = max((_size(x) for x in inexact_leaves(wanted["none"])), default=0.0)
    if sizes[-1] == 0 and moves > 0:
        return Accumulation("late", f"no update came out after {k} micro-batches", 1.0)
    found = {n: _distance(got, w) for n, w in wanted.items()}
    judged = explain(found, k)
    if judged.fault == "none" and _distance(wanted["sums"], wanted["none"]) < _CLOSE:
        return _judge_states(tx, inner, (params, grads, weights), name)
    return judged


def _judge_states(tx: Any, inner: Any, inputs: tuple, name: str | None) -> Accumulation:
    """Adam's first update is the same for a mean and a sum; its moments are not."""
    params, grads, weights = inputs
    state = tx.init(params)
    update = jax.jit(tx.update)
    for g, w in zip(grads, weights, strict=True):
        _, state = update(g, state, params, **({name: jnp.float32(w)} if name else {}))
    once = jax.jit(lambda g: inner.update(g, inner.init(params), params)[1])
    found = {n: _state_distance(state, once(g)) for n, g in hypotheses(grads, weights).items()}
    return explain(found, len(grads))


def _state_distance(outer: Any, inner: Any) -> float:
    """Largest distance of an inner float leaf to the nearest leaf of its shape in the outer."""
    floats = inexact_leaves(outer)
    worst = 0.0
    for leaf in inexact_leaves(inner):
        same = [x for x in floats if x.shape == leaf.shape and x.dtype == leaf.dtype]
        worst = max(worst, min((_distance(x, leaf) for x in same), default=1.0))
    return worst


def _weight_name(tx: Any) -> str | None:
    """The extra argument through which jaxgrad's accumulate takes weights."""
    reader = closure(tx.update).get("weight_of")
    name = closure(reader).get("weights") if reader is not None else None
    return name if isinstance(name, str) else None


def _judge_by_symmetry(
    run: Callable, grads: Sequence[PyTree], weights: Sequence[float], got: PyTree
) -> Accumulation:
    """A sum and a mean alike do the same when every micro-batch is replaced by the mean."""
    k = len(grads)
    found = {}
    for name, g in hypotheses(grads, weights).items():
        if not name.startswith("sums"):
            found[name] = _distance(got, run([g] * k)[1])
    return explain(found, k)


class StepDistances(NamedTuple):
    """How far a step function's outcome is from every hypothesis.

    Attributes:
        found: relative distances.
        absolute: False if the outcome are new parameters, compared up to the learning rate.
    """

    found: dict[str, float]
    absolute: bool


def judge_step(outcome: PyTree, params: PyTree, candidates: dict[str, PyTree]) -> StepDistances:
    """Compares a step function's outcome with every hypothesis.

    Args:
        outcome: the accumulated gradient, or the new parameters.
        params: the old parameters.
        candidates: of `hypotheses`.

    Returns:
        Distances. From new parameters a sum cannot be told from a mean.
    """
    as_gradient = {n: _distance(outcome, g) for n, g in candidates.items()}
    if min(as_gradient.values()) <= _CLOSE:
        return StepDistances(as_gradient, True)
    change = map_inexact(lambda a, b: a - b, outcome, params)
    as_step = {}
    for name, g in candidates.items():
        inner = sum(float(jnp.vdot(x, y).real) for x, y in _pairs(change, g))
        square = sum(float(jnp.vdot(x, x).real) for x in inexact_leaves(g))
        rate = inner / square if square else 0.0
        scaled = map_inexact(lambda x, r=rate: r * x, g)
        as_step[name] = _distance(change, scaled) if rate < 0 else 1.0
    nearer = min(as_step.values()) < min(as_gradient.values())
    return StepDistances(as_step, False) if nearer else StepDistances(as_gradient, True)


def _pairs(a: PyTree, b: PyTree) -> list[tuple[Any, Any]]:
    return list(zip(inexact_leaves(a), inexact_leaves(b), strict=True))
