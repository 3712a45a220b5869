"""Inputs and targets of a scale that the model is not made for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.parts import Affine
from jaxgrad.diagnosis.units import saturated
from jaxgrad.diagnosis.weights import loud, rms
from jaxgrad.graph.ir import Value

_LOUD = 10.0  # input RMS that no standardized data reach


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
        base = evidence.wiring.origin(difference.target)[0]
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
