"""Jacobians that can be read off the program: elementwise layers are diagonal, dense layers are their weights.

What is proved is the tangent program (the layer's own derivative rules, already applied): a single
thread from the tangent to the result through elementwise scalings and products with a matrix.
Everything else is pushed or pulled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxgrad.graph import capture, compat, flatten
from jaxgrad.graph.ir import Lit, Op, Ref, Table, Value, value_inputs
from jaxgrad.graph.names import Labels
from jaxgrad.graph.program import Program

# Linear in one operand, elementwise, shape kept.
_SCALINGS = {"mul", "div", "neg", "convert_element_type", "copy", "select_n", "reduce_precision"}


@dataclass(frozen=True, eq=False)
class _Thread:
    """A tangent program whose result depends on the tangent through one thread of operations."""

    line: flatten.Line
    table: Table
    inputs: tuple[Value, ...]
    carried: frozenset[Value]


def structured_jacobian(fun: Callable[[Array], Array], h: Array) -> Array | None:
    """The Jacobian of `fun` at `h` without a single push, where the program proves its form.

    Args:
        fun: a function of one array of shape (n_in,), or (examples, n_in) with independent
            examples.
        h: where.

    Returns:
        Array (n_out, n_in) or (examples, n_out, n_in); None where the form is not provable.
    """
    thread = _read(fun, h)
    if thread is None:
        return None
    env: dict[Value, Any] = dict(thread.table.constants)
    env[thread.inputs[0]] = h
    form: tuple[str, Array] = ("diagonal", jnp.ones_like(h))
    for op in thread.line.ops:
        values = [ref.value if isinstance(ref, Lit) else env.get(ref) for ref in op.inputs]
        position = next((i for i, r in enumerate(op.inputs) if _in(r, thread.carried)), None)
        if position is None:
            env.update(zip(op.outputs, flatten.run_op(op, values), strict=True))
        elif op.name == "dot_general":
            form = ("dense", _times_weights(form, values[1 - position], _weight_axis(op, position)))
        else:
            form = (form[0], _scaled(op, values, position, form))
    if form[0] == "diagonal":
        return form[1][..., None] * jnp.eye(h.shape[-1], dtype=form[1].dtype)
    return jnp.broadcast_to(form[1], (*h.shape[:-1], *form[1].shape[-2:]))


def _in(ref: Ref, values: frozenset[Value]) -> bool:
    return not isinstance(ref, Lit) and ref in values


def _read(fun: Callable[[Array], Array], h: Array) -> _Thread | None:
    if h.ndim not in (1, 2):
        return None

    def tangent(h: Array, t: Array) -> Array:
        return jax.jvp(fun, (h,), (t,))[1]

    try:
        traced = capture.capture(tangent, [h, h])
    except TypeError:  # a layer without a forward rule
        return None
    line = flatten.inline(traced.block, Labels())
    line.ops = flatten.needed_ops(line)
    inputs = traced.block.inputs
    carried = flatten.dependence(line.ops, traced.table, [inputs[1]]).smooth
    if len(line.outputs) != 1 or not _in(line.outputs[0], frozenset(carried)):
        return None
    current, zeros = inputs[1], _zeros(line)
    for op in line.ops:
        taken = [v for v in value_inputs(op) if v in carried]
        if not taken:
            continue
        if taken != [current] or not _is_known(op, current, traced.table, zeros):
            return None
        current = op.outputs[0]
    ends = line.outputs[0] == current
    return _Thread(line, traced.table, tuple(inputs), frozenset(carried)) if ends else None


def _is_known(op: Op, current: Value, table: Table, zeros: set[Value]) -> bool:
    position = op.inputs.index(current)
    shape = tuple(table.avals[current].shape)
    if op.name == "dot_general":
        return _weight_axis(op, position) is not None and _keeps_examples(op, position, table)
    if op.name not in _SCALINGS or (op.name == "div" and position != 0):
        return False
    if op.name == "select_n":  # the other cases must be zero: a choice is linear only then
        others = [r for i, r in enumerate(op.inputs) if i not in (0, position)]
        if position == 0 or not all(_is_zero(r, zeros) for r in others):
            return False
    return tuple(table.avals[op.outputs[0]].shape) == shape


def _is_zero(ref: Ref, zeros: set[Value]) -> bool:
    return not np.any(ref.value) if isinstance(ref, Lit) else ref in zeros


def _zeros(line: flatten.Line) -> set[Value]:
    """Values that are zero whatever the input: written zeros, broadcast."""
    zeros: set[Value] = set()
    for op in line.ops:
        shaping = op.name in ("broadcast_in_dim", "convert_element_type", "copy", "reshape")
        if shaping and all(_is_zero(ref, zeros) for ref in op.inputs):
            zeros.update(op.outputs)
    return zeros


def _weight_axis(op: Op, position: int) -> int | None:
    """Which axis of the other operand, a matrix, meets the tangent's last axis."""
    (contract, batch) = op.eqn.params["dimension_numbers"]
    own, other = (contract[0], contract[1]) if position == 0 else (contract[1], contract[0])
    rank = len(op.eqn.invars[position].aval.shape)
    if batch[0] or len(own) != 1 or own[0] != rank - 1:
        return None
    return other[0] if len(op.eqn.invars[1 - position].aval.shape) == 2 else None


def _keeps_examples(op: Op, position: int, table: Table) -> bool:
    """The result is (n_out,) or (examples, n_out); weights on the left of a batch give (n_out, examples)."""
    return position == 0 or len(table.avals[op.inputs[position]].shape) == 1


def _times_weights(form: tuple[str, Array], weights: Array, axis: int) -> Array:
    kind, current = form
    matrix = weights if axis == 1 else weights.T  # (n_out, n)
    if kind == "diagonal":
        return matrix * current[..., None, :]
    return jnp.matmul(matrix, current, precision=jax.lax.Precision.HIGHEST)


def _scaled(op: Op, values: list[Any], position: int, form: tuple[str, Array]) -> Array:
    """An elementwise operation on the diagonal, or on every column of the matrix so far."""

    def apply(column: Array) -> Array:
        return compat.bind(op.eqn, [*values[:position], column, *values[position + 1 :]])[0]

    kind, current = form
    if kind == "diagonal":
        return apply(current)
    shape = op.eqn.invars[position].aval.shape
    current = jnp.broadcast_to(current, (*shape[:-1], *current.shape[-2:]))
    return jax.vmap(apply, in_axes=-1, out_axes=-1)(current)


def primitives_in(program: Program) -> set[str]:
    """Names of all primitives of a program, those inside calls and branches included."""
    found: set[str] = set()
    for op in program.ops:
        found.add(op.name)
        if op.eqn is not None:
            found.update(eqn.primitive.name for eqn in compat.inner_eqns(op.eqn.params))
    return found
