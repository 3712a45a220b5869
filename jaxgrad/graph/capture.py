"""Function + example arguments -> blocks of operations, with the control flow opened.

`jit` and `remat` calls, `scan` bodies and `cond` branches become inner blocks. What has a
derivative rule of its own, or none (`custom_jvp`, `custom_vjp`, `while`, callbacks, unknown calls),
stays one opaque operation. Which primitive is which is asked of JAX itself by tracing one small
example of each, so that a renamed primitive is still found.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.graph import compat
from jaxgrad.graph.ir import Block, Lit, Op, Ref, Table, Value


@dataclass(frozen=True, eq=False)
class Capture:
    """A traced function: its block, the table of its values, and its outputs' tree."""

    block: Block
    table: Table
    out_tree: Any


# Their sub-program says how two numbers are combined: nothing in it to see.
_COMBINING = ("scatter", "reduce", "select_and_")


@functools.cache
def _kinds() -> dict[Any, str]:
    """Primitive -> kind, read off one traced example of each construct."""
    examples: list[tuple[str, Callable[[Any], Any]]] = [
        ("jit", jax.jit(jnp.sin)),
        ("remat", jax.checkpoint(jnp.sin)),
        ("scan", lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=2)[0]),
        ("cond", lambda x: jax.lax.cond(x > 0, jnp.sin, jnp.cos, x)),
    ]
    found = {}
    for kind, fun in examples:
        jaxpr, _ = compat.make_jaxpr(fun, 1.0)
        calls = [e for e in jaxpr.eqns if compat.sub_jaxprs(e.params)]
        if len(calls) != 1:
            raise NotImplementedError(
                f"jaxgrad cannot read this JAX ({jax.__version__}): expected one equation with a "
                f"sub-program for {kind!r}, got {[e.primitive.name for e in jaxpr.eqns]}"
            )
        found[calls[0].primitive] = kind
    return found


def primitive_kind(eqn: Any) -> str:
    """The kind of an operation: see `Op.kind`."""
    kind = _kinds().get(eqn.primitive)
    if kind is not None:
        return kind
    if eqn.primitive.name in ("closed_call", "core_call", "core_closed_call"):
        return "jit"
    if eqn.primitive.name.startswith(_COMBINING):
        return "plain"
    has_rule = "custom" in eqn.primitive.name or hasattr(eqn.primitive, "fun")
    return "opaque" if has_rule or compat.sub_jaxprs(eqn.params) else "plain"


def capture(fun: Callable[..., Any], args: Sequence[Any]) -> Capture:
    """Trace `fun(*args)`, each argument one array, into a block.

    Args:
        fun: a function of arrays that returns a pytree of arrays.
        args: arrays, tracers, or `jax.ShapeDtypeStruct`s.

    Returns:
        The capture; constants that the function closes over stand in its table.
    """
    trees = []

    def flat(*values: Any) -> list[Any]:
        leaves, tree = jax.tree.flatten(fun(*values))
        trees.append(tree)
        return leaves

    jaxpr, consts = compat.make_jaxpr(flat, *args)
    table = Table()
    return Capture(_block(jaxpr, consts, table, _Call()), table, trees[-1])


def block_of(closed_jaxpr: Any, table: Table) -> Block:
    """The block of a traced function that JAX holds as the parameter of a call."""
    return _block(*compat.open_jaxpr(closed_jaxpr), table, _Call())


@dataclass(frozen=True)
class _Call:
    """What a block's operations inherit from the calls around them."""

    scope: tuple[str, ...] = ()
    derivative: str = ""


def _block(jaxpr: Any, consts: Sequence[Any], table: Table, outer: _Call) -> Block:
    env: dict[Any, Ref] = {}
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        env[var] = table.constant(const, var.aval)
    inputs = []
    for var in jaxpr.invars:
        env[var] = table.new(var.aval)
        inputs.append(env[var])
    ops = tuple(_op(eqn, env, table, outer) for eqn in jaxpr.eqns)
    return Block(tuple(inputs), ops, tuple(_read(atom, env) for atom in jaxpr.outvars))


def _read(atom: Any, env: dict[Any, Ref]) -> Ref:
    return Lit(_literal_array(atom)) if isinstance(atom, compat.Literal) else env[atom]


def _literal_array(atom: Any) -> Any:
    if isinstance(atom.val, (np.ndarray, np.generic)) or np.isscalar(atom.val):
        return np.asarray(atom.val, dtype=atom.aval.dtype)
    return atom.val


def _op(eqn: Any, env: dict[Any, Ref], table: Table, outer: _Call) -> Op:
    kind, scope = primitive_kind(eqn), outer.scope + compat.scopes(eqn)
    marks = (outer.derivative, compat.derivative(eqn))
    derivative = next((m for m in ("backward", "forward") if m in marks), "")
    call = _Call(scope, derivative)
    blocks, counts, length = (), (0, 0), 0
    if kind in ("jit", "remat", "scan"):
        blocks = (_block(*compat.open_jaxpr(compat.called_jaxpr(eqn)), table, call),)
    elif kind == "cond":
        blocks = tuple(_block(*compat.open_jaxpr(b), table, call) for b in eqn.params["branches"])
    if kind == "scan":
        counts = compat.scan_counts(eqn.params, len(eqn.invars))
        length = eqn.params["length"]
    inputs = tuple(_read(atom, env) for atom in eqn.invars)
    outputs: list[Value] = []
    for var in eqn.outvars:
        value = table.new(var.aval)
        outputs.append(value)
        env[var] = value
    return Op(
        kind, eqn.primitive.name, inputs, tuple(outputs), eqn, scope, blocks, *counts, length,
        derivative=derivative,
    )  # fmt: skip
