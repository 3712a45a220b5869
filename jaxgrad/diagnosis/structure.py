"""What a loss is built of: activations, softmaxes, norms, heads, penalties, masks, blocks.

Read off the dataflow, never off names of modules: a tensor is a logit because a log of a sum of
exponentials is taken of it, and a norm is one because a root of a mean square divides by it.
"""

import numpy as np

from jaxgrad.diagnosis.activations import inner_names, is_zero, read_activation
from jaxgrad.diagnosis.norms import is_residual, placed, read_norm, read_softmax
from jaxgrad.diagnosis.parts import (
    Activation,
    Binary,
    Difference,
    Index,
    LogHead,
    Mask,
    Structure,
)
from jaxgrad.diagnosis.wiring import FLAT, Wiring
from jaxgrad.graph.ir import Lit, Op, Ref, Value, value_inputs

_RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "random_gamma", "rng_uniform")


def read_structure(wiring: Wiring) -> Structure:
    """Reads a wired loss."""
    found = Structure()
    for op in wiring.ops():
        read_activation(op, wiring, found)
        read_softmax(op, wiring, found)
        read_norm(op, wiring, found)
        _read_head(op, wiring, found)
        _read_index(op, wiring, found)
        _read_mask(op, wiring, found)
        if op.name in ("add", "add_any") and is_residual(op, wiring):
            found.residual_sums.append(op.outputs[0])
    found.binaries.extend(_binaries(wiring, found))
    found.penalties.extend(_penalties(wiring))
    sums = set(found.residual_sums)
    found.norms[:] = [placed(norm, sums, wiring) for norm in found.norms]
    return found


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
            found.log_heads.append(
                LogHead(op, source, "log", wiring.layer(source), _before_clip(source, wiring))
            )
    if op.kind == "opaque" and {"exp", "log1p"} <= inner_names(op):
        source = next((v for v in value_inputs(op) if v in wiring.live), None)
        if source is not None and wiring.is_head(source):
            found.log_heads.append(LogHead(op, source, "log_sigmoid", wiring.layer(source), source))


def _before_clip(value: Value, wiring: Wiring) -> Value:
    """What a clip, or a tiny constant added, is applied to; the value itself without one."""
    found = value
    for _ in range(12):
        op, behind = wiring.producer.get(value), wiring.sources.get(value, ())
        if op is None and len(behind) == 1 and not isinstance(behind[0], Lit):
            value = behind[0]
            continue
        inner = [v for v in value_inputs(op) if v in wiring.live] if op is not None else []
        if op is None or len(inner) != 1:
            return found
        if op.name in ("clamp", "max", "min") or (op.name == "add" and _adds_little(op)):
            found = inner[0]
        elif op.name not in ("reshape", "squeeze", "convert_element_type", "broadcast_in_dim"):
            return found
        value = inner[0]
    return found


def _adds_little(op: Op) -> bool:
    """Whether an operation adds a small constant, as log(p + eps) does."""
    numbers = [np.asarray(r.value, np.float64) for r in op.inputs if isinstance(r, Lit)]
    return bool(numbers) and bool(np.abs(numbers[0]).max() < 1e-3)


def _binaries(wiring: Wiring, found: Structure) -> list[Binary]:
    """Products of a target with the logarithm of a sigmoid, as in a binary cross-entropy."""
    heads = {wiring.origin(h.op.outputs[0])[0]: h for h in found.log_heads}
    made = []
    for op in wiring.ops():
        if op.name != "mul" or op.outputs[0] not in wiring.live:
            continue
        for one, other in ((0, 1), (1, 0)):
            head = heads.get(wiring.origin(op.inputs[one])[0])
            target = op.inputs[other]
            if head is None or isinstance(target, Lit) or target in wiring.depends:
                continue
            if target in wiring.from_data:
                made.append(Binary(op, head.source, target, head.where))
    return made


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
    """The activation whose output, or part of whose output, a tensor is, unscaled."""
    base, _ = wiring.origin(value, through=("gather", "slice", "dynamic_slice"))
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
            for axis, column in zip(axes, _columns(indices, len(axes), wiring), strict=False):
                raw = _raw_index(column, wiring)
                if raw is None or raw not in wiring.from_data:
                    continue
                if len(axes) > 1 and not wiring.is_head(op.outputs[0]):
                    continue  # places in hidden tensors, which are no classes
                size = wiring.shape(operand)[axis]
                head = not wiring.is_weight(operand)
                where = wiring.layer(op.outputs[0])
                found.indices.append(Index(raw, size, "gather", head, where, op.outputs[0]))
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
            found.indices.append(Index(raw, size, "one_hot", head, "", op.outputs[0]))


def _columns(indices: Ref, count: int, wiring: Wiring) -> tuple[Ref, ...]:
    """The indices along each axis, as in ``x[rows, labels]``; none where they are not seen."""
    if count == 1:
        return (indices,)
    _, op = wiring.origin(indices)
    joined = op is not None and op.name == "concatenate" and len(op.inputs) == count
    return tuple(op.inputs) if op is not None and joined else ()


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
            keeps = op.name == "mul" or not is_zero(op.inputs[2], wiring)
            if op.name == "mul" or keeps != is_zero(op.inputs[2], wiring):
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
