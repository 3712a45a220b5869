"""The instrumented passes: one forward and backward pass with every layer and activation measured.

Compiled once, the pass is run on other parameters, other data and another scale of the loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxgrad.diagnosis.parts import Structure
from jaxgrad.diagnosis.problem import Problem
from jaxgrad.diagnosis.wiring import Wiring, inputs_for
from jaxgrad.graph import rewrite, sites
from jaxgrad.graph.ir import Lit, Ref, Value, is_real_dtype, value_inputs

_FORWARD = (
    "rms", "mean", "max", "zero_share", "nonfinite", "example_share", "token_share",
    "beyond_tanh", "beyond_sigmoid",
)  # fmt: skip


# |tanh| above this is saturated (slope below 6 %), and a sigmoid where |2s - 1| is
SATURATED = 0.97


_BACKWARD = ("gradient_rms", "gradient_max", "gradient_nonfinite")


# What is measured of a unit: the last three are the shares of the data on which a rectifier, a tanh
# and a sigmoid work: they are neither silent nor at their bounds.
UNITS = ("low", "high", "mean", "std", "active", "inside_tanh", "inside_sigmoid")


_MAX_UNITS = 4096


def _scaled_rms(x: Array) -> tuple[Array, Array]:
    largest = jnp.max(jnp.abs(x), initial=0.0)
    unit = jnp.where(largest > 0, largest, 1.0)
    return jnp.sqrt(jnp.mean(jnp.square(x / unit))) * unit, largest


def _share_within(x: Array, axis: int) -> Array:
    """The share of the energy that varies along an axis."""
    if x.ndim < -axis or x.ndim <= max(axis, 0) or x.shape[axis] < 2:
        return jnp.full((), jnp.nan)
    unit = jnp.maximum(jnp.max(jnp.abs(x), initial=0.0), 1e-30)
    x = x / unit
    energy = jnp.mean(jnp.square(x))
    varied = jnp.mean(jnp.square(x - jnp.mean(x, axis=axis, keepdims=True)))
    return jnp.where(energy > 0, varied / energy, jnp.nan)


def _forward_row(x: Array) -> Array:
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    if x.size == 0:
        return jnp.zeros(len(_FORWARD))
    rms, largest = _scaled_rms(x)
    tokens = _share_within(x, -2) if x.ndim >= 3 else jnp.full((), jnp.nan)
    examples = _share_within(x, 0) if x.ndim >= 2 else jnp.full((), jnp.nan)
    bad = jnp.sum(~jnp.isfinite(x))
    row = [rms, jnp.mean(x), largest, jnp.mean(x == 0), bad, examples, tokens]
    row += [jnp.mean(jnp.abs(x) > SATURATED), jnp.mean(jnp.abs(2 * x - 1) > SATURATED)]
    return jnp.stack([jnp.asarray(r, jnp.float32) for r in row])


def _units(x: Array, axis: int, count: int) -> Array:
    """Of every unit over the data: see `UNITS`."""
    if count == 0:
        return jnp.zeros((len(UNITS), 0))
    x = jnp.moveaxis(jax.lax.stop_gradient(x).astype(jnp.float32), axis, -1).reshape(-1, count)
    shares = [x != 0, jnp.abs(x) <= SATURATED, jnp.abs(2 * x - 1) <= SATURATED]
    return jnp.stack([x.min(0), x.max(0), x.mean(0), x.std(0), *(s.mean(0) for s in shares)])


def _backward_row(x: Array) -> Array:
    x = x.astype(jnp.float32)
    rms, largest = _scaled_rms(x)
    return jnp.stack([rms, largest, jnp.sum(~jnp.isfinite(x)).astype(jnp.float32)])


def _axis(slot: dict[str, Array]) -> tuple[str, int]:
    key = next(k for k in slot if k.startswith("units"))
    return key, int(key[5:])


@jax.custom_vjp
def _measured(x: Array, slot: dict[str, Array]) -> Array:
    del slot
    return x


def _measured_forward(x: Array, slot: dict[str, Array]) -> tuple[Array, Any]:
    return x, slot


def _measured_backward(slot: dict[str, Array], cotangent: Array) -> tuple[Array, Any]:
    key, axis = _axis(slot)
    count = slot[key].shape[-1]
    seen = jnp.abs(cotangent)
    return cotangent, {"row": _backward_row(cotangent), key: _units(seen, axis, count)}


_ = _measured.defvjp(_measured_forward, _measured_backward)


def _tap(x: Array, slot: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    key, axis = _axis(slot)
    record = {"row": _forward_row(x), key: _units(x, axis, slot[key].shape[-1])}
    return _measured(x, slot), record


def _blank(slot: dict[str, Array]) -> dict[str, Array]:
    key, _ = _axis(slot)
    return {"row": jnp.full(len(_FORWARD), jnp.nan), key: jnp.zeros_like(slot[key])}


@dataclass(frozen=True, eq=False)
class Tensor:
    """What was measured of one tensor; arrays have the lengths of the scans around it in front.

    Attributes:
        row: forward statistics by name, each of shape lengths.
        units: what `UNITS` says of every unit, (*lengths, len(UNITS), units).
        unit_gradients: the same of the cotangent's magnitude.
    """

    row: dict[str, np.ndarray]
    units: np.ndarray
    unit_gradients: np.ndarray


@dataclass(frozen=True, eq=False)
class Measurement:
    """One pass.

    Attributes:
        value: the loss.
        grads: gradient of every parameter leaf.
        tensors: what was measured, by value of the program.
        names: the layers' rows, in forward order.
        rows: statistics of every row, (rows,) each.
        finite: whether the gradients are.
    """

    value: float
    grads: list[np.ndarray]
    tensors: dict[Value, Tensor]
    names: tuple[str, ...]
    rows: dict[str, np.ndarray]
    row_parameters: tuple[tuple[str, ...], ...]

    @property
    def finite(self) -> bool:
        """Whether the loss and all gradients are finite."""
        return bool(np.isfinite(self.value)) and all(np.isfinite(g).all() for g in self.grads)

    @property
    def norm(self) -> float:
        """Global norm of the gradient."""
        return float(
            np.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in self.grads))
        )


class Instrument:
    """The instrumented pass of a problem."""

    def __init__(self, problem: Problem, wiring: Wiring, structure: Structure) -> None:
        self.problem, self.wiring = problem, wiring
        self.planned = sites.plan_sites(wiring.block, wiring.table, wiring.labels)
        values = {s.value: s.lengths for s in self.planned}
        wanted: list[Value] = []
        for activation in structure.activations:
            wanted += [activation.source, activation.output]
        wanted += [s.scores for s in structure.attention] + structure.outputs
        self.place: dict[Value, Value] = {}
        for value in wanted:
            at = tappable(value, wiring)
            if at is not None and is_real_dtype(wiring.table.avals[at].dtype):
                self.place[value] = at
                _ = values.setdefault(at, wiring.lengths.get(wiring.producer[at], ()))
        for value in values:
            self.place[value] = value
        self.lengths = values
        self.index = {value: i for i, value in enumerate(values)}
        self.tapped = rewrite.Tapped(wiring.table, self.index, _tap, _blank)
        self._compiled = jax.jit(self._run)

    def _slots(self) -> dict[int, dict[str, Array]]:
        slots = {}
        for value, i in self.index.items():
            shape = self.wiring.shape(value)
            axis = channel_axis(value, self.wiring)
            units = shape[axis] if len(shape) >= 2 and shape[axis] <= _MAX_UNITS else 0
            lengths = self.lengths[value]
            slots[i] = {
                "row": jnp.zeros((*lengths, len(_BACKWARD))),
                f"units{axis}": jnp.zeros((*lengths, len(UNITS), units)),
            }
        return slots

    def _run(self, values: list[Array], batch: PyTree, key: Any, scale: Array) -> Any:
        def objective(values: list[Array], slots: Any) -> Any:
            args = inputs_for(self.problem, values, batch, key)
            out, records = self.tapped.run(self.wiring.block, args, slots)
            loss = out[0]
            return (loss * scale.astype(loss.dtype)), (loss, records)

        differentiate = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        (_, (loss, records)), (grads, back) = differentiate(values, self._slots())
        return loss, grads, records, back

    def measure(
        self, values: Sequence[Array], batch: PyTree = None, key: Any = None, scale: float = 1.0
    ) -> Measurement:
        """Runs the pass.

        Args:
            values: parameters.
            batch: None for the problem's own.
            key: random key; None for the problem's own.
            scale: the loss is multiplied by it before it is differentiated; gradients are not
                divided by it.
        """
        batch = self.problem.batch if batch is None else batch
        key = self.problem.key if key is None else key
        arrays = [x for x in jax.tree.leaves(batch) if isinstance(x, jax.Array)]
        out = self._compiled(list(values), arrays, key, jnp.float32(scale))
        loss, grads, records, back = jax.device_get(out)
        tensors = {v: _tensor(records[i], back[i]) for v, i in self.index.items()}
        names, index = sites.rows(self.planned)
        flat = {
            key: np.concatenate([np.ravel(tensors[s.value].row[key]) for s in self.planned])[index]
            if self.planned
            else np.zeros(0)
            for key in (*_FORWARD, *_BACKWARD)
        }
        owners = [s.parameters for s in self.planned for _ in range(int(np.prod(s.lengths)))]
        tensors |= {v: tensors[at] for v, at in self.place.items()}
        return Measurement(
            float(loss), [np.asarray(g) for g in grads], tensors, tuple(names), flat,
            tuple(owners[i] for i in index),
        )  # fmt: skip


def _tensor(record: dict[str, Any], back: dict[str, Any]) -> Tensor:
    key = next(k for k in record if k.startswith("units"))
    row = {name: np.asarray(record["row"][..., i]) for i, name in enumerate(_FORWARD)}
    row |= {name: np.asarray(back["row"][..., i]) for i, name in enumerate(_BACKWARD)}
    return Tensor(row, np.asarray(record[key]), np.asarray(back[key]))


def tappable(value: Ref, wiring: Wiring) -> Value | None:
    """The operation's result that a value inside a call stands for."""
    for _ in range(100):
        if isinstance(value, Lit):
            return None
        if value in wiring.producer:
            return value
        behind = wiring.sources.get(value, [])
        if len(behind) != 1:
            return None
        value = behind[0]
    return None


def channel_axis(value: Value, wiring: Wiring) -> int:
    """The axis of units: the last one, or where the convolution before it puts its channels."""
    rank = len(wiring.shape(value))
    if rank < 3:
        return -1
    current: Ref = value
    for _ in range(12):
        current, op = wiring.origin(current)
        if op is None:
            return -1
        if op.name == "conv_general_dilated":
            return op.eqn.params["dimension_numbers"].out_spec[1] - rank
        same = [v for v in value_inputs(op) if wiring.shape(v) == wiring.shape(value)]
        if not same:
            return -1
        current = same[0]
    return -1


def forward_values(
    problem: Problem, wiring: Wiring, wanted: Sequence[Value]
) -> dict[Value, np.ndarray]:
    """The values themselves, on the problem's parameters and batch, from one forward pass."""
    args = inputs_for(problem, problem.values, problem.batch)
    known = dict(zip(wiring.block.inputs, args, strict=True)) | dict(wiring.table.constants)
    place = {v: tappable(v, wiring) for v in wanted}
    found = {}
    taps: dict[Value, int] = {}
    for value, at in place.items():
        outside = _outside(value, wiring, known)
        if outside is not None:
            found[value] = np.asarray(outside)
        elif at is not None:
            _ = taps.setdefault(at, len(taps))
    if taps:
        records = _record(args, wiring, taps, lambda x: x)
        found |= {v: records[taps[at]] for v, at in place.items() if v not in found and at in taps}
    return found


def _outside(value: Value, wiring: Wiring, known: dict[Value, Any]) -> Any:
    for _ in range(100):
        if value in known:
            return known[value]
        behind = wiring.sources.get(value, [])
        if len(behind) != 1 or isinstance(behind[0], Lit):
            return None
        value = behind[0]
    return None


def _record(
    args: list[Any], wiring: Wiring, taps: dict[Value, int], of: Callable[[Any], Any]
) -> dict[int, np.ndarray]:
    slots = {}
    for value, i in taps.items():
        aval = wiring.table.avals[value]
        like = jax.eval_shape(of, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        lengths = wiring.lengths.get(wiring.producer[value], ())
        slots[i] = jnp.zeros((*lengths, *like.shape), like.dtype)
    tapped = rewrite.Tapped(wiring.table, taps, lambda x, _: (x, of(x)), jnp.zeros_like)
    run = jax.jit(lambda args, slots: tapped.run(wiring.block, args, slots)[1])
    return {i: np.asarray(x) for i, x in run(args, slots).items()}
