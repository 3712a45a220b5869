"""Judging an accumulation: does it do what one big batch would have done?"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxgrad.optim.reading import chain_parts, closure, is_transformation
from jaxgrad.optim.stripping import without_accumulation
from jaxgrad.tree import count_parameters, inexact_leaves, is_inexact_array, map_inexact

# Sums of float32 in another order, through a rule and back.
_CLOSE = 1e-3
# Calls are repeated, since a warm-up has no first step.
_ROUNDS = 2


class Accumulation(NamedTuple):
    """What an accumulation does.

    Attributes:
        fault: ``"none"``, ``"erased"``, ``"sums"``, ``"misweighted"``, ``"early"``, ``"late"``
            or ``"differs"``.
        message: what was measured, in words.
        error: relative distance to one big batch.
        limits: what could not be judged, in words; empty if all could.
    """

    fault: str
    message: str
    error: float
    limits: str = ""


def distance(a: PyTree, b: PyTree) -> float:
    """Largest difference of two trees, relative to the largest entry of both.

    Args:
        a: tree.
        b: tree of the same structure.

    Returns:
        0 for equal trees, empty ones included.
    """
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
    wide = lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32))  # noqa: E731
    total = map_inexact(lambda g: wide(g) * weights[0], grads[0])
    for g, w in zip(grads[1:], weights[1:], strict=True):
        total = map_inexact(lambda a, b, w=w: a + w * wide(b), total, g)
    return map_inexact(lambda t, g: t.astype(g.dtype), total, grads[0])


def tolerance(tree: PyTree) -> float:
    """Rounding that is no fault: larger for half precision, of which the coarsest leaf decides."""
    steps = [float(jnp.finfo(leaf.dtype).eps) for leaf in inexact_leaves(tree)]
    return max([_CLOSE, *(4 * eps for eps in steps)])


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


def explain(found: dict[str, float], k: int, close: float = _CLOSE) -> Accumulation:
    """Names the hypothesis that fits.

    Args:
        found: relative distance to every hypothesis.
        k: number of micro-batches.
        close: largest relative distance of what counts as equal.

    Returns:
        The judgment.
    """
    error = found["none"]
    if error <= close:
        return Accumulation("none", "equal to one big batch", error)
    best = min(found, key=lambda name: found[name])
    start = f"{k} micro-batches differ from one big batch by {error:.2g} (relative)"
    if found[best] > close:
        return Accumulation("differs", f"{start}, and fit no known fault", error)
    words = _WORDS[best].format(k=k)
    return Accumulation(best.split(" ")[0], f"{start}; they equal {words}", error)


class _Fed(NamedTuple):
    """The updates of some calls, and the last state."""

    updates: list[PyTree]
    state: Any


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
    k, close = len(grads), tolerance((params, grads))
    name = _weight_name(tx)
    calls = [
        (g, {name: jnp.float32(w)} if name else {}) for g, w in zip(grads, weights, strict=True)
    ]
    feed = functools.partial(_feed, params=params)
    outer = feed(tx, calls * _ROUNDS)
    sizes = [_largest(u) for u in outer.updates]
    emitted = [i + 1 for i, size in enumerate(sizes[:k]) if size > 0]
    if emitted and emitted[0] < k:
        message = (
            f"an update of size {sizes[emitted[0] - 1]:.2g} came out after {emitted[0]} of {k}"
        )
        return Accumulation("early", f"{message} micro-batches", 1.0)
    if k == 1:
        return Accumulation("none", "one micro-batch is the whole batch", 0.0)
    inner = without_accumulation(tx, functools.partial(_accumulates, feed, calls))
    if inner is None and not any(sizes) and inexact_leaves(params):
        raise ValueError(f"no update came out of {len(sizes)} micro-batches: nothing to compare")
    if inner is None:
        return _judge_by_symmetry(lambda c: feed(tx, c * _ROUNDS), calls, weights, close)
    candidates = hypotheses(grads, weights)
    wanted = {n: feed(inner, [(g, {})] * _ROUNDS) for n, g in candidates.items()}
    return _judge_beside(wanted, _Fed(outer.updates[k - 1 :: k], outer.state), k, close)


def _judge_beside(wanted: dict[str, _Fed], outer: _Fed, k: int, close: float) -> Accumulation:
    """Compares with what the rule inside does with every hypothesis, fed to it directly."""
    moves = [_largest(u) for u in wanted["none"].updates]
    if not any(moves) and inexact_leaves(outer.updates):
        raise ValueError(
            f"no update came out of {_ROUNDS} steps, even without accumulation: nothing to compare"
        )
    if any(_largest(u) == 0 < due for u, due in zip(outer.updates, moves, strict=True)):
        return Accumulation("late", f"no update came out after {k} micro-batches", 1.0)
    judged = explain({n: distance(outer.updates, w.updates) for n, w in wanted.items()}, k, close)
    hidden = distance(wanted["sums"].updates, wanted["none"].updates) < close
    if judged.fault != "none" or not hidden:
        return judged
    # Adam's first updates are the same for a mean and a sum; its moments are not.
    states = {n: _state_distance(outer.state, w.state) for n, w in wanted.items()}
    judged = explain(states, k, close)
    if judged.fault == "none" and states["sums"] <= close:
        return judged._replace(limits=f"a sum and a mean do the same here ({_UNREAD})")
    return judged


_UNREAD = "whether micro-batches are summed or averaged was not judged"


def _feed(tx: Any, calls: list[tuple[PyTree, dict[str, Any]]], params: PyTree) -> _Fed:
    update = jax.jit(tx.update)
    state, updates = tx.init(params), []
    for g, extra in calls:
        u, state = update(g, state, params, **extra)
        updates.append(u)
    return _Fed(updates, state)


def _largest(tree: PyTree) -> float:
    return max((_size(x) for x in inexact_leaves(tree)), default=0.0)


def _accumulates(feed: Callable, calls: list, tx: Any) -> bool:
    """Whether most calls have no update; an accumulator of two emits every other time."""
    try:
        updates = feed(tx, calls * _ROUNDS).updates
    except TypeError:  # it takes no weights, so that it cannot hold the accumulator that does
        updates = feed(tx, [(g, {}) for g, _ in calls] * _ROUNDS).updates
    return sum(_largest(u) > 0 for u in updates) < 0.6 * len(updates)


def _state_distance(outer: Any, inner: Any) -> float:
    """Largest distance of an inner float leaf to the nearest leaf of its shape in the outer."""
    floats = inexact_leaves(outer)
    worst = 0.0
    for leaf in inexact_leaves(inner):
        same = [x for x in floats if x.shape == leaf.shape and x.dtype == leaf.dtype]
        worst = max(worst, min((distance(x, leaf) for x in same), default=1.0))
    return worst


def _weight_name(tx: Any, depth: int = 0) -> str | None:
    """The extra argument through which jaxgrad's accumulate takes weights, wherever it stands."""
    held = closure(tx.update)
    name = closure(held.get("weight_of")).get("weights")
    if isinstance(name, str):
        return name
    inner = [*chain_parts(tx), *(thing for thing in held.values() if is_transformation(thing))]
    found = (_weight_name(thing, depth + 1) for thing in inner) if depth < 8 else ()
    return next((name for name in found if name is not None), None)


def _judge_by_symmetry(
    run: Callable[[list], _Fed], calls: list, weights: Sequence[float], close: float
) -> Accumulation:
    """A sum and a mean alike do the same when every micro-batch is replaced by the mean."""
    got, grads = run(calls).updates, [g for g, _ in calls]
    found = {}
    for name, g in hypotheses(grads, weights).items():
        if not name.startswith("sums"):
            found[name] = distance(got, run([(g, extra) for _, extra in calls]).updates)
    judged = explain(found, len(calls), close)
    return judged._replace(limits=f"what is fed could not be read ({_UNREAD})")


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
    as_gradient = {n: distance(outcome, g) for n, g in candidates.items()}
    if min(as_gradient.values()) <= tolerance(params):
        return StepDistances(as_gradient, True)
    change = map_inexact(lambda a, b: a - b, outcome, params)
    as_step = {}
    for name, g in candidates.items():
        inner = sum(float(jnp.vdot(x, y).real) for x, y in _pairs(change, g))
        square = sum(float(jnp.vdot(x, x).real) for x in inexact_leaves(g))
        rate = inner / square if square else 0.0
        scaled = map_inexact(lambda x, r=rate: r * x, g)
        as_step[name] = distance(change, scaled) if rate < 0 else 1.0
    nearer = min(as_step.values()) < min(as_gradient.values())
    return StepDistances(as_step, False) if nearer else StepDistances(as_gradient, True)


def _pairs(a: PyTree, b: PyTree) -> list[tuple[Any, Any]]:
    return list(zip(inexact_leaves(a), inexact_leaves(b), strict=True))
