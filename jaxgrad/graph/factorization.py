"""From a function to the programs of its layers, and running them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.graph import batching, capture, closures, cuts, flatten, layers, names, reading
from jaxgrad.graph.arguments import leaf_labels, parameter_labels
from jaxgrad.graph.flatten import Line
from jaxgrad.graph.ir import Lit, Table, Value, value_inputs, walk
from jaxgrad.graph.links import Link, Run, run_program
from jaxgrad.graph.paths import Path, common_prefix
from jaxgrad.graph.program import Program, State
from jaxgrad.graph.reading import Graph


def _input_leaves(arg: Any, what: str) -> tuple[list[Any], Any]:
    """The arrays of the chain's input, and its structure."""
    leaves, treedef = jax.tree.flatten(arg)
    if not leaves:
        raise ValueError(
            f"factorize: {what} holds no array (it is None or an empty tree); pass the array, or "
            "choose another argument with argnum="
        )
    found = []
    for name, leaf in zip(leaf_labels(arg, ""), leaves, strict=True):
        try:
            found.append(jnp.asarray(leaf))
        except TypeError:
            where = f"the leaf {name!r} of {what}" if name else what
            raise TypeError(
                f"factorize: expected arrays to differentiate, and {where} is {leaf!r}, of type "
                f"{type(leaf).__name__}. Close over what is no array, or pass it as an argument of "
                "its own and choose the array's with argnum="
            ) from None
    for leaf in found:
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"factorize: {what} is complex ({leaf.dtype}{list(leaf.shape)}), and a chain is of "
                "real states. Pass real and imaginary parts as two real arrays and join them with "
                "jax.lax.complex inside the function."
            )
    return found, treedef


def factorize(
    fun: Callable[..., Any], args: tuple, argnum: int, batch_axis: int | None, mode: str | int
) -> tuple[list[Link], Graph, Callable[[Any], Run]]:
    """See `jaxgrad.factorize`."""
    if isinstance(mode, str) and mode not in ("scopes", "cuts"):
        raise ValueError(
            f"factorize(layers=): expected 'scopes', 'cuts' or an integer depth, got {mode!r}"
        )
    if not -len(args) <= argnum < len(args):
        raise TypeError(f"factorize(argnum={argnum}): got {len(args)} arguments")
    argnum %= len(args)
    what = f"argument {parameter_labels(fun, len(args))[argnum]!r}"
    leaves, in_tree = _input_leaves(args[argnum], what)

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
    scans = scan_paths(traced.block, labels)
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
                group.name,
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


def scan_paths(block: Any, labels: names.Labels) -> dict[Value, Path]:
    """First output of each scan -> the layer path that its iterations repeat."""
    paths = {}
    for _, op in walk(block):
        if op.kind == "scan":
            inside = [labels.path[o] for _, o in walk(op.blocks[0]) if labels.path.get(o)]
            paths[op.outputs[0]] = common_prefix(inside) or labels.path.get(op, ())
    return paths


def _describe(
    made: _Factorized,
    labels: names.Labels,
    parameters: dict[Value, str],
    independence: str,
    block: Any,
) -> Graph:
    chained, table = made.chained, made.table
    used = {n for uses in (*labels.uses.values(), *labels.begins.values()) for n in uses}
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
