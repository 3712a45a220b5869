"""Reads softmaxes, norms and residual sums off the dataflow."""

from dataclasses import replace

from jaxgrad.diagnosis.activations import inner_names
from jaxgrad.diagnosis.parts import Norm, Softmax, Structure
from jaxgrad.diagnosis.wiring import Wiring
from jaxgrad.graph import compat
from jaxgrad.graph.ir import Lit, Op, Ref, Value, value_inputs


def read_softmax(op: Op, wiring: Wiring, found: Structure) -> None:
    """Adds the softmax whose sum an operation takes, if it does."""
    if op.kind == "opaque" and {"exp", "reduce_sum"} <= inner_names(op):
        sums = [e for e in compat.inner_eqns(op.eqn.params) if e.primitive.name == "reduce_sum"]
        source = next((v for v in value_inputs(op) if v in wiring.live), None)
        if source is not None and len(sums[0].params["axes"]) == 1:
            _add_softmax(source, op.outputs[0], sums[0].params["axes"][0], "prob", (wiring, found))
        return
    if op.name != "reduce_sum" or len(op.eqn.params["axes"]) != 1:
        return
    _, maker = wiring.origin(op.inputs[0])
    if maker is None or maker.name == "select_n":
        maker = _exp_behind(op, wiring)
    if maker is None or maker.name != "exp" or maker.outputs[0] not in wiring.live:
        return
    source = maker.inputs[0]
    _, shift = wiring.origin(source)
    if shift is not None and shift.name == "sub" and _is_maximum(shift.inputs[1], wiring):
        source = shift.inputs[0]
    if isinstance(source, Lit):
        return
    readers = wiring.uses_of(op.outputs[0])
    divided = [r for r in readers if r.name == "div"]
    kind = "prob" if divided else "log"
    output = divided[0].outputs[0] if divided else None
    if not divided and not any(r.name in ("log", "sign", "abs", "add") for r in readers):
        return
    _add_softmax(source, output, op.eqn.params["axes"][0], kind, (wiring, found))


def _exp_behind(op: Op, wiring: Wiring) -> Op | None:
    _, maker = wiring.origin(op.inputs[0])
    if maker is not None and maker.name == "select_n":
        for ref in maker.inputs[1:]:
            _, inner = wiring.origin(ref)
            if inner is not None and inner.name == "exp":
                return inner
    return maker


def _is_maximum(ref: Ref, wiring: Wiring) -> bool:
    for _ in range(6):
        ref, op = wiring.origin(ref, through=("stop_gradient",))
        if op is None:
            return False
        if op.name == "reduce_max":
            return True
        values = value_inputs(op)
        if op.name not in ("max", "select_n") or not values:
            return False
        ref = values[-1]
    return False


def _add_softmax(
    source: Value, output: Value | None, axis: int, kind: str, to: tuple[Wiring, Structure]
) -> None:
    wiring, found = to
    shape = wiring.shape(source)
    if axis >= len(shape):
        return
    head = wiring.is_head(source)
    where = wiring.layer(source)
    scores = _unmasked(source, wiring)
    found.softmaxes.append(Softmax(source, output, axis, shape[axis], kind, head, where, scores))


def _unmasked(value: Value, wiring: Wiring) -> Value:
    """Attention scores before a mask is added to them or put in their place."""
    for _ in range(8):
        _, op = wiring.origin(value)
        if op is None or op.name not in ("select_n", "add"):
            return value
        parts = [r for r in op.inputs if not isinstance(r, Lit) and r in wiring.live]
        if len(parts) != 1:
            return value
        value = parts[0]
    return value


def read_norm(op: Op, wiring: Wiring, found: Structure) -> None:
    """Adds the norm whose root an operation takes, if it does."""
    if op.name not in ("rsqrt", "sqrt") or op.outputs[0] not in wiring.live:
        return
    reduction = _mean_behind(op.inputs[0], wiring, 10)
    if reduction is None:
        return
    squared = reduction.inputs[0]
    source = _before_square(squared, wiring)
    if source is None or len(wiring.shape(source)) < 1:
        return
    shape = wiring.shape(squared)
    axes = tuple(reduction.eqn.params["axes"])
    count = 1
    for axis in axes:
        count *= shape[axis]
    copies = 1
    for n in wiring.lengths[op]:
        copies *= n
    over_batch = 0 in axes and len(shape) > 1 and len(axes) < len(shape)
    found.norms.append(
        Norm(op, source, axes, count, wiring.layer_after(op.outputs[0]), over_batch, copies=copies)
    )


def _mean_behind(ref: Ref, wiring: Wiring, limit: int) -> Op | None:
    if limit == 0 or isinstance(ref, Lit):
        return None
    _, op = wiring.origin(ref)
    if op is None:
        return None
    if op.name == "reduce_sum":
        return op
    if op.name not in ("add", "div", "mul", "max", "sub", "select_n", "pjit"):
        return None
    for inner in value_inputs(op):
        if inner in wiring.live:
            found = _mean_behind(inner, wiring, limit - 1)
            if found is not None:
                return found
    return None


def _before_square(ref: Ref, wiring: Wiring) -> Value | None:
    """The tensor x behind x² or (x - mean)²."""
    _, op = wiring.origin(ref)
    if op is None or op.name not in ("square", "integer_pow", "mul", "pow"):
        return None
    inner, before = wiring.origin(op.inputs[0])
    if before is not None and before.name == "sub":
        shapes = [wiring.shape(r) for r in before.inputs]
        _, mean = wiring.origin(before.inputs[1])
        if mean is not None and mean.name in ("div", "mul", "reduce_sum"):
            inner = before.inputs[0] if len(shapes[0]) else inner
            inner = wiring.origin(inner)[0]
    return None if isinstance(inner, Lit) or inner not in wiring.live else inner


def is_residual(op: Op, wiring: Wiring) -> bool:
    """An activation added to something that it was itself computed from."""
    parts = [r for r in op.inputs if not isinstance(r, Lit)]
    if len(parts) != 2 or op.outputs[0] not in wiring.live:
        return False
    if any(wiring.is_weight(r) or r not in wiring.from_data for r in parts):
        return False
    shape = wiring.shape(op.outputs[0])
    if len(shape) < 2 or any(wiring.shape(r) != shape for r in parts):
        return False
    bases = [wiring.origin(r)[0] for r in parts]
    for one, other in ((0, 1), (1, 0)):
        base = bases[one]
        if not isinstance(base, Lit) and base in wiring.upstream([parts[other]]):
            return True
    return False


def placed(norm: Norm, sums: set[Value], wiring: Wiring) -> Norm:
    """Post-LN: the sum is read by the norm alone; Pre-LN: it also runs on past it."""
    base = wiring.origin(norm.source)[0]
    if isinstance(base, Lit) or base not in sums:
        return norm
    cone = wiring.upstream([norm.op.outputs[0]])
    passes_by = False
    for op in wiring.uses_of(base):
        if op.name in ("add", "add_any") and op.outputs[0] not in cone:
            passes_by = True
        # another norm's cone: the sum is read by two norms, and runs on by neither
    return replace(norm, after_sum=True, post=not passes_by)
