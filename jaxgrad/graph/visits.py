"""Modules that no scope names: where their parameters are used, and sums that close a branch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxgrad.graph.ir import Block, Lit, Op, Table, Value, value_inputs, walk
from jaxgrad.graph.names import Labels
from jaxgrad.graph.paths import Path
from jaxgrad.graph.roles import VIEWS

# Elementwise, and in a mask or a factor of no parameter's making: the branch goes on.
_SCALINGS = {"mul", "div", "neg", "select_n", "convert_element_type", "copy", "reduce_precision"}
_FILLING = {"broadcast_in_dim", "reshape"}
_RESHAPING = {"reshape", "squeeze", "transpose", "rev"}
_PRODUCTS = ("dot_general", "conv_general_dilated")
# How far a module's output and the sum that closes its branch are looked for.
_NEAR = 64
_STEPS = 8

Readers = dict[Value, list[Op | None]]


class Visit(NamedTuple):
    """One run of a module.

    Attributes:
        path: the module's.
        names: the parameter leaves that it used.
        position: of the last operation that used one, in the block.
        op: that operation.
        begin: position of the first one.
    """

    path: Path
    names: frozenset[str]
    position: int
    op: Op
    begin: int = 0


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
        begun = {name for k in earlier for name in visits[k].names}
        known = _continued(op, names, earlier, visits, views)
        if known is not None:
            union = visits[known].names | names
            visits[known] = visits[known]._replace(names=union, position=i, op=op)
        else:
            earlier.append(len(visits))
            visits.append(Visit(path, names, i, op, i))
        if names - begun and not op.derivative:
            _join_parts(earlier, visits)
    tangents = {k for runs in latest.values() for k in runs[1:] if visits[k].op.derivative}
    joined = set(range(len(visits))).difference(*latest.values())
    kept = [visit for k, visit in enumerate(visits) if k not in tangents | joined]
    return _named_within(_absorb_biases(kept, readers), labels)


def _join_parts(earlier: list[int], visits: list[Visit]) -> None:
    """One run, if a module that used some leaves again and again uses others for the first time.

    As an associative scan does with its decay between its input's and its output's matrix. Runs
    that repeat all of the first one are steps of a recurrence and stay; so does all that another
    module's run lies between.
    """
    own = [visits[k] for k in earlier]
    between = [v for k, v in enumerate(visits) if k not in earlier]
    if not own[1:] or any(own[0].begin < v.position < own[-1].position for v in between):
        return
    whole = own[0].names
    if all(v.names < whole for v in own[1:-1]) and not own[-1].names >= whole:
        names = frozenset().union(*(v.names for v in own))
        visits[earlier[-1]] = own[-1]._replace(names=names, begin=own[0].begin)
        del earlier[:-1]


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
        return visit._replace(path=(*visit.path, leaf.rpartition("/")[2]))

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
    if not earlier:
        return None
    last = visits[earlier[-1]]
    biased = op.name in ("add", "sub") and last.op.name in _PRODUCTS
    if not last.names & names or (biased and last.op.outputs[0] in value_inputs(op)):
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
            position, op = visit.position, visit.op
            kept[weight] = kept[weight]._replace(names=names, position=position, op=op)
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
        table: the program's values.
        is_data: whether an input holds data, by its type: not a random key.
        readers: who reads each value.
        made: value -> position and operation that made it.
        ends: value -> position of its last reader; past the end if the block returns it.
        used: what operations with parameters return.
        last_use: path of a module -> position of the last operation that uses its parameters.
    """

    block: Block
    labels: Labels
    table: Table
    is_data: Callable[[Value], bool]
    readers: Readers
    made: dict[Value, tuple[int, Op]] = field(init=False)
    ends: dict[Value, int] = field(init=False)
    used: set[Value] = field(init=False)
    last_use: dict[Path, int] = field(init=False)

    def __post_init__(self) -> None:
        ops = self.block.ops
        self.made = {v: (i, op) for i, op in enumerate(ops) for v in op.outputs}
        self.ends = {v: i for i, op in enumerate(ops) for v in value_inputs(op)
                     if op.derivative != "backward"}  # fmt: skip
        self.ends |= {v: len(ops) for v, found in self.readers.items() if None in found}
        self.used = {v for op in ops if op in self.labels.uses for v in op.outputs}
        self.last_use = {}
        for i, op in enumerate(ops):
            if op in self.labels.uses and op.derivative != "backward":
                path = self.labels.path[op]
                self.last_use |= {path[:depth]: i for depth in range(1, len(path) + 1)}

    def output(self, visit: Visit) -> tuple[Value, int, Op]:
        """Where all that a run of a module has made comes together; else its last operation's.

        Gates of one projection, an attention's weights and what they weigh: the last operation with
        a parameter may not be the last of the module. What another module reads is past its output,
        and a single number (a penalty on the router) beside it.
        """
        last = visit.position
        nothing = visit.op.outputs[0], last, visit.op
        several = len(visit.op.outputs) != 1 or visit.op.derivative  # a value beside its tangents
        if several or last - visit.begin > _NEAR:
            return nothing
        made: set[Value] = set()
        for i in range(visit.begin, min(last + _NEAR, len(self.block.ops))):
            op = self.block.ops[i]
            uses = self.labels.uses.get(op, frozenset())
            own = uses and uses <= visit.names and i <= last
            if not own and not any(v in made for v in value_inputs(op)):
                continue
            if op.derivative or (i > last and self._goes_beyond(op, made)):
                return nothing
            if op.name != "stop_gradient":
                made.update(v for v in op.outputs if self.shape(v) and self.table.is_float(v))
            if i >= last:
                live = [v for v in made if self.ends.get(v, -1) > i]
                if len(live) == 1 and live[0] in op.outputs:
                    return live[0], i, op
        return nothing

    def closing_sum(self, value: Value) -> Sum | None:
        """The sum that adds a branch ending in `value` to its own input.

        On the way there may be a dropout, a scale or another shape; and, if the input of the branch
        is what is added, a gate or an activation of the branch's own.
        """
        begin, _ = self.made.get(value, (len(self.block.ops), None))
        branch, steps, plain = {value}, 0, True
        for i in range(begin + 1, min(begin + 1 + _NEAR, len(self.block.ops))):
            op = self.block.ops[i]
            own = [v for v in value_inputs(op) if v in branch]
            if not own:
                continue
            if steps >= 2 * _STEPS or self.uses_parameters(op):
                return None
            others = [v for v in value_inputs(op) if v not in branch]
            live = [v for v in branch if v in own or self.ends.get(v, -1) > i]
            alone = len(own) == len(live) == len(others) == 1 and self.ends.get(own[0]) == i
            if op.name in ("add", "add_any") and alone and self._is_residual(op, own[0], plain):
                return Sum(i, op, steps > 0)
            if any(v in self.labels.fed and self._holds_data(v) for v in others):  # a gate
                return None
            plain = plain and steps < _STEPS and len(own) == 1 and self._is_scaling(op, own[0])
            branch.update(v for v in op.outputs if self.table.is_float(v))
            steps += 1
        return None

    def _goes_beyond(self, op: Op, made: set[Value]) -> bool:
        """Whether an operation is another module's, or adds what others made (a residual sum)."""
        others = [v for v in value_inputs(op) if v not in made and v in self.labels.fed]
        sums = op.name in ("add", "add_any", "sub", "concatenate")
        return self.uses_parameters(op) or (sums and any(map(self._holds_data, others)))

    def uses_parameters(self, op: Op) -> bool:
        """Whether an operation, or one inside it, uses a parameter."""
        return op in self.labels.uses or any(
            inner in self.labels.uses for block in op.blocks for _, inner in walk(block)
        )

    def shape(self, value: Value) -> tuple[int, ...]:
        """The value's shape; `()` for what has none."""
        return tuple(getattr(self.table.avals[value], "shape", ()))

    def name(self, path: Path, position: int) -> Path:
        """A sum's name: the outermost module that ends with it, or its last part's with a `+`."""
        for depth in range(1, len(path)):
            if self.last_use.get(path[:depth], -1) < position:
                return path[:depth]
        return (*path[:-1], f"{path[-1]}+")

    def _is_residual(self, op: Op, value: Value, plain: bool) -> bool:
        shape = self.shape(value)
        others: list[Any] = [ref for ref in op.inputs if isinstance(ref, Lit) or ref != value]
        if op in self.labels.by_scope or len(others) != 1 or isinstance(others[0], Lit):
            return False
        (skip,) = others
        if self.shape(skip) != shape or not (plain or shape):
            return False
        shortcut = plain and skip in self.used and self._holds_data(skip)
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
        if len(op.outputs) != 1:
            return False
        if op.name in _RESHAPING:
            return True
        if self.shape(op.outputs[0]) != self.shape(value):
            return False
        if op.kind == "jit":
            return {o.name for _, o in walk(op.blocks[0])} <= _SCALINGS | _FILLING
        return op.name in _SCALINGS
