"""What happens on the way: ascent, spikes, breakdowns."""

import math

import numpy as np

from jaxgrad.diagnosis import guess
from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.gradients import underflow
from jaxgrad.diagnosis.units import dead, layer_of_leaf, saturated


def ascent(evidence: Evidence) -> list[Finding]:
    """The first update goes up the gradient."""
    if evidence.optimizer is None or not evidence.initial.finite:
        return []
    run = evidence.main
    moved = np.flatnonzero((run.update_norms > 0) & np.isfinite(run.alignment))[:5]
    return ascent_finding(run.alignment[moved])


def ascent_finding(cosines: np.ndarray) -> list[Finding]:
    """The finding, if there is one: cosines of the first updates with the negative gradient."""
    if not cosines.size or np.median(cosines) > -0.05 or cosines[0] > 0:
        return []
    return [
        Finding(
            "optimizer.ascent", "error", "running", "optimizer",
            "The updates go up the gradient: their cosine with the negative gradient is "
            f"{cosines[0]:.2f} at the first step.",
            {"cosine": [float(c) for c in cosines], "threshold": -0.05},
            fix("optimizer.ascent"), 0.97,
            may_be_wrong="the objective is meant to be maximized",
        )
    ]  # fmt: skip


def falling_without_end(evidence: Evidence) -> list[Finding]:
    """A cross-entropy with its sign flipped: every row's gradient raises one logit's loss."""
    if not evidence.initial.finite:
        return []
    head = evidence.head
    if head is None or head.kind != "log" or head.size < 3:
        return _flipped_binary(evidence)
    chance = math.log(head.size)
    # random logits can be worse than chance and hardly better; a policy's loss is anywhere below
    if not 0.85 * chance <= -evidence.initial.value <= 1.7 * chance:
        return []
    return [
        Finding(
            "optimizer.ascent", "error", "initial", head.where,
            f"The loss begins at {evidence.initial.value:.3g}, minus the logarithm of the number "
            "of classes: its sign is flipped, and the likelihood of the labels is minimized.",
            {"loss": evidence.initial.value, "minus_chance": -chance},
            "loss = -log_probabilities[labels].mean()", 0.9,
        )
    ]  # fmt: skip


def _flipped_binary(evidence: Evidence) -> list[Finding]:
    """A binary log-likelihood that is minimized: even odds give minus ln 2."""
    if evidence.initial.value >= 0 or not evidence.structure.binaries:
        return []
    places = guess.logits(evidence.structure, evidence.wiring)
    even = guess.value_of_zeros(evidence.problem, evidence.wiring, places)
    if even is None or abs(even + math.log(2.0)) > 1e-3:
        return []
    where = evidence.structure.binaries[0].where
    return [
        Finding(
            "optimizer.ascent", "error", "initial", where,
            f"At even odds the binary cross-entropy is {even:.3g}, minus ln 2: its sign is flipped,"
            " and the likelihood of the targets is minimized.",
            {"loss": evidence.initial.value, "loss_of_even_odds": even},
            "loss = -(y * jnp.log(p) + (1 - y) * jnp.log(1 - p)).mean()", 0.9,
        )
    ]  # fmt: skip


def cancelled(evidence: Evidence) -> list[Finding]:
    """Every gradient is exactly zero, at all steps, though the loss is made of the parameters.

    As that of a ratio of a probability with itself, which is one whatever the parameters are. What
    other rules explain (dead or saturated units, float16) is theirs.
    """
    start = evidence.initial
    if not start.finite or start.norm != 0 or start.value == 0:
        return []
    run = evidence.main
    if run.stopped is not None or (run.gradient_norms != 0).any():
        return []
    if any(rule(evidence) for rule in (dead, saturated, underflow)):
        return []
    return [
        Finding(
            "gradient.blocked", "error", "running", "loss",
            "The loss is made of the parameters, and the gradient of every one is exactly zero at "
            f"all of {len(run.losses)} steps: what depends on them cancels.",
            {"loss": start.value, "gradient_norm": 0.0},
            "old = jax.lax.stop_gradient(old)  # or compute it before the update, from other "
            "parameters", 0.9,
            may_be_wrong="the loss is at its minimum already",
        )
    ]  # fmt: skip


def spike(evidence: Evidence) -> list[Finding]:
    """A loss far above all others before it, from which the run comes back."""
    run = evidence.main
    if run.stopped is not None or run.levels is not None:  # the loss of one example is no event
        return []
    count = len(evidence.problem.batches)
    found = spike_finding(run.losses, run.gradient_norms, count)
    # the few batches of a diagnosis come again and again: it may know them by heart
    by_heart = [
        f for f in found
        if f.evidence["median_before"] < 1e-3 * abs(run.first) and f.evidence["step"] >= 2 * count
    ]  # fmt: skip
    return [] if by_heart and evidence.improves else found


def spike_finding(losses: np.ndarray, norms: np.ndarray, batches: int | None) -> list[Finding]:
    """The finding, if there is one, of losses and gradient norms step by step.

    Norms that are NaN were not measured, and do not speak against it.
    """
    if len(losses) < 20:
        return []
    for t in range(8, len(losses) - 2):
        before = losses[max(t - 21, 0) : t]
        middle = float(np.median(before))
        spread = float(np.median(np.abs(before - middle))) * 1.4826
        high = losses[t] > middle + 10 * max(spread, 0.05 * abs(middle))
        above = losses[t] > max(before.max() * 3, losses[:3].max() * 2)
        steep = norms[t] > 5 * np.median(norms[max(t - 21, 0) : t])
        if not (high and above and (steep or not np.isfinite(norms[t]))):
            continue
        known = {} if batches is None else {"batch": t % batches}
        return [
            Finding(
                "loss.spike", "warning", "running", f"step {t}",
                f"At step {t} the loss jumps from {middle:.3g} to {losses[t]:.3g}.",
                {"step": t, "loss": float(losses[t]), "median_before": middle, **known,
                 "gradient_norm": float(norms[t]), "threshold": "10 sigma and 3 x"},
                fix("loss.spike", step=t), 0.85,
            )
        ]  # fmt: skip
    return []


def breakdown(evidence: Evidence) -> list[Finding]:
    """The run breaks down at every learning rate that was tried."""
    run = evidence.main
    if run.stopped is None or not evidence.initial.finite:
        return []
    if any(evidence.run(scale=s).stopped is None for s in (0.1, 0.01, 0.001)) or not run.stopped:
        return []
    leaf = evidence.problem.names[int(np.nanargmax(run.gradient_rms[run.stopped - 1]))]
    return [
        Finding(
            "gradient.exploding", "error", "running", layer_of_leaf(evidence, leaf),
            f"The training breaks down at step {run.stopped}, at a thousandth of the learning rate "
            "too.",
            {"step": run.stopped, "gradient_norm": float(run.gradient_norms[run.stopped])},
            fix("gradient.exploding"), 0.6,
        )
    ]  # fmt: skip
