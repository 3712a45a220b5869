"""What a loss is built of: activations, softmaxes, norms, heads, penalties, masks, blocks.

Read off the dataflow, never off names of modules: a tensor is a logit because a log of a sum of
exponentials is taken of it, and a norm is one because a root of a mean square divides by it.
"""

from dataclasses import dataclass, field, replace

from jaxgrad.diagnosis.wiring import FLAT, TRANSPARENT, Wiring
from jaxgrad.graph import compat
from jaxgrad.graph.ir import Lit, Op, Ref, Value, value_inputs

_RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "random_gamma", "rng_uniform")
BOUNDED = {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0)}
HALF_BOUNDED = {"relu": 0.0, "softplus": 0.0, "exp": 0.0}


@dataclass(frozen=True, eq=False)
class Activation:
    """A nonlinearity between layers; `gate` if its output multiplies other data."""

    op: Op
    kind: str
    source: Value
    output: Value
    where: str
    gate: bool = False
    affine: tuple["Affine", ...] = ()


@dataclass(frozen=True, eq=False)
class Affine:
    """A product with a weight; `normalized` if a norm stands between it and the activation."""

    op: Op
    leaf: str
    fan_in: int
    fan_out: int
    where: str
    recurrent: bool = False


@dataclass(frozen=True, eq=False)
class Softmax:
    """Exponentials divided by their sum: `kind` is "log" where only its logarithm is used."""

    source: Value
    output: Value | None
    axis: int
    size: int
    kind: str
    head: bool
    where: str
    scores: Value = -1  # the source before masks


@dataclass(frozen=True, eq=False)
class Norm:
    """A division by a root mean square. `post` if it alone reads a residual sum."""

    op: Op
    source: Value
    axes: tuple[int, ...]
    count: int
    where: str
    over_batch: bool
    after_sum: bool = False
    post: bool = False
    copies: int = 1


@dataclass(frozen=True, eq=False)
class Difference:
    """A prediction minus a target, at the end of a regression."""

    op: Op
    prediction: Value
    target: Ref
    where: str


@dataclass(frozen=True, eq=False)
class LogHead:
    """A logarithm, or a log-sigmoid, of what the last layer returns."""

    op: Op
    source: Value
    kind: str  # "log" or "log_sigmoid"
    where: str


@dataclass(frozen=True, eq=False)
class Index:
    """Integers of the data that pick among classes or rows."""

    value: Value
    size: int
    via: str  # "gather" or "one_hot"
    head: bool
    where: str


@dataclass(frozen=True, eq=False)
class Mask:
    """A random mask on activations; `keeps` says what its predicate means."""

    predicate: Value
    keeps: bool
    where: str


@dataclass(frozen=True, eq=False)
class Structure:
    """All that was read."""

    activations: list[Activation] = field(default_factory=list)
    softmaxes: list[Softmax] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    log_heads: list[LogHead] = field(default_factory=list)
    indices: list[Index] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    penalties: list[Value] = field(default_factory=list)
    residual_sums: list[Value] = field(default_factory=list)

    @property
    def attention(self) -> list[Softmax]:
        """The softmaxes that are no heads."""
        return [s for s in self.softmaxes if not s.head]

    @property
    def depth(self) -> int:
        """Number of hidden activations."""
        return len([a for a in self.activations if not a.gate])


def read_structure(wiring: Wiring) -> Structure:
    """Reads a wired loss."""
    found = Structure()
    for op in wiring.ops():
        _read_activation(op, wiring, found)
        _read_softmax(op, wiring, found)
        _read_norm(op, wiring, found)
        _read_head(op, wiring, found)
        _read_index(op, wiring, found)
        _read_mask(op, wiring, found)
        if op.name in ("add", "add_any") and _is_residual(op, wiring):
            found.residual_sums.append(op.outputs[0])
    found.penalties.extend(_penalties(wiring))
    sums = set(found.residual_sums)
    found.norms[:] = [_placed(norm, sums, wiring) for norm in found.norms]
    return found


def inner_names(op: Op) -> set[str]:
    """Primitives inside an opaque operation."""
    return {eqn.primitive.name for eqn in compat.inner_eqns(op.eqn.params)}


# ------------------------------------------------------------------------------------- activations


def _read_activation(op: Op, wiring: Wiring, found: Structure) -> None:
    if not op.outputs or op.outputs[0] not in wiring.live:
        return
    kind = _activation_kind(op, wiring)
    if kind is None:
        return
    source = next((v for v in value_inputs(op) if v in wiring.live), None)
    if source is None or _is_variance(op.outputs[0], wiring):
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
        return "relu" if any(_is_zero(ref, wiring) for ref in op.inputs) else None
    if op.kind == "opaque":
        inside = inner_names(op)
        if "max" in inside and not inside & {"exp", "log1p", "log", "reduce_max", "dot_general"}:
            return "relu"
        if {"exp", "log1p"} <= inside or "logaddexp" in op.name:
            return "softplus"
        return None
    if op.name == "select_n" and _compared(op, wiring) is not None:
        cases = op.inputs[1:]
        return "relu" if any(_is_zero(ref, wiring) for ref in cases) else "leaky_relu"
    if op.name == "exp":
        readers = wiring.uses_of(op.outputs[0])
        inside = any(r.name in ("reduce_sum", "div", "log1p", "log") for r in readers)
        return None if inside else "exp"
    return None


def _is_variance(value: Value, wiring: Wiring) -> bool:
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
    if isinstance(z, Lit) or z not in wiring.live or not _is_zero(zero, wiring):
        return None
    cases = {wiring.origin(ref)[0] for ref in op.inputs[1:]}
    return z if wiring.origin(z)[0] in cases else None


def _is_zero(ref: Ref, wiring: Wiring) -> bool:
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


# --------------------------------------------------------------------------------------- softmaxes


def _read_softmax(op: Op, wiring: Wiring, found: Structure) -> None:
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


# ------------------------------------------------------------------------------------------- norms


def _read_norm(op: Op, wiring: Wiring, found: Structure) -> None:
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


def _is_residual(op: Op, wiring: Wiring) -> bool:
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


def _placed(norm: Norm, sums: set[Value], wiring: Wiring) -> Norm:
    """Post-LN: the sum is read by the norm alone; Pre-LN: it also runs on past it."""
    base = wiring.origin(norm.source)[0]
    if base not in sums:
        return norm
    cone = wiring.upstream([norm.op.outputs[0]])
    passes_by = False
    for op in wiring.uses_of(base):
        if op.name in ("add", "add_any") and op.outputs[0] not in cone:
            passes_by = True
        # another norm's cone: the sum is read by two norms, and runs on by neither
    return replace(norm, after_sum=True, post=not passes_by)


# ------------------------------------------------------------------------------------------- heads


def _read_head(op: Op, wiring: Wiring, found: Structure) -> None:
    if not op.outputs or op.outputs[0] not in wiring.live:
        return
    if op.name == "sub":
        for one, other in ((0, 1), (1, 0)):
            prediction, target = op.inputs[one], op.inputs[other]
            if isinstance(prediction, Lit) or prediction not in wiring.live:
                continue
            known = not isinstance(target, Lit) and target in wiring.from_data
            if known and target not in wiring.depends and _is_error(op, wiring):
                where = wiring.layer(prediction)
                found.differences.append(Difference(op, prediction, target, where))
    if op.name == "log" and not isinstance(op.inputs[0], Lit) and op.inputs[0] in wiring.live:
        source = op.inputs[0]
        if wiring.is_head(source) and _is_output(source, wiring):
            found.log_heads.append(LogHead(op, source, "log", wiring.layer(source)))
    if op.kind == "opaque" and {"exp", "log1p"} <= inner_names(op):
        source = next((v for v in value_inputs(op) if v in wiring.live), None)
        if source is not None and wiring.is_head(source):
            found.log_heads.append(LogHead(op, source, "log_sigmoid", wiring.layer(source)))


def _is_error(op: Op, wiring: Wiring) -> bool:
    """Whether a difference is squared or its magnitude taken, at the end of the program."""
    names = {r.name for r in wiring.uses_of(op.outputs[0])}
    squares = {"square", "integer_pow", "abs", "mul", "min", "pow"}
    return bool(names & squares) and wiring.is_head(op.outputs[0])


def _is_output(value: Value, wiring: Wiring) -> bool:
    """Not the sum of a softmax: that is positive by its making."""
    _, op = wiring.origin(value)
    if op is not None and op.name in ("add", "max", "clamp"):  # log(p + eps)
        inner = [v for v in value_inputs(op) if v in wiring.live]
        return all(_is_output(v, wiring) for v in inner)
    return op is None or op.name not in ("reduce_sum", "abs", "reduce_max", "exp")


def bound_of(value: Value, structure: Structure, wiring: Wiring) -> Activation | None:
    """The activation whose output a tensor is, unscaled."""
    base, _ = wiring.origin(value)
    for activation in structure.activations:
        if wiring.origin(activation.output)[0] == base and base != activation.source:
            return activation
    return None


def _read_index(op: Op, wiring: Wiring, found: Structure) -> None:
    if op.name == "gather" and not isinstance(op.inputs[0], Lit) and len(op.inputs) > 1:
        operand, indices = op.inputs[0], op.inputs[1]
        picks = operand in wiring.depends and not isinstance(indices, Lit)
        if picks and indices in wiring.from_data and indices not in wiring.depends:
            axes = op.eqn.params["dimension_numbers"].start_index_map
            raw = _raw_index(indices, wiring)
            if len(axes) == 1 and raw is not None:
                size = wiring.shape(operand)[axes[0]]
                head = not wiring.is_weight(operand)
                where = wiring.layer(op.outputs[0])
                found.indices.append(Index(raw, size, "gather", head, where))
    if op.name == "eq":
        for one, other in ((0, 1), (1, 0)):
            _, iota = wiring.origin(op.inputs[other])
            value = op.inputs[one]
            if iota is None or iota.name != "iota" or isinstance(value, Lit):
                continue
            raw = wiring.origin(value)[0]
            if isinstance(raw, Lit) or raw in wiring.depends or raw not in wiring.from_data:
                continue
            shape = wiring.shape(op.outputs[0])
            size = max(wiring.shape(op.inputs[other]) or shape)
            head = wiring.is_head(op.outputs[0]) and op.outputs[0] in wiring.reaching
            found.indices.append(Index(raw, size, "one_hot", head, ""))


def _raw_index(ref: Ref, wiring: Wiring) -> Value | None:
    """The integers before `where(i < 0, i + n, i)`."""
    for _ in range(8):
        ref, op = wiring.origin(ref)
        if isinstance(ref, Lit):
            return None
        if op is None:
            return ref
        if op.name == "select_n" and len(op.inputs) == 3:
            ref = op.inputs[1]
        elif op.name == "concatenate":
            return None
        else:
            return ref if not wiring.is_float(ref) else None
    return None


# ------------------------------------------------------------------------------- masks, penalties


def _read_mask(op: Op, wiring: Wiring, found: Structure) -> None:
    if not op.outputs or op.outputs[0] not in wiring.live or op.name not in ("select_n", "mul"):
        return
    candidates = [op.inputs[0]] if op.name == "select_n" else list(op.inputs)
    for ref in candidates:
        if isinstance(ref, Lit) or ref in wiring.depends:
            continue
        base, test = wiring.origin(ref, through=("div",))
        random = test is not None and test.name in ("lt", "le", "gt", "ge")
        if random and not isinstance(base, Lit) and _is_random(base, wiring):
            keeps = op.name == "mul" or not _is_zero(op.inputs[2], wiring)
            if op.name == "mul" or keeps != _is_zero(op.inputs[2], wiring):
                found.masks.append(Mask(base, keeps, wiring.layer(op.outputs[0])))
            return


def _is_random(value: Value, wiring: Wiring) -> bool:
    made = (wiring.producer.get(v) for v in wiring.upstream([value]))
    return any(op is not None and op.name in _RANDOM for op in made)


def _penalties(wiring: Wiring) -> list[Value]:
    """Scalars made of parameters alone that are added to the loss."""
    found = []
    for op in wiring.ops():
        if op.name not in ("add", "add_any", "sub") or op.outputs[0] not in wiring.reaching:
            continue
        if wiring.shape(op.outputs[0]) != () or op.outputs[0] not in wiring.from_data:
            continue
        found += [r for r in op.inputs if wiring.is_weight(r) and wiring.shape(r) == ()]
    return list(dict.fromkeys(found))


def blocks_of(leaf: Value, wiring: Wiring) -> list[tuple[Op, Value]]:
    """Where the gradient of a parameter ends: flat operations, each with the value it stops."""
    smooth = wiring.downstream([leaf], smooth=True)
    ends = []
    for op in wiring.ops():
        stopped = [v for v in value_inputs(op) if v in smooth]
        dead_end = op.name in FLAT or not any(wiring.is_float(v) for v in op.outputs)
        if stopped and dead_end and any(v in wiring.reaching for v in op.outputs):
            ends.append((op, stopped[0]))
    return ends


__all__ = ["BOUNDED", "HALF_BOUNDED", "TRANSPARENT", "Structure", "read_structure"]
