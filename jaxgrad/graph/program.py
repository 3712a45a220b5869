"""A link of the chain as a pure function, comparable: equal layers share one compilation.

`Program.run(constants, sides, state)` holds no array: whatever the operations read from outside is
an argument. Two programs are equal when they do the same to differently valued constants.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.graph import compat
from jaxgrad.graph.flatten import run_op
from jaxgrad.graph.ir import Lit, Op, Ref, Table, Value, is_float_dtype, value_inputs

State = tuple[Any, ...]


class Program:
    """A straight line of operations from one state to the next.

    Attributes:
        ops: the operations.
        before: values of the incoming state.
        after: values of the outgoing state.
        constants: values that do not depend on the chain's input; scalar literals come first, see
            `literals`.
        sides: values that depend on it, but not through the state: integers, masks, what is behind
            `stop_gradient`.
        side_outputs: values made here that later programs take as sides.
        literals: the floating-point scalars written into the operations, lifted to arguments.
        name: the layer's, for errors; equal programs may have different ones.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        before: Sequence[Value],
        after: Sequence[Ref],
        influenced: set[Value],
        table: Table,
        name: str = "",
    ) -> None:
        self.ops, self.before, self.after = tuple(ops), tuple(before), tuple(after)
        self.side_outputs: tuple[Value, ...] = ()
        self.table, self.name = table, name
        made = {v for op in ops for v in op.outputs} | set(before)
        outside = dict.fromkeys(v for op in ops for v in value_inputs(op) if v not in made)
        outside |= dict.fromkeys(v for v in after if not isinstance(v, Lit) and v not in made)
        self.sides = tuple(v for v in outside if v in influenced)
        self.constants = tuple(v for v in outside if v not in influenced)
        found = [r for op in ops for r in op.inputs if isinstance(r, Lit) and _is_lifted(r)]
        self.literals = tuple(found)

    def run(self, constants: State, sides: State, state: State) -> tuple[State, State]:
        """The next state, and the side values for later programs.

        Args:
            constants: the literals' values, then the constants'.
            sides: the side values.
            state: one array for every value in `before`.
        """
        count = len(self.literals)
        literals = iter(constants[:count])
        env: dict[Value, Any] = dict(zip(self.constants, constants[count:], strict=True))
        env |= dict(zip(self.sides, sides, strict=True)) | dict(
            zip(self.before, state, strict=True)
        )

        def read(ref: Ref) -> Any:
            if not isinstance(ref, Lit):
                return env[ref]
            return next(literals) if _is_lifted(ref) else ref.value

        for op in self.ops:
            outputs = run_op(op, [read(ref) for ref in op.inputs], self.name)
            env.update(zip(op.outputs, outputs, strict=True))
        after = tuple(ref.value if isinstance(ref, Lit) else env[ref] for ref in self.after)
        return after, tuple(env[v] for v in self.side_outputs)

    def literal_values(self) -> tuple[Any, ...]:
        """The lifted literals as arrays."""
        return tuple(jnp.asarray(lit.value) for lit in self.literals)

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """What makes two programs the same program."""
        number: dict[Value, int] = {}
        for value in (*self.before, *self.constants, *self.sides):
            number[value] = len(number)
        lines = []
        for op in self.ops:
            inputs = tuple(self._input_key(ref, number) for ref in op.inputs)
            for value in op.outputs:
                number[value] = len(number)
            lines.append(
                (op.name, op.kind, op.length if op.kind == "index" else 0, _op_key(op), inputs)
            )
        types = tuple(_type_key(self.table.avals[v]) for v in number)
        ends = tuple(self._input_key(ref, number) for ref in (*self.after, *self.side_outputs))
        shape = (len(self.before), len(self.constants), len(self.sides))
        return (shape, types, tuple(lines), ends)

    def _input_key(self, ref: Ref, number: dict[Value, int]) -> Any:
        if not isinstance(ref, Lit):
            return number[ref]
        value = np.asarray(ref.value)
        return ("lit", str(value.dtype), None if _is_lifted(ref) else value.tobytes())

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Program) and self._hash == other._hash and self.key == other.key
        )


def _is_lifted(lit: Lit) -> bool:
    return is_float_dtype(getattr(lit.value, "dtype", None))


def _type_key(aval: Any) -> tuple[Any, ...]:
    return (tuple(aval.shape), str(aval.dtype))


def _op_key(op: Op) -> Any:
    """The operation's parameters as something that can be compared.

    A custom rule is compared by what it does: the trace of its derivative.
    """
    if op.eqn is None:
        return ()
    params = {k: _param_key(v) for k, v in op.eqn.params.items() if not _is_rule(v)}
    inside = [op.eqn, *compat.inner_eqns(op.eqn.params)]  # a printed sub-program hides its rules
    has_rule = any(_is_rule(v) for eqn in inside for v in eqn.params.values())
    return (tuple(sorted(params.items())), _rule_key(op, inside) if has_rule else ())


def _is_rule(value: Any) -> bool:
    """Whether a parameter is a function; JAX wraps some of them in a box that is not callable."""
    function = callable(value) or hasattr(value, "call_wrapped")
    return function and not compat.is_jaxpr(value) and not isinstance(value, type | np.dtype)


def _param_key(value: Any) -> Any:
    if compat.is_jaxpr(value):
        jaxpr, consts = compat.open_jaxpr(value)
        return (str(jaxpr), tuple(_array_key(c) for c in consts))
    if isinstance(value, tuple | list):
        return tuple(_param_key(v) for v in value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _array_key(value)
    return repr(value)


def _array_key(array: Any) -> Any:
    return _Same(array)


class _Same:
    """Compares by identity and keeps the object alive, so that its identity stays its own."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __lt__(self, other: Any) -> bool:
        return id(self.value) < id(other.value)


def _rule_key(op: Op, inside: Sequence[Any]) -> Any:
    """The trace of a custom rule's derivative: forward where it has one, else backward."""
    avals = [v.aval for v in op.eqn.invars]
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    floats = [i for i, a in enumerate(args) if is_float_dtype(a.dtype)]

    def call(wanted: list[Any], rest: list[Any]) -> list[Any]:
        values = list(rest)
        for i, value in zip(floats, wanted, strict=True):
            values[i] = value
        return [o for o in compat.bind(op.eqn, values) if is_float_dtype(o.dtype)]

    def forward(rest: list[Any], tangents: list[Any]) -> Any:
        return jax.jvp(lambda w: call(w, rest), ([rest[i] for i in floats],), (tangents,))

    def backward(rest: list[Any], _: list[Any]) -> Any:
        out, pull = jax.vjp(lambda w: call(w, rest), [rest[i] for i in floats])
        return out, pull([jnp.ones_like(o) for o in out])

    # forward through a custom_vjp traces to a stub that holds the rule unseen
    only_backward = any(eqn.primitive.name.startswith("custom_vjp") for eqn in inside)
    for derivative in (backward,) if only_backward else (forward, backward):
        try:
            closed = jax.make_jaxpr(derivative)(args, [args[i] for i in floats])
        except Exception:  # no rule in this direction, or one that refuses some of its inputs a
            continue  # derivative (equinox asserts that they have none)
        jaxpr, consts = compat.open_jaxpr(closed)
        return (str(jaxpr), tuple(_array_key(c) for c in consts))
    return _Same(op.eqn)
