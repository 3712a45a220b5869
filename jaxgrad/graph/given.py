"""Chains whose layers are given: traced for the type of their state, as programs like any other."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxgrad.graph import capture, flatten, names
from jaxgrad.graph.ir import Value
from jaxgrad.graph.links import Link, Run, run_program
from jaxgrad.graph.program import Program, State


def resolve_given(given: Sequence[Any], x: Any, cache: dict[Any, Any]) -> Run:
    """A chain of given functions at an input: each traced once for the type of its state."""
    state, tree = _flat_state(x)
    states, trees, links = [state], [tree], []
    for k, layer in enumerate(given):
        key = (k, tree, tuple((a.shape, str(a.dtype)) for a in state))
        if key not in cache:
            cache[key] = _trace_layer(layer.function, tree, state, layer.name)
        program, constants, out_tree = cache[key]
        links.append(Link(layer.name, program, constants, (), tree, out_tree))
        state, _ = run_program(program, constants, (), state)
        tree = out_tree
        states.append(state)
        trees.append(tree)
    return Run(tuple(links), tuple(states), tuple(trees))


def resolve_scanned(
    block: Callable[[Any, Any], Any], stacked: Any, given: Sequence[Any], x: Any
) -> Run:
    """A chain of equal layers at an input: the block is traced once."""
    state, tree = _flat_state(x)
    params, params_tree = jax.tree.flatten(stacked)
    first = [leaf[0] for leaf in params]

    def call(*leaves: Any) -> Any:
        own = jax.tree.unflatten(params_tree, leaves[: len(params)])
        return block(own, jax.tree.unflatten(tree, leaves[len(params) :]))

    traced = capture.capture(call, [*first, *state])
    inputs = traced.block.inputs
    program, fixed = _whole_program(traced, inputs[len(params) :])
    states, links = [state], []
    for k, layer in enumerate(given):
        own = {v: leaf[k] for v, leaf in zip(inputs, params, strict=False)}
        values = tuple(own[v] if v in own else fixed[v] for v in program.constants)
        constants = (*program.literal_values(), *values)
        links.append(Link(layer.name, program, constants, (), tree, traced.out_tree))
        state, _ = run_program(program, constants, (), states[-1])
        _check_same_type(states[0], state, layer.name)
        states.append(state)
    return Run(tuple(links), tuple(states), (tree,) * len(states))


def _check_same_type(before: State, after: State, name: str) -> None:
    types = [[(tuple(a.shape), str(a.dtype)) for a in state] for state in (before, after)]
    if types[0] != types[1]:
        raise ValueError(
            f"layer {name!r}: Chain.scanned expects a block that keeps the state's shape and "
            f"dtype, got {types[0]} -> {types[1]}"
        )


def _flat_state(x: Any) -> tuple[State, Any]:
    leaves, tree = jax.tree.flatten(x)
    return tuple(jnp.asarray(leaf) for leaf in leaves), tree


def _trace_layer(function: Any, tree: Any, state: State, name: str) -> tuple[Program, State, Any]:
    try:
        traced = capture.capture(lambda *leaves: function(jax.tree.unflatten(tree, leaves)), state)
    except (TypeError, ValueError) as error:
        shapes = [tuple(a.shape) for a in state]
        raise ValueError(f"layer {name!r} fails on a state of shape {shapes}: {error}") from error
    program, fixed = _whole_program(traced, traced.block.inputs)
    constants = (*program.literal_values(), *(fixed[v] for v in program.constants))
    return program, constants, traced.out_tree


def _whole_program(
    traced: capture.Capture, state: Sequence[Value]
) -> tuple[Program, dict[Value, Any]]:
    line = flatten.inline(traced.block, names.Labels(), traced.table, traced.block.inputs)
    line.ops = flatten.needed_ops(line)
    influenced = flatten.dependence(line.ops, traced.table, state).influenced
    program = Program(line.ops, state, line.outputs, influenced, traced.table)
    return program, traced.table.constants
