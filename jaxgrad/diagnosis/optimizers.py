"""Where an optimizer clips, how often, and what it does with micro-batches."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.optim.accumulating import judge_transformation, micro_gradients
from jaxgrad.optim.reading import chain_parts

_SAME = 1e-3
_LONGEST = 64  # calls in which an accumulator has to come to its second update


def clip_after_update(evidence: Evidence) -> list[Finding]:
    """The clip stands behind the rule's state: exploding gradients enter the moments in full."""
    order = evidence.clip
    if order is None or order.intentional or order not in ("after", "mixed"):
        return []
    after = [name for name, verdict in order.leaves.items() if verdict == "after"]
    return clip_after_finding(str(order), after, list(order.steps)) if after else []


def clip_after_finding(order: str, after: list[str], steps: list[str]) -> list[Finding]:
    """The finding; `after` names the leaves of the state that see unclipped gradients."""
    return [
        Finding(
            "optimizer.clip_after_update", "error", "static", "optimizer",
            "The clip comes after the rule's state, so unclipped gradients enter its moments and "
            "the clip caps the finished update instead.",
            {"order": order, "layers": after, "steps": steps},
            fix("optimizer.clip_after_update"), 0.98,
            may_be_wrong="the update is meant to be clipped, as in Adafactor",
        )
    ]  # fmt: skip


def accumulation(evidence: Evidence) -> list[Finding]:
    """Accumulation over micro-batches that sums, or forgets."""
    if evidence.optimizer is None or not evidence.initial.finite:
        return []
    summed = _summing_step(evidence)
    if summed or evidence.every < 2:
        return summed
    every = evidence.every
    tree = evidence.problem.tree(evidence.problem.values)
    evidence.tell(f"comparing {every} micro-batches with one batch")
    try:
        judged = judge_transformation(
            evidence.plain_optimizer, tree, micro_gradients(tree, every), [1.0] * every,
        )  # fmt: skip
    except Exception as error:
        evidence.notes.append(f"the accumulation could not be judged: {error}")
        return []
    code = {"sums": "accumulation.sums", "erased": "accumulation.ineffective"}.get(judged.fault)
    if code is None:
        return _misweighted(evidence)
    return [
        Finding(
            code, "error", "static", "optimizer",
            f"Accumulation over {every} micro-batches is not one big batch: {judged.message}.",
            {"every": every, "relative_error": judged.error, "threshold": _SAME},
            fix(code, every=every), 0.97,
            may_be_wrong="the sum is meant, and the learning rate was divided by the number of "
            "micro-batches",
        )
    ]  # fmt: skip


def _summing_step(evidence: Evidence) -> list[Finding]:
    """A step of the chain that holds gradients back and hands on their sum, where the mean learns.

    What follows it, a momentum for instance, may move the parameters at every step all the same.
    """
    own = evidence.progress(evidence.main)
    if evidence.improves:
        return []
    every = next((k for k in map(_sums_over(evidence), _steps_of(evidence)) if k), 0)
    if not every:
        return []
    cured = evidence.run(scale=1.0 / every)
    # a run that the sum breaks and the mean does not: that rate may still be too high for the mean
    saved = evidence.main.stopped is not None and cured.stopped is None
    if not saved and not evidence.progress(cured) > max(0.1, 2 * own):
        return []
    return [
        Finding(
            "accumulation.sums", "error", "counterfactual", "optimizer",
            f"A step of the optimizer holds {every} gradients back and hands on their sum, {every} "
            f"times their mean; with the mean the run gets to {cured.last:.3g}, "
            + (
                f"as given it breaks at step {evidence.main.stopped}."
                if saved
                else f"as given to {evidence.main.last:.3g}."
            ),
            {"every": every, "loss_as_given": evidence.main.last, "loss_with_mean": cured.last},
            fix("accumulation.sums", every=every), 0.93,
        )
    ]  # fmt: skip


def _steps_of(evidence: Evidence) -> list[Any]:
    """The steps of a chain, chains inside of it opened."""
    found, queue = [], [evidence.plain_optimizer]
    while queue:
        tx = queue.pop(0)
        parts = chain_parts(tx)
        queue += parts
        found += [] if parts else [tx]
    return found


def _sums_over(evidence: Evidence) -> Callable[[Any], int]:
    """Finds over how many calls a step sums what it gets, on its own; 0 if it does not."""
    problem = evidence.problem
    tree = problem.tree(problem.values)
    ones = problem.tree([jnp.full_like(v, 1e-3) for v in problem.values])

    def sums_over(tx: Any) -> int:
        def call(state: Any, _: None) -> tuple[Any, jax.Array]:
            updates, state = tx.update(ones, state, tree)
            largest = [jnp.max(jnp.abs(u)).astype(jnp.float32) for u in problem.flat(updates)]
            return state, jnp.max(jnp.stack(largest))

        try:
            if not jax.tree.leaves(tx.init(tree)):
                return 0
            sizes = np.asarray(jax.lax.scan(call, tx.init(tree), None, _LONGEST)[1]) / 1e-3
        except Exception:  # it needs more than gradients, or its state changes its shape
            return 0
        out = np.flatnonzero(sizes) + 1
        if len(out) < 2 or out[0] < 2 or np.any(np.diff(out) != out[0]):
            return 0
        return int(out[0]) if np.allclose(sizes[out - 1], out[0], rtol=1e-2) else 0

    return sums_over


def _misweighted(evidence: Evidence) -> list[Finding]:
    """Means of micro-batches with unequal numbers of tokens are not the mean of all tokens."""
    problem, every = evidence.problem, evidence.every
    parts = list(problem.batches[:every])
    if len(parts) < every:
        return []
    whole = _joined(parts)
    if whole is None:
        return []
    evidence.tell(f"comparing the loss of {every} micro-batches with that of their union")
    gradient = jax.jit(jax.grad(problem.value))
    each = np.stack([_vector(gradient(problem.values, part)) for part in parts])
    union = _vector(gradient(problem.values, whole))
    weights, *_ = np.linalg.lstsq(each.T, union, rcond=None)
    left = np.linalg.norm(each.T @ weights - union) / max(np.linalg.norm(union), 1e-30)
    # of a loss that is a sum the union is the sum of all parts: what counts is the direction
    mean = each.mean(0)
    plain = np.linalg.norm(mean * (union @ mean / max(mean @ mean, 1e-30)) - union)
    plain /= max(np.linalg.norm(union), 1e-30)
    if left > 0.02 or plain < 0.05 or weights.min() < -0.02:
        return []
    return [
        Finding(
            "accumulation.misweighted", "error", "static", "optimizer",
            "Micro-batches count equally although they hold unequal numbers of tokens: the mean of "
            "their means is not the mean of all.",
            {"weights": [float(w) for w in weights], "relative_error": float(plain),
             "threshold": 0.05},
            fix("accumulation.misweighted", every=every), 0.9,
            may_be_wrong="every micro-batch is meant to count equally",
        )
    ]  # fmt: skip


def _joined(parts: list[object]) -> object | None:
    sizes = {x.shape[0] for x in jax.tree.leaves(parts[0]) if getattr(x, "ndim", 0)}
    if len(sizes) != 1:
        return None
    return jax.tree.map(
        lambda *xs: jnp.concatenate(xs) if getattr(xs[0], "ndim", 0) else xs[0], *parts
    )


def _vector(leaves: list[object]) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in leaves])


def clip_always(evidence: Evidence) -> list[Finding]:
    """The clip takes off nine tenths of almost every gradient."""
    order = evidence.clip
    if order is None or order not in ("before", "both", "stateless", "mixed"):
        return []
    threshold = evidence.clip_norm = _threshold(evidence)
    losses, norms = evidence.main.losses, evidence.main.gradient_norms
    learning = losses > 0.1 * losses[0] if losses[0] > 0 else np.isfinite(losses)
    norms = norms[np.isfinite(norms) & learning]  # a converged model has nothing to clip
    if threshold is None or not norms.size:
        return []
    found = clip_always_finding(norms, np.full_like(norms, threshold))
    if not found:
        return []
    if _keeps_size(evidence, threshold):
        return [_before_a_normalizing_rule(evidence, found[0], threshold / float(norms.max()))]
    return [_as_step_size(evidence, found[0])]


def _before_a_normalizing_rule(evidence: Evidence, clip: Finding, factor: float) -> Finding:
    """An alarm only if the training without the clip gets a tenth further.

    The rule takes a gradient at any scale, and at so small a one the clip lets all pass.
    """
    free = evidence.run(gain=0.5 * factor)
    facts = {
        "steps_keep_their_size": True, "loss_as_given": evidence.main.last,
        "loss_without": free.last,
    }  # fmt: skip
    return replace(
        clip, severity=clip.severity if evidence.gains(free, times=1.0) else "info",
        evidence=clip.evidence | facts,
        cause=f"The clip is active at {clip.evidence['share_clipped']:.0%} of the steps, and the "
        "rule behind it makes steps of the same size of what is left: the training gets to "
        f"{evidence.main.last:.3g} with the clip and to {free.last:.3g} without.",
    )  # fmt: skip


def _as_step_size(evidence: Evidence, clip: Finding) -> Finding:
    """No alarm if the training learns, and larger steps get it no further."""
    harmless = evidence.improves and not evidence.gains(evidence.run(scale=10.0), times=1.0)
    facts = clip.evidence | {"steps_keep_their_size": False}
    return replace(clip, severity="info" if harmless else clip.severity, evidence=facts)


def _keeps_size(evidence: Evidence, threshold: float) -> bool:
    """Whether the rule behind the clip makes as large a step of a gradient ten times smaller.

    Adam does, and a clip before it hardly changes how far a step goes. The second step tells: a
    warm-up may begin at a rate of zero.
    """
    step, factor = jax.jit(_fresh_step(evidence, 2)), threshold / evidence.initial.norm
    try:
        at, below = (step(jnp.float32(factor * f))[0] for f in (1.0, 0.1))
    except TypeError:
        return False
    size = math.sqrt(sum(float(jnp.sum(jnp.square(a))) for a in at))
    apart = math.sqrt(
        sum(float(jnp.sum(jnp.square(a - b))) for a, b in zip(at, below, strict=True))
    )
    return size > 0 and apart < 0.1 * size


def clip_always_finding(raw: np.ndarray, clipped: np.ndarray) -> list[Finding]:
    """The finding, if there is one: norms before the clip, and what it leaves of them, (T,)."""
    share, ratio = float(np.mean(raw > clipped * (1 + 1e-6))), float(np.median(raw / clipped))
    if share < 0.9 or ratio < 10:
        return []
    return [
        Finding(
            "optimizer.clip_always", "warning", "running", "optimizer",
            f"The clip is active at {share:.0%} of the steps and divides the gradient by "
            f"{ratio:.3g} in the median: it sets the step size.",
            {"share_clipped": share, "ratio": ratio, "clip_norm": float(np.median(clipped)),
             "raw_norm_90th_percentile": float(np.quantile(raw, 0.9)), "threshold": 10.0},
            fix("optimizer.clip_always", threshold=float(np.quantile(raw, 0.9))), 0.88,
            may_be_wrong="normalized gradients are meant",
        )
    ]  # fmt: skip


def _fresh_step(
    evidence: Evidence, count: int = 1
) -> Callable[[jax.Array], tuple[list[jax.Array], Any]]:
    """An early update, and the state after it, of the given gradient at so many times its size."""
    problem, tx = evidence.problem, evidence.trainer.tx
    tree = problem.tree(problem.values)

    def step(factor: jax.Array) -> tuple[list[jax.Array], Any]:
        grads = problem.tree([jnp.asarray(g) * factor for g in evidence.initial.grads])
        state, updates = tx.init(tree), tree
        for _ in range(count * min(evidence.every, 8)):
            updates, state = tx.update(grads, state, tree)
        return problem.flat(updates), state

    return step


def _threshold(evidence: Evidence) -> float | None:
    """Norm that the clip leaves of large gradients along the given one; None if there is no limit.

    A clip by the weights' size, unit by unit, stops one leaf long before another; each counts by
    its part of the gradient.
    """
    if not evidence.initial.finite or evidence.initial.norm == 0:
        return None
    powers = np.arange(-32.0, 17.0)
    step = _fresh_step(evidence)

    @jax.jit
    def answers(factors: jax.Array) -> list[jax.Array]:
        def one(factor: jax.Array) -> list[jax.Array]:
            updates, state = step(factor)
            floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
            seen = updates if evidence.clip == "stateless" else floats
            return [jnp.sum(jnp.abs(x)) for x in seen]

        return jax.lax.map(one, factors)

    try:
        table = jax.device_get(answers(jnp.asarray(2.0**powers, jnp.float32)))
    except TypeError:
        return None
    passed, whole = [], []
    for column in map(np.asarray, table):
        if not np.isfinite(column).all() or column[-1] == 0:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            slopes = np.diff(np.log2(column))
        rises = np.abs(slopes[:4].mean() - 1) < 0.05 or np.abs(slopes[:4].mean() - 2) < 0.1
        if rises and np.abs(slopes[-4:]).max() < 0.01:
            power = 1 if slopes[:4].mean() < 1.5 else 2
            passed.append(np.float64(column[-1]) ** (1 / power))
            whole.append(np.float64(column[0]) ** (1 / power) / 2.0 ** powers[0])
    if not passed:
        return None
    return float(np.linalg.norm(passed) / np.linalg.norm(whole)) * evidence.initial.norm
