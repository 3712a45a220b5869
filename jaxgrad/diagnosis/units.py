"""Units that are silent, at their bounds, or all equal."""

import math

import jax.numpy as jnp
import numpy as np

from jaxgrad.diagnosis.evidence import Evidence, leaf_index
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.parts import Activation
from jaxgrad.diagnosis.weights import scales


def saturated(evidence: Evidence) -> list[Finding]:
    """Bounded units at their ends on most of the data."""
    if not evidence.initial.finite or evidence.is_trained:
        return []
    uses: dict[tuple[str, str], list[tuple[Activation, float, int]]] = {}
    for activation in evidence.hidden():
        tensor = evidence.initial.tensors.get(activation.output)
        if tensor is None or activation.kind not in ("tanh", "sigmoid"):
            continue
        if evidence.wiring.is_head(activation.output):
            continue
        share = float(np.nanmean(tensor.row[f"beyond_{activation.kind}"]))
        key = activation.where, activation.kind
        size = math.prod(evidence.wiring.shape(activation.output))
        uses.setdefault(key, []).append((activation, share, size))
    # A layer that is called several times is saturated by all that it sees, not by one example.
    shares = [
        (calls[0][0], sum(s * size for _, s, size in calls) / max(sum(n for *_, n in calls), 1))
        for calls in uses.values()
    ]
    bad = [(a, s) for a, s in shares if s > 0.5]
    if not bad:
        return _gates_saturated(evidence)
    activation, share = bad[0]
    severity = "warning" if evidence.improves else "error"
    scale = [s for s in scales(evidence) if s.activation is activation]
    because = "large weights" if any(s.ratio > 2 for s in scale) else "large inputs or biases"
    return [
        Finding(
            "unit.saturated", severity, "initial", activation.where,
            f"{share:.0%} of the {activation.kind} outputs of {activation.where} are at their "
            f"bounds before training, from {because}; their slope is below 6 %.",
            {"share": share, "threshold": 0.5, "because": because,
             "layers": [a.where for a, _ in bad]},
            fix("unit.saturated"), 0.9,
            may_be_wrong="the parameters are not at initialization",
        )
    ]  # fmt: skip


def _gates_saturated(evidence: Evidence) -> list[Finding]:
    """Gates and candidates of a recurrent cell at their bounds, where smaller weights learn.

    A gate may well be open or shut: only a run that nothing else moves is looked at, and the same
    training with centered weights of variance 1 / fan_in in the place of large ones tells it.
    """
    gates = [a for a in evidence.structure.activations if a.gate and a.kind in ("tanh", "sigmoid")]
    index, values, bad = leaf_index(evidence), list(evidence.problem.values), []
    large: dict[str, float] = {}
    for activation in gates:
        tensor = evidence.initial.tensors.get(activation.output)
        if tensor is None:
            continue
        share = float(np.nanmean(tensor.row[f"beyond_{activation.kind}"]))
        bad += [(activation, share)] if share > 0.5 else []
        for affine in activation.affine:
            w = np.asarray(values[index[affine.leaf]], np.float64)
            gain = float(np.mean(w**2)) * affine.fan_in
            if share > 0.5 and gain > 4:
                large[affine.leaf] = gain
                centered = (w - w.mean()) / max(float(w.std()), 1e-30) / math.sqrt(affine.fan_in)
                values[index[affine.leaf]] = jnp.asarray(centered, values[index[affine.leaf]].dtype)
    if not bad or not large or not evidence.stuck:
        return []
    cured = evidence.run_from(values)
    if not evidence.gains(cured):
        return []
    activation, share = max(bad, key=lambda item: item[1])
    worst = max(large, key=lambda name: large[name])
    return [
        Finding(
            "unit.saturated", "error", "counterfactual", worst,
            f"{share:.0%} of the {activation.kind} outputs of {activation.where} are at their "
            f"bounds before training, from large weights: the mean square of {worst} times fan_in "
            f"is {large[worst]:.3g}, and 1 would keep the scale. Centered at that size, "
            f"{evidence.steps} steps get to {cured.last:.3g} instead of {evidence.main.last:.3g}.",
            {"share": share, "threshold": 0.5, "mean_square_times_fan_in": large,
             "loss_as_given": evidence.main.last, "loss_with_smaller_weights": cured.last,
             "layers": [a.where for a, _ in bad]},
            fix("unit.saturated"), 0.9,
        )
    ]  # fmt: skip


def dead(evidence: Evidence) -> list[Finding]:
    """Layers whose units are silent on all of the data."""
    if not evidence.initial.finite:
        return []
    for activation in evidence.hidden():
        share, units = dead_share(evidence, activation, "initial")
        if share < 0.9 or (units < 3 and not _silent_for_good(evidence, activation)):
            continue
        severity = "warning" if share < 1 and evidence.improves else "error"
        return [
            Finding(
                "unit.dead", severity, "initial", activation.where,
                f"{share:.0%} of the {units} units of {activation.where} are zero on all of the "
                "data, so no gradient passes them.",
                {"share": share, "threshold": 0.9, "units": units,
                 "bias": _bias_of(evidence, activation)},
                fix("unit.dead"), 0.92,
                may_be_wrong="the batch is far smaller than the variety of the data",
            )
        ]  # fmt: skip
    return []


def _silent_for_good(evidence: Evidence, activation: Activation) -> bool:
    """Whether so narrow a layer, of which one unit may well rest, is all silent to the end."""
    whole = all(dead_share(evidence, activation, when)[0] == 1 for when in ("initial", "final"))
    return whole and not evidence.improves


def _bias_of(evidence: Evidence, activation: Activation) -> float:
    tensor = evidence.initial.tensors.get(activation.source)
    return float(np.nanmean(tensor.row["mean"])) if tensor is not None else float("nan")


def dead_share(evidence: Evidence, activation: Activation, when: str) -> tuple[float, int]:
    """Share of a layer's units that are silent on all data, and the number of units."""
    measured = evidence.initial if when == "initial" else evidence.final
    tensor = measured.tensors.get(activation.output)
    if tensor is None or activation.kind not in ("relu", "gelu", "silu", "leaky_relu"):
        return 0.0, 0
    if tensor.units.shape[-1] == 0:
        return 0.0, 0
    units = tensor.units.reshape(-1, *tensor.units.shape[-2:])
    high, low = units[:, 1].max(0), units[:, 0].min(0)
    if activation.kind == "relu":
        silent = (high <= 0) & (low >= 0)
    elif activation.kind == "leaky_relu":
        return 0.0, 0
    else:
        source = evidence.initial.tensors.get(activation.source)
        if source is None or source.units.shape != tensor.units.shape:
            return 0.0, 0
        into = source.units.reshape(units.shape)[:, 1].max(0)
        silent = into < -4.0
    return float(silent.mean()), int(silent.size)


def symmetric(evidence: Evidence) -> list[Finding]:
    """Units that are equal, and get equal gradients: they stay equal for ever."""
    measured, problem = evidence.initial, evidence.problem
    if not measured.finite:
        return []
    guilty = []
    mixing = _users(evidence, ("dot_general", "conv_general_dilated"))
    tables = _users(evidence, ("gather",))
    for i, name in enumerate(problem.names):
        weights = np.asarray(problem.values[i], np.float64)
        gradient = np.asarray(measured.grads[i], np.float64)
        mixes, table = name in mixing, name in tables
        if weights.ndim < 2 or not (mixes or table):
            continue
        if not problem.trainable[i] or evidence.wiring.parameters[i] not in evidence.wiring.live:
            continue
        if mixes and _equal_axis(weights, gradient, {weights.ndim - 1, 0, 1}) is not None:
            guilty += [] if _is_last(evidence, name) else [name]
        elif not mixes and _stays_equal(evidence, i):
            guilty.append(name)
    if not guilty and measured.norm == 0:
        return _zero_saddle(evidence)
    if not guilty or (not gradient_moves(evidence, guilty) and evidence.improves):
        return []
    where = layer_of_leaf(evidence, guilty[0])
    return [
        Finding(
            "init.symmetric", "error", "initial", where,
            f"All units of {guilty[0]} start equal and get equal gradients, so the layer has one "
            "unit in effect, however wide it is.",
            {"layers": guilty}, fix("init.symmetric"), 0.95,
            may_be_wrong="the equal units are told apart later by something random in the loss",
        )
    ]  # fmt: skip


def _zero_saddle(evidence: Evidence) -> list[Finding]:
    """Factors of a product that are all zero: each gets the other's zero as its gradient.

    Embedding tables are compared with what a small random draw in their place makes of the run.
    """
    problem, values = evidence.problem, list(evidence.problem.values)
    zero = [
        i
        for i, v in enumerate(values)
        if v.ndim >= 2 and problem.trainable[i] and not np.any(np.asarray(v))
        and evidence.wiring.parameters[i] in evidence.wiring.live
    ]  # fmt: skip
    if not zero or np.any(evidence.main.gradient_norms):
        return []
    for i in zero:
        draw = np.random.default_rng(i).standard_normal(values[i].shape)
        values[i] = jnp.asarray(draw / math.sqrt(values[i].shape[-1]), values[i].dtype)
    cured = evidence.run_from(values)
    if not cured.gradient_norms[0] > 0 or not cured.drop > 0.02:
        return []
    names = [problem.names[i] for i in zero]
    return [
        Finding(
            "init.symmetric", "error", "initial", layer_of_leaf(evidence, names[0]),
            f"Every gradient is exactly zero, now and after {evidence.steps} steps: {names[0]} "
            + (f"and {len(names) - 1} more start " if len(names) > 1 else "starts ")
            + "at zero, and what is multiplied by zero learns nothing. From a random draw the "
            f"loss falls from {cured.first:.3g} to {cured.last:.3g}.",
            {"layers": names, "gradient_norm": 0.0, "loss_from_a_random_draw": cured.last},
            fix("init.symmetric"), 0.93,
        )
    ]  # fmt: skip


def gradient_moves(evidence: Evidence, names: list[str]) -> bool:
    """Whether any of these leaves gets a gradient."""
    index = leaf_index(evidence)
    return any(np.any(evidence.initial.grads[index[n]]) for n in names)


def _users(evidence: Evidence, names: tuple[str, ...]) -> set[str]:
    """Leaves that operations of these names use: weights of a product, rows of a table."""
    found: set[str] = set()
    for op, leaves in evidence.wiring.labels.uses.items():
        if op.name in names:
            found |= set(leaves)
    return found


def _equal_axis(weights: np.ndarray, gradient: np.ndarray, axes: set[int]) -> int | None:
    """The axis along which weights and gradients are constant, if there is one."""
    for axis in axes:
        if weights.shape[axis] < 2:
            continue
        same = []
        for array in (weights, gradient):
            moved = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
            scale = np.abs(moved).max() if moved.size else 0.0
            same.append(bool(np.abs(moved - moved[:1]).max() <= 1e-5 * scale))
        if all(same):
            return axis
    return None


def _stays_equal(evidence: Evidence, i: int) -> bool:
    """Whether the columns of a table move together, and are equal still at the end of the run."""
    weights, last = (np.asarray(v[i], np.float64) for v in (evidence.problem.values,
                                                            evidence.main.values))  # fmt: skip
    gradient = np.asarray(evidence.initial.grads[i], np.float64)
    columns = {weights.ndim - 1}  # rows are told apart by what picks them
    equal = _equal_axis(weights, gradient, columns) is not None and bool(np.any(gradient))
    return equal and _equal_axis(last, gradient, columns) is not None


def _is_last(evidence: Evidence, name: str) -> bool:
    """Whether the units of a leaf are the model's outputs; or all of it is a zero branch."""
    wiring = evidence.wiring
    index = leaf_index(evidence)
    weights = np.asarray(evidence.problem.values[index[name]])
    outputs = [op.outputs[0] for op, names in wiring.labels.uses.items() if name in names]
    if outputs and all(wiring.is_head(v) for v in outputs):
        return True
    if np.any(weights):
        return False
    # zero weights: equal for ever only if a gradient never comes, though the leaf can be reached
    later = evidence.main.values[index[name]]
    return bool(np.any(np.asarray(later)))


def layer_of_leaf(evidence: Evidence, name: str) -> str:
    """The layer that uses a parameter leaf."""
    for op, names in evidence.wiring.labels.uses.items():
        if name in names:
            return evidence.wiring.layer(op.outputs[0]) or name
    return name
