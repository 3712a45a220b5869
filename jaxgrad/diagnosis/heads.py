"""Losses that do not fit what the last layer returns, and labels that name no class."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.parts import BOUNDED
from jaxgrad.diagnosis.structure import bound_of
from jaxgrad.graph.ir import Value


def single_class(evidence: Evidence) -> list[Finding]:
    """A softmax over one class is the constant 1."""
    for head in evidence.structure.softmaxes:
        if head.head and head.size == 1 and not np.any(evidence.initial.norm):
            return [
                Finding(
                    "loss.single_class_softmax", "error", "static", head.where,
                    "The softmax runs over a single class, so its output is 1 whatever the network "
                    "says, and no gradient passes.",
                    {"classes": 1, "gradient_norm": evidence.initial.norm},
                    fix("loss.single_class_softmax"), 0.99,
                )
            ]  # fmt: skip
    return []


def double_softmax(evidence: Evidence) -> list[Finding]:
    """The logits are probabilities already."""
    for head in evidence.structure.softmaxes:
        if not head.head or head.size < 2 or head.source not in evidence.values:
            continue
        z = np.asarray(evidence.values[head.source], np.float64)
        axis = head.axis - len(evidence.wiring.shape(head.source))
        sums = z.sum(axis=axis)
        if not np.isfinite(z).all() or z.min() < 0 or np.abs(sums - 1).max() > 2e-2:
            continue
        return [
            Finding(
                "loss.double_softmax", "error", "static", head.where,
                "What the cross-entropy takes as logits are probabilities already: a softmax was "
                "applied before, and a second one flattens it.",
                {"row_sums": [float(sums.min()), float(sums.max())], "smallest": float(z.min())},
                fix("loss.double_softmax"), 0.97,
                may_be_wrong="the logits happen to be non-negative and to sum to one",
            )
        ]  # fmt: skip
    return []


def output_mismatch(evidence: Evidence) -> list[Finding]:
    """The last layer cannot say what the loss asks for."""
    found = _bounded_logits(evidence) or _bounded_regression(evidence) or _log_of_raw(evidence)
    return found or _broadcast_error(evidence) or _batch_softmax(evidence)


def _mismatch(
    where: str, cause: str, evidence: dict[str, Any], confidence: float, kind: str = ""
) -> Finding:
    return Finding(
        "loss.output_mismatch", "error", "static", where, cause, evidence,
        fix(f"loss.output_mismatch{kind}"), confidence,
    )  # fmt: skip


def _bounded_logits(evidence: Evidence) -> list[Finding]:
    structure, wiring = evidence.structure, evidence.wiring
    heads = [(s.source, s.where) for s in structure.softmaxes if s.head and s.size > 1]
    heads += [(h.source, h.where) for h in structure.log_heads if h.kind == "log_sigmoid"]
    for source, where in heads:
        bound = bound_of(source, structure, wiring)
        if bound is None or bound.kind not in ("relu", "tanh", "sigmoid", "softplus", "exp"):
            continue
        return [
            _mismatch(
                bound.where or where,
                f"The logits are the output of {bound.kind}, which cannot take every value.",
                {"activation": bound.kind}, 0.95,
            )
        ]  # fmt: skip
    return []


def _bounded_regression(evidence: Evidence) -> list[Finding]:
    structure, wiring = evidence.structure, evidence.wiring
    for difference in structure.differences:
        bound = bound_of(difference.prediction, structure, wiring)
        target = (
            evidence.values.get(difference.target) if isinstance(difference.target, int) else None
        )
        if bound is None or target is None or bound.kind not in (*BOUNDED, "relu"):
            continue
        low, high = BOUNDED.get(bound.kind, (0.0, np.inf))
        outside = float(np.mean((target < low - 1e-3) | (target > high + 1e-3)))
        if outside < 0.05:
            continue
        return [
            _mismatch(
                bound.where,
                f"The prediction is the output of {bound.kind}, but {outside:.0%} of the targets "
                f"lie outside its range [{low:g}, {high:g}].",
                {"activation": bound.kind, "outside": outside, "threshold": 0.05}, 0.95,
            )
        ]  # fmt: skip
    return []


def _log_of_raw(evidence: Evidence) -> list[Finding]:
    for head in evidence.structure.log_heads:
        values = evidence.values.get(head.source)
        if head.kind != "log" or values is None or not np.isfinite(values).all():
            continue
        lowest = float(values.min())
        relu = bound_of(head.source, evidence.structure, evidence.wiring)
        dead = relu is not None and relu.kind == "relu" and lowest <= 0
        if lowest < 0 or dead:
            return [
                _mismatch(
                    head.where,
                    "The loss takes the logarithm of outputs that are no probabilities.",
                    {"smallest": lowest, "threshold": 0.0}, 0.93, " (log)",
                )
            ]  # fmt: skip
    return []


def _broadcast_error(evidence: Evidence) -> list[Finding]:
    """(N, 1) minus (N,) is (N, N)."""
    wiring = evidence.wiring
    for difference in evidence.structure.differences:
        behind = wiring.origin(difference.prediction)[0]
        before, after = wiring.shape(behind), wiring.shape(difference.op.outputs[0])
        square = len(after) == 2 and after[0] == after[1] and after[0] > 1
        if square and before in ((after[0], 1), (after[0],)):
            return [
                _mismatch(
                    difference.where,
                    f"Prediction and target broadcast against each other: {before} minus "
                    f"({after[0]},) is {after}, every prediction against every target.",
                    {"prediction": str(before), "difference": str(after)}, 0.95, " (shapes)",
                )
            ]  # fmt: skip
    return []


def _batch_softmax(evidence: Evidence) -> list[Finding]:
    wiring = evidence.wiring
    sizes = {wiring.shape(v)[0] for v in wiring.data if wiring.shape(v)}
    for head in evidence.structure.softmaxes:
        shape = wiring.shape(head.source)
        if head.head and len(shape) == 2 and head.axis == 0 and sizes == {shape[0]} != {shape[1]}:
            return [
                _mismatch(
                    head.where, "The softmax runs over the batch, not over the classes.",
                    {"shape": str(shape), "axis": 0}, 0.85, " (axis)",
                )
            ]  # fmt: skip
    return []


def labels_out_of_range(evidence: Evidence) -> list[Finding]:
    """Integers that name no class, and change the loss."""
    for index in evidence.structure.indices:
        if index.value not in evidence.values:
            continue
        labels = evidence.values[index.value]
        if labels.size == 0 or not np.issubdtype(labels.dtype, np.integer):
            continue
        low, high = int(labels.min()), int(labels.max())
        too_low = low < 0 and index.via == "gather" and index.head
        if high < index.size and not too_low:
            continue
        if index.via == "one_hot" and not index.head:
            continue
        if not _matters(evidence, index.value, index.size):
            continue
        head = evidence.head
        where = (head.where if head is not None else "") or index.where
        return [
            Finding(
                "data.labels_out_of_range", "error", "static", where if index.head else index.where,
                f"Labels run from {low} to {high}, but there are {index.size} classes: the first "
                f"is 0 and the last {index.size - 1}.",
                {"lowest": low, "highest": high, "classes": index.size},
                fix("data.labels_out_of_range", size=index.size), 0.97,
                may_be_wrong="these labels are padding, and masked",
            )
        ]  # fmt: skip
    return []


def _matters(evidence: Evidence, value: Value, size: int) -> bool:
    """Whether labels in range in their place change the loss; True where it cannot be tried."""
    wiring, problem = evidence.wiring, evidence.problem
    base = wiring.origin(value)[0]
    leaves, treedef = jax.tree.flatten(problem.batch)
    arrays = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    if base not in wiring.data[: len(arrays)]:
        return True
    at = arrays[wiring.data.index(base)]
    leaves[at] = jnp.clip(leaves[at], 0, size - 1)
    before = evidence.initial.value
    after = float(problem.value(problem.values, treedef.unflatten(leaves)))
    return not np.isclose(before, after, rtol=1e-6, equal_nan=True)
