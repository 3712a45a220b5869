"""Where an optimizer clips, how often, and what it does with micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.optim.accumulating import judge_transformation, micro_gradients

_SAME = 1e-3


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
    if evidence.optimizer is None or not evidence.initial.finite or evidence.every < 2:
        return []
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
    plain = np.linalg.norm(each.mean(0) - union) / max(np.linalg.norm(union), 1e-30)
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
    return clip_always_finding(norms, np.full_like(norms, threshold))


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


def _threshold(evidence: Evidence) -> float | None:
    """Norm along the given gradient at which a fresh state stops to answer; None if it never."""
    problem, tx = evidence.problem, evidence.trainer.tx
    if not evidence.initial.finite or evidence.initial.norm == 0:
        return None
    tree = problem.tree(problem.values)
    powers = np.arange(-32.0, 17.0)
    every = evidence.every

    @jax.jit
    def answers(factors: jax.Array) -> list[jax.Array]:
        def one(factor: jax.Array) -> list[jax.Array]:
            grads = [jnp.asarray(g) * factor for g in evidence.initial.grads]
            state = tx.init(tree)
            for _ in range(min(every, 8)):
                updates, state = tx.update(problem.tree(grads), state, tree)
            floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
            seen = problem.flat(updates) if evidence.clip == "stateless" else floats
            return [jnp.sum(jnp.abs(x)) for x in seen]

        return jax.lax.map(one, factors)

    try:
        table = jax.device_get(answers(jnp.asarray(2.0**powers, jnp.float32)))
    except TypeError:
        return None
    found = []
    for column in map(np.asarray, table):
        if not np.isfinite(column).all() or column[-1] == 0:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            slopes = np.diff(np.log2(column))
        rises = np.abs(slopes[:4].mean() - 1) < 0.05 or np.abs(slopes[:4].mean() - 2) < 0.1
        if rises and np.abs(slopes[-4:]).max() < 0.01:
            power = 1 if slopes[:4].mean() < 1.5 else 2
            gain = np.log2(column[0]) / power - powers[0]
            found.append(2.0 ** (np.log2(column[-1]) / power - gain))
    return float(min(found)) * evidence.initial.norm if found else None
