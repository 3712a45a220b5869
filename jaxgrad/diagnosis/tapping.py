"""What is measured of one tensor and of its cotangent, inside the compiled program or on the host.

Inside, nothing but the figures leaves the program, but every tensor's dozens of reductions are
compiled; they take several times as long as the program itself. Small tensors are carried out and
measured by numpy: the same functions, for both.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxgrad.taps import make_tap

FORWARD = (
    "rms", "mean", "max", "zero_share", "nonfinite", "example_share", "token_share",
    "beyond_tanh", "beyond_sigmoid",
)  # fmt: skip
BACKWARD = ("gradient_rms", "gradient_max", "gradient_nonfinite")

# |tanh| above this is saturated (slope below 6 %), and a sigmoid where |2s - 1| is
SATURATED = 0.97

# What is measured of a unit: the last three are the shares of the data on which a rectifier, a tanh
# and a sigmoid work: they are neither silent nor at their bounds.
UNITS = ("low", "high", "mean", "std", "active", "inside_tanh", "inside_sigmoid")

Slot = dict[str, Array]


@dataclass(frozen=True, eq=False)
class Tensor:
    """What was measured of one tensor; arrays have the lengths of the scans around it in front.

    Attributes:
        row: forward and backward statistics by name, each of shape lengths.
        units: what `UNITS` says of every unit, (*lengths, len(UNITS), units).
        unit_gradients: the same of the cotangent's magnitude.
    """

    row: dict[str, np.ndarray]
    units: np.ndarray
    unit_gradients: np.ndarray


def _namespace(x: Any) -> Any:
    return np if isinstance(x, np.ndarray) else jnp


def _each(x: Any) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _largest(x: Any) -> Any:
    xp = _namespace(x)
    return xp.max(xp.abs(x), axis=_each(x), keepdims=True, initial=0.0)


def _scaled_rms(x: Any) -> tuple[Any, Any]:
    """Root mean square and largest magnitude along the first axis, without overflow."""
    xp, largest = _namespace(x), _largest(x)
    unit = xp.where(largest > 0, largest, 1.0)
    rms = xp.sqrt(xp.mean(xp.square(x / unit), axis=_each(x)))
    return rms * unit.reshape(-1), largest.reshape(-1)


def _share_within(x: Any, axis: int) -> Any:
    """The share of the energy that varies along an axis, for each entry of the first."""
    xp = _namespace(x)
    if x.shape[axis] < 2:
        return xp.full(x.shape[0], xp.nan)
    x = x / xp.maximum(_largest(x), 1e-30)
    energy = xp.mean(xp.square(x), axis=_each(x))
    varied = xp.mean(xp.square(x - xp.mean(x, axis=axis, keepdims=True)), axis=_each(x))
    return xp.where(energy > 0, varied / xp.where(energy > 0, energy, 1.0), xp.nan)


def _forward_row(x: Any) -> Any:
    """(K, ...) -> (K, len(FORWARD))."""
    xp = _namespace(x)
    if x.size == 0:
        return xp.zeros((x.shape[0], len(FORWARD)), np.float32)
    rms, largest = _scaled_rms(x)
    unknown = xp.full(x.shape[0], xp.nan)
    examples = _share_within(x, 1) if x.ndim >= 3 else unknown
    tokens = _share_within(x, -2) if x.ndim >= 4 else unknown
    beyond = [xp.abs(x) > SATURATED, xp.abs(2 * x - 1) > SATURATED]
    row = [rms, xp.mean(x, axis=_each(x)), largest, xp.mean(x == 0, axis=_each(x))]
    row += [xp.sum(~xp.isfinite(x), axis=_each(x)), examples, tokens]
    row += [xp.mean(b, axis=_each(x)) for b in beyond]
    return xp.stack([xp.asarray(r, np.float32) for r in row], axis=-1)


def _backward_row(x: Any) -> Any:
    """(K, ...) -> (K, len(BACKWARD))."""
    xp = _namespace(x)
    rms, largest = _scaled_rms(x)
    nonfinite = xp.sum(~xp.isfinite(x), axis=_each(x))
    return xp.stack([xp.asarray(r, np.float32) for r in (rms, largest, nonfinite)], axis=-1)


def _units(x: Any, axis: int, count: int) -> Any:
    """Of every unit over the data, (K, ...) -> (K, len(UNITS), count); axis is counted from -1."""
    xp = _namespace(x)
    if x.size == 0 or count == 0:
        return xp.zeros((x.shape[0], len(UNITS), count), np.float32)
    x = xp.moveaxis(x, axis, -1).reshape(x.shape[0], -1, count)
    shares = [x != 0, xp.abs(x) <= SATURATED, xp.abs(2 * x - 1) <= SATURATED]
    found = [x.min(1), x.max(1), x.mean(1), x.std(1), *(s.mean(1) for s in shares)]
    return xp.stack([xp.asarray(f, np.float32) for f in found], axis=1)


def slot_inside(lengths: tuple[int, ...], axis: int, units: int) -> Slot:
    """What takes the figures of the cotangent where they are computed inside the program."""
    return {
        "row": jnp.zeros((*lengths, len(BACKWARD))),
        f"units{axis}": jnp.zeros((*lengths, len(UNITS), units)),
    }


def _axis(slot: Slot) -> tuple[str, int]:
    key = next(k for k in slot if k.startswith("units"))
    return key, int(key[5:])


def _one(x: Array) -> Array:
    return x.astype(jnp.float32)[None]


@jax.custom_vjp
def _measured(x: Array, slot: Slot) -> Array:
    del slot
    return x


def _measured_forward(x: Array, slot: Slot) -> tuple[Array, Slot]:
    return x, slot


def _measured_backward(slot: Slot, cotangent: Array) -> tuple[Array, Slot]:
    key, axis = _axis(slot)
    units = _units(jnp.abs(_one(cotangent)), axis, slot[key].shape[-1])[0]
    return cotangent, {"row": _backward_row(_one(cotangent))[0], key: units}


_ = _measured.defvjp(_measured_forward, _measured_backward)


def tap_inside(x: Array, slot: Slot) -> tuple[Array, Slot]:
    """A tap that measures inside the program."""
    key, axis = _axis(slot)
    seen = _one(jax.lax.stop_gradient(x))
    record = {"row": _forward_row(seen)[0], key: _units(seen, axis, slot[key].shape[-1])[0]}
    return _measured(x, slot), record


def blank_inside(slot: Slot) -> Slot:
    """What stands for a tensor that was not computed."""
    key, _ = _axis(slot)
    row = jnp.zeros((*slot["row"].shape[:-1], len(FORWARD)))
    return {"row": row, key: jnp.zeros_like(slot[key])}


def of_figures(record: dict[str, Any], back: dict[str, Any]) -> Tensor:
    """What was measured inside."""
    key = next(k for k in record if k.startswith("units"))
    row = {name: np.asarray(record["row"][..., i]) for i, name in enumerate(FORWARD)}
    row |= {name: np.asarray(back["row"][..., i]) for i, name in enumerate(BACKWARD)}
    return Tensor(row, np.asarray(record[key]), np.asarray(back[key]))


def slot_outside(lengths: tuple[int, ...], shape: tuple[int, ...], dtype: Any) -> Slot:
    """What takes the cotangent itself."""
    return {"tensor": jnp.zeros((*lengths, *shape), dtype), "seen": jnp.zeros(lengths)}


_carried = make_tap(lambda cotangent: {"tensor": cotangent, "seen": jnp.ones(())})


def tap_outside(x: Array, slot: Slot) -> tuple[Array, Slot]:
    """A tap that carries the tensor out of the program."""
    record = {"tensor": jax.lax.stop_gradient(x), "seen": jnp.ones(())}
    return _carried(x, slot), record


def blank_outside(slot: Slot) -> Slot:
    """What stands for a tensor that was not computed."""
    return jax.tree.map(jnp.zeros_like, slot)


def of_tensors(record: dict[str, Any], back: dict[str, Any], axis: int, units: int) -> Tensor:
    """Measures what was carried out."""
    seen = np.asarray(record["seen"]) > 0
    lengths, computed = seen.shape, seen.reshape(-1)

    def stacked(x: Any) -> np.ndarray:
        # in double precision, as the mean of equal numbers has to be that number
        shape = np.shape(x)[len(lengths) :]
        return np.asarray(x).astype(np.float64).reshape(computed.size, *shape)

    with np.errstate(all="ignore"):  # what is not finite is counted, and not warned of
        x, cotangent = stacked(record["tensor"]), stacked(back["tensor"])
        forward, backward = _forward_row(x), _backward_row(cotangent)
        of_units = [_units(t, axis, units) for t in (x, np.abs(cotangent))]
    for table in (forward, backward, *of_units):
        table[~computed] = 0.0  # as inside the program: a branch that was not taken says nothing
    row = {name: forward[:, i].reshape(lengths) for i, name in enumerate(FORWARD)}
    row |= {name: backward[:, i].reshape(lengths) for i, name in enumerate(BACKWARD)}
    first, second = (t.reshape(*lengths, *t.shape[1:]) for t in of_units)
    return Tensor(row, first, second)
