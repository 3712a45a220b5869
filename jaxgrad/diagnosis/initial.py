"""What is wrong at the given parameters: scale of weights, activations, gradients and data."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.diagnosis.evidence import Evidence, leaf_index, source_line
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.structure import Activation, Affine
from jaxgrad.graph.ir import Value

# Weight variance times fan_in that keeps the scale, by activation (He 2015; Glorot 2010).
_KEEPS = {
    "relu": 2.0, "leaky_relu": 2.0, "gelu": 2.0, "silu": 2.0, "tanh": 1.0, "sigmoid": 1.0,
    "softplus": 1.0, "exp": 1.0,
}  # fmt: skip
# An overflow in one of these is a matter of size; in all others a NaN is a matter of domain.
_GROWING = {
    *("exp", "mul", "dot_general", "conv_general_dilated", "add", "add_any", "integer_pow"),
    *("square", "reduce_sum", "expm1", "cosh", "sinh", "convert_element_type", "sub", "cumsum"),
}
_LOUD = 10.0  # input RMS that no standardized data reach
_FLOAT16_SCALE = 2.0**12


# ------------------------------------------------------------------------------------- non-finite


def nonfinite(evidence: Evidence) -> list[Finding]:
    """NaN or infinity at the given parameters, or in the gradient of the step where a run broke."""
    first = evidence.initial
    if first.finite and (evidence.main.stopped is None or not evidence.main.loss_finite_at_stop):
        return []
    forward, backward = evidence.births
    birth = forward if forward is not None else backward
    if birth is None:
        return _nonfinite_data(evidence)
    wiring = evidence.wiring
    output = birth.op.outputs[0]
    stage = "initial" if not first.finite else "running"
    inner = next((v for v in birth.op.inputs if isinstance(v, int)), output)
    where = wiring.layer(inner if birth.backward else output)
    facts = {
        "operation": birth.op.name, "line": source_line(birth.op),
        "pass": "backward" if birth.backward else "forward", "iteration": list(birth.iteration),
    }  # fmt: skip
    half = "float16" in (wiring.dtype(output), wiring.dtype(inner))
    grows = birth.op.name in _GROWING
    if half and grows:
        return [
            Finding(
                "precision.overflow", "error", stage, where,
                f"float16 ends at 65504, and the {facts['pass']} pass of {birth.op.name} exceeds "
                "it; float32 would be finite.",
                facts, fix("precision.overflow"), 0.92,
            )
        ]  # fmt: skip
    if birth.backward and stage == "initial" and grows:
        quiet = evidence.instrument.measure(evidence.problem.values, scale=2.0**-60)
        if quiet.finite:
            return [_exploding(where, facts)]
    if not birth.backward and grows:
        if stage == "running":
            return []
        return [_too_large(evidence, facts | {"loss": first.value}, "error")]
    if stage == "running" and grows:
        return []
    return [
        Finding(
            "gradient.nonfinite", "error", stage, where,
            f"NaN or infinity is born in the {facts['pass']} pass of {birth.op.name}"
            + (f" ({facts['line']})" if facts["line"] else "")
            + (f", iteration {birth.iteration}" if birth.iteration else "")
            + "; no large value leads to it.",
            facts, fix("gradient.nonfinite"), 0.93,
        )
    ]  # fmt: skip


def _nonfinite_data(evidence: Evidence) -> list[Finding]:
    leaves = jax.tree.leaves(evidence.broken_batch)
    bad = [
        name
        for name, leaf in zip(evidence.wiring.data_names, leaves, strict=False)
        if getattr(leaf, "dtype", None) is not None
        and jnp.issubdtype(leaf.dtype, jnp.inexact)
        and not bool(jnp.isfinite(leaf).all())
    ]
    where = bad[0] if bad else ""
    what = f"{where} holds NaN or infinity" if bad else "parameters or data hold NaN or infinity"
    return [
        Finding(
            "gradient.nonfinite", "error", "initial", where, f"{what} before any layer.",
            {"layers": bad}, "assert jnp.isfinite(x).all()", 0.9,
        )
    ]  # fmt: skip


def _exploding(where: str, facts: dict[str, object]) -> Finding:
    return Finding(
        "gradient.exploding", "error", "initial", where,
        "Every layer, or step of the recurrence, enlarges the gradient on its way back.",
        facts, fix("gradient.exploding"), 0.85,
    )  # fmt: skip


# ----------------------------------------------------------------------------------- weight scales


class Scale:
    """What a layer's weights do to the scale, beside what its activation needs."""

    def __init__(self, activation: Activation, affine: Affine, std: float) -> None:
        self.activation, self.affine = activation, affine
        self.gain = std**2 * affine.fan_in
        self.needed = _KEEPS.get(activation.kind, 1.0)
        self.ratio = math.sqrt(self.gain / self.needed) if std > 0 else 0.0


def scales(evidence: Evidence) -> list[Scale]:
    """The hidden layers' scales, in forward order; layers before a norm do not count."""
    index = leaf_index(evidence)
    found = []
    seen = set()
    for activation in evidence.hidden():
        for affine in activation.affine:
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
    if scale.activation.kind in ("tanh", "sigmoid"):
        affine = scale.affine
        return math.sqrt(2 * affine.fan_in / (affine.fan_in + affine.fan_out))
    return math.sqrt(scale.needed)


def _compounded(found: list[Scale]) -> float:
    """The factor by which the weights miss the needed scale, all layers together."""
    return math.exp(sum(math.log(max(s.ratio, 1e-30)) for s in found)) if found else 1.0


def init_scale(evidence: Evidence) -> list[Finding]:
    """Weights too small or too large for the depth, or made for another activation."""
    if not evidence.initial.finite or evidence.is_trained:
        return []
    found = [s for s in scales(evidence) if s.ratio > 0]
    if not found:
        return []
    whole = _compounded(found)
    ratios = np.array([s.ratio for s in found])
    if whole > 30 and ratios.max() > 2:
        return _maybe_too_large(evidence)
    if whole < 1 / 30 and not evidence.improves:
        return _maybe_too_small(evidence, found)
    return []


def _loud(evidence: Evidence) -> dict[str, float] | None:
    """Signs that the output is far too large, or that bounded units are driven to their ends."""
    head = evidence.head
    if evidence.chance is not None and head is not None:
        ratio = evidence.initial.value / evidence.chance
        if ratio > 5:
            return {"loss_over_chance": ratio, "threshold": 5.0}
    for difference in evidence.structure.differences:
        prediction = evidence.values.get(difference.prediction)
        target = (
            evidence.values.get(difference.target) if isinstance(difference.target, int) else None
        )
        if prediction is None or target is None:
            continue
        ratio = _rms(prediction) / max(_rms(target), 1e-30)
        if ratio > 30:
            return {"prediction_over_target": ratio, "threshold": 30.0}
    return None


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))) if x.size else 0.0


def _maybe_too_large(evidence: Evidence) -> list[Finding]:
    signs = _loud(evidence)
    if signs is None:
        return []
    severity = "warning" if evidence.improves else "error"
    return [_too_large(evidence, signs, severity)]


def _too_large(evidence: Evidence, facts: dict[str, object], severity: str) -> Finding:
    found = scales(evidence)
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
    small = [s for s in found if s.ratio < 0.7]
    worst = min(s.ratio for s in found)
    if worst > 0.25 and not evidence.stuck:
        return []
    cured = evidence.run_from(rescaled(evidence, found))
    own, gained = max(evidence.progress(evidence.main), 0.0), evidence.progress(cured)
    if gained < max(2.5 * own, own + 0.1):
        return []
    where, scale = small[0].affine.where, small[0]
    facts = {
        "variance_times_fan_in": scale.gain, "needed": scale.needed,
        "all_layers": _compounded(found), "loss_as_given": evidence.main.last,
        "loss_with_the_needed_scale": cured.last, "layers": [s.affine.where for s in small],
    }  # fmt: skip
    if worst > 0.25:
        return [_mismatch(scale, facts)]
    return [
        Finding(
            "init.too_small", "error", "initial", where,
            f"The weights are too small from {where} on: variance times fan_in is "
            f"{scale.gain:.3g}, {scale.needed:g} would keep the scale, and {len(found)} layers "
            f"compound to {_compounded(found):.1g}.",
            facts, fix("init.too_small", gain=scale.needed), 0.92,
        )
    ]  # fmt: skip


def _mismatch(scale: Scale, facts: dict[str, object]) -> Finding:
    kind = scale.activation.kind
    mode = "fan_avg" if kind in ("tanh", "sigmoid") else "fan_in"
    return Finding(
        "init.activation_mismatch", "error", "initial", scale.affine.where,
        f"The initialization is made for another activation: for {kind} variance times fan_in "
        f"should be about {scale.needed:g}, it is {scale.gain:.3g}, and depth compounds it.",
        facts,
        fix("init.activation_mismatch", gain=scale.needed, mode=mode, kind=kind), 0.85,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- units


def saturated(evidence: Evidence) -> list[Finding]:
    """Bounded units at their ends on most of the data."""
    if not evidence.initial.finite or evidence.is_trained:
        return []
    shares = []
    for activation in evidence.hidden():
        tensor = evidence.initial.tensors.get(activation.output)
        if tensor is None or activation.kind not in ("tanh", "sigmoid"):
            continue
        if evidence.wiring.is_head(activation.output):
            continue
        share = float(np.nanmean(tensor.row[f"beyond_{activation.kind}"]))
        shares.append((activation, share))
    bad = [(a, s) for a, s in shares if s > 0.5]
    if not bad:
        return []
    activation, share = bad[0]
    severity = "warning" if evidence.improves else "error"
    scale = [s for s in scales(evidence) if s.activation is activation]
    because = "large weights" if scale and scale[0].ratio > 2 else "large inputs or biases"
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


def dead(evidence: Evidence) -> list[Finding]:
    """Layers whose units are silent on all of the data."""
    if not evidence.initial.finite:
        return []
    for activation in evidence.hidden():
        share, units = dead_share(evidence, activation, "initial")
        if units < 3 or share < 0.9:
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
    for i, name in enumerate(problem.names):
        weights = np.asarray(problem.values[i], np.float64)
        gradient = np.asarray(measured.grads[i], np.float64)
        if weights.ndim < 2 or problem.names[i] not in _mixing(evidence):
            continue
        if not problem.trainable[i] or evidence.wiring.parameters[i] not in evidence.wiring.live:
            continue
        axis = _equal_axis(weights, gradient, evidence)
        if axis is not None:
            guilty.append(name)
    guilty = [name for name in guilty if not _is_last(evidence, name)]
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


def gradient_moves(evidence: Evidence, names: list[str]) -> bool:
    """Whether any of these leaves gets a gradient."""
    index = leaf_index(evidence)
    return any(np.any(evidence.initial.grads[index[n]]) for n in names)


def _mixing(evidence: Evidence) -> set[str]:
    """Leaves that are weights of a product."""
    wiring = evidence.wiring
    found: set[str] = set()
    for op, names in wiring.labels.uses.items():
        if op.name in ("dot_general", "conv_general_dilated"):
            found |= set(names)
    return found


def _equal_axis(weights: np.ndarray, gradient: np.ndarray, evidence: Evidence) -> int | None:
    """The axis along which weights and gradients are constant, if there is one."""
    del evidence
    for axis in {weights.ndim - 1, 0, 1}:
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


# ------------------------------------------------------------------------------------ gradient flow


def flow_profile(evidence: Evidence) -> list[tuple[str, float]]:
    """Cotangent RMS at the hidden pre-activations, in forward order, iterations one by one."""
    profile = []
    for activation in evidence.hidden():
        tensor = evidence.initial.tensors.get(activation.source)
        if tensor is None or evidence.wiring.is_head(activation.output):
            continue
        sizes = np.atleast_1d(tensor.row["gradient_rms"]).reshape(-1)
        many = len(sizes) > 1
        for k, size in enumerate(sizes):
            name = f"{activation.where}[{k}]" if many else activation.where
            profile.append((name, float(size)))
    return profile


def gradient_scale(evidence: Evidence) -> list[Finding]:
    """Gradients that vanish or explode from the last hidden layer, or time step, to the first."""
    if not evidence.initial.finite:
        return []
    profile = [(n, s) for n, s in flow_profile(evidence) if np.isfinite(s)]
    if len(profile) < 4:
        return _exploding_rows(evidence)
    sizes = np.array([s for _, s in profile])
    if sizes[-1] <= 0:
        return []
    ratio = sizes[0] / sizes[-1]
    half = sizes[: max(len(sizes) // 2, 1)].max() / sizes[-1]
    names = [n for n, _ in profile]
    where = evidence.hidden()[0].where
    if ratio < 1e-3:
        return _vanishing(evidence, (where, ratio, half), names)
    if ratio > 1e3 and evidence.stuck:
        facts = {"first_over_last": float(ratio), "threshold": 1e3}
        return [_exploding(where, facts)]
    return []


def _exploding_rows(evidence: Evidence) -> list[Finding]:
    """Without activations between the layers, as in a linear recurrence: row by row."""
    rows = evidence.initial.rows["gradient_rms"]
    known = [(n, s) for n, s in zip(evidence.initial.names, rows, strict=True) if s > 0]
    if len(known) < 4 or known[0][1] < 1e3 * known[-1][1] or not evidence.stuck:
        return []
    facts = {"first_over_last": float(known[0][1] / known[-1][1]), "threshold": 1e3}
    return [_exploding(known[0][0], facts)]


def _vanishing(
    evidence: Evidence, measured: tuple[str, float, float], names: list[str]
) -> list[Finding]:
    where, ratio, half = measured
    unresolved = half < 1e-7  # below the resolution of float32 beside the last ones
    if evidence.improves and not unresolved:
        return []
    if not unresolved and not evidence.stuck:
        return []
    severity = "warning" if evidence.improves else "error"
    facts = {
        "first_over_last": float(ratio), "threshold": 1e-3, "first_half_over_last": float(half),
        "layers": names[: len(names) // 2],
    }  # fmt: skip
    return [
        Finding(
            "gradient.vanishing", severity, "initial", where,
            f"The gradient shrinks to {ratio:.1g} of itself between the last and the first of "
            f"{len(names)} activations.",
            facts, fix("gradient.vanishing"), 0.85,
            may_be_wrong="the first steps of a sequence do not matter for this task",
        )
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------- data


def unnormalized(evidence: Evidence) -> list[Finding]:
    """Inputs, or targets, of a scale that the model is not made for."""
    if not np.isfinite(evidence.initial.value):
        return _unnormalized_inputs(evidence) if _has_loud_inputs(evidence) else []
    return _unnormalized_inputs(evidence) or _unnormalized_targets(evidence)


def _inputs(evidence: Evidence) -> list[tuple[Value, Affine]]:
    """Data that enter a product with a weight, without a norm before the next activation."""
    return [
        (value, affine)
        for activation in evidence.structure.activations
        for affine in activation.affine
        for value in evidence.data_of(affine.op)
        if value in evidence.values
    ]


def _has_loud_inputs(evidence: Evidence) -> bool:
    return any(_rms(evidence.values[v]) > _LOUD for v, _ in _inputs(evidence))


def _unnormalized_inputs(evidence: Evidence) -> list[Finding]:
    for value, affine in _inputs(evidence):
        x = np.asarray(evidence.values[value], np.float64)
        size = _rms(x)
        if size < _LOUD or not np.isfinite(size):
            continue
        base = evidence.wiring.origin(value)[0]
        cured, facts = _with_standardized(evidence, base)
        if not cured:
            continue
        name = _data_name(evidence, base)
        severity = "warning" if evidence.improves else "error"
        return [
            Finding(
                "data.unnormalized", severity, "initial", affine.where,
                f"{name} enters {affine.where} with an RMS of {size:.3g}; the layer is made for "
                "inputs of about one.",
                facts | {"input": name, "rms": size, "threshold": _LOUD},
                fix("data.unnormalized"), 0.9,
                may_be_wrong="the first layer's weights are scaled down to match",
            )
        ]  # fmt: skip
    return []


def _data_name(evidence: Evidence, base: object) -> str:
    table = dict(zip(evidence.wiring.data, evidence.wiring.data_names, strict=True))
    return table.get(base, "the input")  # type: ignore[call-overload]


def _leaf_at(evidence: Evidence, base: object) -> int | None:
    leaves = jax.tree.leaves(evidence.problem.batch)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    data = evidence.wiring.data[: len(arrays)]
    return data.index(base) if base in data else None  # type: ignore[arg-type]


def _standardized(evidence: Evidence, position: int) -> list[jax.Array] | None:
    """The stack of batches with one float leaf at zero mean and unit variance, or None."""
    stack = list(evidence.trainer.stack)
    x = stack[position]
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    stack[position] = ((x - jnp.mean(x)) / (jnp.std(x) + 1e-12)).astype(x.dtype)
    return stack


def _with_standardized(evidence: Evidence, base: object) -> tuple[bool, dict[str, object]]:
    """Whether standardized inputs make a difference: to the first loss, or to the training."""
    position = _leaf_at(evidence, base)
    stack = None if position is None else _standardized(evidence, position)
    loud = _loud(evidence) is not None
    if stack is None:
        return loud or not evidence.learns, {"probe": "none: the input is no float array"}
    cured = evidence.run_from(stack=stack)
    facts = {
        "first_loss": evidence.initial.value, "first_loss_standardized": cured.first,
        "last_loss": evidence.main.last, "last_loss_standardized": cured.last,
    }  # fmt: skip
    quieter = loud and cured.first < 0.5 * evidence.initial.value
    better = not evidence.improves and evidence.progress(cured) > max(
        2 * evidence.progress(evidence.main), 0.1
    )
    broken = not np.isfinite(evidence.initial.value) and np.isfinite(cured.first)
    bounded = any(f.code == "unit.saturated" for f in saturated(evidence))
    return bool(quieter or better or broken or bounded), facts


def _unnormalized_targets(evidence: Evidence) -> list[Finding]:
    for difference in evidence.structure.differences:
        target = (
            evidence.values.get(difference.target) if isinstance(difference.target, int) else None
        )
        prediction = evidence.values.get(difference.prediction)
        if target is None or prediction is None or _rms(target) < _LOUD:
            continue
        base = evidence.wiring.origin(difference.target)[0]
        position = _leaf_at(evidence, base)
        stack = None if position is None else _standardized(evidence, position)
        if stack is None or _rms(target) < 10 * _rms(prediction) or evidence.improves:
            continue
        cured = evidence.run_from(stack=stack)
        relative = (cured.first - cured.last) / max(abs(cured.first), 1e-12)
        if not relative > max(evidence.main.drop * 2, 0.1):
            continue
        name = _data_name(evidence, base)
        return [
            Finding(
                "data.unnormalized", "error", "initial", name,
                f"The targets have an RMS of {_rms(target):.3g}, the predictions "
                f"{_rms(prediction):.3g}: small steps never get there.",
                {"target_rms": _rms(target), "prediction_rms": _rms(prediction),
                 "loss_taken_off": evidence.main.drop, "loss_taken_off_standardized": relative},
                fix("data.unnormalized").replace("x", "y"), 0.85,
            )
        ]  # fmt: skip
    return []


# --------------------------------------------------------------------------------------- precision


def underflow(evidence: Evidence) -> list[Finding]:
    """Gradients that a half-precision dtype flushes to zero: they come back under a loss scale."""
    wiring = evidence.wiring
    half = [v for v in wiring.live if wiring.dtype(v) == "float16"]
    if not half or not evidence.initial.finite:
        return []
    for scale in (_FLOAT16_SCALE, 2.0**6):
        scaled = evidence.instrument.measure(evidence.problem.values, scale=scale)
        if scaled.finite:
            break
    else:
        return []
    lost = []
    for name, g, big in zip(
        evidence.problem.names, evidence.initial.grads, scaled.grads, strict=True
    ):
        true = np.asarray(big, np.float64) / scale
        error = np.linalg.norm(true - np.asarray(g, np.float64)) / max(np.linalg.norm(true), 1e-300)
        flushed = float(np.mean((np.asarray(g) == 0) & (true != 0))) if g.size else 0.0
        if error > 0.1 and flushed > 0.1:
            lost.append((name, float(error), flushed))
    if not lost:
        return []
    name, error, flushed = max(lost, key=lambda item: item[1])
    return [
        Finding(
            "precision.underflow", "error", "initial", layer_of_leaf(evidence, name),
            f"float16 flushes {flushed:.0%} of the gradient of {name} to zero; multiplied by "
            f"{scale:g} before the backward pass, it is there.",
            {"lost": flushed, "relative_error": error, "threshold": 0.1,
             "layers": [n for n, *_ in lost]},
            fix("precision.underflow"), 0.94,
        )
    ]  # fmt: skip


RULES = [
    nonfinite, underflow, symmetric, unnormalized, dead, saturated, init_scale, gradient_scale,
]  # fmt: skip
