"""Labels that name no class, and targets that are no probabilities."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.parts import Index
from jaxgrad.diagnosis.passes import tappable
from jaxgrad.diagnosis.wiring import inputs_for
from jaxgrad.graph import rewrite

_OUTSIDE = 0.05  # share of targets that are no probabilities


def labels_out_of_range(evidence: Evidence) -> list[Finding]:
    """Integers that name no class, and change the loss; binary targets that are neither 0 nor 1."""
    return _classes_out_of_range(evidence) or _targets_out_of_range(evidence)


def _targets_out_of_range(evidence: Evidence) -> list[Finding]:
    """Y and 1 - y of a binary cross-entropy where y is no probability: the loss has no bottom."""
    known = [
        (b, sign * np.asarray(evidence.values[b.target], np.float64))
        for b in evidence.structure.binaries
        if b.target in evidence.values
        for sign in (1, -1)  # -y log p - (1 - y) log(1 - p), or the negative of a sum
    ]
    for binary, y in known:
        paired = any(y.shape == o.shape and np.allclose(y + o, 1, atol=1e-3) for _, o in known)
        outside = float(np.mean((y < -1e-3) | (y > 1 + 1e-3))) if y.size else 0.0
        if not paired or outside < _OUTSIDE:
            continue
        low, high = float(min(y.min(), 1 - y.max())), float(max(y.max(), 1 - y.min()))
        return [
            Finding(
                "data.labels_out_of_range", "error", "static", binary.where,
                "A binary cross-entropy takes targets from 0 to 1, and "
                f"{outside:.0%} of these lie outside: without a bottom, it pushes their logits to "
                "infinity.",
                {"lowest": low, "highest": high, "outside": outside, "threshold": _OUTSIDE},
                "targets = (targets - targets.min()) / (targets.max() - targets.min())   # 0 to 1",
                0.95,
            )
        ]  # fmt: skip
    return []


def _classes_out_of_range(evidence: Evidence) -> list[Finding]:
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
        if not _matters(evidence, index) or _masked(evidence, index, labels):
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


def _masked(evidence: Evidence, index: Index, labels: np.ndarray) -> bool:
    """Whether no gradient comes back to what the labels out of range pick: they are padding."""
    wiring, problem = evidence.wiring, evidence.problem
    at = tappable(index.picked, wiring)
    if index.via != "gather" or at is None or wiring.lengths[wiring.producer[at]]:
        return False
    shape = wiring.shape(at)
    if math.prod(shape) % labels.size:
        return False
    tapped = rewrite.Tapped(wiring.table, {at: 0}, lambda x, slot: (x + slot, slot), jnp.zeros_like)

    def objective(slot: jax.Array) -> jax.Array:
        args = inputs_for(problem, problem.values, problem.batch)
        return tapped.run(wiring.block, args, {0: slot})[0][0]

    seen = jax.jit(jax.grad(objective))(jnp.zeros(shape, wiring.dtype(at)))
    rows = np.abs(np.asarray(seen, np.float64)).reshape(labels.size, -1).sum(1)
    outside = (labels < 0) | (labels >= index.size)
    return not np.any(rows[outside.ravel()])


def _matters(evidence: Evidence, index: Index) -> bool:
    """Whether labels in range in their place change the loss; True where it cannot be tried.

    An index may be clamped in silence, and then the nearest class is what it picks already: the
    first class in its place tells whether that is used.
    """
    wiring, problem = evidence.wiring, evidence.problem
    base, size = wiring.origin(index.value)[0], index.size
    leaves, treedef = jax.tree.flatten(problem.batch)
    arrays = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    if base not in wiring.data[: len(arrays)]:
        return True
    at = arrays[wiring.data.index(base)]
    labels, before = leaves[at], evidence.initial.value
    others = [jnp.clip(labels, 0, size - 1)]
    if index.via == "gather" and index.head and wiring.is_head(index.picked):
        others.append(jnp.where((labels < 0) | (labels >= size), 0, labels))
    for other in others:
        leaves[at] = other
        after = float(problem.value(problem.values, treedef.unflatten(leaves)))
        if not np.isclose(before, after, rtol=1e-6, equal_nan=True):
            return True
    return False
