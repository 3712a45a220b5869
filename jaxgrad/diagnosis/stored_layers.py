"""Rules for a stored run, layer by layer: NaN, scale, death, and what a type rounds away."""

from typing import Any

import numpy as np

from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.gradients import exploding, vanishing
from jaxgrad.diagnosis.past import Past
from jaxgrad.diagnosis.rounding import lost_shares, lost_updates

_GROWN = 1e3  # a scale that grew by so much before something broke explains the break


def no_gradient(past: Past) -> list[Finding]:
    """Leaves that never got a gradient: all of them is a fault, some may be frozen on purpose."""
    names = past.recording.parameter_names
    gradients = past.rows("weight_gradient_rms")
    silent = np.flatnonzero((gradients == 0).all(0))
    if not silent.size or not len(names):
        return []
    everything = len(silent) == len(names)
    leaves = [names[i] for i in silent]
    who = "None of the parameters" if everything else f"{len(leaves)} parameter leaves of many"
    return [
        Finding(
            "gradient.blocked", "error" if everything else "info", "running", leaves[-1],
            f"{who} ever got a gradient, in {len(past.steps)} steps that were looked at."
            if everything
            else f"{len(leaves)} of {len(names)} parameter leaves never got a gradient, in "
            f"{len(past.steps)} steps that were looked at.",
            {"layers": leaves}, fix("gradient.blocked"), 0.9 if everything else 0.4,
            may_be_wrong="a stored run does not show whether they are frozen on purpose",
        )
    ]  # fmt: skip


def nonfinite(past: Past) -> list[Finding]:
    """The first NaN or infinity: born from growth, or out of nothing."""
    if past.stopped is None or not past.broken_rows.any():
        return []
    k = int(np.argmax(past.broken_rows))
    where, which = _birthplace(past, k)
    stage = "initial" if k == 0 and past.from_the_start else "running"
    facts = {"step": int(past.steps[k]), "pass": which}
    growth = _growth(past, k, which)
    if growth is not None:
        return _grown(stage, where, facts | growth)
    return [
        Finding(
            "gradient.nonfinite", "error", stage, where,
            f"NaN or infinity is born in the {which} pass at {where or 'the loss'}, at step "
            f"{facts['step']}; no large value leads to it.",
            facts, fix("gradient.nonfinite", operation="sqrt"), 0.8,
            may_be_wrong="the batch of that step held it already",
        )
    ]  # fmt: skip


def _birthplace(past: Past, k: int) -> tuple[str, str]:
    """The layer where the first bad value of a step was made, and the pass it was made in."""
    names = past.recording.names
    forward = np.flatnonzero(past.rows("activation_nonfinite")[k] > 0)
    if forward.size:
        return names[int(forward[0])], "forward"
    backward = np.flatnonzero(past.rows("gradient_nonfinite")[k] > 0)
    if backward.size:
        # a row is the gradient at a layer's output: the layer behind it made it
        made = int(backward[-1]) + 1
        return (names[made] if made < len(names) else ""), "backward"
    leaves = np.flatnonzero(past.rows("weight_gradient_nonfinite")[k] > 0)
    name = past.recording.parameter_names[int(leaves[-1])] if leaves.size else ""
    return name, "backward"


def _growth(past: Past, k: int, which: str) -> dict[str, Any] | None:
    """Signs that large values led to a break at snapshot k: in the same pass, or before it."""
    name = "activation_rms" if which == "forward" else "gradient_rms"
    row = past.rows(name)[k]
    sizes = row[np.isfinite(row) & (row > 0)]
    if sizes.size >= 2 and sizes.max() > _GROWN**2 * max(sizes.min(), 1e-30):
        ends = (sizes[0], sizes[-1]) if which == "forward" else (sizes[-1], sizes[0])
        if ends[1] > _GROWN * ends[0]:
            return {"largest": float(sizes.max()), "across_layers": float(ends[1] / ends[0])}
    before, start = past.rows(name)[:k], past.rows(name)[0]
    if k == 0 or not before.size:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        grown = before[-1] / start
    grown = grown[np.isfinite(grown)]
    losses = past.losses[np.isfinite(past.losses)]
    rise = losses[-1] / abs(losses[0]) if losses.size and losses[0] != 0 else 1.0
    if (grown.size and grown.max() > _GROWN) or rise > _GROWN:
        return {"since_the_start": float(grown.max()) if grown.size else 1.0, "loss": float(rise)}
    return None


def _grown(stage: str, where: str, facts: dict[str, Any]) -> list[Finding]:
    if stage == "running":
        return [
            Finding(
                "gradient.exploding", "error", stage, where,
                f"The run breaks down at step {facts['step']} after its values grew.",
                facts, fix("gradient.exploding"), 0.6,
                may_be_wrong="the learning rate is too high, which only a trial would show",
            )
        ]  # fmt: skip
    if facts["pass"] == "backward":
        return [exploding(where, facts)]
    return [_too_large(where, facts, "error")]


def _too_large(where: str, facts: dict[str, Any], severity: str) -> Finding:
    return Finding(
        "init.too_large", severity, "initial", where,
        f"The activations grow from layer to layer, from {where} on: the weights are too large.",
        facts, fix("init.too_large", gain=2.0), 0.75,
        may_be_wrong="the inputs are not normalized, which a stored run does not show",
    )  # fmt: skip


def init_scale(past: Past) -> list[Finding]:
    """Scales of activations and gradients across the layers, before the first update."""
    rows = past.weighted()
    if not past.from_the_start or past.broken_rows[0] or len(rows) < 5:
        return []
    activation = past.first("activation_rms")[rows]
    gradient = past.first("gradient_rms")[rows]
    if not (np.isfinite(activation).all() and np.isfinite(gradient).all()) or gradient[-1] <= 0:
        return []
    names = [past.recording.names[k] for k in rows]
    # the last layer's scale is its own affair: a head may start at zero
    forward = activation[-2] / max(activation[0], 1e-37)
    back = gradient[0] / gradient[-1]
    half = gradient[: len(rows) // 2].max() / gradient[-1]
    facts = {"activations_last_over_first": float(forward), "gradient_first_over_last": float(back)}
    chance = past.recording.chance
    loud = chance is not None and past.losses[0] > 5 * chance
    if forward > _GROWN or (forward > 30 and loud):
        if loud or not past.improves:
            return [_too_large(names[0], facts, "warning" if past.improves else "error")]
    elif forward < 1e-3 and not past.improves:
        return [_too_small(names, facts)]
    elif back < 1e-3 and ((half < 1e-7 and not past.improves) or past.progress < 0.1):
        return [vanishing(names[0], "error", float(back), facts | {"threshold": 1e-3})]
    elif back > _GROWN and past.progress < 0.1:
        return [exploding(names[0], facts | {"threshold": _GROWN})]
    return []


def _too_small(names: list[str], facts: dict[str, Any]) -> Finding:
    ratio = facts["activations_last_over_first"]
    return Finding(
        "init.too_small", "error", "initial", names[0],
        f"The activations shrink to {ratio:.1g} of themselves between the first and the last of "
        f"{len(names) - 1} hidden layers: the weights are too small, and the loss does not fall.",
        facts | {"threshold": 1e-3, "layers": names[:-1]}, fix("init.too_small", gain=2.0), 0.8,
        may_be_wrong="the units are dead or saturated, which looks alike from outside",
    )  # fmt: skip


def dead(past: Past) -> list[Finding]:
    """Layers whose outputs stay zero, and whose weights get no gradient: nothing revives them.

    A branch that starts at zero on purpose gets a gradient.
    """
    if not past.from_the_start or past.broken_rows[0] or past.improves:
        return []
    index = {name: i for i, name in enumerate(past.recording.parameter_names)}
    ran = ~past.broken_rows
    silent = np.asarray(np.all(past.rows("activation_zero_share")[ran] >= 1.0, axis=0))
    still = np.asarray(np.all(past.rows("weight_gradient_rms")[ran] == 0, axis=0))
    found = [
        past.recording.names[k]
        for k in past.weighted()[:-1]
        if silent[k] and all(still[index[p]] for p in past.recording.site_parameters[k])
    ]
    if not found:
        return []
    return [
        Finding(
            "unit.dead", "error", "initial", found[0],
            f"All outputs of {found[0]} are zero from the first step on, and no gradient passes "
            "them.",
            {"share": 1.0, "threshold": 1.0, "layers": found}, fix("unit.dead"), 0.8,
            may_be_wrong="the layer is switched off on purpose",
        )
    ]  # fmt: skip


def rounded_away(past: Past) -> list[Finding]:
    """Updates that a half-precision type rounds away."""
    if "rounded_away" not in past.recording.rows:
        return []
    names, dtypes = past.recording.parameter_names, past.recording.facts.get("leaf_dtypes")
    if dtypes is None or len(dtypes) != len(names):
        return []
    shares = past.rows("rounded_away")
    found = lost_shares(names, dtypes, shares)
    if past.improves or not found:
        return []
    return [lost_updates(found, {"loss_at_the_end": past.last}, 0.7)]
