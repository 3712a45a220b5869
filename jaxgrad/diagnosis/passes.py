"""The instrumented passes: one forward and backward pass with every layer and activation measured.

Compiled once, the pass is run on other parameters, other data and another scale of the loss.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxgrad.diagnosis import tapping
from jaxgrad.diagnosis.parts import Structure
from jaxgrad.diagnosis.problem import Problem, arrays_of
from jaxgrad.diagnosis.wiring import Wiring, inputs_for
from jaxgrad.graph import rewrite, sites
from jaxgrad.graph.ir import Lit, Ref, Value, is_real_dtype, value_inputs

_MAX_UNITS = 4096
# Elements of all tensors that are carried to the host, and measured there.
_MAX_CARRIED = 2**24


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
    tensors: dict[Value, tapping.Tensor]
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
        sizes = [math.prod((*n, *wiring.shape(v))) for v, n in values.items()]
        self.outside = sum(sizes) <= _MAX_CARRIED
        taps = (
            (tapping.tap_outside, tapping.blank_outside)
            if self.outside
            else (tapping.tap_inside, tapping.blank_inside)
        )
        self.tapped = rewrite.Tapped(wiring.table, self.index, *taps)
        self._compiled = jax.jit(self._run)

    def _units(self, value: Value) -> tuple[int, int]:
        """The axis of a tensor's units, and how many of them are looked at."""
        shape, axis = self.wiring.shape(value), channel_axis(value, self.wiring)
        return axis, shape[axis] if len(shape) >= 2 and shape[axis] <= _MAX_UNITS else 0

    def _slots(self) -> dict[int, tapping.Slot]:
        slots = {}
        for value, i in self.index.items():
            lengths, shape = self.lengths[value], self.wiring.shape(value)
            if self.outside:
                dtype = self.wiring.table.avals[value].dtype
                slots[i] = tapping.slot_outside(lengths, shape, dtype)
            else:
                slots[i] = tapping.slot_inside(lengths, *self._units(value))
        return slots

    def _tensor(self, value: Value, record: Any, back: Any) -> tapping.Tensor:
        if self.outside:
            return tapping.of_tensors(record, back, *self._units(value))
        return tapping.of_figures(record, back)

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
        out = self._compiled(list(values), arrays_of(batch), key, jnp.float32(scale))
        loss, grads, records, back = jax.device_get(out)
        tensors = {v: self._tensor(v, records[i], back[i]) for v, i in self.index.items()}
        names, index = sites.rows(self.planned)
        flat = {
            key: np.concatenate([np.ravel(tensors[s.value].row[key]) for s in self.planned])[index]
            if self.planned
            else np.zeros(0)
            for key in (*tapping.FORWARD, *tapping.BACKWARD)
        }
        owners = [s.parameters for s in self.planned for _ in range(int(np.prod(s.lengths)))]
        tensors |= {v: tensors[at] for v, at in self.place.items()}
        return Measurement(
            float(loss), [np.asarray(g) for g in grads], tensors, tuple(names), flat,
            tuple(owners[i] for i in index),
        )  # fmt: skip


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
    taps: dict[Value, None] = {}
    for value, at in place.items():
        outside = _outside(value, wiring, known)
        if outside is not None:
            found[value] = np.asarray(outside)
        elif at is not None:
            taps[at] = None
    if taps:
        records = record(args, wiring, list(taps), lambda x: x)
        found |= {v: records[at] for v, at in place.items() if v not in found and at in taps}
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


def record(
    args: list[Any], wiring: Wiring, values: Sequence[Value], of: Callable[[Any], Any]
) -> dict[Value, np.ndarray]:
    """A function of some results of operations, from one forward pass; every iteration has its own.

    Args:
        args: the inputs of the dataflow.
        wiring: the dataflow.
        values: results of its operations.
        of: what is kept of each.
    """
    slots = {}
    for i, value in enumerate(values):
        aval = wiring.table.avals[value]
        like = jax.eval_shape(of, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        lengths = wiring.lengths.get(wiring.producer[value], ())
        slots[i] = jnp.zeros((*lengths, *like.shape), like.dtype)
    taps = {value: i for i, value in enumerate(values)}
    tapped = rewrite.Tapped(wiring.table, taps, lambda x, _: (x, of(x)), jnp.zeros_like)
    run = jax.jit(lambda args, slots: tapped.run(wiring.block, args, slots)[1])
    return {values[i]: np.asarray(x) for i, x in run(args, slots).items()}
