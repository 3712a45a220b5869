"""Modules that no scope names: where their parameters are used, and sums that close a branch."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from jaxgrad.graph.ir import Block, Lit, Op, Value, value_inputs, walk
from jaxgrad.graph.names import Labels
from jaxgrad.graph.paths import Path
from jaxgrad.graph.roles import VIEWS

# Elementwise, and in a mask or a factor of no parameter's making: the branch goes on.
_SCALINGS = {"mul", "div", "neg", "select_n", "convert_element_type", "copy", "reduce_precision"}
_FILLING = {"broadcast_in_dim", "reshape"}

Readers = dict[Value, list[Op | None]]


@dataclass(frozen=True)
class Visit:
    """One run of a module.

    Attributes:
        path: the module's.
        names: the parameter leaves that it used.
        position: of the last operation that used one, in the block.
        op: that operation.
    """

    path: Path
    names: frozenset[str]
    position: int
    op: Op


def module_visits(block: Block, labels: Labels, readers: Readers) -> list[Visit]:
    """The runs of modules in a block that no scope names; each ends with its last parameter.

    Inside a derivative a module's first run is the forward pass; the others are its tangents.
    """
    visits: list[Visit] = []
    latest: dict[tuple[Path, str], list[int]] = {}
    views: dict[Value, Value] = {}
    for i, op in enumerate(block.ops):
        if op.derivative and op.name in VIEWS:
            views |= dict.fromkeys(op.outputs, value_inputs(op)[0]) if value_inputs(op) else {}
        if op not in labels.uses or op in labels.by_scope or op.derivative == "backward":
            continue
        path, names = labels.path[op], labels.uses[op]
        earlier = latest.setdefault((path, op.derivative), [])
        known = _continued(op, names, earlier, visits, views)
        if known is not None:
            visits[known] = Visit(path, visits[known].names | names, i, op)
        else:
            earlier.append(len(visits))
            visits.append(Visit(path, names, i, op))
    tangents = {k for runs in latest.values() for k in runs[1:] if visits[k].op.derivative}
    kept = [visit for k, visit in enumerate(visits) if k not in tangents]
    return _named_within(_absorb_biases(kept, readers), labels)


def _named_within(visits: list[Visit], labels: Labels) -> list[Visit]:
    """A block's own leaf, such as a layer scale, is a part of the block: `block/scale`."""
    blocks = {
        path[:depth]
        for op, path in labels.path.items()
        if op in labels.uses
        for depth in range(1, len(path))
    }

    def named(visit: Visit) -> Visit:
        (leaf, *others) = visit.names
        if visit.path not in blocks or others:
            return visit
        return replace(visit, path=(*visit.path, leaf.rpartition("/")[2]))

    return [named(visit) for visit in visits]


def _continued(
    op: Op,
    names: frozenset[str],
    earlier: list[int],
    visits: list[Visit],
    views: dict[Value, Value],
) -> int | None:
    """Which run an operation belongs to: the last one that has not used these parameters.

    Inside a derivative, where tangents stand beside values, the one whose result it reads.
    """
    if op.derivative:
        read = {_origin(v, views) for v in value_inputs(op)}
        for k in reversed(earlier):
            if visits[k].op.outputs[0] in read and not visits[k].names & names:
                return k
    if earlier and not visits[earlier[-1]].names & names:
        return earlier[-1]
    return None


def _origin(value: Value, views: dict[Value, Value]) -> Value:
    while value in views:
        value = views[value]
    return value


def _absorb_biases(visits: list[Visit], readers: Readers) -> list[Visit]:
    """Join `b` to `w` where the leaves lie at the root: `w`'s only reader adds `b`."""
    kept: list[Visit] = []
    for visit in visits:
        candidates = range(len(kept) - 1, -1, -1) if visit.op.derivative else [len(kept) - 1]
        weight = next((k for k in candidates if k >= 0 and _is_bias(visit, kept[k], readers)), None)
        if weight is None:
            kept.append(visit)
        else:
            names = kept[weight].names | visit.names
            kept[weight] = Visit(kept[weight].path, names, visit.position, visit.op)
    return kept


def _is_bias(visit: Visit, weight: Visit, readers: Readers) -> bool:
    op, source = visit.op, weight.op.outputs[0]
    at_root = op.name == "add" and len(visit.path) == 1 and len(visit.names) == 1
    reads = source in value_inputs(op) and readers[source] == [op]
    return at_root and reads and visit.path != weight.path


# ------------------------------------------------------------------- residual sums


@dataclass(frozen=True)
class Sum:
    """A residual sum.

    Attributes:
        position: in the block.
        op: the addition.
        scaled: whether the branch is scaled, masked or cast before it.
    """

    position: int
    op: Op
    scaled: bool


@dataclass(eq=False)
class Branches:
    """A block, as the search for residual sums sees it.

    Attributes:
        block: the block.
        labels: the layer of every operation.
        shape: a value's shape.
        is_data: whether an input holds data, by its type: not a random key.
        readers: who reads each value.
        made: value -> position and operation that made it.
        used: what operations with parameters return.
        last_use: path of a module -> position of the last operation that uses its parameters.
    """

    block: Block
    labels: Labels
    shape: Callable[[Value], tuple[int, ...]]
    is_data: Callable[[Value], bool]
    readers: Readers
    made: dict[Value, tuple[int, Op]] = field(init=False)
    used: set[Value] = field(init=False)
    last_use: dict[Path, int] = field(init=False)

    def __post_init__(self) -> None:
        ops = self.block.ops
        self.made = {v: (i, op) for i, op in enumerate(ops) for v in op.outputs}
        self.used = {v for op in ops if op in self.labels.uses for v in op.outputs}
        self.last_use = {}
        for i, op in enumerate(ops):
            if op in self.labels.uses and op.derivative != "backward":
                path = self.labels.path[op]
                self.last_use |= {path[:depth]: i for depth in range(1, len(path) + 1)}

    def closing_sum(self, value: Value) -> Sum | None:
        """The sum that adds a branch ending in `value` to its own input.

        On the way there may be a dropout or a scale.
        """
        for steps in range(8):
            readers = self.readers.get(value, ())
            if len(readers) != 1 or not isinstance(op := readers[0], Op):
                return None
            if op in self.labels.uses:
                return None
            if op.name in ("add", "add_any"):
                found = self._is_residual(op, value)
                return Sum(self.made[op.outputs[0]][0], op, steps > 0) if found else None
            if not self._is_scaling(op, value):
                return None
            value = op.outputs[0]
        return None

    def name(self, path: Path, position: int) -> Path:
        """A sum's name: the outermost module that ends with it, or its last part's with a `+`."""
        for depth in range(1, len(path)):
            if self.last_use.get(path[:depth], -1) < position:
                return path[:depth]
        return (*path[:-1], f"{path[-1]}+")

    def _is_residual(self, op: Op, value: Value) -> bool:
        shape = self.shape(value)
        others: list[Any] = [ref for ref in op.inputs if isinstance(ref, Lit) or ref != value]
        if op in self.labels.by_scope or len(others) != 1 or isinstance(others[0], Lit):
            return False
        (skip,) = others
        if self.shape(skip) != shape:
            return False
        shortcut = skip in self.used and self._holds_data(skip)
        return shortcut or self._leads_to(skip, value)

    def _leads_to(self, source: Value, target: Value) -> bool:
        """Whether `target` is computed from `source`."""
        earliest = self.made[source][0] if source in self.made else -1
        todo, seen = [target], {target}
        while todo:
            position, op = self.made.get(todo.pop(), (-1, None))
            if op is None or position <= earliest:
                continue
            for v in value_inputs(op):
                if v == source:
                    return True
                if v not in seen:
                    seen.add(v)
                    todo.append(v)
        return False

    def _holds_data(self, value: Value) -> bool:
        """Whether a value is computed from more than parameters, constants and random keys."""
        todo, seen = [value], {value}
        while todo:
            v = todo.pop()
            _, op = self.made.get(v, (-1, None))
            if op is None and v not in self.labels.named and self.is_data(v):
                return True
            for u in value_inputs(op) if op else ():
                if u not in seen:
                    seen.add(u)
                    todo.append(u)
        return False

    def _is_scaling(self, op: Op, value: Value) -> bool:
        if len(op.outputs) != 1 or self.shape(op.outputs[0]) != self.shape(value):
            return False
        others = [v for v in value_inputs(op) if v != value]
        if any(v in self.labels.fed and self._holds_data(v) for v in others):  # a gate
            return False
        if op.kind == "jit":
            return {o.name for _, o in walk(op.blocks[0])} <= _SCALINGS | _FILLING
        return op.name in _SCALINGS
