"""The intermediate representation: a traced function as blocks of operations with unique values.

JAX shares one sub-jaxpr among all calls of a jitted helper, so a variable of a jaxpr does not name
one tensor. Here every call path has its own `Block`, and every `Value` is one integer that stands
for one tensor of the run.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

Value = int


@dataclass(frozen=True, eq=False)
class Lit:
    """A scalar written into the program."""

    value: Any

    @property
    def aval(self) -> Any:
        """Something with the literal's shape and dtype."""
        return self.value if hasattr(self.value, "dtype") else np.asarray(self.value)


Ref = Value | Lit


@dataclass(frozen=True, eq=False)
class Op:
    """One equation.

    Attributes:
        kind: "plain" (bound as it is), "jit", "remat", "scan", "cond" (their `blocks` may be
            rewritten), or "opaque" (has sub-programs that jaxgrad must not open: custom derivative
            rules, `while`, callbacks).
        eqn: JAX's own equation.
        blocks: the opened sub-programs of this call.
        scope: names of the enclosing scopes, outermost first, those of the callers included.
        iteration: `(scan, k)` marks of an unrolled scan, outermost first.
        derivative: "forward" or "backward" for an operation of a derivative that the program takes
            itself (a gradient penalty, an inner training step), the calls around it included;
            else "".
    """

    kind: str
    name: str
    inputs: tuple[Ref, ...]
    outputs: tuple[Value, ...]
    eqn: Any
    scope: tuple[str, ...] = ()
    blocks: tuple["Block", ...] = ()
    num_consts: int = 0
    num_carry: int = 0
    length: int = 0
    iteration: tuple[tuple[int, int], ...] = ()
    derivative: str = ""


@dataclass(frozen=True, eq=False)
class Block:
    """A straight-line program: `inputs` and `constants` in, `ops` in order, `outputs` out."""

    inputs: tuple[Value, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Ref, ...]


@dataclass(eq=False)
class Table:
    """What is known of each value: its type, and for constants the array itself."""

    avals: dict[Ref, Any] = field(default_factory=dict)
    constants: dict[Value, Any] = field(default_factory=dict)

    def new(self, aval: Any) -> Value:
        """A new value of the given type."""
        value = len(self.avals)
        self.avals[value] = aval
        return value

    def constant(self, array: Any, aval: Any) -> Value:
        """A new value that stands for a known array."""
        value = self.new(aval)
        self.constants[value] = array
        return value

    def is_float(self, ref: Ref) -> bool:
        """Whether a gradient can pass through the value: a real or complex floating type."""
        return not isinstance(ref, Lit) and is_float_dtype(getattr(self.avals[ref], "dtype", None))


def is_float_dtype(dtype: Any) -> bool:
    """True for real and complex floating types; False for integers, booleans, keys and float0."""
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def is_real_dtype(dtype: Any) -> bool:
    """True for real floating types, half precision included."""
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def value_inputs(op: Op) -> tuple[Value, ...]:
    """The inputs of an operation that are values, not literals."""
    return tuple(ref for ref in op.inputs if not isinstance(ref, Lit))


def walk(block: Block) -> Iterator[tuple[tuple[Op, ...], Op]]:
    """All operations in program order, each with those that enclose it, outermost first."""
    stack: list[tuple[tuple[Op, ...], Op]] = [((), op) for op in reversed(block.ops)]
    while stack:
        parents, op = stack.pop()
        yield parents, op
        inside = [((*parents, op), inner) for b in op.blocks for inner in b.ops]
        stack.extend(reversed(inside))


def reach(block: Block, wanted: Iterable[Ref], reaching: set[Value]) -> None:
    """Add to `reaching` all that `wanted` is computed from; in loops and branches, every value."""
    reaching.update(ref for ref in wanted if not isinstance(ref, Lit))
    for op in reversed(block.ops):
        if not any(v in reaching for v in op.outputs):
            continue
        if op.kind not in ("jit", "remat"):
            reaching.update(v for b in op.blocks for _, o in walk(b) for v in o.outputs)
            reaching.update(value_inputs(op))
            continue
        inner = op.blocks[0]
        pairs = zip(op.outputs, inner.outputs, strict=True)
        reach(inner, [ref for v, ref in pairs if v in reaching], reaching)
        arguments = zip(op.inputs, inner.inputs, strict=True)
        reaching.update(ref for ref, v in arguments if v in reaching and not isinstance(ref, Lit))


def substitute(ref: Ref, mapping: dict[Value, Ref]) -> Ref:
    """Follow a renaming to its end."""
    while not isinstance(ref, Lit) and ref in mapping:
        ref = mapping[ref]
    return ref


def renamed(op: Op, mapping: dict[Value, Ref]) -> Op:
    """The operation with its inputs renamed."""
    return replace(op, inputs=tuple(substitute(ref, mapping) for ref in op.inputs))


def clone(block: Block, table: Table, mapping: dict[Value, Ref], edit: Callable[[Op], Op]) -> Block:
    """A copy of `block` with new values, except where `mapping` already says otherwise."""
    for value in block.inputs:
        if value not in mapping:
            mapping[value] = table.new(table.avals[value])
    ops = []
    for op in block.ops:
        blocks = tuple(clone(inner, table, mapping, edit) for inner in op.blocks)
        inputs = tuple(substitute(ref, mapping) for ref in op.inputs)
        outputs = []
        for value in op.outputs:
            mapping[value] = table.new(table.avals[value])
            outputs.append(mapping[value])
        ops.append(edit(replace(op, inputs=inputs, outputs=tuple(outputs), blocks=blocks)))
    inputs = tuple(
        v for v in (substitute(i, mapping) for i in block.inputs) if not isinstance(v, Lit)
    )
    return Block(inputs, tuple(ops), tuple(substitute(ref, mapping) for ref in block.outputs))
