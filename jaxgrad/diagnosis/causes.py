"""From findings to one primary cause: what stands first in the chain explains what follows."""

import math
from collections.abc import Sequence
from dataclasses import replace

from jaxgrad.diagnosis.finding import SEVERITIES, Finding, as_consequence

# The chain from program to symptom. An earlier group explains alarms of all later ones.
_CHAIN: tuple[tuple[str, ...], ...] = (
    ("gradient.blocked", "loss.single_class_softmax", "data.labels_out_of_range",
     "norm.batch_of_one", "loss.output_mismatch", "loss.double_softmax", "optimizer.ascent",
     "accumulation.*"),
    ("optimizer.clip_after_update",),
    ("precision.*", "gradient.nonfinite"),
    ("init.symmetric",),
    ("data.unnormalized",),
    ("regularization.*",),
    ("attention.logit_growth",),
    ("init.too_small", "init.activation_mismatch"),
    ("unit.saturated",),
    ("init.too_large",),
    ("attention.rank_collapse",),
    ("unit.dead",),
    ("gradient.vanishing", "gradient.exploding"),
    ("norm.post_ln_without_warmup",),
    ("optimizer.clip_always",),
    ("batch.too_small",),
    ("lr.too_high", "lr.too_low"),
    ("loss.spike",),
)  # fmt: skip
_PLACE = {code: i for i, group in enumerate(_CHAIN) for code in group}
# Faults of the program that stand beside whatever else is wrong, and explain none of it.
_APART = {"optimizer.clip_after_update", "optimizer.clip_always"}


def rank(finding: Finding) -> int | float:
    """Place in the chain; what attention does late is what the learning rate did to it.

    Data whose scale alone makes the loss infinite stand before the infinity.
    """
    first, cured = (finding.evidence.get(k, 0.0) for k in ("first_loss", "first_loss_standardized"))
    broken = not math.isfinite(first) and math.isfinite(cured)
    if finding.code == "data.unnormalized" and broken:
        return 1.5
    if finding.code == "regularization.dominates" and finding.evidence.get("breaks_the_run"):
        return _PLACE["gradient.nonfinite"] - 0.5
    if finding.code == "init.too_large" and finding.stage == "counterfactual":
        return _PLACE["unit.saturated"] - 0.5  # the state is at its bounds because of it
    gentler = [
        finding.evidence.get(f"taken_off_{k}", 0.0) for k in ("with_warmup", "at_lower_rates")
    ]
    if finding.code == "norm.post_ln_without_warmup" and max(gentler) > 0.1:
        return _PLACE["attention.rank_collapse"] - 0.5  # the same start trains with gentler steps
    if finding.code == "optimizer.clip_always" and finding.evidence.get("steps_keep_their_size"):
        return _PLACE["lr.too_low"] + 0.5  # the rule behind it undoes what the clip takes off
    if finding.code == "attention.logit_growth" and finding.stage == "running":
        return len(_CHAIN)
    for i, group in enumerate(_CHAIN):
        for code in group:
            if finding.code == code or (code.endswith("*") and finding.code.startswith(code[:-1])):
                return i
    return len(_CHAIN)


def judge(findings: Sequence[Finding]) -> tuple[Finding | None, tuple[Finding, ...]]:
    """Chooses the primary cause; every alarm that it explains becomes its consequence.

    Args:
        findings: what the rules found.

    Returns:
        The primary cause, or None, and all findings: the primary first, then other alarms, then
        what is for information.
    """
    alarms = sorted(
        (f for f in findings if f.is_alarm),
        key=lambda f: (rank(f), SEVERITIES.index(f.severity), -f.confidence),
    )
    rest = [f for f in findings if not f.is_alarm]
    if not alarms:
        return None, tuple(rest)
    primary, others = alarms[0], []
    for other in alarms[1:]:
        apart = {primary.code, other.code} & _APART
        if apart and rank(other) == rank(primary):
            others.append(other)
        elif apart and other.code in _APART:
            others.append(replace(other))
        else:
            others.append(as_consequence(other, primary.code))
    order = sorted(others, key=lambda f: SEVERITIES.index(f.severity))
    return primary, (primary, *order, *rest)
