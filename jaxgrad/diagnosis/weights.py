"""Weights too small, too large, or made for another activation."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.diagnosis import guess
from jaxgrad.diagnosis.activations import affine_of
from jaxgrad.diagnosis.evidence import WELL, Evidence, leaf_index
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.parts import Activation, Affine
from jaxgrad.diagnosis.training import Run

# Weight variance times fan_in that keeps the scale, by activation (He 2015; Glorot 2010).
_KEEPS = {
    "relu": 2.0, "leaky_relu": 2.0, "gelu": 2.0, "silu": 2.0, "tanh": 1.0, "sigmoid": 1.0,
    "softplus": 1.0, "exp": 1.0, "elu": 1.5,
}  # fmt: skip

_NOTHING = 0.05  # a share of the loss that the noise of a batch could be
# All layers together so far below the needed scale, a late start is no matter of taste; a training
# from the needed scale leaves less than this share of what the given one leaves.
_TINY, _LATE = 1e-3, 0.2
_SMALL = 0.85  # between the weights of a linear layer, 0.71 of what a rectifier needs, and enough


class Scale:
    """What a layer's weights do to the scale, beside what its activation needs.

    Without an activation the layer is the last one.
    """

    def __init__(self, activation: Activation | None, affine: Affine, std: float) -> None:
        self.activation, self.affine = activation, affine
        self.kind = "" if activation is None else activation.kind
        self.gain = std**2 * affine.fan_in
        self.needed = _KEEPS.get(self.kind, 1.0)
        self.ratio = math.sqrt(self.gain / self.needed) if std > 0 else 0.0


def scales(evidence: Evidence) -> list[Scale]:
    """The hidden layers' scales, in forward order; layers before a norm do not count."""
    return _scales(evidence, [(a, affine) for a in evidence.hidden() for affine in a.affine])


def _last_scales(evidence: Evidence) -> list[Scale]:
    """Those of the layers that give the predictions, or the logits."""
    structure, wiring = evidence.structure, evidence.wiring
    ends = guess.logits(structure, wiring) + guess.predictions(structure, wiring)
    return _scales(evidence, [(None, affine) for v in ends for affine in affine_of(v, wiring)])


def _scales(evidence: Evidence, layers: Sequence[tuple[Activation | None, Affine]]) -> list[Scale]:
    index = leaf_index(evidence)
    found = []
    seen = set()
    for activation, affine in layers:
        leaf = evidence.problem.values[index[affine.leaf]] if affine.leaf in index else None
        if leaf is None or leaf.ndim < 2 or affine.op in seen:
            continue
        seen.add(affine.op)
        std = float(np.std(np.asarray(leaf, np.float64)))
        found.append(Scale(activation, affine, std))
    return found


def rescaled(evidence: Evidence, found: list[Scale]) -> list[jax.Array]:
    """The parameters with every hidden layer's weights at the scale its activation needs."""
    index = leaf_index(evidence)
    values = list(evidence.problem.values)
    for scale in found:
        if scale.ratio > 0:
            i = index[scale.affine.leaf]
            goal = _goal(scale) / math.sqrt(scale.gain)
            values[i] = (values[i].astype(jnp.float32) * goal).astype(values[i].dtype)
    return values


def _goal(scale: Scale) -> float:
    """Root of variance times fan_in: He for rectifiers, Glorot for bounded activations."""
    if scale.kind in ("tanh", "sigmoid"):
        affine = scale.affine
        return math.sqrt(2 * affine.fan_in / (affine.fan_in + affine.fan_out))
    return math.sqrt(scale.needed)


def compounded(found: list[Scale]) -> float:
    """The factor by which the weights miss the needed scale, all layers together."""
    return math.exp(sum(math.log(max(s.ratio, 1e-30)) for s in found)) if found else 1.0


def init_scale(evidence: Evidence) -> list[Finding]:
    """Weights too small or too large for the depth, or made for another activation."""
    if not evidence.initial.finite or evidence.is_trained:
        return []
    found = [s for s in scales(evidence) if s.ratio > 0]
    last = [s for s in _last_scales(evidence) if s.ratio > 0]
    if not found:
        return _loud_at_first(evidence, last)
    recurrent = _recurrence_too_large(evidence, found)
    if recurrent:
        return recurrent
    whole = compounded(found)
    ratios = np.array([s.ratio for s in found])
    if whole > 30 and ratios.max() > 2:
        return _maybe_too_large(evidence)
    if whole < (_TINY if evidence.improves and not _gives_the_mean(evidence) else 1 / 30):
        return _maybe_too_small(evidence, found)
    return _loud_at_first(evidence, found + last)


def _loud_at_first(evidence: Evidence, found: list[Scale]) -> list[Finding]:
    """An output far too large, by some weights: the same training with them as needed tells it."""
    signs = loud(evidence, 0.4) if any(s.ratio > 2 for s in found) else None
    if signs is None or evidence.progress(evidence.main) >= WELL:
        return []
    wide = [s for s in found if s.ratio > 1]
    cured = evidence.run_from(rescaled(evidence, wide))
    if not evidence.gains(cured):
        return []
    signs |= {"loss_as_given": evidence.main.last, "loss_with_the_needed_scale": cured.last}
    severity = "warning" if evidence.improves else "error"
    return [too_large(evidence, signs, severity, [s for s in wide if s.ratio > 2])]


def _recurrence_too_large(evidence: Evidence, found: list[Scale]) -> list[Finding]:
    """Matrices that are applied at every step of time, and enlarge what they are applied to.

    The states stay bounded by their activation, so no loss shows it: the same training with these
    matrices at the scale that keeps the state's tells it.
    """
    wide = [s for s in _recurrent(evidence, found) if s.ratio > 2]
    if not wide or evidence.progress(evidence.main) > WELL:
        return []
    index, values = leaf_index(evidence), list(evidence.problem.values)
    for scale in wide:
        i = index[scale.affine.leaf]
        values[i] = (values[i].astype(jnp.float32) / scale.ratio).astype(values[i].dtype)
    cured = evidence.run_from(values)
    if not evidence.gains(cured, times=2.0 if evidence.improves else 1.5):
        return []
    worst = wide[0]
    return [
        Finding(
            "init.too_large", "warning" if evidence.improves else "error", "counterfactual",
            worst.affine.leaf,
            f"The recurrent matrix {worst.affine.leaf} enlarges the state at every step of time: "
            f"variance times fan_in is {worst.gain:.3g}, and {worst.needed:g} would keep it. So "
            f"scaled, the same training gets to {cured.last:.3g} instead of "
            f"{evidence.main.last:.3g}.",
            {"variance_times_fan_in": worst.gain, "needed": worst.needed,
             "loss_as_given": evidence.main.last, "loss_with_the_needed_scale": cured.last,
             "layers": [s.affine.leaf for s in wide]},
            "recurrent_init = jax.nn.initializers.orthogonal()", 0.9,
        )
    ]  # fmt: skip


def _recurrent(evidence: Evidence, found: list[Scale]) -> list[Scale]:
    """The matrices of recurrences, each once: of hidden layers, and of the gates around them."""
    index = leaf_index(evidence)
    kept = {s.affine.leaf: s for s in found if s.affine.recurrent}
    for activation in evidence.structure.activations:
        for affine in activation.affine:
            known = affine.leaf in index and affine.leaf not in kept
            if activation.gate and affine.recurrent and known:
                weights = np.asarray(evidence.problem.values[index[affine.leaf]], np.float64)
                kept[affine.leaf] = Scale(activation, affine, float(np.std(weights)))
    return list(kept.values())


def loud(evidence: Evidence, share: float = 1.0) -> dict[str, float] | None:
    """Signs that the output is far too large; at a share of the thresholds, if one is given."""
    above = 5.0 * share
    if evidence.chance is not None:
        ratio = evidence.initial.value / evidence.chance
        if ratio > above:
            return {"loss_over_chance": ratio, "threshold": above}
    above = 30.0 * share
    for difference in evidence.structure.differences:
        prediction = evidence.values.get(difference.prediction)
        target = (
            evidence.values.get(difference.target) if isinstance(difference.target, int) else None
        )
        if prediction is None or target is None:
            continue
        ratio = rms(prediction) / max(rms(target), 1e-30)
        if ratio > above:
            return {"prediction_over_target": ratio, "threshold": above}
    return None


def rms(x: np.ndarray) -> float:
    """Root mean square in float64; 0 of nothing."""
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))) if x.size else 0.0


def _maybe_too_large(evidence: Evidence) -> list[Finding]:
    signs = loud(evidence)
    if signs is None:
        return []
    severity = "warning" if evidence.improves else "error"
    return [too_large(evidence, signs, severity)]


def too_large(
    evidence: Evidence, facts: dict[str, Any], severity: str, known: Sequence[Scale] = ()
) -> Finding:
    """The finding, at the first layer whose weights exceed what its activation needs."""
    found = known or scales(evidence)
    wide = [s for s in found if s.ratio > 2] or found
    where = wide[0].affine.where if wide else ""
    if not where:
        bad = np.flatnonzero(~np.isfinite(evidence.initial.rows["rms"]))
        where = evidence.initial.names[int(bad[0])] if bad.size else ""
    gain = wide[0].needed if wide else 2.0
    measured = wide[0].gain if wide else float("nan")
    return Finding(
        "init.too_large", severity, "initial", where,
        f"The weights are too large from {where} on: variance times fan_in is {measured:.3g}, and "
        f"{gain:g} would keep the scale.",
        facts | {"variance_times_fan_in": measured, "needed": gain,
                 "layers": [s.affine.where for s in wide]},
        fix("init.too_large", gain=gain), 0.88,
        may_be_wrong="a scale inside the model undoes it",
    )  # fmt: skip


def _maybe_too_small(evidence: Evidence, found: list[Scale]) -> list[Finding]:
    small = [s for s in found if s.ratio < _SMALL]
    worst = min(s.ratio for s in found)
    if worst > 0.25 and not evidence.stuck:
        return []
    cured = evidence.run_from(rescaled(evidence, found))
    better = evidence.gains(cured, times=2.5) or _starts_late(evidence, cured)
    if _gives_the_mean(evidence):
        better = _beyond_the_mean(evidence, cured) >= 2 * _NOTHING
    if not better:
        return []
    where, scale = small[0].affine.where, small[0]
    facts = {
        "variance_times_fan_in": scale.gain, "needed": scale.needed,
        "all_layers": compounded(found), "loss_as_given": evidence.main.last,
        "loss_with_the_needed_scale": cured.last, "layers": [s.affine.where for s in small],
    }  # fmt: skip
    if worst > 0.25:
        return [_mismatch(scale, facts)]
    return [
        Finding(
            "init.too_small", "error", "initial", where,
            f"The weights are too small from {where} on: variance times fan_in is "
            f"{scale.gain:.3g}, {scale.needed:g} would keep the scale, and {len(found)} layers "
            f"compound to {compounded(found):.1g}.",
            facts, fix("init.too_small", gain=scale.needed), 0.92,
        )
    ]  # fmt: skip


def _starts_late(evidence: Evidence, cured: Run) -> bool:
    """Whether a run that learns leaves far more of its loss than one from the needed scale."""
    given, other = (1 - evidence.progress(run) for run in (evidence.main, cured))
    return given > _NOTHING and other < _LATE * given


def _beyond_the_mean(evidence: Evidence, run: Run) -> float:
    """The share that a run took off the loss of the best constant output; 0 without one."""
    return 0.0 if evidence.constant is None else 1 - run.last / evidence.constant


def _gives_the_mean(evidence: Evidence) -> bool:
    """Whether a regression learned its targets' mean, and nothing that depends on the input."""
    return evidence.constant is not None and _beyond_the_mean(evidence, evidence.main) < _NOTHING


def _mismatch(scale: Scale, facts: dict[str, Any]) -> Finding:
    kind = scale.kind
    mode = "fan_avg" if kind in ("tanh", "sigmoid") else "fan_in"
    return Finding(
        "init.activation_mismatch", "error", "initial", scale.affine.where,
        f"The initialization is made for another activation: for {kind} variance times fan_in "
        f"should be about {scale.needed:g}, it is {scale.gain:.3g}, and depth compounds it.",
        facts,
        fix("init.activation_mismatch", gain=scale.needed, mode=mode, kind=kind), 0.85,
    )  # fmt: skip
