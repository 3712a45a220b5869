"""Batches that keep a training from learning: a few unlike all others, or all too small."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.diagnosis.evidence import LEARNS, Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.problem import FEW, Problem, count_examples
from jaxgrad.diagnosis.training import Trainer

_UNLIKE = 10.0  # loss or gradient of a batch over the median of all


def outlying_batch(evidence: Evidence, own: float) -> list[Finding]:
    """A few batches unlike all others; the same training without them learns."""
    problem = evidence.problem
    count = len(problem.batches)
    if count < 4:
        return []
    evidence.tell("measuring the gradient of every batch")
    passes = [evidence.instrument.measure(problem.values, batch) for batch in problem.batches]
    both = np.abs([[m.value for m in passes], [m.norm for m in passes]])
    sizes = (both / np.maximum(np.median(both, axis=1, keepdims=True), 1e-30)).max(0)
    bad = np.flatnonzero(sizes > _UNLIKE)
    if not 0 < len(bad) <= count // 4:
        return []
    good = [k if k not in bad else int(np.argmin(sizes)) for k in range(count)]
    rest = jax.tree.map(lambda x: x[np.array(good)], evidence.trainer.stack)
    cured = evidence.run_from(stack=rest)
    gained = evidence.progress(cured)
    if not gained > max(LEARNS, 2 * own):
        return []
    return [
        Finding(
            "loss.spike", "error", "counterfactual", f"step {bad[0]}",
            f"Batch {bad[0]} is unlike the others: at the given parameters its loss or gradient is "
            f"{sizes[bad[0]]:.3g} times theirs. Without it the same training gets to "
            f"{cured.last:.3g}, with it to {evidence.main.last:.3g}.",
            {"batches": [int(k) for k in bad], "times_the_median": float(sizes[bad[0]]),
             "threshold": _UNLIKE, "loss_as_given": evidence.main.last, "loss_without": cured.last},
            fix("loss.spike", step=int(bad[0])), 0.88,
        )
    ]  # fmt: skip


def outlier_on_the_way(evidence: Evidence) -> list[Finding]:
    """The same, where a training that learns a little shows such a batch by its gradient."""
    run, count = evidence.main, len(evidence.problem.batches)
    rounds = len(run.gradient_norms) // count
    if count < 4 or rounds < 2 or run.stopped is not None:
        return []
    norms = np.median(run.gradient_norms[: rounds * count].reshape(rounds, count), axis=0)
    if not norms.max() > _UNLIKE * np.median(norms):
        return []
    return outlying_batch(evidence, max(evidence.progress(run), 0.0))


def batch_too_small(evidence: Evidence, own: float) -> list[Finding]:
    """The same rate on the union of the batches."""
    problem = evidence.problem
    count = len(problem.batches)
    size = count_examples(problem.batch)
    if count < 4 or size is None or size > FEW:
        return []
    union = jax.tree.map(
        lambda *xs: jnp.concatenate(xs) if getattr(xs[0], "ndim", 0) else xs[0], *problem.batches
    )
    evidence.tell("training on the union of the batches")
    bigger = Problem(**{**vars(problem), "batch": union, "batches": (union,)})
    run = Trainer(bigger, evidence.optimizer, evidence.steps).run()
    gained = (run.first - run.last) / max(abs(run.first), 1e-12)
    if not gained > max(LEARNS, 2 * own):
        return []
    return [
        Finding(
            "batch.too_small", "error", "counterfactual", "optimizer",
            f"With batches of {size} the gradient is mostly noise at this learning rate; on "
            f"batches of {size * count} the same rate learns.",
            {"batch": size, "taken_off": own, "taken_off_by_larger_batch": gained},
            fix("batch.too_small", every=count), 0.8,
        )
    ]  # fmt: skip
