"""Reads nonlinearities and the weights before them off the dataflow."""

from jaxgrad.diagnosis.parts import Activation, Affine, Structure
from jaxgrad.diagnosis.wiring import Wiring
from jaxgrad.graph import compat
from jaxgrad.graph.ir import Lit, Op, Ref, Value, value_inputs


def read_activation(op: Op, wiring: Wiring, found: Structure) -> None:
    """Adds the nonlinearity that an operation is, if it is one, to what was found."""
    if not op.outputs or op.outputs[0] not in wiring.live:
        return
    kind = _activation_kind(op, wiring)
    if kind is None:
        return
    source = next((v for v in value_inputs(op) if v in wiring.live), None)
    if source is None or is_variance(op.outputs[0], wiring):
        return
    output = op.outputs[0]
    if op.name == "select_n":
        source = _compared(op, wiring) or source
    gate, multiplied = _gates(output, source, wiring)
    if kind == "sigmoid" and multiplied is not None:
        kind, gate, output = "silu", False, multiplied
    if wiring.is_head(output) and kind in ("exp", "softplus"):
        return
    affine = affine_of(source, wiring)
    where = wiring.layer(source)
    found.activations.append(Activation(op, kind, source, output, where, gate, affine))


def _activation_kind(op: Op, wiring: Wiring) -> str | None:  # noqa: PLR0911
    if op.name == "tanh":
        return None if _is_gelu(op, wiring) else "tanh"
    if op.name == "logistic":
        return "sigmoid"
    if op.name == "max":
        return "relu" if any(is_zero(ref, wiring) for ref in op.inputs) else None
    if op.kind == "opaque":
        inside = inner_names(op)
        if "max" in inside and not inside & {"exp", "log1p", "log", "reduce_max", "dot_general"}:
            return "relu"
        if {"exp", "log1p"} <= inside or "logaddexp" in op.name:
            return "softplus"
        return None
    if op.name == "select_n" and _compared(op, wiring) is not None:
        cases = op.inputs[1:]
        return "relu" if any(is_zero(ref, wiring) for ref in cases) else "leaky_relu"
    if op.name == "exp":
        readers = wiring.uses_of(op.outputs[0])
        inside = any(r.name in ("reduce_sum", "div", "log1p", "log") for r in readers)
        return None if inside else "exp"
    return None


def is_variance(value: Value, wiring: Wiring) -> bool:
    """`max(0, variance)` of a norm: a root is taken of it next."""
    readers = wiring.uses_of(value)
    for op in list(readers):
        if op.name == "add":
            readers += wiring.uses_of(op.outputs[0])
    return any(op.name in ("rsqrt", "sqrt") for op in readers)


def _compared(op: Op, wiring: Wiring) -> Value | None:
    """The tensor z of `where(z > 0, z, ...)`."""
    _, test = wiring.origin(op.inputs[0])
    if test is None or test.name not in ("gt", "ge", "lt", "le"):
        return None
    z, zero = test.inputs[0], test.inputs[1]
    if isinstance(z, Lit) or z not in wiring.live or not is_zero(zero, wiring):
        return None
    cases = {wiring.origin(ref)[0] for ref in op.inputs[1:]}
    return z if wiring.origin(z)[0] in cases else None


def is_zero(ref: Ref, wiring: Wiring) -> bool:
    """Whether a value is a written zero, broadcast or not."""
    behind, op = wiring.origin(ref)
    if isinstance(behind, Lit):
        return getattr(behind.value, "size", 1) == 1 and float(behind.value) == 0
    return op is not None and op.name == "zeros_like"


def _is_gelu(op: Op, wiring: Wiring) -> bool:
    readers = wiring.uses_of(op.outputs[0])
    return (
        len(readers) == 1
        and readers[0].name == "add"
        and any(isinstance(wiring.origin(ref)[0], Lit) for ref in readers[0].inputs)
    )


def _gates(output: Value, source: Value, wiring: Wiring) -> tuple[bool, Value | None]:
    """Whether an output multiplies other activations; and its product with its own source."""
    behind = wiring.origin(source)[0]
    for op in wiring.uses_of(output):
        if op.name != "mul":
            continue
        others = [r for r in op.inputs if not isinstance(r, Lit) and r in wiring.live]
        bases = {wiring.origin(r)[0] for r in others}
        if behind in bases or source in bases:
            return False, op.outputs[0]
        if len(others) == 2 and all(r in wiring.from_data for r in others):
            return True, None
    return False, None


def affine_of(source: Value, wiring: Wiring, limit: int = 12) -> tuple[Affine, ...]:
    """The products with weights that a pre-activation is the sum of; none behind a norm."""
    if limit == 0:
        return ()
    _, op = wiring.origin(source)
    if op is None:
        return ()
    if op.name in ("dot_general", "conv_general_dilated"):
        affine = _affine(op, wiring)
        return () if affine is None else (affine,)
    if op.name in ("add", "sub", "add_any"):
        parts = [r for r in op.inputs if not isinstance(r, Lit) and not wiring.is_weight(r)]
        return tuple(a for r in parts for a in affine_of(r, wiring, limit - 1))
    if op.name in ("slice", "dynamic_slice", "split", "squeeze", "gather") and op.inputs:
        ref = op.inputs[0]
        return () if isinstance(ref, Lit) else affine_of(ref, wiring, limit - 1)
    return ()


def _affine(op: Op, wiring: Wiring) -> Affine | None:
    leaves = wiring.labels.uses.get(op, frozenset())
    weights = [i for i, r in enumerate(op.inputs[:2]) if wiring.is_weight(r)]
    if len(weights) != 1 or not leaves:
        return None
    side = weights[0]
    shape = wiring.shape(op.inputs[side])
    total = 1
    for n in shape:
        total *= n
    if op.name == "dot_general":
        contract, batch = op.eqn.params["dimension_numbers"]
        fan_in = 1
        for axis in contract[side]:
            fan_in *= shape[axis]
        shared = 1
        for axis in batch[side]:
            shared *= shape[axis]
        fan_out = total // max(fan_in * shared, 1)
    else:
        spec = op.eqn.params["dimension_numbers"].rhs_spec
        fan_out = shape[spec[0]]
        fan_in = total // max(fan_out, 1)
    data = op.inputs[1 - side]
    recurrent = not isinstance(data, Lit) and _is_carried(data, wiring)
    leaf = sorted(leaves)[0]
    return Affine(op, leaf, fan_in, fan_out, wiring.layer(op.outputs[0]), recurrent)


def _is_carried(value: Value, wiring: Wiring) -> bool:
    """Whether a value is what a scan carries: it has two sources, the start and the last step."""
    behind, _ = wiring.origin(value)
    return not isinstance(behind, Lit) and len(wiring.sources.get(behind, ())) > 1


def inner_names(op: Op) -> set[str]:
    """Primitives inside an opaque operation."""
    return {eqn.primitive.name for eqn in compat.inner_eqns(op.eqn.params)}
