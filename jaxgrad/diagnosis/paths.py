"""Paths that no gradient can take: blocks, and norms over one element."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.parts import Norm
from jaxgrad.diagnosis.structure import blocks_of
from jaxgrad.diagnosis.wiring import source_line
from jaxgrad.graph.ir import Op, Value


def batch_of_one(evidence: Evidence) -> list[Finding]:
    """Statistics over one element: what is normalized is zero."""
    for norm in evidence.structure.norms:
        if norm.count == 1 and (0 in norm.axes or _stops_all_before(evidence, norm)):
            return [
                Finding(
                    "norm.batch_of_one", "error", "static", norm.where,
                    "The norm takes its statistics over a single element, so it subtracts the "
                    "activation from itself and returns zero.",
                    {"elements": 1, "axes": list(norm.axes)}, fix("norm.batch_of_one"), 0.98,
                )
            ]  # fmt: skip
    return []


def _stops_all_before(evidence: Evidence, norm: Norm) -> bool:
    """Whether no parameter before a norm gets a gradient, as where x - mean(x) is zero."""
    wiring = evidence.wiring
    before = wiring.upstream([norm.source])
    grads = [
        g
        for leaf, g in zip(wiring.parameters, evidence.initial.grads, strict=True)
        if leaf in before and leaf in wiring.live
    ]
    return bool(grads) and not any(np.any(g) for g in grads)


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
    meant = _together(meant, [op for op in meant if wiring.is_weight(stopped_at[op])])
    if lost and _all_frozen(evidence, [n for names in lost.values() for n in names]):
        meant, lost = meant | lost, {}
    return [
        *(_blocked(evidence, op, stopped_at[op], names, "error") for op, names in lost.items()),
        *(_blocked(evidence, op, stopped_at[op], names, "info") for op, names in meant.items()),
    ]


def _together(found: dict[Op, list[str]], leaves: list[Op]) -> dict[Op, list[str]]:
    """Leaves that are each stopped themselves as one: a frozen base is one thing, not hundreds."""
    if len(leaves) < 2:
        return found
    names = [name for op in leaves for name in found[op]]
    rest = {op: names for op, names in found.items() if op not in leaves}
    return {leaves[0]: names} | rest


def _blocked(evidence: Evidence, op: Op, value: Value, names: list[str], severity: str) -> Finding:
    where = _last_stopped(evidence, evidence.wiring.layer(value), names)
    line = source_line(op)
    what = f"{op.name}" + (f" ({line})" if line else "")
    return Finding(
        "gradient.blocked", severity, "static", where,
        f"The gradient ends at {what}, behind {where}: {len(names)} parameter leaves that the loss "
        "depends on get none.",
        {"operation": op.name, "line": line, "layers": names}, fix("gradient.blocked"), 0.95,
        may_be_wrong="these parameters are frozen on purpose: say so with trainable=",
    )  # fmt: skip


def _last_stopped(evidence: Evidence, layer: str, names: list[str]) -> str:
    """The layer that is stopped, or the last one before it, if that one learns on other paths.

    An argmin over distances to the rows of a table stands in the table's layer, which learns all
    the same; what ends there is the gradient of whatever is compared with them.
    """
    wiring, uses = evidence.wiring, evidence.wiring.labels.uses
    own = {n for op, given in uses.items() if wiring.layer(op.outputs[0]) == layer for n in given}
    leaf = dict(zip(evidence.problem.names, wiring.parameters, strict=True))
    learns = any(n in leaf and leaf[n] in wiring.live for n in own)
    if layer and (own & set(names) or not learns):
        return layer
    stopped = [op for op, given in uses.items() if set(given) & set(names)]
    behind = wiring.layer(stopped[-1].outputs[0]) if stopped and layer else ""
    return behind or layer or names[0]  # a leaf that is stopped itself


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
