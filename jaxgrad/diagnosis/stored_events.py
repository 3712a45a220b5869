"""Rules for a stored run, step by step: the optimizer's order, direction, rate, and spikes."""

import numpy as np

from jaxgrad.diagnosis.events import ascent_finding, spike_finding
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.optimizers import clip_after_finding, clip_always_finding
from jaxgrad.diagnosis.past import Past
from jaxgrad.diagnosis.rates import SLOW

_LEAPS = 0.1  # updates of a tenth of the weights and more


def clip_after_update(past: Past) -> list[Finding]:
    """The clip stands behind the rule's state; read off the optimizer when the run began."""
    read = past.recording.facts.get("optimizer", {})
    if read.get("clip_order") not in ("after", "mixed") or read.get("intentional"):
        return []
    after = [name for name, verdict in read["leaves"].items() if verdict == "after"]
    return clip_after_finding(read["clip_order"], after, list(read["steps"])) if after else []


def ascent(past: Past) -> list[Finding]:
    """The first updates go up the gradient."""
    cosines = np.asarray(past.recording.mean["alignment"], np.float64)
    moved = np.asarray(past.recording.mean["update_norm"]) > 0
    return ascent_finding(cosines[np.isfinite(cosines) & moved][:5]) if past.from_the_start else []


def clip_always(past: Past) -> list[Finding]:
    """The clip takes off nine tenths of almost every gradient while there is something to learn."""
    clipped = np.asarray(past.recording.mean["clipped_norm"], np.float64)
    known = np.isfinite(clipped) & np.isfinite(past.norms) & (clipped > 0)
    if past.losses[0] > 0:  # a converged model has nothing to clip
        known &= past.losses > 0.1 * past.losses[0]
    return clip_always_finding(past.norms[known], clipped[known]) if known.any() else []


def rate_too_high(past: Past) -> list[Finding]:
    """Updates as large as the weights, and a run that breaks down or gets nowhere."""
    if past.ratios is None or not past.from_the_start or past.progress >= 0.1:
        return []
    early = past.ratios[: max(len(past.ratios) // 10, 4)]
    if not np.isfinite(early).any():
        return []
    # leaf by leaf, so that a bias that starts at zero does not count
    largest = float(np.nanmedian(np.nanmax(np.where(np.isfinite(early), early, -1.0), axis=0)))
    rose = np.nanmax(np.where(np.isfinite(past.losses), past.losses, -np.inf)) > 2 * abs(
        past.losses[0]
    )
    if largest < _LEAPS or not (past.stopped is not None or rose or largest > 1.0):
        return []
    return [
        Finding(
            "lr.too_high", "error", "running", "optimizer",
            (f"The training breaks down at step {past.stopped}" if past.stopped is not None
             else f"The training gets to a loss of {past.last:.3g}")
            + f", and its first updates are {largest:.0%} of the weights.",
            {"first_loss": float(past.losses[0]), "last_loss": past.last,
             "update_over_weight": largest, "threshold": _LEAPS},
            fix("lr.too_high", factor=0.1), 0.7,
            may_be_wrong="no lower rate was tried: the initialization may be too large",
        )
    ]  # fmt: skip


def rate_too_low(past: Past) -> list[Finding]:
    """Updates of next to nothing, and a loss that stays where a guess is."""
    if past.ratios is None or past.stopped is not None or past.warms_up:
        return []
    if past.progress > 0.05 or past.typical_ratio > SLOW or past.norms[-1] == 0:
        return []
    severity = "error" if past.at_chance and past.from_the_start else "info"
    return [
        Finding(
            "lr.too_low", severity, "running", "optimizer",
            f"In {len(past.losses)} steps the updates took {past.progress:.2%} off the loss; in "
            f"the median they are {past.typical_ratio:.1g} of the weights.",
            {"update_over_weight": past.typical_ratio, "threshold": SLOW,
             "loss_at_the_end": past.last},
            fix("lr.too_low", factor=100), 0.7 if severity == "error" else 0.4,
            may_be_wrong="the model was trained before, or a schedule raises the rate later",
        )
    ]  # fmt: skip


def spike(past: Past) -> list[Finding]:
    """A loss far above all others before it, from which the run comes back."""
    if past.stopped is not None:
        return []
    high = np.asarray(past.recording.high["loss"], np.float64)
    losses = past.losses if past.recording.exact else np.fmax(high, past.losses)
    found = spike_finding(losses, np.asarray(past.recording.high["gradient_norm"]), None)
    for finding in found:  # a point's number is not its step's
        point = int(finding.evidence["step"])
        step = int(past.recording.curve["first"][point])
        finding.evidence["step"] = step
        return [
            Finding(**{**vars(finding), "where": f"step {step}",
                       "cause": finding.cause.replace(f"step {point}", f"step {step}"),
                       "fix": fix("loss.spike", step=step)})
        ]  # fmt: skip
    return []
