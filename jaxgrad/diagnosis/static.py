"""What is wrong by construction: optimizer, head, labels, norms, blocked paths."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgrad.diagnosis.evidence import Evidence, source_line
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.structure import BOUNDED, blocks_of, bound_of
from jaxgrad.graph.ir import Op, Value
from jaxgrad.optim.accumulating import judge_transformation, micro_gradients

_SAME = 1e-3


def clip_after_update(evidence: Evidence) -> list[Finding]:
    """The clip stands behind the rule's state: exploding gradients enter the moments in full."""
    order = evidence.clip
    if order is None or order.intentional or order not in ("after", "mixed"):
        return []
    after = [name for name, verdict in order.leaves.items() if verdict == "after"]
    if not after:
        return []
    return [
        Finding(
            "optimizer.clip_after_update", "error", "static", "optimizer",
            "The clip comes after the rule's state, so unclipped gradients enter its moments and "
            "the clip caps the finished update instead.",
            {"order": str(order), "layers": after, "steps": list(order.steps)},
            fix("optimizer.clip_after_update"), 0.98,
            may_be_wrong="the update is meant to be clipped, as in Adafactor",
        )
    ]  # fmt: skip


def accumulation(evidence: Evidence) -> list[Finding]:
    """Accumulation over micro-batches that sums, or forgets."""
    if evidence.optimizer is None or not evidence.initial.finite or evidence.every < 2:
        return []
    every = evidence.every
    tree = evidence.problem.tree(evidence.problem.values)
    evidence.tell(f"comparing {every} micro-batches with one batch")
    tx = optax.with_extra_args_support(evidence.trainer.tx)
    try:
        judged = judge_transformation(
            optax.GradientTransformation(tx.init, _without_extra(evidence.optimizer)),
            tree, micro_gradients(tree, every), [1.0] * every,
        )  # fmt: skip
    except Exception as error:
        evidence.notes.append(f"the accumulation could not be judged: {error}")
        return []
    code = {"sums": "accumulation.sums", "erased": "accumulation.ineffective"}.get(judged.fault)
    if code is None:
        return _misweighted(evidence)
    return [
        Finding(
            code, "error", "static", "optimizer",
            f"Accumulation over {every} micro-batches is not one big batch: {judged.message}.",
            {"every": every, "relative_error": judged.error, "threshold": _SAME},
            fix(code, every=every), 0.97,
            may_be_wrong="the sum is meant, and the learning rate was divided by the number of "
            "micro-batches",
        )
    ]  # fmt: skip


def _without_extra(tx: object) -> object:
    return tx.update  # type: ignore[attr-defined]


def _misweighted(evidence: Evidence) -> list[Finding]:
    """Means of micro-batches with unequal numbers of tokens are not the mean of all tokens."""
    problem, every = evidence.problem, evidence.every
    parts = list(problem.batches[:every])
    if len(parts) < every:
        return []
    whole = _joined(parts)
    if whole is None:
        return []
    evidence.tell(f"comparing the loss of {every} micro-batches with that of their union")
    gradient = jax.jit(jax.grad(problem.value))
    each = np.stack([_vector(gradient(problem.values, part)) for part in parts])
    union = _vector(gradient(problem.values, whole))
    weights, *_ = np.linalg.lstsq(each.T, union, rcond=None)
    left = np.linalg.norm(each.T @ weights - union) / max(np.linalg.norm(union), 1e-30)
    plain = np.linalg.norm(each.mean(0) - union) / max(np.linalg.norm(union), 1e-30)
    if left > 0.02 or plain < 0.05 or weights.min() < -0.02:
        return []
    return [
        Finding(
            "accumulation.misweighted", "error", "static", "optimizer",
            "Micro-batches count equally although they hold unequal numbers of tokens: the mean of "
            "their means is not the mean of all.",
            {"weights": [float(w) for w in weights], "relative_error": float(plain),
             "threshold": 0.05},
            fix("accumulation.misweighted", every=every), 0.9,
            may_be_wrong="every micro-batch is meant to count equally",
        )
    ]  # fmt: skip


def _joined(parts: list[object]) -> object | None:
    sizes = {x.shape[0] for x in jax.tree.leaves(parts[0]) if getattr(x, "ndim", 0)}
    if len(sizes) != 1:
        return None
    return jax.tree.map(
        lambda *xs: jnp.concatenate(xs) if getattr(xs[0], "ndim", 0) else xs[0], *parts
    )


def _vector(leaves: list[object]) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in leaves])


# ------------------------------------------------------------------------------------------- heads


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


def _mismatch(where: str, cause: str, evidence: dict[str, object], confidence: float) -> Finding:
    return Finding(
        "loss.output_mismatch", "error", "static", where, cause, evidence,
        fix("loss.output_mismatch"), confidence,
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
                    {"smallest": lowest, "threshold": 0.0}, 0.93,
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
                    {"prediction": str(before), "difference": str(after)}, 0.95,
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
                    {"shape": str(shape), "axis": 0}, 0.85,
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


# ------------------------------------------------------------------------------------------- norms


def batch_of_one(evidence: Evidence) -> list[Finding]:
    """Statistics over one element: what is normalized is zero."""
    for norm in evidence.structure.norms:
        if norm.count == 1 and 0 in norm.axes:
            return [
                Finding(
                    "norm.batch_of_one", "error", "static", norm.where,
                    "The norm takes its statistics over a single element, so it subtracts the "
                    "activation from itself and returns zero.",
                    {"elements": 1, "axes": list(norm.axes)}, fix("norm.batch_of_one"), 0.98,
                )
            ]  # fmt: skip
    return []


# ------------------------------------------------------------------------------------------ blocks


def blocked(evidence: Evidence) -> list[Finding]:
    """Trainable parameters that the loss depends on, and no gradient can reach."""
    if evidence.undifferentiable:
        return _undifferentiable(evidence)
    wiring, problem = evidence.wiring, evidence.problem
    lost: dict[Op, list[str]] = {}
    stopped_at: dict[Op, Value] = {}
    meant: dict[Op, list[str]] = {}
    for leaf, name, trained in zip(
        wiring.parameters, problem.names, problem.trainable, strict=True
    ):
        if leaf not in wiring.reaching or leaf in wiring.live:
            continue
        ends = blocks_of(leaf, wiring)
        if not ends:
            continue
        op, value = ends[-1]
        stopped_at[op] = value
        deliberate = not trained or _is_meant(evidence, ends)
        (meant if deliberate else lost).setdefault(op, []).append(name)
    if lost and _all_frozen(evidence, [n for names in lost.values() for n in names]):
        meant, lost = meant | lost, {}
    return [
        *(_blocked(evidence, op, stopped_at[op], names, "error") for op, names in lost.items()),
        *(_blocked(evidence, op, stopped_at[op], names, "info") for op, names in meant.items()),
    ]


def _blocked(evidence: Evidence, op: Op, value: Value, names: list[str], severity: str) -> Finding:
    where = evidence.wiring.layer(value)
    line = source_line(op)
    what = f"{op.name}" + (f" ({line})" if line else "")
    return Finding(
        "gradient.blocked", severity, "static", where,
        f"The gradient ends at {what}, behind {where or 'the parameters'}: {len(names)} parameter "
        f"leaves that the loss depends on get none.",
        {"operation": op.name, "line": line, "layers": names}, fix("gradient.blocked"), 0.95,
        may_be_wrong="these parameters are frozen on purpose: say so with trainable=",
    )  # fmt: skip


def _is_meant(evidence: Evidence, ends: list[tuple[Op, Value]]) -> bool:
    """Frozen at the leaf itself, or a target: no layer that learns comes after the block."""
    wiring = evidence.wiring
    if not any(leaf in wiring.live for leaf in wiring.parameters):
        return False
    if all(op.name == "stop_gradient" and wiring.is_weight(value) for op, value in ends):
        return True
    after = wiring.downstream([v for op, _ in ends for v in op.outputs])
    learning = dict(zip(wiring.parameter_names, wiring.parameters, strict=True))
    for op, names in wiring.labels.uses.items():
        reads = any(v in after for v in op.inputs if isinstance(v, int))
        if reads and any(learning[n] in wiring.live for n in names if n in learning):
            return False
    return all(op.name == "stop_gradient" for op, _ in ends)


def _all_frozen(evidence: Evidence, names: list[str]) -> bool:
    """Whether the optimizer never moves these leaves, whatever their gradient."""
    if evidence.optimizer is None:
        return False
    problem, tx = evidence.problem, evidence.trainer.tx
    values = [jnp.ones_like(v) for v in problem.values]
    tree = problem.tree(problem.values)
    state, moved = tx.init(tree), np.zeros(len(values), bool)
    update = jax.jit(tx.update)
    try:
        for _ in range(4):
            updates, state = update(problem.tree(values), state, tree)
            moved |= np.array([bool(np.any(np.asarray(u))) for u in problem.flat(updates)])
    except TypeError:  # an optimizer that needs the loss
        return False
    index = {n: i for i, n in enumerate(problem.names)}
    return bool(moved.any()) and not any(moved[index[n]] for n in names)


def _undifferentiable(evidence: Evidence) -> list[Finding]:
    """JAX itself refuses: a loop without a fixed length, a callback."""
    wiring = evidence.wiring
    suspects = [
        op
        for op in wiring.ops()
        if ("while" in op.name or "callback" in op.name)
        and any(v in wiring.smooth for v in op.inputs if isinstance(v, int))
    ]
    op = suspects[0] if suspects else None
    where = "" if op is None else wiring.layer(next(v for v in op.inputs if v in wiring.smooth))
    name = "an operation" if op is None else f"{op.name} ({source_line(op)})"
    return [
        Finding(
            "gradient.blocked", "error", "static", where,
            f"JAX cannot differentiate the loss: {name} has no reverse-mode derivative.",
            {"error": evidence.undifferentiable.splitlines()[0]},
            "jax.lax.scan(body, carry, length=n)   # in the place of while_loop", 0.95,
        )
    ]  # fmt: skip


RULES = [
    blocked, clip_after_update, single_class, double_softmax, output_mismatch,
    labels_out_of_range, batch_of_one,
]  # fmt: skip
