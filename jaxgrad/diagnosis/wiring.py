"""Dataflow of a captured loss, across the calls, loops and branches that its blocks open."""

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import PyTree

from jaxgrad.diagnosis.problem import Problem
from jaxgrad.graph import capture, compat, names
from jaxgrad.graph.arguments import leaf_labels
from jaxgrad.graph.ir import Block, Lit, Op, Ref, Table, Value, value_inputs

# Operations whose derivative is zero wherever it exists: a gradient ends here.
FLAT = {
    *("stop_gradient", "floor", "ceil", "round", "sign", "argmax", "argmin", "is_finite"),
    *("eq", "ne", "lt", "le", "gt", "ge", "nextafter"),
}
# Operations that hand on what they get, in another shape, sign or type.
TRANSPARENT = {
    *("reshape", "convert_element_type", "squeeze", "broadcast_in_dim", "transpose", "copy"),
    *("neg", "name", "reduce_precision", "optimization_barrier", "expand_dims", "copy_p", "rev"),
}
_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot")


@dataclass(eq=False)
class Wiring:
    """Who makes and who reads every value.

    Attributes:
        block: the loss as a block; its inputs are parameters, then batch leaves, then the key.
        table: its values.
        labels: the layer of every operation.
        parameters: values of the parameter leaves, in order.
        data: values of the batch leaves, and array constants of the trace.
        loss: the value that is returned.
    """

    block: Block
    table: Table
    labels: names.Labels
    parameters: tuple[Value, ...]
    parameter_names: tuple[str, ...]
    data: tuple[Value, ...]
    data_names: tuple[str, ...]

    def __post_init__(self) -> None:
        self.producer: dict[Value, Op] = {}
        self.sources: dict[Value, list[Ref]] = defaultdict(list)
        self.readers: dict[Value, list[Op]] = defaultdict(list)
        self.feeds: dict[Value, list[Value]] = defaultdict(list)
        self.order: dict[Op, int] = {}
        self.lengths: dict[Op, tuple[int, ...]] = {}
        self._connect(self.block, ())
        self.loss = self.block.outputs[0]
        self.smooth = self.downstream(self.parameters, smooth=True)
        self.depends = self.downstream(self.parameters)
        self.from_data = self.downstream(self.data)
        reaching = self.upstream([self.loss])
        self.reaching = reaching
        self.live = self.smooth & self.upstream([self.loss], smooth=True)
        self._layer: dict[Value, str] = {}

    # ------------------------------------------------------------------------------- building

    def _connect(self, block: Block, lengths: tuple[int, ...]) -> None:
        for op in block.ops:
            if not op.blocks:
                self.order[op] = len(self.order)
                self.lengths[op] = lengths
                for value in op.outputs:
                    self.producer[value] = op
                for value in dict.fromkeys(value_inputs(op)):
                    self.readers[value].append(op)
                continue
            arguments = op.inputs[1:] if op.kind == "cond" else op.inputs
            inside = (*lengths, op.length) if op.kind == "scan" else lengths
            for inner in op.blocks:
                for value, ref in zip(inner.inputs, arguments, strict=True):
                    self._alias(value, ref)
                for value, ref in zip(op.outputs, inner.outputs, strict=True):
                    self._alias(value, ref)
                if op.kind == "scan":
                    carried = inner.inputs[op.num_consts : op.num_consts + op.num_carry]
                    for value, ref in zip(carried, inner.outputs, strict=False):
                        self._alias(value, ref)
                self._connect(inner, inside)

    def _alias(self, value: Value, ref: Ref) -> None:
        self.sources[value].append(ref)
        if not isinstance(ref, Lit):
            self.feeds[ref].append(value)

    # ------------------------------------------------------------------------------- walking

    def is_float(self, ref: Ref) -> bool:
        """Whether a gradient can pass through a value."""
        return self.table.is_float(ref)

    def shape(self, ref: Ref) -> tuple[int, ...]:
        """The shape of a value."""
        aval = ref.aval if isinstance(ref, Lit) else self.table.avals[ref]
        return tuple(getattr(aval, "shape", ()))

    def dtype(self, ref: Ref) -> str:
        """The dtype of a value, as a string."""
        aval = ref.aval if isinstance(ref, Lit) else self.table.avals[ref]
        return str(getattr(aval, "dtype", ""))

    def _passes(self, op: Op) -> bool:
        return op.name not in FLAT

    def downstream(self, start: Iterable[Value], *, smooth: bool = False) -> set[Value]:
        """All values computed from `start`; with `smooth`, those that a derivative reaches."""
        found = {v for v in start if not smooth or self.is_float(v)}
        queue = deque(found)
        while queue:
            value = queue.popleft()
            nexts = list(self.feeds[value])
            for op in self.readers[value]:
                if not smooth or self._passes(op):
                    nexts += op.outputs
            for new in nexts:
                if new not in found and (not smooth or self.is_float(new)):
                    found.add(new)
                    queue.append(new)
        return found

    def upstream(self, start: Iterable[Ref], *, smooth: bool = False) -> set[Value]:
        """All values that `start` is computed from."""
        found = {v for v in start if not isinstance(v, Lit)}
        queue = deque(found)
        while queue:
            value = queue.popleft()
            for new in self.inputs_of(value, smooth=smooth):
                if new not in found and (not smooth or self.is_float(new)):
                    found.add(new)
                    queue.append(new)
        return found

    def inputs_of(self, value: Value, *, smooth: bool = False) -> list[Value]:
        """The values that one value is made from directly."""
        op = self.producer.get(value)
        if op is None:
            return [ref for ref in self.sources[value] if not isinstance(ref, Lit)]
        return list(value_inputs(op)) if not smooth or self._passes(op) else []

    def origin(self, ref: Ref, through: Iterable[str] = ()) -> tuple[Ref, Op | None]:
        """The value behind reshapes, casts and calls, and the operation that made it."""
        passable = TRANSPARENT | set(through)
        for _ in range(200):
            if isinstance(ref, Lit):
                return ref, None
            op = self.producer.get(ref)
            if op is None:
                behind = self.sources[ref]
                if len(behind) != 1:
                    return ref, None
                ref = behind[0]
            elif op.name in passable:
                ref = op.inputs[0]
            else:
                return ref, op
        return ref, None

    def uses_of(self, value: Value) -> list[Op]:
        """The operations that read a value behind reshapes, casts and calls."""
        found: list[Op] = []
        seen = {value}
        queue = deque([value])
        while queue:
            current = queue.popleft()
            nexts = list(self.feeds[current])
            for op in self.readers[current]:
                if op.name in TRANSPARENT:
                    nexts += op.outputs
                else:
                    found.append(op)
            for new in nexts:
                if new not in seen:
                    seen.add(new)
                    queue.append(new)
        return found

    def ops(self) -> list[Op]:
        """All plain and opaque operations, in program order."""
        return list(self.order)

    # ------------------------------------------------------------------------------- naming

    def layer(self, ref: Ref) -> str:
        """The name of the layer that made a value: its own, or the nearest one before it."""
        if isinstance(ref, Lit):
            return ""
        if ref not in self._layer:
            self._layer[ref] = self._find_layer(ref)
        return self._layer[ref]

    def _find_layer(self, ref: Value) -> str:
        seen = {ref}
        queue = deque([ref])
        while queue:
            value = queue.popleft()
            op = self.producer.get(value)
            path = self.labels.path.get(op) if op is not None else None
            if path:
                return "/".join(path)
            for new in self.inputs_of(value):
                if new not in seen:
                    seen.add(new)
                    queue.append(new)
        return ""

    def layer_after(self, value: Value, hops: int = 4) -> str:
        """The layer an inner value belongs to: its own, the next one's, else the one before."""
        op = self.producer.get(value)
        if op is not None and self.labels.path.get(op):
            return "/".join(self.labels.path[op])
        current = [value]
        for _ in range(hops):
            found: list[Value] = []
            for v in current:
                for reader in self.readers[v]:
                    if self.labels.path.get(reader):
                        return "/".join(self.labels.path[reader])
                    found += reader.outputs
                found += self.feeds[v]
            current = found
        return self.layer(value)

    def is_head(self, value: Value) -> bool:
        """Whether no product with a weight, and no attention, comes after a value."""
        after = self.downstream([value]) & self.reaching
        makers = {self.producer[v] for v in after if v in self.producer}
        return not any(
            op.name in _PRODUCTS and op.outputs[0] in self.depends
            for op in makers
            if op is not self.producer.get(value)
        )

    def is_weight(self, ref: Ref) -> bool:
        """Whether a value is computed from parameters alone."""
        return not isinstance(ref, Lit) and ref in self.depends and ref not in self.from_data


def wire(problem: Problem) -> Wiring:
    """Traces a problem's loss and connects its values."""
    batch_leaves, batch_def = jax.tree.flatten(problem.batch)
    arrays = [i for i, leaf in enumerate(batch_leaves) if isinstance(leaf, jax.Array)]
    count = len(problem.wanted)

    def flat(*values: Any) -> Any:
        leaves = list(batch_leaves)
        for i, value in zip(arrays, values[count : count + len(arrays)], strict=True):
            leaves[i] = value
        key = values[-1] if problem.key is not None else None
        batch: PyTree = jax.tree.unflatten(batch_def, leaves)
        return problem.value(values[:count], batch, key)

    args = [*problem.values, *(batch_leaves[i] for i in arrays)]
    args += [] if problem.key is None else [problem.key]
    traced = capture.capture(flat, args)
    block, table = traced.block, traced.table
    parameters = dict(zip(block.inputs[:count], problem.names, strict=True))
    labels = names.label(block, table, parameters)
    every = leaf_labels(problem.batch, problem.batch_root)
    data = block.inputs[count : count + len(arrays)]
    constants = tuple(v for v, a in table.constants.items() if getattr(a, "ndim", 0) > 0)
    return Wiring(
        block, table, labels, tuple(block.inputs[:count]), problem.names,
        (*data, *constants),
        (*(every[i] for i in arrays), *("a constant" for _ in constants)),
    )  # fmt: skip


def inputs_for(problem: Problem, values: Any, batch: PyTree, key: Any = None) -> list[Any]:
    """The block's inputs for one evaluation."""
    leaves = [leaf for leaf in jax.tree.leaves(batch) if isinstance(leaf, jax.Array)]
    extra = [] if problem.key is None else [problem.key if key is None else key]
    return [*values, *leaves, *extra]


def source_line(op: Op) -> str:
    """The user's line that made an operation."""
    return compat.source_line(op.eqn)
