"""From a function to the programs of its layers, and running them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.graph import batching, capture, closures, cuts, flatten, layers, names, reading
from jaxgrad.graph.arguments import parameter_labels
from jaxgrad.graph.flatten import Line
from jaxgrad.graph.ir import Lit, Table, Value, value_inputs, walk
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


@dataclass(frozen=True)
class Graph:
    """What was found while a function was factorized.

    Attributes:
        cuts: number of cuts, input and output included.
        start: what the first state is.
        opaque: operations that were not looked into.
        closed_scans: scans that are one layer, each with the reason.
        side_inputs: values that layers take besides the state.
        uncovered: parameters that no named layer uses.
        made_up_names: layers that nothing named.
        independence: "proved" or "probed" for a batch, empty for one example.
    """

    cuts: int
    start: str = "the input"
    opaque: tuple[str, ...] = ()
    closed_scans: tuple[str, ...] = ()
    side_inputs: tuple[str, ...] = ()
    uncovered: tuple[str, ...] = ()
    made_up_names: tuple[str, ...] = ()
    independence: str = ""

    def __str__(self) -> str:
        notes = [f"starts at {self.start}"] if self.start != "the input" else []
        for text, items in (
            ("opaque", self.opaque),
            ("one layer", self.closed_scans),
            ("held as side inputs", self.side_inputs),
            ("parameters in no layer", self.uncovered),
            ("named by jaxgrad", self.made_up_names),
        ):
            notes += [f"{text}: {', '.join(items)}"] if items else []
        notes += [f"examples independent ({self.independence})"] if self.independence else []
        return "\n".join(f"  {note}" for note in notes)


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


def _check_input(leaves: list[Any], what: str) -> None:
    if not leaves:
        raise ValueError(
            f"factorize: {what} holds no array (it is None or an empty tree); pass the array, or "
            "choose another argument with argnum="
        )
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"factorize: {what} is complex ({leaf.dtype}{list(leaf.shape)}), and a chain is of "
                "real states. Pass real and imaginary parts as two real arrays and join them with "
                "jax.lax.complex inside the function."
            )


def _one_or_all(shapes: list[tuple[int, ...]]) -> Any:
    return shapes[0] if len(shapes) == 1 else shapes


def factorize(
    fun: Callable[..., Any], args: tuple, argnum: int, batch_axis: int | None, mode: str | int
) -> tuple[list[Link], Graph, Callable[[Any], Run]]:
    """See `jaxgrad.factorize`."""
    if isinstance(mode, str) and mode not in ("scopes", "cuts"):
        raise ValueError(
            f"factorize(layers=): expected 'scopes', 'cuts' or an integer depth, got {mode!r}"
        )
    if not 0 <= argnum < len(args):
        raise TypeError(f"factorize(argnum={argnum}): got {len(args)} arguments")
    leaves, in_tree = jax.tree.flatten(args[argnum])
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    what = f"argument {parameter_labels(fun, len(args))[argnum]!r}"
    _check_input(leaves, what)

    def of_input(*values: Any) -> Any:
        full = list(args)
        full[argnum] = jax.tree.unflatten(in_tree, values)
        return fun(*full)

    traced = capture.capture(of_input, leaves)
    table, inputs = traced.table, list(traced.block.inputs)
    if not traced.block.outputs:
        raise ValueError("factorize: the function returns no array")
    parameters = closures.name_constants(fun, args, argnum, table.constants)
    labels = names.label(traced.block, table, parameters)
    scans = _scan_paths(traced.block, labels)
    line = flatten.inline(traced.block, labels, table, inputs)
    line = flatten.unroll(line, table, inputs, labels)
    names.label_calls(line.ops, labels)
    chained = cuts.find_chain(line, table, inputs, what)
    groups = layers.group(chained, labels, table, mode, scans)
    layouts, independence = None, ""
    if batch_axis is not None:
        layouts, independence = batching.layouts(
            chained, line, table, inputs, leaves, batch_axis, labels
        )
    out_tree = traced.out_tree
    made = _Factorized(_Found(chained, groups, line, table, inputs, in_tree, out_tree, layouts))
    links = made.links(leaves)
    graph = _describe(made, labels, parameters, independence, traced.block)
    return links, graph, made.resolver(links)


@dataclass(frozen=True, eq=False)
class _Found:
    """What reading the function has found."""

    chained: cuts.Chained
    groups: list[layers.Group]
    line: Line
    table: Table
    inputs: list[Value]
    in_tree: Any
    out_tree: Any
    layouts: dict[tuple[Value, ...], batching.Layout] | None


class _Factorized:
    """A factorized function: its programs, and how to run them on another input."""

    def __init__(self, found: _Found) -> None:
        chained, groups, line, table = found.chained, found.groups, found.line, found.table
        self.groups, self.table, self.inputs, self.in_tree = (
            groups,
            table,
            found.inputs,
            found.in_tree,
        )
        self.chained, self.layouts, self.out_tree = chained, found.layouts, found.out_tree
        self.closed_scans, inputs = line.closed_scans, found.inputs
        influenced = chained.depends.influenced | set(inputs)
        self.programs = [
            Program(
                [op for s in group.segments for op in s.ops],
                group.segments[0].before,
                group.segments[-1].after,
                influenced,
                table,
            )
            for group in groups
        ]
        self.prelude = Program(chained.prelude, inputs, chained.start, influenced, table)
        self._pass_sides_on()
        self.fixed = _fixed_values(line, influenced, table, [self.prelude, *self.programs])

    def _pass_sides_on(self) -> None:
        needed = {v for program in self.programs for v in program.sides}
        for program in (self.prelude, *self.programs):
            made = [v for op in program.ops for v in op.outputs if v in needed]
            program.side_outputs = tuple(dict.fromkeys(made))

    def constants(self, program: Program) -> State:
        values = (self.fixed[v] for v in program.constants)
        return (*program.literal_values(), *values)

    def trees(self) -> list[Any]:
        """Structure of every state."""
        chained = self.chained
        states = [chained.start, *(group.segments[-1].after for group in self.groups)]
        leaf = jax.tree.structure(0)
        trees = [leaf if len(s) == 1 else jax.tree.structure(tuple(s)) for s in states]
        if chained.start == tuple(v for v in self.inputs if self.table.is_float(v)):
            skeleton = [0 if self.table.is_float(v) else None for v in self.inputs]
            trees[0] = jax.tree.structure(jax.tree.unflatten(self.in_tree, skeleton))
        if self.groups and self.out_tree.num_leaves == len(states[-1]):
            trees[-1] = self.out_tree
        return trees

    def forward(self, leaves: Sequence[Any]) -> tuple[list[State], list[State]]:
        """All states and the side inputs of all layers, at an input."""
        env = dict(zip(self.inputs, leaves, strict=True))
        state, sides = run_program(self.prelude, self.constants(self.prelude), (), tuple(leaves))
        env |= dict(zip(self.prelude.side_outputs, sides, strict=True))
        env |= dict(zip(self.chained.start, state, strict=True))
        states, all_sides = [state], []
        for program in self.programs:
            taken = tuple(env[v] for v in program.sides)
            state, made = run_program(program, self.constants(program), taken, state)
            env |= dict(zip(program.side_outputs, made, strict=True))
            states.append(state)
            all_sides.append(taken)
        return states, all_sides

    def links(self, leaves: Sequence[Any]) -> list[Link]:
        trees = self.trees()
        needs_sides = any(program.sides for program in self.programs)
        sides = self.forward(leaves)[1] if needs_sides else [()] * len(self.programs)
        states = [self.chained.start, *(group.segments[-1].after for group in self.groups)]
        layouts = [self.layouts[s] if self.layouts else None for s in states]
        return [
            Link(group.name, program, self.constants(program), sides[k], trees[k], trees[k + 1],
                 layouts[k], layouts[k + 1])
            for k, (group, program) in enumerate(zip(self.groups, self.programs, strict=True))
        ]  # fmt: skip

    def resolver(self, links: list[Link]) -> Callable[[Any], Run]:
        trees = tuple(self.trees())
        avals = [self.table.avals[v] for v in self.inputs]

        def resolve(x: Any) -> Run:
            leaves, tree = jax.tree.flatten(x)
            shapes = [tuple(np.shape(leaf)) for leaf in leaves]
            if tree != self.in_tree or shapes != [tuple(a.shape) for a in avals]:
                raise ValueError(
                    f"the chain was made for an input of shape {[tuple(a.shape) for a in avals]}, "
                    f"got {shapes}; factorize the function again for another shape"
                )
            leaves = [jnp.asarray(leaf, a.dtype) for leaf, a in zip(leaves, avals, strict=True)]
            states, sides = self.forward(leaves)
            current = tuple(
                Link(
                    k.name,
                    k.program,
                    k.constants,
                    s,
                    k.in_tree,
                    k.out_tree,
                    k.batch_in,
                    k.batch_out,
                )
                for k, s in zip(links, sides, strict=True)
            )
            return Run(current, tuple(states), trees)

        return resolve


def _fixed_values(
    line: Line, influenced: set[Value], table: Table, programs: Sequence[Program]
) -> dict[Value, Any]:
    """Everything that does not depend on the chain's input, computed once."""
    env = dict(table.constants)
    needed = {v for program in programs for v in program.constants}
    todo = []
    for op in reversed(line.ops):
        if any(v in needed for v in op.outputs) and not any(v in influenced for v in op.outputs):
            needed.update(value_inputs(op))
            todo.append(op)
    for op in reversed(todo):
        values = [ref.value if isinstance(ref, Lit) else env[ref] for ref in op.inputs]
        env.update(zip(op.outputs, flatten.run_op(op, values), strict=True))
    return env


def _scan_paths(block: Any, labels: names.Labels) -> dict[Value, names.Path]:
    """First output of each scan -> the layer path that its iterations repeat."""
    paths = {}
    for _, op in walk(block):
        if op.kind == "scan":
            inside = [labels.path[o] for _, o in walk(op.blocks[0]) if labels.path.get(o)]
            paths[op.outputs[0]] = names.common_prefix(inside) or labels.path.get(op, ())
    return paths


def _describe(
    made: _Factorized,
    labels: names.Labels,
    parameters: dict[Value, str],
    independence: str,
    block: Any,
) -> Graph:
    chained, table = made.chained, made.table
    used = {name for uses in labels.uses.values() for name in uses}
    read = reading.read_values(block)
    sides = dict.fromkeys(v for program in made.programs for v in program.sides)
    start = "the input"
    if chained.start != tuple(v for v in made.inputs if table.is_float(v)):
        producer = chained.prelude[-1] if chained.prelude else None
        where = "/".join(labels.path.get(producer, ())) if producer else ""
        aval = table.avals[chained.start[0]]
        start = f"the first float cut, {aval.dtype}{list(aval.shape)}" + (
            f" of {where}" if where else ""
        )
    return Graph(
        cuts=len(chained.segments) + 1,
        start=start,
        opaque=reading.opaque_regions(block, table, labels),
        closed_scans=tuple(
            f"{op.name} over {op.length} steps: {why}" for op, why in made.closed_scans.items()
        ),
        side_inputs=tuple(f"{table.avals[v].dtype}{list(table.avals[v].shape)}" for v in sides),
        uncovered=tuple(
            dict.fromkeys(
                name if value in read else f"{name} (unused)"
                for value, name in parameters.items()
                if name not in used
            )
        ),
        made_up_names=tuple(group.name for group in made.groups if group.made_up),
        independence=independence,
    )
