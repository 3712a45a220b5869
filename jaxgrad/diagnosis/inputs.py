"""Inputs and targets of a scale that the model is not made for."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.diagnosis import guess
from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.parts import Affine
from jaxgrad.diagnosis.units import saturated
from jaxgrad.diagnosis.weights import loud, rms
from jaxgrad.graph.ir import Lit, Ref, Value

_LOUD = 10.0  # input RMS that no standardized data reach
_MEAN = 0.9  # a run that leaves more of the loss of the targets' mean knows nothing but the mean
_FAR = 4.0  # a run three times as long that is this many times as far from the bottom is far behind


def unnormalized(evidence: Evidence) -> list[Finding]:
    """Inputs, or targets, of a scale that the model is not made for."""
    if not np.isfinite(evidence.initial.value):
        return _unnormalized_inputs(evidence) if _has_loud_inputs(evidence) else []
    found = _unnormalized_inputs(evidence) or _unnormalized_targets(evidence)
    return found or _unnormalized_together(evidence)


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
    return any(rms(evidence.values[v]) > _LOUD for v, _ in _inputs(evidence))


def _unnormalized_inputs(evidence: Evidence) -> list[Finding]:
    for value, affine in _inputs(evidence):
        x = np.asarray(evidence.values[value], np.float64)
        size = rms(x)
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


def _data_behind(evidence: Evidence, ref: Ref) -> Ref:
    """The value behind reshapes, casts, and sums and products with written numbers."""
    base, op = evidence.wiring.origin(ref)
    while op is not None and op.name in ("add", "sub", "mul", "div"):
        values = [operand for operand in op.inputs if not isinstance(operand, Lit)]
        if len(values) != 1:
            break
        base, op = evidence.wiring.origin(values[0])
    return base


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


def _with_standardized(evidence: Evidence, base: object) -> tuple[bool, dict[str, Any]]:
    """Whether standardized inputs make a difference: to the first loss, or to the training."""
    position = _leaf_at(evidence, base)
    stack = None if position is None else _standardized(evidence, position)
    is_loud = loud(evidence) is not None
    if stack is None:
        return is_loud or not evidence.learns, {"probe": "none: the input is no float array"}
    cured = evidence.run_from(stack=stack)
    facts = {
        "first_loss": evidence.initial.value, "first_loss_standardized": cured.first,
        "last_loss": evidence.main.last, "last_loss_standardized": cured.last,
    }  # fmt: skip
    quieter = is_loud and cured.first < 0.5 * evidence.initial.value
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
        if target is None or prediction is None or rms(target) < _LOUD:
            continue
        base = _data_behind(evidence, difference.target)
        position = _leaf_at(evidence, base)
        stack = None if position is None else _standardized(evidence, position)
        if stack is None or rms(target) < 10 * rms(prediction) or evidence.improves:
            continue
        cured = evidence.run_from(stack=stack)
        relative = (cured.first - cured.last) / max(abs(cured.first), 1e-12)
        if not relative > max(evidence.main.drop * 2, 0.1):
            continue
        name = _data_name(evidence, base)
        return [
            Finding(
                "data.unnormalized", "error", "initial", name,
                f"The targets have an RMS of {rms(target):.3g}, the predictions "
                f"{rms(prediction):.3g}: small steps never get there.",
                {"target_rms": rms(target), "prediction_rms": rms(prediction),
                 "loss_taken_off": evidence.main.drop, "loss_taken_off_standardized": relative},
                fix("data.unnormalized").replace("x", "y"), 0.85,
            )
        ]  # fmt: skip
    return []


def _unnormalized_together(evidence: Evidence) -> list[Finding]:
    """Targets far from zero that the run fits worse than their mean, though it takes off a lot.

    Inputs may be loud as well, so that neither alone is to be mended: all of them are standardized.
    """
    for difference in evidence.structure.differences:
        base = _data_behind(evidence, difference.target)
        known = isinstance(difference.target, int) and _leaf_at(evidence, base) is not None
        target = evidence.values.get(difference.target) if known else None  # type: ignore[arg-type]
        if target is None or rms(target) < _LOUD:
            continue
        facts = _worse_than_the_mean(evidence, difference.prediction, target)
        if facts is None:
            continue
        name, steps = _data_name(evidence, base), evidence.steps
        below = 1 - facts["loss_standardized"] / facts["loss_of_the_mean_standardized"]
        return [
            Finding(
                "data.unnormalized", "error", "counterfactual", name,
                f"The targets have an RMS of {rms(target):.3g}, and after {3 * steps} steps the "
                f"loss is {facts['loss_as_given']:.3g}, that of their mean "
                f"{facts['loss_of_the_mean']:.3g}; with inputs and targets standardized {steps} "
                f"steps get {below:.2%} below it.",
                {"target_rms": rms(target), "threshold": _LOUD} | facts,
                fix("data.unnormalized") + "\n" + fix("data.unnormalized").replace("x", "y"), 0.88,
            )
        ]  # fmt: skip
    return []


def _worse_than_the_mean(
    evidence: Evidence, prediction: Value, target: np.ndarray
) -> dict[str, float] | None:
    """The losses, where the run stays far behind itself on standardized data; else None."""
    problem, wiring, run = evidence.problem, evidence.wiring, evidence.main
    mean = float(np.mean(np.asarray(target, np.float64)))
    constant = evidence.constant or guess.value_of_zeros(problem, wiring, [prediction], mean)
    if constant is None or constant <= 0 or run.last <= _MEAN * constant:
        return None
    stack = [_by_feature(x) for x in evidence.trainer.stack]
    leaves, treedef = jax.tree.flatten(problem.batch)
    rest = iter([x[0] for x in stack])
    batch = treedef.unflatten([next(rest) if isinstance(x, jax.Array) else x for x in leaves])
    level = guess.value_of_zeros(replace(problem, batch=batch), wiring, [prediction])
    cured = evidence.run_from(stack=stack)
    if level is None or not cured.last < 0.7 * level:
        return None
    longer = evidence.longer
    share, cured_share = longer.last / constant, cured.last / level
    if share < 0.7 and not share > max(0.25, _FAR * cured_share):
        return None
    return {
        "loss_as_given": longer.last, "loss_of_the_mean": constant,
        "loss_standardized": cured.last, "loss_of_the_mean_standardized": level,
    }  # fmt: skip


def _by_feature(x: jax.Array) -> jax.Array:
    """A stacked leaf, loud ones at zero mean and unit variance in every column."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or rms(np.asarray(x)) < _LOUD:
        return x
    axes = tuple(range(x.ndim - 1)) if x.ndim > 2 else None
    wide = x.astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(jnp.square(wide), axis=axes, keepdims=True))
    spread = jnp.maximum(jnp.std(wide, axis=axes, keepdims=True), 1e-4 * size + 1e-12)
    return ((wide - jnp.mean(wide, axis=axes, keepdims=True)) / spread).astype(x.dtype)
