"""Learning rates that end while there is most of the loss to take off."""

import numpy as np

from jaxgrad.diagnosis.evidence import LEARNS, Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.training import Run

# what a run that stands still takes off once it is taken up again, over what it took off before
_AGAIN, _NOTICED = 1.5, 0.05


def ends_early(evidence: Evidence) -> list[Finding]:
    """Steps that end, large as they were, while there is most of the loss to take off."""
    run = evidence.main
    own = evidence.progress(run)
    if evidence.every > 1:  # between two updates of an accumulator there is none
        return []
    if run.stopped is not None or own >= LEARNS or evidence.is_trained or not runs_out(run):
        return []
    gained = evidence.progress(evidence.run(reference=True))
    if gained > max(LEARNS, 3 * own):
        return [out_of_rate(evidence, *at_a_constant_rate(gained))]
    return _stands_still(evidence)


def _stands_still(evidence: Evidence) -> list[Finding]:
    """A run whose steps have ended, and that falls as far again once it is taken up.

    The loss may have no zero, as a density's: then no share of it tells what was left to learn.
    """
    trainer, run = evidence.trainer, evidence.main
    evidence.tell(f"training {evidence.steps} steps on from the end of the run")
    on = trainer.run(run.values, reference=True)
    if on.stopped is not None:
        return []
    states = evidence.problem.values, run.values, on.values
    start, end, later = (trainer.level(values) for values in states)
    again = end - later
    if not again > max(_AGAIN * (start - end), _NOTICED * abs(end)):
        return []
    facts = {"loss_at_first": start, "loss_at_the_end": end, "loss_taken_up_again": later}
    words = f"from there Adam at a constant 1e-3 takes it on to {later:.3g}"
    return [out_of_rate(evidence, words, facts)]


def runs_out(run: Run) -> bool:
    """Whether the updates end, in the middle of the run, though the gradient does not."""
    if len(run.losses) < 16 or not run.update_norms.any():
        return False
    updates, gradients = _left(run.update_norms), _left(run.gradient_norms)
    return updates < 1e-3 and updates < 1e-2 * gradients


def _left(norms: np.ndarray) -> float:
    """The last quarter of a run over the largest of the first."""
    quarter = len(norms) // 4
    return float(np.median(norms[-quarter:])) / max(float(np.max(norms[:quarter])), 1e-37)


def at_a_constant_rate(gained: float) -> tuple[str, dict[str, float]]:
    """Words and facts on the share of its loss that the same training takes off with Adam."""
    facts = {"taken_off_at_a_constant_rate": gained}
    return f"Adam at a constant 1e-3 takes off {gained:.0%}", facts


def out_of_rate(evidence: Evidence, words: str, facts: dict[str, float]) -> Finding:
    """The finding, with words and facts on another training that goes on."""
    run = evidence.main
    left = _left(run.update_norms)
    return Finding(
        "lr.too_low", "error", "counterfactual", "optimizer",
        f"The updates come to an end at a loss of {run.last:.3g}: the last ones are {left:.1g} of "
        f"the first, as from a schedule that decays too fast; {words}.",
        {"last_updates_over_first": left, "threshold": 1e-3, "loss_as_given": run.last} | facts,
        "schedule = optax.cosine_decay_schedule(peak, decay_steps=total_steps)"
        "   # count steps, not epochs", 0.88,
        may_be_wrong="a restart raises the rate later",
    )  # fmt: skip
