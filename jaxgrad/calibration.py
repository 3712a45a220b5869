"""Data-dependent initialization: rescale weights until every layer passes signals at scale one."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxgrad import gain
from jaxgrad.gain import Measured
from jaxgrad.graph import weighted
from jaxgrad.graph.marks import Weight
from jaxgrad.graph.program import Program, State
from jaxgrad.graph.weighted import Reading, WeightedLayer

# What a layer with zero weights must pass on to count as residual.
_RESIDUAL = 0.1
# R residual layers may multiply the squared gradient by this before they are shrunk: Pre-LN, whose
# gains go like 1 + 1/l, stays below e^2 by this measure; blocks of gain 2 pass it at R = 7.
_EXPLOSION = 100.0
# Mean squares of the first pre-activation that are left as they are.
_BAND = (0.1, 10.0)
_TOLERANCE = 1e-3
_ACCEPTED = 0.02
_NO_WEIGHT = Weight(-1)


@dataclass(frozen=True)
class CalibratedLayer:
    """What calibration did to one layer.

    Attributes:
        name: the layer.
        status: "scaled"; "residual" (left as it is: a path goes around its weights); "no weight";
            "tied" (an earlier layer has scaled its weights); "insensitive" (its scale does not
            change what is measured, as before a norm); "unreachable" (it does, but never to one, as
            in narrow sigmoid layers); "dead" (it passes nothing on); "unsliced" (its weights cannot
            be scaled apart from other layers'); "standardized" (where data enter: scaled to
            pre-activations of mean square one).
        factor: what its weights were multiplied by.
        before: the measured quantity with the given weights, at calibrated inputs.
        after: the same with the new weights.
        parameters: names of the leaves that were scaled.
    """

    name: str
    status: str
    factor: float
    before: float
    after: float
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` did.

    Attributes:
        layers: one entry a layer, first to last; the layer where data enter comes first.
        target: what was set to one.
        off_chain: parameter leaves of products outside of the chain (embeddings that meet later, a
            second input's tower): left as they are.
    """

    layers: tuple[CalibratedLayer, ...]
    target: str
    off_chain: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [
            f"{r.name}: {r.status}, factor {r.factor:.4g}, {r.before:.4g} -> {r.after:.4g}"
            for r in self.layers
        ]
        notes = [f"off the chain: {', '.join(self.off_chain)}"] if self.off_chain else []
        return "\n".join([f"{self.target} to one", *rows, *notes])


def calibrate(  # noqa: PLR0913
    loss: Callable[..., Array],
    params: PyTree,
    batch: PyTree,
    *,
    target: Literal["jacobian", "variance"] = "jacobian",
    probes: int = 16,
    iterations: int = 24,
    key: Array | None = None,
    return_report: bool = False,
) -> Any:
    """Rescale the weights until every layer passes the gradient on at scale one.

    The layers are those of the chain from the first activation that depends on parameters and batch
    to the last cut before the loss, first to last, each at the output of the calibrated ones before
    it. A layer's weights (what a product multiplies its input with: no biases, no norm scales) all
    get one factor. It is the factor at which the mean squared singular value of the layer's
    Jacobian over the batch, `||J||_F^2 / n_out`, is one: a random gradient then keeps its norm
    (`chi_1 = 1` of Schoenholz et al. 2017, measured instead of assumed). With the target "variance"
    it is the factor at which the variance of the layer's pre-activation is one, as in LSUV (Mishkin
    and Matas 2016, arXiv 1511.06422).

    The layer where float data enter is scaled by its Jacobian with respect to them; if its
    pre-activations then had a mean square outside [0.1, 10] (data far from scale one), to a mean
    square of one instead. Embeddings of integers are left. Residual layers are left, too: with the
    skip path their mean squared singular value is above one whatever the weights; only if R of them
    explode (median gain to the power R above 100) each is brought to 1 + 1/R. A weight that several
    layers share belongs to the first, and an embedding that is also the readout is left; weights
    stacked for a scan are scaled slice by slice.

    Args:
        loss: `loss(params, batch)`, or `loss(params, batch, key)` if `key` is given; a real scalar.
        params: any pytree; leaves that are no floating-point arrays stay as they are.
        batch: a pytree of arrays, with a good number of examples.
        target: "jacobian" or "variance".
        probes: random vectors a layer whose Jacobian has more than 256 rows an example; smaller
            ones are measured exactly where the first axis counts independent examples.
        iterations: most measurements a layer.
        key: for the random vectors, and the loss's third argument.
        return_report: whether to return the `Calibration` too.

    Returns:
        The rescaled parameters; with `return_report`, `(params, report)`.

    Raises:
        ValueError: if no activation depends on both arguments, no layer has a weight to scale, or
            activations are not finite (it names the layer).
        TypeError: if the loss is no real scalar.

    Warns:
        UserWarning: for layers that pass no gradient at all (zero weights, dead units); they are
            left as they are.
    """
    if target not in ("jacobian", "variance"):
        raise ValueError(f"calibrate(target=): expected 'jacobian' or 'variance', got {target!r}")
    reading = weighted.read(loss, params, (batch,) if key is None else (batch, key))
    if not any(layer.weights for layer in _all_layers(reading)):
        raise ValueError(
            "calibrate: no layer of the chain has a weight to scale; the layers are "
            f"{[layer.name for layer in reading.layers]}, and products elsewhere use "
            f"{list(reading.off_chain)}"
        )
    settings = _Settings(target, probes, iterations, jax.random.key(0) if key is None else key)
    sweep = _Sweep(reading, settings)
    sweep.run(residual=None)
    gains = [r.gain for r in sweep.rows if r.row.status == "residual"]
    if gains and len(gains) * np.log(np.median(gains)) > np.log(_EXPLOSION):
        sweep = _Sweep(reading, settings)
        sweep.run(residual=1 + 1 / len(gains))
    report = Calibration(tuple(r.row for r in sweep.rows), target, reading.off_chain)
    dead = [row.name for row in report.layers if row.status == "dead"]
    if dead:
        warnings.warn(
            f"calibrate: layers {dead} pass no gradient (zero weights or dead units), so no factor "
            "can bring them to scale one; they are left as they are. Give them nonzero weights "
            "first if that is not meant.",
            stacklevel=2,
        )
    scaled = _apply(reading, sweep.factors)
    return (scaled, report) if return_report else scaled


def _all_layers(reading: Reading) -> tuple[WeightedLayer, ...]:
    return (*([reading.entry] if reading.entry else []), *reading.layers)


def _apply(reading: Reading, factors: dict[Weight, float]) -> PyTree:
    leaves = list(reading.leaves)
    for weight, factor in factors.items():
        leaf = jnp.asarray(leaves[weight.leaf])
        scale = jnp.asarray(factor, leaf.dtype)
        at = leaf.at[weight.index] if weight.index else leaf.at[...]
        leaves[weight.leaf] = at.multiply(scale)
    return jax.tree.unflatten(reading.treedef, leaves)


class _Settings(NamedTuple):
    target: str
    probes: int
    iterations: int
    key: Array


class _Row(NamedTuple):
    """A layer's entry in the report, with its gain whatever the target."""

    row: CalibratedLayer
    gain: float


class _Sweep:
    """One pass over the layers, first to last."""

    def __init__(self, reading: Reading, settings: _Settings) -> None:
        self.reading, self.settings = reading, settings
        self.factors: dict[Weight, float] = {}
        self.owner: dict[Weight, str] = {}
        self.rows: list[_Row] = []
        self.sides: dict[Any, Any] = {}

    def constants(self, program: Program) -> State:
        """The program's constants with the factors found so far, wherever a weight is used."""
        values = list(self.reading.constants(program))
        for position, value in enumerate(program.constants, start=len(program.literals)):
            factor = self.factors.get(self.reading.weight_of.get(value, _NO_WEIGHT))
            if factor is not None:
                values[position] = values[position] * jnp.asarray(factor, values[position].dtype)
        return tuple(values)

    def run(self, residual: float | None) -> None:
        """Fit every layer; `residual` is the goal of residual ones, None leaves them."""
        reading, entry = self.reading, self.reading.entry
        if entry is not None:
            self.rows.append(self._fit(entry, reading.data, residual, True))
        start = reading.start
        # what the first activation is made of is settled: scaled by a later layer that shares it (a
        # tied embedding), it would change the input of every layer in between
        made_of = (reading.weight_of.get(value) for value in start.constants)
        self.owner |= {w: "start" for w in made_of if w is not None and w not in self.owner}
        state, _ = gain.run(start, self.constants(start), (), ())
        self.sides |= dict(zip(start.after, state, strict=True))
        for layer in reading.layers:
            is_entry = reading.at_data and layer is reading.layers[0]
            self.rows.append(self._fit(layer, state, residual, is_entry))
            program = layer.program
            sides = tuple(self.sides[v] for v in program.sides)
            after, made = gain.run(program, self.constants(program), sides, state)
            state = after[: len(after) - bool(layer.weights or layer.blocked)]
            self.sides |= dict(zip(program.side_outputs, made, strict=True))
            self.sides |= dict(zip(program.after, state, strict=False))

    def _fit(
        self, layer: WeightedLayer, state: State, residual: float | None, is_entry: bool
    ) -> _Row:
        own = {p: w for p, w in layer.weights.items() if w not in self.owner}
        measure = self._measurer(layer, state, tuple(own))
        now = measure(1.0)
        if not now.finite:
            raise ValueError(
                f"calibrate: layer {layer.name!r} gives NaN or infinite activations or gradients; "
                "check the batch and the parameters of this layer"
            )
        pick = self._quantity(layer)
        status, factor, after = self._choose(layer, own, measure, now, residual, is_entry)
        if factor != 1:
            self.factors |= dict.fromkeys(own.values(), factor)
        self.owner |= dict.fromkeys(own.values(), layer.name)
        names = tuple(sorted({self.reading.leaf_names[w.leaf] for w in own.values()}))
        row = CalibratedLayer(
            layer.name, status, factor, pick(now), pick(after), names if factor != 1 else ()
        )
        return _Row(row, after.gain)

    def _quantity(self, layer: WeightedLayer) -> Callable[[Measured], float]:
        by_variance = self.settings.target == "variance" and layer.weights
        return (lambda m: m.variance) if by_variance else (lambda m: m.gain)

    def _choose(
        self, layer: WeightedLayer, own: dict[int, Weight], measure: Any, now: Measured,
        residual: float | None, is_entry: bool,
    ) -> tuple[str, float, Measured]:  # fmt: skip
        """The layer's status, its factor, and what is measured with it."""
        if not own:
            why = "tied" if layer.weights else "unsliced" if layer.blocked else "no weight"
            return why, 1.0, now
        around = measure(0.0).gain
        around = around if np.isfinite(around) else 0.0
        goal = 1.0
        if around >= _RESIDUAL:
            if residual is None or now.gain <= residual or around >= residual:
                return "residual", 1.0, now
            goal = residual
            chosen = self._solve(lambda m: (m.gain - around) / (goal - around), measure, now)
            return chosen if chosen[0] == "scaled" else ("residual", 1.0, now)
        chosen = self._solve(self._quantity(layer), measure, now)
        square = chosen[2].mean_square
        if is_entry and self.settings.target == "jacobian" and not _BAND[0] <= square <= _BAND[1]:
            status, factor, after = self._solve(lambda m: m.mean_square, measure, now)
            return ("standardized" if status == "scaled" else status), factor, after
        return chosen

    def _measurer(
        self, layer: WeightedLayer, state: State, own: tuple[int, ...]
    ) -> Callable[[float], Measured]:
        program = layer.program
        spec = gain.Spec(own, bool(layer.weights or layer.blocked), self.settings.probes)
        sides = tuple(self.sides[v] for v in program.sides)
        constants = self.constants(program)

        def measure(factor: float) -> Measured:
            found = gain.measure(
                program, spec, constants, sides, state, jnp.float32(factor), self.settings.key
            )
            return Measured(*np.asarray(found, np.float64).tolist())

        return measure

    def _solve(
        self, quantity: Callable[[Measured], float], measure: Callable[[float], Measured],
        now: Measured,
    ) -> tuple[str, float, Measured]:  # fmt: skip
        """The factor at which a quantity is one, by secant steps in logarithms."""
        if not quantity(now) > 0:
            return "dead", 1.0, now
        x, y, slope = 0.0, float(np.log(quantity(now))), 2.0
        best, moved = (abs(y), x, now), 0.0
        for _ in range(self.settings.iterations):
            if best[0] < _TOLERANCE:
                break
            step = float(np.clip(-y / slope, -5, 5))
            found = measure(float(np.exp(x + step)))
            value = quantity(found)
            if not (np.isfinite(value) and value > 0):  # over- or underflow: half the way
                slope *= 2
                continue
            new = float(np.log(value))
            measured = (new - y) / step
            moved = max(moved, abs(new - y))
            if moved < 1e-3:
                break  # the scale of these weights does not change it
            if measured < 0.02:  # past a maximum
                slope *= 2
                continue
            x, y, slope = x + step, new, float(np.clip(measured, 0.25, 16))
            best = min(best, (abs(y), x, found), key=lambda entry: entry[0])
        if best[0] > _ACCEPTED:
            return "insensitive" if moved < 1e-3 else "unreachable", 1.0, now
        return "scaled", float(np.exp(best[1])), best[2]
