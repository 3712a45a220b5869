"""Which parameters are the weights of an operation.

A weight is a parameter that a product (`dot_general`, a convolution) multiplies data with: biases
and the scales of norms enter no product. Weights of an unrolled scan are slices of their stacked
leaf.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxgrad.graph import compat
from jaxgrad.graph.flatten import Line, dependence
from jaxgrad.graph.ir import Block, Lit, Op, Table, Value, value_inputs

_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")


@dataclass(frozen=True)
class Weight:
    """A parameter leaf, or one entry of a stacked one.

    Attributes:
        leaf: its position among the leaves of the parameters.
        index: the entry, one number a scan; None if the slices cannot be told apart.
    """

    leaf: int
    index: tuple[int, ...] | None = ()


class Marks:
    """Which weights every operation multiplies an activation or data with.

    Attributes:
        of: operation -> weights.
        whole: value -> the weight that it is, up to a cast.
        roles: value computed from parameters alone -> the weights in it.
        touched: values that depend on a parameter.
    """

    def __init__(
        self, line: Line, table: Table, weights: dict[Value, int], data: Sequence[Value]
    ) -> None:
        self.table = table
        self.of: dict[Op, frozenset[Weight]] = {}
        self.whole = {v: Weight(p) for v, p in weights.items()}
        self.roles = {v: frozenset([w]) for v, w in self.whole.items()}
        self.touched = dependence(line.ops, table, weights).influenced
        self.data = dependence(line.ops, table, data).influenced
        for op in line.ops:
            marked = self._visit(op, self.roles, self.data)
            if marked:
                self.of[op] = marked

    def _visit(
        self, op: Op, roles: dict[Value, frozenset[Weight]], data: set[Value]
    ) -> frozenset[Weight]:
        taken = [v for v in value_inputs(op) if v in roles]
        if not taken:
            return frozenset()
        if op.kind == "index":
            self._slice(op, taken[0])
            return frozenset()
        if not any(v in data for v in value_inputs(op)):
            union = _union(roles[v] for v in taken)
            roles.update(dict.fromkeys(op.outputs, union))
            if op.name in ("convert_element_type", "copy") and taken[0] in self.whole:
                self.whole[op.outputs[0]] = self.whole[taken[0]]
            return frozenset()
        if op.blocks:
            return _union(self._inside(op, b, roles, data) for b in op.blocks)
        if op.name in _PRODUCTS:
            return self._matrices(taken, roles)
        inner = {e.primitive.name for e in compat.inner_eqns(op.eqn.params)}
        if op.kind == "opaque" and inner & set(_PRODUCTS):
            return self._matrices([v for v in taken if len(self._shape(v)) > 1], roles)
        return frozenset()

    def _slice(self, op: Op, taken: Value) -> None:
        (value,) = op.outputs
        weight = self.whole.get(taken)
        if weight is None or weight.index is None:
            self.roles[value] = frozenset(Weight(w.leaf, None) for w in self.roles[taken])
            return
        self.whole[value] = Weight(weight.leaf, (*weight.index, op.length))
        self.roles[value] = frozenset([self.whole[value]])

    def _inside(
        self, op: Op, block: Block, roles: dict[Value, frozenset[Weight]], data: set[Value]
    ) -> frozenset[Weight]:
        """The products inside a loop or a branch; what a loop carries is data."""
        given = op.inputs[1:] if op.kind == "cond" else op.inputs
        carried = range(op.num_consts, op.num_consts + op.num_carry)
        inner_roles, inner_data = {}, set()
        for i, (value, ref) in enumerate(zip(block.inputs, given, strict=True)):
            if i in carried or (not isinstance(ref, Lit) and ref in data):
                inner_data.add(value)
            elif not isinstance(ref, Lit) and ref in roles:
                inner_roles[value] = roles[ref]
        inner_data = dependence(block.ops, self.table, inner_data).influenced
        visited = [self._visit(inner, inner_roles, inner_data) for inner in block.ops]
        return _union(visited)

    def _matrices(
        self, taken: Iterable[Value], roles: dict[Value, frozenset[Weight]]
    ) -> frozenset[Weight]:
        """The weights in a product's operand: its matrices, where it has some."""
        found = _union(roles[v] for v in taken)
        rank = {w: len(self._shape_of(w)) for w in found}
        return frozenset(w for w in found if rank[w] > 1) or found

    def _shape(self, value: Value) -> tuple[int, ...]:
        return tuple(self.table.avals[value].shape)

    def _shape_of(self, weight: Weight) -> tuple[int, ...]:
        leaf = next(v for v, w in self.whole.items() if w == Weight(weight.leaf))
        return self._shape(leaf)[len(weight.index or ()) :]


def _union(sets: Iterable[frozenset[Weight]]) -> frozenset[Weight]:
    return frozenset(weight for found in sets for weight in found)
