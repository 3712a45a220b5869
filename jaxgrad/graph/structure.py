"""Jacobians read off the program: elementwise layers are diagonal, dense ones their weights.

What is read is the tangent program: the layer's own derivative rules, already applied. Every value
in it that depends on the tangent is a diagonal or a matrix times that tangent, as long as it comes
from elementwise scalings, sums, and products with a matrix; so is a residual branch. Everything
else is pushed or pulled.
"""

import functools
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

# Linear and elementwise in their tangents: in one of two operands, in one alone, in all together.
_PRODUCTS = {"mul", "div"}
_UNARY = {"neg", "convert_element_type", "copy", "reduce_precision"}
_SUMS = {"add", "sub", "add_any"}


@dataclass(frozen=True, eq=False)
class _Form:
    """A value as `matrix @ tangent`: of shape (..., n) if diagonal, (..., n_out, n) if not."""

    matrix: Array
    diagonal: bool

    def dense(self) -> Array:
        """The matrix, written out."""
        if not self.diagonal:
            return self.matrix
        return self.matrix[..., None] * jnp.eye(self.matrix.shape[-1], dtype=self.matrix.dtype)


def structured_jacobian(fun: Callable[[Array], Array], h: Array) -> Array | None:
    """The Jacobian of `fun` at `h` without a single push, where the program proves its form.

    Args:
        fun: a function of one array of shape (n_in,), or (examples, n_in) with independent
            examples.
        h: where.

    Returns:
        Array (n_out, n_in) or (examples, n_out, n_in); None where the form is not provable.
    """
    read = _read(fun, h)
    if read is None:
        return None
    line, table, (state, tangent) = read
    env: dict[Value, Any] = dict(table.constants) | {state: h}
    forms: dict[Ref, _Form] = {tangent: _Form(jnp.ones_like(h), True)}
    for op in line.ops:
        if any(v in forms for v in value_inputs(op)):
            forms[op.outputs[0]] = _propagate(op, env, forms)
        else:
            values = [ref.value if isinstance(ref, Lit) else env[ref] for ref in op.inputs]
            env.update(zip(op.outputs, flatten.run_op(op, values), strict=True))
    matrix = forms[line.outputs[0]].dense()
    return jnp.broadcast_to(matrix, (*h.shape[:-1], *matrix.shape[-2:]))


def _read(fun: Callable[[Array], Array], h: Array) -> tuple[flatten.Line, Table, Any] | None:
    """The tangent program of `fun`, if every operation on the tangent's way is understood."""
    if h.ndim not in (1, 2):
        return None

    def tangent(h: Array, t: Array) -> Array:
        return jax.jvp(fun, (h,), (t,))[1]

    try:
        traced = capture.capture(tangent, [h, h])
    except TypeError:  # a layer without a forward rule
        return None
    inputs, table = traced.block.inputs, traced.table
    line = flatten.inline(traced.block, Labels(), table, inputs)
    line.ops = flatten.needed_ops(line)
    carried = flatten.dependence(line.ops, table, [inputs[1]]).influenced
    zeros = _zeros(line)
    on_the_way = [op for op in line.ops if any(v in carried for v in value_inputs(op))]
    understood = all(_is_understood(op, carried, zeros, table) for op in on_the_way)
    reaches = len(line.outputs) == 1 and line.outputs[0] in carried
    return (line, table, inputs) if understood and reaches else None


def _is_understood(op: Op, carried: set[Value], zeros: set[Value], table: Table) -> bool:
    taken = [i for i, ref in enumerate(op.inputs) if not isinstance(ref, Lit) and ref in carried]
    shapes = {tuple(table.avals[op.inputs[i]].shape) for i in taken}
    if op.name == "dot_general":
        return len(taken) == 1 and _weight_axis(op, taken[0]) is not None
    if len(op.outputs) != 1 or shapes != {tuple(table.avals[op.outputs[0]].shape)}:
        return False
    if op.name in _PRODUCTS:
        return len(taken) == 1 and not (op.name == "div" and taken == [1])
    if op.name == "select_n":  # linear only if every other case is zero
        others = [ref for i, ref in enumerate(op.inputs) if i and i not in taken]
        return 0 not in taken and all(_is_zero(ref, zeros) for ref in others)
    return op.name in _UNARY or (op.name in _SUMS and len(taken) == len(op.inputs))


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
    """Which axis of the other operand, a matrix, meets the tangent's last axis.

    None if it is no such product, or if its result is (n_out, examples).
    """
    (contract, batch) = op.eqn.params["dimension_numbers"]
    own, other = (contract[0], contract[1]) if position == 0 else (contract[1], contract[0])
    rank = len(op.eqn.invars[position].aval.shape)
    keeps_examples = position == 0 or rank == 1
    if batch[0] or len(own) != 1 or own[0] != rank - 1 or not keeps_examples:
        return None
    return other[0] if len(op.eqn.invars[1 - position].aval.shape) == 2 else None


def _propagate(op: Op, env: dict[Value, Any], forms: dict[Ref, _Form]) -> _Form:
    taken = [i for i, ref in enumerate(op.inputs) if not isinstance(ref, Lit) and ref in forms]
    own = [forms[op.inputs[i]] for i in taken]
    values: list[Any] = [r.value if isinstance(r, Lit) else env.get(r) for r in op.inputs]
    if op.name == "dot_general":
        weights = values[1 - taken[0]]
        return _times_weights(own[0], weights if _weight_axis(op, taken[0]) == 1 else weights.T)

    def apply(columns: list[Array]) -> Array:
        operands = list(values)
        for i, column in zip(taken, columns, strict=True):
            operands[i] = column
        return compat.bind(op.eqn, operands)[0]

    if all(form.diagonal for form in own):
        return _Form(apply([form.matrix for form in own]), True)
    shape = op.eqn.outvars[0].aval.shape
    dense = [form.dense() for form in own]
    dense = [jnp.broadcast_to(m, (*shape[:-1], *m.shape[-2:])) for m in dense]
    return _Form(jax.vmap(apply, in_axes=-1, out_axes=-1)(dense), False)


def _times_weights(form: _Form, weights: Array) -> _Form:
    """`weights`, (n_out, n), times what there is."""
    if form.diagonal:
        return _Form(weights * form.matrix[..., None, :], False)
    return _Form(jnp.matmul(weights, form.matrix, precision=jax.lax.Precision.HIGHEST), False)


@functools.lru_cache(maxsize=1024)
def directions(program: Program) -> tuple[bool, bool]:
    """Whether a program has a forward-mode and a reverse-mode derivative.

    Names alone do not tell: a `custom_vjp` around a `while_loop` (an implicit layer) has the
    reverse mode that its rule gives. Reverse mode past a loop is traced; forward mode past a
    `custom_vjp` would trace, to a stub that fails when it is run.
    """
    found = primitives_in(program)
    forward = not any(name.startswith("custom_vjp") for name in found)
    return forward, "while" not in found or _has_reverse(program)


def _has_reverse(program: Program) -> bool:
    types = program.table.avals
    constants = [jax.ShapeDtypeStruct(np.shape(lit.value), lit.value.dtype)
                 for lit in program.literals]  # fmt: skip
    constants += [_type(types[v]) for v in program.constants]
    sides = [_type(types[v]) for v in program.sides]
    state = [_type(types[v]) for v in program.before]
    floats = [i for i, a in enumerate(state) if jnp.issubdtype(a.dtype, jnp.floating)]

    def reverse(constants: Any, sides: Any, state: Any) -> Any:
        def fun(wanted: list[Any]) -> list[Any]:
            full = list(state)
            for i, value in zip(floats, wanted, strict=True):
                full[i] = value
            after, _ = program.run(tuple(constants), tuple(sides), tuple(full))
            return [a for a in after if jnp.issubdtype(jnp.result_type(a), jnp.floating)]

        out, pull = jax.vjp(fun, [state[i] for i in floats])
        return pull(out)

    try:
        _ = jax.eval_shape(reverse, constants, sides, state)
    except Exception:  # a rule may refuse with any exception (equinox asserts)
        return False
    return True


def _type(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def primitives_in(program: Program) -> set[str]:
    """Names of all primitives of a program, those inside calls and branches included."""
    found: set[str] = set()
    for op in program.ops:
        found.add(op.name)
        if op.eqn is not None:
            found.update(eqn.primitive.name for eqn in compat.inner_eqns(op.eqn.params))
    return found
