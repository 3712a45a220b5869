"""Layers as programs with their arrays: how a chain is run."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.graph import batching
from jaxgrad.graph.program import Program, State


@dataclass(frozen=True, eq=False)
class Link:
    """One layer as a program with its arrays.

    Attributes:
        name: the layer's name.
        program: what it computes.
        constants: the values of its literals and constants.
        sides: the values of its side inputs at the input the chain was made with.
        in_tree: structure of the incoming state.
        out_tree: structure of the outgoing state.
        batch_in: where the examples lie in the incoming state; None without a batch.
        batch_out: the same for the outgoing state.
    """

    name: str
    program: Program
    constants: State
    sides: State
    in_tree: Any
    out_tree: Any
    batch_in: batching.Layout | None = None
    batch_out: batching.Layout | None = None

    def __call__(self, h: Any) -> Any:
        """The next state."""
        state = check_state(h, self.program, self.in_tree, self.name)
        after, _ = run_program(self.program, self.constants, self.sides, state)
        return jax.tree.unflatten(self.out_tree, after)


@dataclass(frozen=True, eq=False)
class Run:
    """A chain at one input.

    Attributes:
        links: the layers, their side inputs at this input.
        states: the states before, between and after the layers, each a tuple of arrays.
        trees: the states' structures.
    """

    links: tuple[Link, ...]
    states: tuple[State, ...]
    trees: tuple[Any, ...]

    def tree_of(self, k: int, state: State) -> Any:
        """A state as the user's layers take it."""
        return jax.tree.unflatten(self.trees[k], state)


_jitted_run = jax.jit(
    lambda program, constants, sides, state: program.run(constants, sides, state), static_argnums=0
)


def run_program(
    program: Program, constants: State, sides: State, state: State
) -> tuple[State, State]:
    """Run a program, compiled once for all programs equal to it."""
    return _jitted_run(program, constants, sides, state)


def check_state(h: Any, program: Program, tree: Any, name: str) -> State:
    """The leaves of a state, after a check of its structure and shapes."""
    leaves, found = jax.tree.flatten(h)
    expected = [program.table.avals[v] for v in program.before]
    shapes = [tuple(np.shape(leaf)) for leaf in leaves]
    wanted = [tuple(a.shape) for a in expected]
    if found != tree or shapes != wanted:
        raise ValueError(
            f"layer {name!r}: expected a state of shape {_one_or_all(wanted)}, got "
            f"{_one_or_all(shapes)}; states of this chain are made by chain.states(x)"
        )
    return tuple(jnp.asarray(leaf, a.dtype) for leaf, a in zip(leaves, expected, strict=True))


def _one_or_all(shapes: list[tuple[int, ...]]) -> Any:
    return shapes[0] if len(shapes) == 1 else shapes
