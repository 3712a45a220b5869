"""Learning rate, batch size and warm-up, settled by trainings under other circumstances."""

import math

import numpy as np

from jaxgrad.diagnosis.batches import batch_too_small, outlier_on_the_way, outlying_batch
from jaxgrad.diagnosis.endurance import comes_apart, falls_behind
from jaxgrad.diagnosis.epsilon import epsilon
from jaxgrad.diagnosis.evidence import LEARNS, WELL, Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.schedules import at_a_constant_rate, ends_early, out_of_rate, runs_out
from jaxgrad.diagnosis.training import Run

# Share of its spread over the data that an output has left: of a collapsed one at most, of another
# one at least.
_FORGOTTEN, _REMEMBERED = 1e-3, 0.03
# The same of one that is about to collapse; the share of its loss below which a run stands.
_LOST, _STANDS = 0.05, 0.02
# a warm-up that at this many times the run's length has not come to this ratio is too long
_PATIENCE, _EFFECTIVE = 10.0, 1e-4
# the last quarter's updates over those before, where the rate still grows; 1.4 if it does linearly
_RISES = 1.15
# a run shot far above its start; a slower one leaves less than this share of what it leaves
_FAR, _SHARE = 10.0, 0.5
SLOW = 10.0**-4.5  # update RMS over weight RMS; healthy runs stand between 1e-2 and 1e-4


def learning_rate(evidence: Evidence) -> list[Finding]:
    """Too high, too low, a batch too small for it, or Post-LN without a warm-up."""
    if evidence.optimizer is None or not evidence.initial.finite:
        return []
    if evidence.every > 1 and not (evidence.main.update_norms > 0).any():
        return []
    too_low = _too_low(evidence) or epsilon(evidence) or ends_early(evidence)
    if too_low:
        return too_low
    collapsed = _collapse(evidence)
    rough = _shaken(evidence) or _overshot(evidence)
    well = evidence.progress(evidence.main) >= WELL and not rough
    if well and not collapsed:
        return comes_apart(evidence) or falls_behind(evidence)
    found = _too_high(evidence, collapsed) or falls_behind(evidence)
    return found or outlier_on_the_way(evidence)


def _collapse(evidence: Evidence) -> dict[str, float]:
    """Facts on an output that came to forget its input, where gentler steps keep it.

    The loss shows nothing of it: it falls to the entropy of the labels' own distribution and stays
    there, as that of a healthy run does for a while.
    """
    run = evidence.main
    kept = evidence.kept(run)
    if kept is None or kept > _FORGOTTEN or evidence.progress(run) > 0.9:
        return {}
    others = {
        "spread_kept_at_a_tenth": evidence.kept(evidence.run(scale=0.1)),
        "spread_kept_at_a_hundredth": evidence.kept(evidence.run(scale=0.01)),
    }
    found = {name: value for name, value in others.items() if value is not None}
    if max(found.values(), default=0.0) < max(_REMEMBERED, 100 * kept):
        return {}
    return {"spread_kept": kept, "threshold": _FORGOTTEN} | found


def _shaken(evidence: Evidence) -> bool:
    """Whether a run that improves was far above its start on the way."""
    losses = evidence.main.losses
    base = evidence.initial.value
    return bool(np.nanmax(losses) > 3 * abs(base) and np.nanmedian(losses) > 0.5 * abs(base))


def _overshot(evidence: Evidence) -> bool:
    """Whether a run was, on the way, far above both its start and a model that knows nothing."""
    base = evidence.baseline
    if base is None or evidence.initial.value <= 0:
        return False
    return bool(np.nanmax(evidence.main.losses) > _FAR * max(base, evidence.initial.value))


def _leaves_more(evidence: Evidence, factor: float) -> bool:
    """Whether a run that overshot leaves far more of its loss than a slower one.

    Both take off most of it, since it is measured from the start, and no share of it tells them
    apart.
    """
    if factor == 1.0 or not _overshot(evidence):
        return False
    return evidence.run(scale=factor).last < _SHARE * evidence.main.last


def _too_low(evidence: Evidence) -> list[Finding]:
    run = evidence.main
    if run.stopped is not None or run.update_ratio > SLOW or _gets_there(evidence):
        return []
    if evidence.is_trained and run.update_norms.max() > 0:
        return []  # fine-tuning: small steps are meant
    own = evidence.progress(run)
    if own > 0.05:
        return []
    for scale in (10.0, 100.0, 1e3, 1e4, 1e5):
        other = evidence.run(scale=scale)
        gained = evidence.progress(other)
        if gained > max(0.1, 10 * own) and scale >= 100:
            return [_low(evidence, scale, gained)]
        if gained > LEARNS:
            return []
    if runs_out(run):
        gained = evidence.progress(evidence.run(reference=True))
        if gained > max(0.1, 10 * own):
            return [out_of_rate(evidence, *at_a_constant_rate(gained))]
    if run.update_norms.max() == 0 and evidence.progress(evidence.run(reference=True)) > 0.1:
        return [_low(evidence, math.inf, evidence.progress(evidence.run(reference=True)))]
    return []


def _gets_there(evidence: Evidence) -> bool:
    """Whether a warm-up that goes on reaches an effective rate before long, at this run's pace."""
    run = evidence.main
    tail = run.typical_ratio(len(run.losses) - max(len(run.losses) // 10, 1))
    return _still_warms_up(run) and tail * _PATIENCE > _EFFECTIVE


def _still_warms_up(run: Run) -> bool:
    """Whether the updates grow from next to nothing, and go on to grow at the end."""
    norms = run.update_norms[run.update_norms > 0]
    quarter = max(len(norms) // 4, 1)
    before, last = np.median(norms[-2 * quarter : -quarter]), np.median(norms[-quarter:])
    return run.warms_up and bool(last > _RISES * before)


def _low(evidence: Evidence, scale: float, gained: float) -> Finding:
    run = evidence.main
    own = max(evidence.progress(run), 0.0)
    warm = (
        f" The rate still warms up, and after {_PATIENCE:g} times as many steps it would be too "
        "low, too." if _still_warms_up(run) else ""
    )  # fmt: skip
    return Finding(
        "lr.too_low", "error", "counterfactual", "optimizer",
        f"In {len(run.losses)} steps the updates took {own:.2%} off the loss; "
        f"{scale:g} times larger ones take off {gained:.0%}." + warm,
        {"update_over_weight": run.update_ratio, "threshold": SLOW,
         "loss_as_given": run.last, "scale": scale, "taken_off_at_scale": gained},
        fix("lr.too_low", factor=scale), 0.9,
        may_be_wrong="a schedule raises the rate later",
    )  # fmt: skip


def _too_high(evidence: Evidence, collapsed: dict[str, float]) -> list[Finding]:
    run = evidence.main
    own = evidence.progress(run)
    best, factor = own, 1.0
    for scale in (0.1, 0.01, 0.001):
        gained = evidence.progress(evidence.run(scale=scale))
        if gained > best:
            best, factor = gained, scale
        if best > LEARNS:
            break
    post = is_post_ln(evidence)
    if post and not evidence.main.warms_up:
        found = _post_ln(evidence, best, collapsed)
        if found:
            return found
    better = best >= max(0.1, 2 * own) or _beyond_frequencies(evidence, run, factor)
    better = better or _leaves_more(evidence, factor)
    better = better and math.isfinite(best) and not _moves_little(run)
    if not better and not collapsed:
        return []
    if factor == 1.0:  # no rate gets further yet, but a lower one keeps what the output knows
        factor = 0.1 if collapsed.get("spread_kept_at_a_tenth", 0.0) > _REMEMBERED else 0.01
    if better and not collapsed and _recovers(evidence, factor):
        return []
    other = outlying_batch(evidence, own) or batch_too_small(evidence, own)
    if other:
        return other
    return [
        Finding(
            "lr.too_high", "error", "counterfactual", "optimizer",
            (f"The training breaks down at step {run.stopped}" if run.stopped is not None
             else f"The training gets to a loss of {run.last:.3g}")
            + f"; with updates {1 / factor:g} times smaller it gets to "
            f"{evidence.run(scale=factor).last:.3g}"
            + (", and its output still depends on its input." if collapsed else "."),
            {"first_loss": run.first, "loss_as_given": run.last, "scale": factor,
             "loss_at_scale": evidence.run(scale=factor).last,
             "update_over_weight": run.update_ratio} | collapsed,
            fix("lr.too_high", factor=factor), 0.9,
        )
    ]  # fmt: skip


def _recovers(evidence: Evidence, factor: float) -> bool:
    """Whether the run as given, left alone, gets further than the slower one: a bad start only."""
    if evidence.main.stopped is not None:
        return False
    return evidence.longer.last < evidence.run(scale=factor).last


def _beyond_frequencies(evidence: Evidence, run: Run, factor: float) -> bool:
    """Whether a slower run learns far more than how often each label comes.

    That much every run with a bias at its output learns, and it hides what another one is ahead.
    """
    guess = evidence.marginal_entropy
    if not guess or factor == 1.0:
        return False
    own, best = (1 - r.last / guess for r in (run, evidence.run(scale=factor)))
    return best >= max(0.2, 2 * own)


def _moves_little(run: Run) -> bool:
    """Whether the updates were small from the start on: not only after all units had died."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (run.update_rms / run.weight_rms)[: max(len(run.losses) // 10, 8)]
    ratio = ratio[np.isfinite(ratio) & (ratio > 0)]
    return run.stopped is None and (not ratio.size or float(np.median(ratio)) < 1e-4)


def is_post_ln(evidence: Evidence) -> bool:
    """Whether norms stand on the residual path itself."""
    norms = [n for n in evidence.structure.norms if n.after_sum and not n.over_batch]
    post = sum(n.copies for n in norms if n.post)
    return post >= 4 and post > sum(n.copies for n in norms if not n.post)


def _post_ln(evidence: Evidence, best: float, collapsed: dict[str, float]) -> list[Finding]:
    own = evidence.progress(evidence.main)
    steps = evidence.steps
    warm = max(
        evidence.progress(evidence.run(warmup=steps)),
        evidence.progress(evidence.run(scale=0.3, warmup=steps)),
    )
    cured = max(warm, best)
    stall = {} if collapsed or cured >= max(0.02, 2 * own) else _stall(evidence)
    if cured < max(0.02, 2 * own) and not collapsed and not stall:
        return []
    norm = next(n for n in evidence.structure.norms if n.post)
    return [
        Finding(
            "norm.post_ln_without_warmup", "error", "counterfactual", norm.where,
            "The norms stand on the residual path (Post-LN), and the learning rate starts at its "
            "peak: the deep stack stalls"
            + (f" with an output that forgot its input ({collapsed['spread_kept']:.0e} of its "
               "spread over the data is left)" if collapsed else "")
            + (f" ({stall['loss_after_longer']:.3g} after {3 * evidence.steps} steps, at a third "
               f"of the rate {stall['loss_after_longer_at_a_third']:.3g})" if stall else "")
            + ", and gentler steps mend it.",
            {"loss_as_given": evidence.main.last, "taken_off": own,
             "taken_off_with_warmup": warm, "taken_off_at_lower_rates": best,
             "norms": sum(n.copies for n in evidence.structure.norms if n.post)}
            | collapsed | stall,
            fix("norm.post_ln_without_warmup"), 0.85,
            may_be_wrong="the learning rate is too high for any arrangement of norms",
        )
    ]  # fmt: skip


def _stall(evidence: Evidence) -> dict[str, float]:
    """Facts on a run whose output loses its input, and that gentler steps get on in the long run.

    No training of the usual length tells it: deep nets of this kind take their time at any rate.
    """
    kept = evidence.kept(evidence.main)
    if kept is None or kept > _LOST or evidence.progress(evidence.main) > _STANDS:
        return {}
    gentler = evidence.kept(evidence.run(scale=0.1))
    if gentler is None or gentler < 20 * kept:
        return {}
    given, other = evidence.longer, evidence.patient.run(scale=0.3)
    if evidence.progress(other) < max(_STANDS, 2 * evidence.progress(given)):
        return {}
    return {
        "spread_kept": kept, "spread_kept_at_a_tenth": gentler, "loss_after_longer": given.last,
        "loss_after_longer_at_a_third": other.last,
    }  # fmt: skip
