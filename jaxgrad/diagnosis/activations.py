"""Reads nonlinearities and the weights before them off the dataflow."""

from jaxgrad.diagnosis.parts import Activation, Affine, Structure
from jaxgrad.diagnosis.wiring import Wiring
from jaxgrad.graph import compat
from jaxgrad.graph.ir import Lit, Op, Ref, Value, value_inputs

_EXPONENTIALS = ("exp", "expm1")
_SCALINGS = ("mul", "div", "sub", "add")
_SUMS = ("add", "add_any", "sub", "neg")
_UNARY = ("neg", "integer_pow", "square")
_BOUNDED = {"tanh": "tanh", "logistic": "sigmoid", "erf": "erf", "erfc": "erf"}
# What a bounded activation is called where its own argument multiplies it.
_SELF_GATED = {"tanh": "gelu", "erf": "gelu", "sigmoid": "silu"}


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
    if kind in _SELF_GATED and (product := _times_itself(output, source, wiring)) is not None:
        kind, gate, (source, output) = _SELF_GATED[kind], False, product
    elif kind == "sigmoid" and multiplied is not None:
        kind, gate, output = "silu", False, multiplied
    if wiring.is_head(output) and kind in ("exp", "softplus"):
        return
    affine = affine_of(source, wiring)
    where = wiring.layer(source)
    found.activations.append(Activation(op, kind, source, output, where, gate, affine))


def _activation_kind(op: Op, wiring: Wiring) -> str | None:  # noqa: PLR0911
    if op.name in _BOUNDED:
        return _BOUNDED[op.name]
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
        if _is_elu(op, wiring):
            return "elu"
        if _keeps_negative(op, wiring):  # the bounded argument of an ELU's exponential
            return None
        cases = op.inputs[1:]
        return "relu" if any(is_zero(ref, wiring) for ref in cases) else "leaky_relu"
    if op.name == "exp":
        later = _scaled_uses(op.outputs[0], wiring)
        if any(r.name == "select_n" and _is_elu(r, wiring) for r in later):
            return None
        readers = wiring.uses_of(op.outputs[0])
        inside = any(r.name in ("reduce_sum", "div", "log1p", "log") for r in readers)
        return None if inside else "exp"
    return None


def _is_elu(op: Op, wiring: Wiring) -> bool:
    """Whether a choice is between z and a shifted exponential of it, as in ELU, SELU and CELU."""
    queue = [(ref, 3) for ref in op.inputs[1:]]
    while queue:
        _, made = wiring.origin((item := queue.pop())[0])
        if made is None:
            continue
        if made.name in _EXPONENTIALS:
            return _compared(op, wiring) is not None
        if made.name in _SCALINGS and item[1]:
            queue += [(ref, item[1] - 1) for ref in made.inputs if not isinstance(ref, Lit)]
    return False


def _keeps_negative(op: Op, wiring: Wiring) -> bool:
    """Whether a choice, read by an exponential, is min(z, 0)."""
    test = wiring.origin(op.inputs[0])[1]
    if test is None or not is_zero(op.inputs[2 if test.name in ("gt", "ge") else 1], wiring):
        return False
    return any(r.name in _EXPONENTIALS for r in _scaled_uses(op.outputs[0], wiring))


def _scaled_uses(value: Value, wiring: Wiring, hops: int = 3) -> list[Op]:
    """The operations that read a value, or a multiple of it, or one shifted by a constant."""
    found, current = [], [value]
    for _ in range(hops):
        readers = [op for v in current for op in wiring.uses_of(v)]
        found += readers
        current = [op.outputs[0] for op in readers if op.name in _SCALINGS]
    return found


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


def _times_itself(output: Value, source: Value, wiring: Wiring) -> tuple[Value, Value] | None:
    """An x and its x * f(x), f of a multiple of x, as in GELU and SiLU; None without one."""
    behind = _multiples(source, wiring)
    for op in _scaled_uses(output, wiring):
        if op.name != "mul" or any(isinstance(ref, Lit) for ref in op.inputs):
            continue
        for ref in op.inputs:
            shared = [v for v in _multiples(ref, wiring) if v in behind]
            if shared:
                return shared[0], op.outputs[0]
    return None


def _multiples(ref: Ref, wiring: Wiring, hops: int = 6) -> list[Value]:
    """A value and those that it is a polynomial of, in one variable and with written factors."""
    found: list[Value] = []
    queue = [ref]
    for _ in range(hops):
        following: list[Ref] = []
        for behind, op in (wiring.origin(r) for r in queue):
            if isinstance(behind, Lit) or behind not in wiring.live or behind in found:
                continue
            found.append(behind)
            if op is not None and op.name in (*_UNARY, *_SCALINGS):
                live = [r for r in op.inputs if not isinstance(r, Lit) and r in wiring.live]
                less = min(hops - 1, 4)  # the search branches here
                bases = [set(_multiples(r, wiring, less)) for r in live] if len(live) > 1 else []
                if all(bases[0] & each for each in bases):
                    following += live
        queue = following
    return found


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
        two = len(others) == 2 and all(r in wiring.from_data for r in others)
        if two and not _is_slope(op, output, wiring):
            return True, None
    return False, None


def _is_slope(op: Op, output: Value, wiring: Wiring) -> bool:
    """Whether a product is part of the derivative of the activation itself.

    That of y = tanh(z) is (1 + y)(1 - y), that of a sigmoid y (1 - y): what y multiplies meets
    1 - y before or after, with sums of other derivatives on the way. Losses that hold derivatives
    of the model, as those of differential equations do, are full of them.
    """
    rests = {v for r in wiring.uses_of(output) if _is_rest(r, output, wiring) for v in r.outputs}
    if not rests:
        return False
    after, before = [op.outputs[0]], list(op.inputs)
    for _ in range(4):
        readers = [r for v in after for r in wiring.uses_of(v)]
        makers = [m for _, m in map(wiring.origin, before) if m is not None]
        for other in (*readers, *makers):
            if other.name == "mul" and any(wiring.origin(r)[0] in rests for r in other.inputs):
                return True
        after = [r.outputs[0] for r in readers if r.name in _SUMS]
        before = [ref for m in makers if m.name in _SUMS for ref in m.inputs]
    return False


def _is_rest(op: Op, output: Value, wiring: Wiring) -> bool:
    """Whether an operation is 1 - y."""
    if op.name != "sub":
        return False
    one, y = (wiring.origin(ref)[0] for ref in op.inputs)
    if not isinstance(one, Lit) or y != wiring.origin(output)[0]:
        return False
    return getattr(one.value, "size", 1) == 1 and float(one.value) == 1


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
