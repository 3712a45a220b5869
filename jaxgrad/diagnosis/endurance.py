"""Runs that get somewhere, and come apart later."""

import numpy as np

from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix

# A rise of the loss on the way, and what is lost again in the long run: shares of what was taken
# off; what a slower run gets to at least.
_RISE, _LOST, _HELD = 0.25, 0.5, 0.8


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
    return [
        Finding(
            "lr.too_high", "error", "counterfactual", "optimizer",
            f"The training takes the loss to {run.last:.3g}, and comes apart later: "
            + (f"it breaks down at step {longer.stopped}" if longer.stopped is not None
               else f"after {len(longer.losses)} steps it is at {longer.last:.3g}")
            + f"; with updates 10 times smaller it is at {slower.last:.3g} then.",
            {"first_loss": run.first, "loss_as_given": run.last, "loss_after_longer": longer.last,
             "loss_after_longer_at_a_tenth": slower.last, "steps": len(longer.losses),
             "update_over_weight": run.update_ratio},
            fix("lr.too_high", factor=0.1), 0.88,
            may_be_wrong="the learning rate is lowered by then",
        )
    ]  # fmt: skip


def _is_rough(losses: np.ndarray) -> bool:
    """Whether the loss rises, on its way down, by a good share of all that it falls."""
    falls = np.minimum.accumulate(losses)
    rise = float(np.max(losses - falls))
    return rise > _RISE * max(float(losses[0] - falls[-1]), 0.0)
