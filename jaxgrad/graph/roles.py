"""What a value is to the parameters, and what an operation makes of them.

A cast, a transposition or a weight norm of a parameter is still that parameter; so is a parameter
after an inner training step, `p - rate * gradient`. Where it meets data, its module is used. A
module with a kernel that runs on parameters alone (the projection of learned queries) makes data of
them; so, with hindsight, do the scales and biases that acted before it (a LayerNorm of the
queries), which alone might as well be a weight norm.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxgrad.graph.ir import Block, Op, Table, Value, value_inputs
from jaxgrad.graph.paths import Path, module_of

# Elementwise arithmetic that keeps a constant operand from turning a weight into data (a mask on a
# weight).
SHAPING = {"mul", "add", "sub", "div", "select_n", "max", "min", "concatenate", "pad"}
SHAPING |= {"dynamic_slice", "dynamic_update_slice"}
_SUMS = ("add", "sub", "add_any")
_PRODUCTS = ("dot_general", "conv_general_dilated")
# What leaves a leaf the same leaf.
VIEWS = {"broadcast_in_dim", "reshape", "convert_element_type", "transpose", "squeeze", "copy"}

Names = frozenset[str]


@dataclass(frozen=True)
class Scaled:
    """A scale or bias of a module that acted on another module's parameters."""

    module: Path
    op: Op
    names: Names


@dataclass(eq=False)
class Roles:
    """What is known of the values of a program.

    Attributes:
        table: the values.
        shapes: parameter leaf -> its shape.
        owners: values that are computed from parameters alone -> the leaves' names.
        uses: operation -> names of the parameter leaves that it mixes with data.
        applied: those of them that run on parameters alone -> path of the module that runs.
        begins: loop -> names of the parameter leaves that what it carries begins with.
        penalties: values in `owners` that sum parameters up to one number.
        neutral: values that are computed from constants alone.
        gradients: values that are computed from an inner gradient alone.
        fed: values that depend on a parameter.
        views: values that hold one leaf, perhaps in another shape -> its name.
        scaled: values in `owners` -> the modules whose scale or bias acted on them, in order.
    """

    table: Table
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    owners: dict[Value, Names] = field(default_factory=dict)
    uses: dict[Op, Names] = field(default_factory=dict)
    applied: dict[Op, Path] = field(default_factory=dict)
    begins: dict[Op, Names] = field(default_factory=dict)
    penalties: set[Value] = field(default_factory=set)
    neutral: set[Value] = field(default_factory=set)
    gradients: set[Value] = field(default_factory=set)
    fed: set[Value] = field(default_factory=set)
    views: dict[Value, str] = field(default_factory=dict)
    scaled: dict[Value, tuple[Scaled, ...]] = field(default_factory=dict)

    def shape(self, value: Value) -> tuple[int, ...]:
        """The value's shape; `()` for what has none."""
        return tuple(getattr(self.table.avals[value], "shape", ()))


def is_penalty(op: Op, inputs: Sequence[Value], roles: Roles) -> bool:
    """Whether parameters become one number here (an L2 norm), or did before.

    Such a number is added to a loss, or divides a weight; data that it meets is no layer's output.
    """
    shapes = [roles.shape(v) for v in inputs]
    reduced = op.name.startswith(("reduce_", "dot_general")) and any(shapes)
    avals = [roles.table.avals[v] for v in op.outputs]
    scalar = all(getattr(aval, "shape", None) == () for aval in avals)
    passed_on = [v for v in inputs if v in roles.penalties]
    rest = [v for v, s in zip(inputs, shapes, strict=True) if v not in roles.penalties and s]
    return (reduced and scalar) or (bool(passed_on) and not rest)


def is_update(op: Op, others: list[Value], names: Names, roles: Roles) -> bool:
    """`p - rate * gradient`: a parameter plus an inner gradient of its own shape."""
    if op.name not in _SUMS or any(v not in roles.gradients for v in others):
        return False
    shape = roles.shape(op.outputs[0])
    leaves = [roles.shapes[name] for name in names]
    return any(shape == leaf or (leaf and shape[-len(leaf) :] == leaf) for leaf in leaves)


def scales_an_update(op: Op, others: list[Value], readers: "Readers", roles: Roles) -> bool:
    """A learned rate times an inner gradient, which is then added to a parameter."""
    return (
        op.name in ("mul", "div")
        and all(v in roles.gradients for v in others)
        and readers.joins_a_parameter(op.outputs[0], roles)
    )


def kernels_module(op: Op, readers: "Readers", roles: Roles) -> Path | None:
    """The module whose kernel acts on another module's parameters as on data.

    Not a low-rank correction, which is added to a weight.
    """
    inputs = value_inputs(op)
    product = op.name in _PRODUCTS and len(inputs) == len(op.inputs) == 2
    if not product or op.derivative == "backward" or not roles.shape(op.outputs[0]):
        return None
    modules = [{module_of(name) for name in roles.owners[v]} for v in inputs]
    leaves: list[Any] = [roles.views.get(v) for v in inputs]
    depths = [len(module_of(name)) if _in_a_module(name) else 0 for name in leaves]
    if modules[0] & modules[1] or not any(depths):
        return None
    if any(v in roles.penalties for v in inputs) or readers.joins_a_parameter(op.outputs[0], roles):
        return None
    # a kernel is a leaf as it is; of two, the one in the deeper module, or on the right
    return min(modules[0 if depths[0] > depths[1] else 1])


def scaled_modules(op: Op, roles: Roles, names: Names = frozenset()) -> tuple[Scaled, ...]:
    """The scales and biases that acted on what an operation on parameters returns."""
    inputs = value_inputs(op)
    before = tuple(dict.fromkeys(s for v in inputs for s in roles.scaled.get(v, ())))
    if op.name not in ("mul", *_SUMS) or len(inputs) != 2 or not names:
        return before
    rank = len(roles.shape(op.outputs[0]))
    leaves: list[Any] = [roles.views.get(v) for v in inputs]
    vectors = [
        k for k, n in enumerate(leaves) if _in_a_module(n) and 0 < len(roles.shapes[n]) < rank
    ]
    if len(vectors) != 1:
        return before
    module = module_of(leaves[vectors[0]])
    others = {module_of(name) for name in roles.owners[inputs[1 - vectors[0]]]}
    if before and before[-1].module == module:
        return (*before[:-1], Scaled(module, op, names))
    return before if module in others else (*before, Scaled(module, op, names))


def _in_a_module(leaf: str | None) -> bool:
    return leaf is not None and module_of(leaf) != (leaf,)


class Readers:
    """Who reads a value of a block."""

    def __init__(self, block: Block) -> None:
        self.block = block

    @functools.cached_property
    def of(self) -> dict[Value, list[Op]]:
        """Value -> the operations that read it."""
        found: dict[Value, list[Op]] = defaultdict(list)
        for op in self.block.ops:
            for v in value_inputs(op):
                found[v].append(op)
        return found

    def joins_a_parameter(self, value: Value, roles: Roles) -> bool:
        """Whether the value is added, scaled perhaps, to a parameter of its shape."""
        for _ in range(4):
            readers = self.of[value]
            if len(readers) != 1:
                return False
            (op,) = readers
            others = [v for v in value_inputs(op) if v != value]
            if op.name in _SUMS and len(others) == 1:
                name = roles.views.get(others[0])
                vector = name and len(roles.shapes[name]) < len(roles.shape(others[0]))
                return others[0] in roles.owners and not vector
            if op.name not in ("mul", "div", "neg", *VIEWS) or any(
                v not in roles.neutral for v in others
            ):
                return False
            (value,) = op.outputs
        return False
