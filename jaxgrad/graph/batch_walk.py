"""Following a batch through a program, into its loops, branches and derivative rules."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import jax
import numpy as np

from jaxgrad.graph import compat
from jaxgrad.graph.batch_layout import Call, Coupled, Shape, Spec, Unfollowable, join, step
from jaxgrad.graph.batch_rules import RULES
from jaxgrad.graph.capture import block_of, capture
from jaxgrad.graph.flatten import dependence
from jaxgrad.graph.ir import Block, Lit, Op, Ref, Table, Value

_CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


@dataclass(eq=False)
class Walk:
    """What is known of the values of one program.

    A value is *smooth* if a gradient with respect to the batch passes through it. Only coupling of
    smooth values couples the examples' gradients, so an operand that is coupled but not smooth (a
    mask, a count, a statistic behind `stop_gradient`) is held fixed, like a constant, in the rules
    for smooth results.

    Attributes:
        count: number of examples.
        table: the types of the program's values.
        smooth: the smooth values.
        specs: where the examples lie in each value visited so far; absent for constants.
        memo: what was found of functions with derivative rules; calls share their equations.
        strict: whether the results are needed although no gradient passes.
    """

    count: int
    table: Table
    smooth: set[Value]
    specs: dict[Value, Spec] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    strict: bool = False

    def spec(self, ref: Ref) -> Spec:
        """Where the examples lie in a value."""
        return None if isinstance(ref, Lit) else self.specs.get(ref)

    def is_smooth(self, ref: Ref) -> bool:
        """Whether a gradient passes through a value, as far as is known."""
        spec = self.spec(ref)
        blocked = isinstance(spec, Coupled) and not spec.smooth
        return not isinstance(ref, Lit) and ref in self.smooth and not blocked

    def shape(self, ref: Ref) -> Shape:
        """The shape of a value."""
        array = ref.value if isinstance(ref, Lit) else self.table.avals[ref]
        return tuple(int(d) for d in getattr(array, "shape", ()))

    def visit(self, op: Op) -> None:
        """Find where the examples lie in the results of an operation.

        Raises:
            Unfollowable: if no rule can tell, and a result is smooth or needed.
        """
        specs = [self.spec(ref) for ref in op.inputs]
        if all(spec is None for spec in specs):
            found: Sequence[Spec] = [None] * len(op.outputs)
        else:
            try:
                found = self._results(op, specs)
            except Unfollowable:
                if self.strict or any(v in self.smooth for v in op.outputs):
                    raise
                found = [Coupled("nothing is known of it", smooth=False)] * len(op.outputs)
        self.store(op, found)

    def store(self, op: Op, found: Sequence[Spec]) -> None:
        """Note where the examples lie in the results of an operation."""
        for value, spec in zip(op.outputs, found, strict=True):
            if isinstance(spec, Coupled):
                smooth = spec.smooth and value in self.smooth
                made_or_left = not spec.ops or op.blocks or op.name in _OPAQUE
                ops = (*spec.ops, op) if made_or_left else spec.ops
                spec = replace(spec, ops=ops, smooth=smooth)  # noqa: PLW2901
            if prod(self.shape(value)) == 0:  # no elements: nothing of any example
                spec = None  # noqa: PLW2901
            self.specs[value] = spec

    def _results(self, op: Op, specs: list[Spec]) -> list[Spec]:
        if op.kind in _BLOCKS:
            return _BLOCKS[op.kind](self, op, specs)
        if op.name in _OPAQUE:
            return _OPAQUE[op.name](self, op, specs)
        return self._primitive(op, specs)

    def _primitive(self, op: Op, specs: list[Spec]) -> list[Spec]:
        smooth = [self.is_smooth(ref) for ref in op.inputs]
        coupled = [(s, k) for s, k in zip(specs, smooth, strict=True) if isinstance(s, Coupled)]
        if broken := [s for s, k in coupled if k]:
            return [broken[0]] * len(op.outputs)
        if coupled and not any(smooth):
            return [coupled[0][0]] * len(op.outputs)
        held: list[Spec] = [None if isinstance(s, Coupled) else s for s in specs]
        only_smooth = [s if k else None for s, k in zip(specs, smooth, strict=True)]
        try:
            found = self._apply(op, held)
        except Unfollowable:
            if not any(smooth) or only_smooth == held:
                raise
            unknown: list[Spec] = [Coupled("no rule tells")]
            found = unknown
        if any(smooth) and any(isinstance(s, Coupled) for s in found):
            fixed = Coupled("it depends on other examples, but not smoothly", smooth=False)
            retried = self._apply(op, only_smooth)
            found = [
                s if v in self.smooth else fixed for v, s in zip(op.outputs, retried, strict=True)
            ]
        if coupled:
            hard = coupled[0][0]
            found = [
                s if v in self.smooth else hard for v, s in zip(op.outputs, found, strict=True)
            ]
        return found

    def _apply(self, op: Op, specs: list[Spec]) -> list[Spec]:
        if all(spec is None for spec in specs):
            return [None] * len(op.outputs)
        shapes = [self.shape(ref) for ref in op.inputs]
        if op.kind == "index":
            return [step(specs[0], shapes[0], self.count)]
        if op.kind == "stack":
            return [join(specs)]
        if op.name not in RULES:
            raise Unfollowable
        outs = [self.shape(v) for v in op.outputs]
        return RULES[op.name](Call(op.eqn.params, self.count, specs, shapes, outs))

    def inside(self, block: Block, specs: Sequence[Spec]) -> list[Spec]:
        """Walk a block of this program's own table, its smooth values known."""
        inner = replace(self, specs=dict(zip(block.inputs, specs, strict=True)))
        for op in block.ops:
            inner.visit(op)
        return [inner.spec(ref) for ref in block.outputs]

    def apart(
        self, block: Block, table: Table, specs: Sequence[Spec], smooth: Sequence[bool]
    ) -> list[Spec]:
        """Walk a block whose smooth values are still to be found, from those of its inputs."""
        start = [v for v, k in zip(block.inputs, smooth, strict=True) if k and table.is_float(v)]
        values = dependence(block.ops, table, start).smooth
        return replace(self, table=table, smooth=values).inside(block, specs)


def _call(walk: Walk, op: Op, specs: list[Spec]) -> list[Spec]:
    return walk.inside(op.blocks[0], specs)


def _scan(walk: Walk, op: Op, specs: list[Spec]) -> list[Spec]:
    """Loop until the strides of the carry stop changing."""
    first = op.num_consts + op.num_carry
    steps = []
    for spec, ref in zip(specs[first:], op.inputs[first:], strict=True):
        try:
            steps.append(step(spec, walk.shape(ref), walk.count))
        except Unfollowable:
            if walk.is_smooth(ref):
                raise
            steps.append(Coupled("it loops over the batch", smooth=False))
    body, consts = op.blocks[0], specs[: op.num_consts]

    def run(carry: list[Spec]) -> list[Spec]:
        return walk.inside(body, [*consts, *carry, *steps])

    smooth = [v in walk.smooth for v in body.inputs[op.num_consts : first]]
    return _loop(run, specs[op.num_consts : first], smooth)


def _loop(
    run: Callable[[list[Spec]], list[Spec]], carry: list[Spec], smooth: Sequence[bool]
) -> list[Spec]:
    while True:
        found = run(carry)
        merged = [merge(group) for group in zip(carry, found, smooth, strict=False)]
        if [_kind(s) for s in merged] == [_kind(s) for s in carry]:
            return [*merged, *found[len(carry) :]]
        carry = merged


def merge(group: tuple[Spec, Spec, bool]) -> Spec:
    """The stride of a value that is one or the other, and whether a gradient passes through it."""
    *specs, smooth = group
    fixed = [s for s in specs if isinstance(s, Coupled) and not (s.smooth and smooth)]
    moving = [s for s in specs if s is not None and s not in fixed]
    if fixed and not (smooth and moving):
        return fixed[0]
    return join(moving)


def _kind(spec: Spec) -> Any:
    return ("coupled", spec.smooth) if isinstance(spec, Coupled) else spec


def _cond(walk: Walk, op: Op, specs: list[Spec]) -> list[Spec]:
    smooth = [walk.is_smooth(ref) for ref in op.inputs[1:]]
    branches = [walk.apart(block, walk.table, specs[1:], smooth) for block in op.blocks]
    found = branches[0]
    for more in branches[1:]:
        flags = [v in walk.smooth for v in op.outputs]
        found = [merge(group) for group in zip(found, more, flags, strict=True)]
    return found if specs[0] is None else _only_smooth(walk, op, found)


def _only_smooth(walk: Walk, op: Op, found: list[Spec]) -> list[Spec]:
    """Which way a program takes depends on several examples: what is not smooth is coupled."""
    fixed = Coupled("its control flow depends on several examples", smooth=False)
    return [s if v in walk.smooth else fixed for v, s in zip(op.outputs, found, strict=True)]


def _while(walk: Walk, op: Op, specs: list[Spec]) -> list[Spec]:
    params = op.eqn.params
    if not {"body_jaxpr", "cond_nconsts", "body_nconsts"} <= params.keys():
        raise Unfollowable
    first, last = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    table = Table()
    body = block_of(params["body_jaxpr"], table)
    carried = [v in walk.smooth for v in op.outputs]
    smooth = [*(walk.is_smooth(ref) for ref in op.inputs[first:last]), *carried]
    found = _loop(
        lambda carry: walk.apart(body, table, [*specs[first:last], *carry], smooth),
        specs[last:],
        carried,
    )
    return _only_smooth(walk, op, found)  # the number of iterations may depend on every example


def _custom(walk: Walk, op: Op, specs: list[Spec]) -> list[Spec]:
    """A function with a derivative rule of its own: both must keep the examples apart."""
    smooth = tuple(walk.is_smooth(ref) for ref in op.inputs)
    key = (id(op.eqn), *specs, smooth, *(v in walk.smooth for v in op.outputs))
    if key in walk.memo:
        return walk.memo[key][0]
    programs = compat.sub_jaxprs(op.eqn.params)
    if len(programs) != 1:
        raise Unfollowable
    table = Table()
    block = block_of(programs[0][1], table)
    if len(block.inputs) != len(op.inputs) or len(block.outputs) != len(op.outputs):
        raise Unfollowable
    found = walk.apart(block, table, specs, smooth)
    if any(smooth) and not any(isinstance(s, Coupled) for s in found):
        found = _check_pullback(walk, op, specs, found)
    if not any(isinstance(s, Coupled) for s in (*specs, *found)):
        walk.memo[key] = (found, op.eqn)  # the equation is kept, so that its id stays its own
    return found


def pullback(op: Op, smooth: Sequence[bool], outs: Sequence[bool]) -> Callable[..., Any]:
    """The function `(inputs, cotangents of results in outs) -> cotangents of smooth inputs`."""

    def fun(*values: Any) -> Any:
        inputs, cotangents = values[: len(op.inputs)], values[len(op.inputs) :]

        def primal(*moving: Any) -> Any:
            left = iter(moving)
            full = [next(left) if k else v for v, k in zip(inputs, smooth, strict=True)]
            results = compat.bind(op.eqn, full)
            return [r for r, k in zip(results, outs, strict=True) if k]

        moving = [v for v, k in zip(inputs, smooth, strict=True) if k]
        return jax.vjp(primal, *moving)[1](list(cotangents))

    return fun


def _check_pullback(walk: Walk, op: Op, specs: list[Spec], found: list[Spec]) -> list[Spec]:
    smooth = [walk.is_smooth(ref) for ref in op.inputs]
    outs = [v in walk.smooth for v in op.outputs]
    avals = [
        np.asarray(ref.value) if isinstance(ref, Lit) else walk.table.avals[ref]
        for ref in op.inputs
    ]
    avals += [walk.table.avals[v] for v, k in zip(op.outputs, outs, strict=True) if k]
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    try:
        traced = capture(pullback(op, smooth, outs), structs)
    except Exception as error:  # the user's own rule runs here: it may raise anything
        raise Unfollowable from error
    held = [None if isinstance(s, Coupled) else s for s in specs]
    given = [*held, *(s for s, k in zip(found, outs, strict=True) if k)]
    flags = [False] * len(held) + [True] * sum(outs)
    gradients = walk.apart(traced.block, traced.table, given, flags)
    expected = [s for s, k in zip(specs, smooth, strict=True) if k]
    for gradient, spec in zip(gradients, expected, strict=True):
        fixed = gradient is None or (isinstance(gradient, Coupled) and not gradient.smooth)
        if isinstance(spec, int) and not fixed and gradient != spec:
            why = "its derivative rule mixes the examples"
            ops = gradient.ops if isinstance(gradient, Coupled) else ()
            return [Coupled(why, ops=ops) if v in walk.smooth else s
                    for v, s in zip(op.outputs, found, strict=True)]  # fmt: skip
    return found


def _linear_solve(walk: Walk, op: Op, specs: list[Spec]) -> list[Spec]:
    """Solve A x = b: examples stay apart if they do in A, in its transpose, and in both solves."""
    programs, lengths = op.eqn.params["jaxprs"], op.eqn.params["const_lengths"]
    total = sum(lengths)
    smooth = [walk.is_smooth(ref) for ref in op.inputs]

    def run(state: list[Spec]) -> list[Spec]:
        position = 0
        for name, length in zip(lengths._fields, lengths, strict=True):
            here = slice(position, position + length)
            position += length
            if getattr(programs, name) is None:
                continue
            table = Table()
            block = block_of(getattr(programs, name), table)
            flags = [*smooth[here], *(True for _ in state)]
            found = walk.apart(block, table, [*specs[here], *state], flags)
            state = [merge((a, b, True)) for a, b in zip(state, found, strict=True)]
        return state

    return _loop(run, list(specs[total:]), [True] * len(op.outputs))


_BLOCKS = {"jit": _call, "remat": _call, "scan": _scan, "cond": _cond}
_OPAQUE = {
    **dict.fromkeys(_CUSTOM, _custom),
    "while": _while,
    "custom_linear_solve": _linear_solve,
}
