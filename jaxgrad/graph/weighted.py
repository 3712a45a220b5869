"""The chain of a loss over its activations, each layer with the weights that scale it.

An activation depends on parameters and on the batch. The chain starts where the activations first
come together and ends at the last cut before the loss.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxgrad import tree
from jaxgrad.graph import arguments, capture, cuts, flatten, layers, names
from jaxgrad.graph.factorization import scan_paths
from jaxgrad.graph.flatten import Line, dependence
from jaxgrad.graph.ir import Block, Lit, Op, Table, Value, is_real_dtype, value_inputs
from jaxgrad.graph.marks import Marks, Weight
from jaxgrad.graph.program import Program, State

_MOST_STARTS = 4


@dataclass(frozen=True, eq=False)
class WeightedLayer:
    """A layer with its weights.

    Attributes:
        name: its name.
        program: from one state to the next; it returns the pre-activation after the state.
        weights: position among the program's constants -> weight.
        blocked: leaves that it multiplies with but that cannot be scaled for this layer alone.
    """

    name: str
    program: Program
    weights: dict[int, Weight]
    blocked: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Reading:
    """A loss as a chain of weighted layers.

    Attributes:
        start: a program without a state that makes the first one.
        at_data: whether the first state is a float leaf of the batch.
        entry: where it is not, from the float data to the first state; or None (tokens).
        data: the float data that `entry` takes.
        layers: the layers after it.
        env: value -> array, for everything that the programs take from outside.
        weight_of: value -> the weight that it is.
        leaves: all leaves of the parameters.
        treedef: their structure.
        leaf_names: their names.
        off_chain: names of the leaves that some product takes, but no layer of the chain.
    """

    start: Program
    at_data: bool
    entry: WeightedLayer | None
    data: State
    layers: tuple[WeightedLayer, ...]
    env: dict[Value, Any]
    weight_of: dict[Value, Weight]
    leaves: list[Any]
    treedef: Any
    leaf_names: dict[int, str]
    off_chain: tuple[str, ...]

    def constants(self, program: Program) -> State:
        """The values of a program's constants, unscaled."""
        return (*program.literal_values(), *(self.env[v] for v in program.constants))


def read(loss: Callable[..., Any], params: Any, args: Sequence[Any]) -> Reading:
    """Read `loss(params, *args)`.

    Raises:
        TypeError: if the loss is no real scalar or the parameters hold no float.
        ValueError: if no activation depends on parameters and on the batch.
    """
    args = [jax.tree.map(_as_jax, a) for a in args]
    split = arguments.split(loss, (params, *args), {}, [0])
    leaves, treedef = jax.tree.flatten(params)
    captured = capture.capture(
        lambda *values: split.call(loss, values), [split.leaves[i] for i in split.traced]
    )
    block, table = captured.block, captured.table
    _check_loss(block, table)
    at = dict(zip(split.traced, block.inputs, strict=True))
    weights = {at[p]: p for p in split.wanted}
    data = [v for p, v in at.items() if p >= len(leaves)]
    labels = names.label(block, table, {v: split.names[p] for v, p in weights.items()})
    line = flatten.inline(block, labels, table, block.inputs)
    line.ops = flatten.needed_ops(line)
    source = _Source(table, labels, weights, data, scan_paths(block, labels))
    found = _best(line, source)
    env = dict(table.constants) | {v: split.leaves[p] for p, v in at.items()}
    return found.reading(env, leaves, treedef, dict(split.names))


def _as_jax(leaf: Any) -> Any:
    return jnp.asarray(leaf) if tree.is_array(leaf) else leaf


def _check_loss(block: Block, table: Table) -> None:
    shapes = [table.avals[v] if not isinstance(v, Lit) else v.aval for v in block.outputs]
    if len(shapes) != 1 or shapes[0].shape != () or not is_real_dtype(shapes[0].dtype):
        got = ", ".join(f"{a.dtype}{list(a.shape)}" for a in shapes) or "nothing"
        raise TypeError(
            f"expected loss(params, batch) to return one real scalar, got {got}; reduce it with "
            ".mean() and leave auxiliary results out"
        )


@dataclass(frozen=True, eq=False)
class _Source:
    """What is known of the loss before it is cut."""

    table: Table
    labels: names.Labels
    weights: dict[Value, int]
    data: list[Value]
    scans: dict[Value, names.Path]

    @property
    def float_data(self) -> list[Value]:
        """The floating-point leaves of the batch."""
        types = self.table.avals
        return [v for v in self.data if is_real_dtype(getattr(types[v], "dtype", None))]

    def activations(self, line: Line) -> set[Value]:
        smooth = dependence(line.ops, self.table, self.weights).smooth
        touched = dependence(line.ops, self.table, self.data).influenced
        return {v for v in smooth & touched if is_real_dtype(self.table.avals[v].dtype)}


def _best(line: Line, source: _Source) -> "_Found":
    """The start from which most layers have weights: the data, or else an activation."""
    active = source.activations(line)
    if not active:
        raise ValueError(
            "no activation depends on both the parameters and the batch: expected "
            "loss(params, batch) to use both; pass the data as the second argument instead of "
            "closing over it"
        )
    smooth = dependence(line.ops, source.table, source.float_data).smooth
    reaching = source.float_data if any(v in smooth & active for v in line.outputs) else []
    best, most = None, -1
    for start in [*reaching, *_starts(line, active)]:
        if not _leads_on(line, start, source.table):
            continue
        found = _Found(line, start, source)
        count = sum(bool(marks) for marks in found.group_marks)
        if count > most:
            best, most = found, count
    assert best is not None
    return best


def _leads_on(line: Line, start: Value, table: Table) -> bool:
    """Whether a gradient can pass from the start to the loss."""
    smooth = dependence(line.ops, table, [start]).smooth
    return any(v in smooth for v in line.outputs if not isinstance(v, Lit))


def _starts(line: Line, active: set[Value]) -> list[Value]:
    """Where the chain may begin: where all activations have come together, or at one of them."""
    outputs = {v for v in line.outputs if not isinstance(v, Lit) and v in active}
    last = cuts.last_uses(line.ops, active, outputs)
    roots = [
        (i, v)
        for i, op in enumerate(line.ops)
        for v in op.outputs
        if v in active and v in last and not any(u in active for u in value_inputs(op))
    ]
    if not roots:
        return []
    live: set[Value] = set()
    joined: list[Value] = []
    for i, op in enumerate(line.ops):
        live.update(v for v in op.outputs if v in active and v in last)
        live = {v for v in live if last[v] > i}
        if i >= roots[-1][0] and len(live) == 1:
            joined = [v for v in live if v not in outputs]
            break
    return list(dict.fromkeys([*joined, *(v for _, v in roots[:_MOST_STARTS])]))


class _Found:
    """The chain from one start."""

    def __init__(self, line: Line, start: Value, source: _Source) -> None:
        table, labels = source.table, source.labels
        self.source, self.start = source, start
        # unrolling a scan would take away the very value that the chain starts from
        of_scan = any(op.kind == "scan" and start in op.outputs for op in line.ops)
        self.line = line if of_scan else flatten.unroll(line, table, [start], labels)
        names.label_calls(self.line.ops, labels)
        self.marks = Marks(self.line, source.table, source.weights, source.data)
        chained = cuts.find_chain(self.line, table, [start], "the first activation")
        self.influenced = chained.depends.influenced | {start}
        groups = layers.group(chained, labels, table, "scopes", source.scans)
        self.groups = self._trimmed(groups)
        self.group_marks = [self._marked(ops) for _, ops, _, _ in self.groups]

    def _trimmed(self, groups: list[layers.Group]) -> list[tuple[str, tuple, Any, Any]]:
        """The groups as (name, operations, before, after), without what follows the last weight."""
        uses = self.source.labels.uses
        flat = [(g.name, s) for g in groups for s in g.segments]
        with_weights = [k for k, (_, s) in enumerate(flat) if any(uses.get(op) for op in s.ops)]
        end = (with_weights[-1] + 1) if with_weights else 0
        if end and flat[end - 1][1].after == tuple(self.line.outputs):  # no cut before the loss
            end -= 1
        kept: dict[str, list[Any]] = {}
        for name, segment in flat[:end]:
            kept.setdefault(name, []).append(segment)
        return [
            (name, tuple(op for s in run for op in s.ops), run[0].before, run[-1].after)
            for name, run in kept.items()
        ]

    def _marked(self, ops: Iterable[Op]) -> frozenset[Weight]:
        return frozenset().union(*(self.marks.of.get(op, ()) for op in ops))

    def reading(
        self, env: dict[Value, Any], leaves: list[Any], treedef: Any, leaf_names: dict[int, str]
    ) -> Reading:
        made = [
            self._layer(name, ops, before, after, self.influenced)
            for name, ops, before, after in self.groups
        ]
        start = self._program((), (), (self.start,), set())
        at_data = self.start in self.source.data
        entry, taken = (None, ()) if at_data else self._entry()
        programs = [start, *(layer.program for layer in made), *([entry.program] if entry else [])]
        needed = {v for layer in made for v in layer.program.sides}
        for layer in made:
            outputs = [v for op in layer.program.ops for v in op.outputs if v in needed]
            layer.program.side_outputs = tuple(dict.fromkeys(outputs))
        env = _evaluated(self.line, {v for p in programs for v in p.constants}, env)
        on = {w.leaf for marks in self.group_marks for w in marks}
        on |= {w.leaf for w in entry.weights.values()} if entry else set()
        off = {w.leaf for marks in self.marks.of.values() for w in marks} - on
        return Reading(
            start, at_data, entry, tuple(env[v] for v in taken), tuple(made), env, self.marks.whole,
            leaves, treedef, leaf_names, tuple(leaf_names[i] for i in sorted(off)),
        )  # fmt: skip

    def _entry(self) -> tuple[WeightedLayer | None, tuple[Value, ...]]:
        """From the float data to the first state, with the first group if that has no weight."""
        ops, after, name = (), (self.start,), ""
        if self.groups:
            name, ops, _, after = self.groups[0]
            if self.group_marks[0]:
                name, ops, after = "", (), (self.start,)
        inside = [*self._closure((*ops,), after, set()), *ops]
        taken = []
        for value in self.source.float_data:
            smooth = dependence(inside, self.source.table, [value]).smooth
            if any(v in smooth for v in after):
                taken.append(value)
        if not taken:
            return None, ()
        reached = dependence(inside, self.source.table, taken).influenced
        marked = [op for op in inside if self.marks.of.get(op) and reached & set(op.outputs)]
        if not marked:
            return None, ()
        path = self.source.labels.path.get(marked[-1], ())
        name = name or "/".join(path) or "entry"
        return self._layer(name, tuple(ops), tuple(taken), after, set(), reached), tuple(taken)

    def _layer(
        self, name: str, ops: Sequence[Op], before: Sequence[Value], after: Sequence[Any],
        influenced: set[Value], reached: set[Value] | None = None,
    ) -> WeightedLayer:  # fmt: skip
        everything = [*self._closure(ops, after, influenced | set(before)), *ops]
        on_path = influenced if reached is None else reached
        own = [op for op in everything if on_path & set(op.outputs)]
        preact = self._preactivation(own)
        program = self._program(ops, before, (*after, *preact), influenced)
        marked = self._marked(own)
        positions = {
            len(program.literals) + i: self.marks.whole[v]
            for i, v in enumerate(program.constants)
            if self.marks.whole.get(v) in marked
        }
        missing = {w.leaf for w in marked if w not in set(positions.values())}
        return WeightedLayer(name, program, positions, tuple(sorted(missing)))

    def _preactivation(self, ops: Sequence[Op]) -> tuple[Value, ...]:
        """The result of the last product with a weight, its bias added."""
        marked = [k for k, op in enumerate(ops) if self.marks.of.get(op)]
        if not marked:
            return ()
        value = ops[marked[-1]].outputs[0]
        for op in ops[marked[-1] + 1 :]:
            others = [v for v in value_inputs(op) if v != value]
            biased = op.name in ("add", "add_any") and value in op.inputs
            if biased and len(others) == 1 and others[0] in self.marks.roles:
                value = op.outputs[0]
        return (value,)

    def _program(
        self, ops: Sequence[Op], before: Sequence[Value], after: Sequence[Any],
        influenced: set[Value],
    ) -> Program:  # fmt: skip
        extra = self._closure(ops, after, influenced | set(before))
        return Program([*extra, *ops], before, after, influenced, self.source.table)

    def _closure(self, ops: Sequence[Op], after: Sequence[Any], known: set[Value]) -> list[Op]:
        """The operations that make weights ready for `ops` (transposes, casts, masks)."""
        made = known | {v for op in ops for v in op.outputs}
        wanted = [v for op in ops for v in value_inputs(op)]
        wanted += [v for v in after if not isinstance(v, Lit)]
        needed, found = {v for v in wanted if v not in made}, []
        for op in reversed(self.line.ops):
            is_stop = any(v in self.marks.whole for v in op.outputs) and op.kind == "index"
            if is_stop or not any(v in needed and v in self.marks.touched for v in op.outputs):
                continue
            needed.update(v for v in value_inputs(op) if v not in made)
            found.append(op)
        return found[::-1]


def _evaluated(line: Line, wanted: set[Value], env: dict[Value, Any]) -> dict[Value, Any]:
    """Compute what is wanted from the values that are known."""
    env, needed, todo = dict(env), {v for v in wanted if v not in env}, []
    for op in reversed(line.ops):
        if any(v in needed for v in op.outputs):
            needed.update(v for v in value_inputs(op) if v not in env)
            todo.append(op)
    for op in reversed(todo):
        values = [ref.value if isinstance(ref, Lit) else env[ref] for ref in op.inputs]
        env.update(zip(op.outputs, flatten.run_op(op, values), strict=True))
    return env
