"""Losses that do not fit what the last layer returns."""

from typing import Any

import jax
import numpy as np

from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.parts import BOUNDED
from jaxgrad.diagnosis.structure import bound_of
from jaxgrad.diagnosis.wiring import Wiring
from jaxgrad.graph.ir import Op, Value

_FLAT_SUM = 3.0  # logits of probabilities with this sum differ by less than this
_CLIPPED = 0.05  # share of negative values that a clip turns into probabilities of zero


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
        if not np.isfinite(z).all() or z.min() < 0:
            continue
        if np.abs(sums - 1).max() > 2e-2 and not _scaled_probabilities(z, axis):
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


def _scaled_probabilities(z: np.ndarray, axis: int) -> bool:
    """Whether non-negative rows all have one sum, as probabilities divided by a temperature have.

    A large sum, as of probabilities that are multiplied on purpose, tells the classes apart after
    all; rows that are equal say nothing of how they were made.
    """
    rows = np.moveaxis(z, axis, -1).reshape(-1, z.shape[axis])
    sums = rows.sum(-1)
    total = float(sums.mean())
    if not 0 < total < _FLAT_SUM or np.ptp(sums) > 1e-4 * total:
        return False
    return bool(np.ptp(rows, axis=0).max() > 1e-3 * total / rows.shape[-1])


def output_mismatch(evidence: Evidence) -> list[Finding]:
    """The last layer cannot say what the loss asks for."""
    found = _bounded_logits(evidence) or _bounded_regression(evidence) or _log_of_raw(evidence)
    found = found or _broadcast_error(evidence) or _broadcast_binary(evidence)
    return found or _batch_softmax(evidence) or _pooled_batch(evidence)


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
    first = evidence.initial
    if np.isfinite(first.value) and not first.finite:
        return []  # a `where` picks the other branch, and the gradient alone is bad
    for head in evidence.structure.log_heads:
        values = evidence.values.get(head.source)
        if head.kind != "log" or values is None or not np.isfinite(values).all():
            continue
        lowest = float(values.min())
        relu = bound_of(head.source, evidence.structure, evidence.wiring)
        dead = relu is not None and relu.kind == "relu" and lowest <= 0
        bare = np.asarray(evidence.values.get(head.bare, values))
        clipped = float(np.mean(bare < 0))
        if lowest < 0 or dead or clipped > _CLIPPED:
            return [
                _mismatch(
                    head.where,
                    "The loss takes the logarithm of outputs that are no probabilities"
                    + (f": {clipped:.0%} of them are negative, and clipped." if lowest >= 0
                       and clipped > _CLIPPED else "."),
                    {"smallest": float(bare.min()), "threshold": 0.0}, 0.93, " (log)",
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


def _broadcast_binary(evidence: Evidence) -> list[Finding]:
    """A binary cross-entropy of (N, 1) logits against (N,) targets."""
    wiring = evidence.wiring
    for binary in evidence.structure.binaries:
        before, after = wiring.shape(binary.logits), wiring.shape(binary.op.outputs[0])
        target = wiring.shape(wiring.origin(binary.target)[0])
        square = len(after) == 2 and after[0] == after[1] > 1
        if square and before == (after[0], 1) and target == (after[0],):
            return [
                _mismatch(
                    binary.where,
                    f"Logits and targets broadcast against each other: {before} and {target} give "
                    f"{after}, every logit against every target.",
                    {"logits": str(before), "targets": str(target), "loss": str(after)},
                    0.95, " (shapes)",
                )
            ]  # fmt: skip
    return []


def _pooled_batch(evidence: Evidence) -> list[Finding]:
    """All that the output knows of the data went through a sum over the batch."""
    wiring = evidence.wiring
    shapes = [wiring.shape(v) for v in wiring.data[: len(jax.tree.leaves(evidence.problem.batch))]]
    sizes = {shape[0] for shape in shapes if shape}
    if len(sizes) != 1 or min(sizes) < 2:
        return []
    outputs = [v for v in evidence.structure.outputs if wiring.shape(v)[:1] == tuple(sizes)]
    sums = [op for op in wiring.ops() if _sums_batch(op, min(sizes), wiring)]
    if not sums or not outputs:
        return []
    kept = _without(wiring, {v for op in sums for v in op.outputs})
    if any(v in kept or v not in wiring.from_data for v in outputs):
        return []
    before = [op for op in sums if op.outputs[0] in wiring.upstream([outputs[-1]])]
    if not before:
        return []
    return [
        _mismatch(
            wiring.layer(before[-1].outputs[0]),
            "The network averages over the batch: every example gets the same output, whatever its "
            "input.",
            {"operation": before[-1].name, "axes": str(before[-1].eqn.params["axes"])}, 0.9,
            " (pool)",
        )
    ]  # fmt: skip


def _sums_batch(op: Op, size: int, wiring: Wiring) -> bool:
    """Whether an operation reduces the leading axis of an activation, and it is the batch's."""
    if op.name not in ("reduce_sum", "reduce_max", "reduce_min") or 0 not in op.eqn.params["axes"]:
        return False
    shape = wiring.shape(op.inputs[0])
    live = op.outputs[0] in wiring.live
    return live and shape[0] == size and len(shape) > len(op.eqn.params["axes"])


def _without(wiring: Wiring, cut: set[Value]) -> set[Value]:
    """What is computed from the data, with some values taken out."""
    found = set(wiring.data)
    queue = list(found)
    while queue:
        value = queue.pop()
        after = [*wiring.feeds[value], *(v for op in wiring.readers[value] for v in op.outputs)]
        for new in after:
            if new not in found and new not in cut:
                found.add(new)
                queue.append(new)
    return found


def _batch_softmax(evidence: Evidence) -> list[Finding]:
    wiring = evidence.wiring
    sizes = {wiring.shape(v)[0] for v in wiring.data if wiring.shape(v)}
    for head in evidence.structure.softmaxes:
        shape = wiring.shape(head.source)
        if head.head and len(shape) > 1 and head.axis == 0 and sizes == {shape[0]} != {shape[-1]}:
            return [
                _mismatch(
                    head.where, "The softmax runs over the batch, not over the classes.",
                    {"shape": str(shape), "axis": 0}, 0.85, " (axis)",
                )
            ]  # fmt: skip
    return []
