"""One straight line: calls inlined, scans unrolled where an iteration is a link of the chain."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.graph import compat
from jaxgrad.graph.ir import (
    Block,
    Lit,
    Op,
    Ref,
    Table,
    Value,
    clone,
    renamed,
    substitute,
    value_inputs,
)
from jaxgrad.graph.names import Labels

Iteration = tuple[tuple[int, int], ...]

CALLBACKS = ("pure_callback", "io_callback")


@dataclass(eq=False)
class Line:
    """A straight-line program.

    Attributes:
        ops: operations in order; none of them is a `jit` or `remat` call.
        outputs: what it returns.
        marks: iteration of an unrolled scan -> what it carries on.
        closed_scans: scans that could not be unrolled, each with the reason.
    """

    ops: list[Op]
    outputs: list[Ref]
    marks: dict[Iteration, tuple[Ref, ...]] = field(default_factory=dict)
    closed_scans: dict[Op, str] = field(default_factory=dict)


def inline(block: Block, labels: Labels, table: Table, inputs: Iterable[Value]) -> Line:
    """Replace `jit` and `remat` calls by their bodies; recompute-in-backward changes no derivative.

    A call that the chain's input does not reach (a dropout mask from a fixed key) stays one call.

    Args:
        block: the program.
        labels: extended to the new operations.
        table: the program's values.
        inputs: the values that depend on the chain's input at the block's entry.
    """
    return _inline(block, labels, dependence(block.ops, table, inputs).influenced)


def _inline(block: Block, labels: Labels, influenced: set[Value]) -> Line:
    mapping: dict[Value, Ref] = {}
    ops: list[Op] = []

    def visit(block: Block) -> None:
        for op in block.ops:
            refs = tuple(substitute(ref, mapping) for ref in op.inputs)
            reached = any(v in influenced for v in op.outputs)
            if op.kind in ("jit", "remat") and (reached or getattr(op.eqn, "effects", None)):
                inner = op.blocks[0]
                mapping.update(zip(inner.inputs, refs, strict=True))
                visit(inner)
                mapping.update(zip(op.outputs, inner.outputs, strict=True))
            else:
                new = replace(op, inputs=refs)
                _copy_labels(op, new, labels)
                ops.append(new)

    visit(block)
    return Line(ops, [substitute(ref, mapping) for ref in block.outputs])


def _copy_labels(old: Op, new: Op, labels: Labels) -> None:
    if old in labels.path:
        labels.path[new] = labels.path[old]
    if old in labels.uses:
        labels.uses[new] = labels.uses[old]
    if old in labels.by_scope:
        labels.by_scope.add(new)
    for a, b in zip(old.outputs, new.outputs, strict=True):
        if a in labels.taps:
            labels.taps[b] = labels.taps[a]


@dataclass(eq=False)
class Dependence:
    """How each value depends on the chain's input.

    Attributes:
        influenced: values that depend on it in any way.
        smooth: floating-point values that a gradient with respect to it can reach.
    """

    influenced: set[Value]
    smooth: set[Value]


def dependence(ops: Iterable[Op], table: Table, inputs: Iterable[Value]) -> Dependence:
    """Follow the input through the operations.

    A gradient ends at integers, booleans and keys, and at `stop_gradient`.
    """
    influenced = set(inputs)
    found = Dependence(influenced, {v for v in influenced if table.is_float(v)})
    _follow(ops, table, found)
    return found


def _follow(ops: Iterable[Op], table: Table, found: Dependence) -> None:
    for op in ops:
        if op.kind in ("scan", "jit", "remat"):
            _follow_call(op, table, found)
            continue
        inputs = value_inputs(op)
        if any(v in found.influenced for v in inputs):
            found.influenced.update(op.outputs)
        if op.name != "stop_gradient" and any(v in found.smooth for v in inputs):
            found.smooth.update(v for v in op.outputs if table.is_float(v))


def _follow_call(op: Op, table: Table, found: Dependence) -> None:
    """Through the body of a call; a scan's until what it carries stops changing."""
    inner = op.blocks[0]
    carried = inner.inputs[op.num_consts : op.num_consts + op.num_carry]
    sets = (found.influenced, found.smooth)
    _pass_on(inner.inputs, op.inputs, sets)
    before = None
    while before != (size := tuple(map(len, sets))):
        before = size
        _follow(inner.ops, table, found)
        _pass_on(carried, inner.outputs[: op.num_carry], sets)
    _pass_on(op.outputs, inner.outputs, sets)


def _pass_on(
    targets: Iterable[Value], sources: Iterable[Ref], sets: tuple[set[Value], ...]
) -> None:
    for target, source in zip(targets, sources, strict=True):
        for known in sets:
            if not isinstance(source, Lit) and source in known:
                known.add(target)


def needed_ops(line: Line) -> list[Op]:
    """The operations that the outputs need, in order; effects keep theirs too."""
    needed = {ref for ref in line.outputs if not isinstance(ref, Lit)}
    kept = []
    for op in reversed(line.ops):
        if any(v in needed for v in op.outputs) or getattr(op.eqn, "effects", None):
            needed.update(value_inputs(op))
            kept.append(op)
    return kept[::-1]


def unroll(line: Line, table: Table, inputs: list[Value], labels: Labels) -> Line:
    """Unroll every scan at whose iterations nothing but the carry depends on the input.

    Args:
        line: the program, with calls inlined.
        table: its values; new ones are added.
        inputs: the chain's input.
        labels: extended to the new operations.
    """
    while True:
        line = replace(line, ops=needed_ops(line))
        depends = dependence(line.ops, table, inputs)
        reasons = _why_closed(line, depends)
        line.closed_scans = {op: why for op, why in reasons.items() if why}
        todo = {op for op, why in reasons.items() if why == ""}
        if not todo:
            return line
        line = _unroll_once(line, todo, table, labels, depends)


def _why_closed(line: Line, depends: Dependence) -> dict[Op, str]:
    """Why each scan stays one operation: a sentence, or "" if it can be unrolled.

    Scans that no gradient passes are left out: nobody asks.
    """
    ends = {ref for ref in line.outputs if not isinstance(ref, Lit)}
    last, across = _lifetimes(line, depends, ends)
    reasons = {}
    for position, scan in enumerate(line.ops):
        if scan.kind != "scan" or not any(v in depends.smooth for v in scan.outputs):
            continue
        first = scan.num_consts + scan.num_carry
        smooth_in = [isinstance(ref, int) and ref in depends.smooth for ref in scan.inputs]
        stacked = [v for v in scan.outputs[scan.num_carry :] if v in depends.smooth]
        if any(smooth_in[first:]):
            reasons[scan] = "its per-step inputs depend on the chain's input"
        elif any(smooth_in[: scan.num_consts]):
            reasons[scan] = "every iteration reads a value that depends on the chain's input"
        elif any(last.get(v, -1) > position for v in stacked):
            reasons[scan] = "its stacked outputs are used and depend on the chain's input"
        elif across[position]:
            reasons[scan] = "another value that depends on the chain's input lives across it"
        else:
            reasons[scan] = ""
    return reasons


def _lifetimes(
    line: Line, depends: Dependence, ends: set[Value]
) -> tuple[dict[Value, int], np.ndarray]:
    """Position of each value's last reader, and how many smooth values live across each position.

    For the second only readers count through which a gradient passes.
    """
    end = len(line.ops)
    made: dict[Value, int] = {}
    last, last_smooth = dict.fromkeys(ends, end), dict.fromkeys(ends, end)
    for i in range(end - 1, -1, -1):
        op = line.ops[i]
        made |= dict.fromkeys(op.outputs, i)
        smooth = any(v in depends.smooth for v in op.outputs)
        for v in value_inputs(op):
            _ = last.setdefault(v, i)
            if smooth:
                _ = last_smooth.setdefault(v, i)
    steps = np.zeros(end + 2, int)
    for v, until in last_smooth.items():
        begin = made.get(v, -1)
        if v in depends.smooth and until > begin:  # across those strictly between
            steps[begin + 1] += 1
            steps[until] -= 1
    return last, np.cumsum(steps)


def _unroll_once(
    line: Line, todo: set[Op], table: Table, labels: Labels, depends: Dependence
) -> Line:
    """Unroll the scans in `todo`; those inside them are next."""
    known = Dependence(set(depends.influenced), set(depends.smooth))
    renames: dict[Value, Ref] = {}
    ops: list[Op] = []
    marks = dict(line.marks)
    for op in line.ops:
        new = op
        if any(v in renames for v in value_inputs(op)):
            new = renamed(op, renames)
            _copy_labels(op, new, labels)
        if op in todo:
            carry = _unrolled(new, ops, marks, table, labels, known)
            renames |= dict(zip(op.outputs, carry, strict=False))
        else:
            ops.append(new)
    marks = {m: tuple(substitute(ref, renames) for ref in refs) for m, refs in marks.items()}
    return Line(ops, [substitute(ref, renames) for ref in line.outputs], marks)


def _unrolled(
    scan: Op,
    ops: list[Op],
    marks: dict[Iteration, tuple[Ref, ...]],
    table: Table,
    labels: Labels,
    known: Dependence,
) -> tuple[Ref, ...]:
    """Append a scan's iterations to `ops`; returns what it carries out of the last one."""
    inner, first = scan.blocks[0], scan.num_consts + scan.num_carry
    constants, carry = scan.inputs[: scan.num_consts], scan.inputs[scan.num_consts : first]
    order = range(scan.length)
    stacks: list[dict[int, Ref]] = [{} for _ in scan.outputs[scan.num_carry :]]
    for k in reversed(order) if scan.eqn.params["reverse"] else order:
        mark = (*scan.iteration, (scan.outputs[0], k))
        slices = [_index(ref, k, table, mark) for ref in scan.inputs[first:]]
        mapping: dict[Value, Ref] = dict(
            zip(inner.inputs, [*constants, *carry, *(s.outputs[0] for s in slices)], strict=True)
        )
        body = clone(inner, table, mapping, lambda op, mark=mark: replace(op, iteration=mark))
        _copy_block_labels(inner.ops, body.ops, labels)
        _follow(body.ops, table, known)
        inlined = _inline(body, labels, known.influenced)
        ops += [*slices, *inlined.ops]
        carry = marks[mark] = tuple(inlined.outputs[: scan.num_carry])
        for n, ref in enumerate(inlined.outputs[scan.num_carry :]):
            stacks[n][k] = ref
    for value, pieces in zip(scan.outputs[scan.num_carry :], stacks, strict=True):
        ops.append(_stack(value, [pieces[k] for k in range(scan.length)], scan))
    return carry


def _copy_block_labels(old: Iterable[Op], new: Iterable[Op], labels: Labels) -> None:
    for a, b in zip(old, new, strict=True):
        _copy_labels(a, b, labels)
        for inner_a, inner_b in zip(a.blocks, b.blocks, strict=True):
            _copy_block_labels(inner_a.ops, inner_b.ops, labels)


def _index(ref: Ref, k: int, table: Table, mark: Iteration) -> Op:
    aval = table.avals[ref]
    value = table.new(jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype))
    return Op("index", "index", (ref,), (value,), None, iteration=mark, length=k)


def _stack(value: Value, refs: list[Ref], scan: Op) -> Op:
    return Op("stack", "stack", tuple(refs), (value,), None, scope=scan.scope)


def run_op(op: Op, values: list[Any], layer: str = "") -> list[Any]:
    """Run one operation of a line; `layer` is named if there is no derivative of it."""
    if op.kind == "index":
        if isinstance(values[0], compat.Tracer):
            return [jax.lax.index_in_dim(values[0], op.length, keepdims=False)]
        return [_entry(values[0], op.length)]
    if op.kind == "stack":
        return [jnp.stack(values)]
    if op.name in CALLBACKS:
        return guarded_callback(op, layer)(*values)
    return compat.bind(op.eqn, values)


def guarded_callback(op: Op, layer: str) -> Callable[..., list[Any]]:
    """A call to Python; who differentiates it is told which layer makes it."""
    run = jax.custom_jvp(lambda *values: compat.bind(op.eqn, values))

    @run.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        del primals, tangents
        line = compat.source_line(op.eqn)
        raise ValueError(
            f"layer {layer!r} calls Python by {op.name}" + (f" ({line})" if line else "")
            + ", which has no derivative; give the function that calls it a rule of its own with "
            "jax.custom_jvp or jax.custom_vjp"
        )  # fmt: skip

    return run


@jax.jit
def _entry(stacked: Any, k: Any) -> Any:
    """Entry `k`: compiled once for all, where a static index would compile once an iteration."""
    return jax.lax.dynamic_index_in_dim(stacked, k, keepdims=False)
