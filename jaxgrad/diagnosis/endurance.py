"""Runs that get somewhere, and come apart later, or never get as far as slower ones."""

import numpy as np

from jaxgrad.diagnosis.batches import batch_too_small, outlying_batch
from jaxgrad.diagnosis.evidence import LEARNS, Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.training import Run

# A rise of the loss on the way, and what is lost again in the long run: shares of what was taken
# off; what a slower run gets to at least.
_RISE, _LOST, _HELD = 0.25, 0.5, 0.8
# A run that takes this share off its loss gets far enough; what a slower one leaves, over what it
# leaves itself, in the short run and in the long one.
_ENOUGH, _SHORT, _LONG = 0.75, 0.7, 0.5


def comes_apart(evidence: Evidence) -> list[Finding]:
    """A run that loses again what it took off, and that holds it with smaller steps.

    The first steps at the edge of stability, or of a heavy momentum, are as good as any.
    """
    run = evidence.main
    if run.stopped is not None or not evidence.improves or not _is_rough(run.losses):
        return []
    longer, own = evidence.longer, evidence.progress(run)
    if evidence.progress(longer) > (1 - _LOST) * own:
        return []
    slower = evidence.patient.run(scale=0.1)
    if evidence.progress(slower) < _HELD * own:
        return []
    end = (
        f"it breaks down at step {longer.stopped}" if longer.stopped is not None
        else f"after {len(longer.losses)} steps it is at {longer.last:.3g}"
    )  # fmt: skip
    return [
        _too_high(
            evidence, slower, "error", 0.88,
            f"The training takes the loss to {run.last:.3g}, and comes apart later: {end}; with "
            f"updates 10 times smaller it is at {slower.last:.3g} then.",
        )
    ]  # fmt: skip


def falls_behind(evidence: Evidence) -> list[Finding]:
    """A run that learns, and in the end leaves twice as much as one of far smaller steps.

    Smaller steps take longer: where they are ahead in the short run and in the long one, the rate
    is what the loss stands at. A loss without a bottom at zero has no such shares.
    """
    run = evidence.main
    own = evidence.progress(run)
    if run.stopped is not None or not LEARNS <= own < _ENOUGH or evidence.is_trained:
        return []
    if not run.last > 0 or run.warms_up or not _ahead(evidence.run(scale=0.1), run, _SHORT):
        return []
    longer, slower = evidence.longer, evidence.patient.run(scale=0.1)
    if evidence.progress(longer) >= _ENOUGH or not _ahead(slower, longer, _LONG):
        return []
    other = outlying_batch(evidence, own) or batch_too_small(evidence, own)
    return other or [
        _too_high(
            evidence, slower, "warning", 0.85,
            f"After {len(longer.losses)} steps the training is at a loss of {longer.last:.3g}; "
            f"with updates 10 times smaller it is at {slower.last:.3g} then, and ahead all along.",
        )
    ]  # fmt: skip


def _too_high(
    evidence: Evidence, slower: Run, severity: str, confidence: float, cause: str
) -> Finding:
    """The finding, with what the run came to in the short and in the long, and a slower one."""
    run, longer = evidence.main, evidence.longer
    return Finding(
        "lr.too_high", severity, "counterfactual", "optimizer", cause,
        {"first_loss": run.first, "loss_as_given": run.last, "loss_after_longer": longer.last,
         "loss_after_longer_at_a_tenth": slower.last, "steps": len(longer.losses),
         "update_over_weight": run.update_ratio},
        fix("lr.too_high", factor=0.1), confidence,
        may_be_wrong="the learning rate is lowered by then",
    )  # fmt: skip


def _ahead(slower: Run, run: Run, share: float) -> bool:
    return 0 <= slower.last < share * run.last


def _is_rough(losses: np.ndarray) -> bool:
    """Whether the loss rises, on its way down, by a good share of all that it falls."""
    falls = np.minimum.accumulate(losses)
    rise = float(np.max(losses - falls))
    return rise > _RISE * max(float(losses[0] - falls[-1]), 0.0)
