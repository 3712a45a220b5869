"""What the rules judge by: one place that runs passes and trainings, each at most once."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array

from jaxgrad.diagnosis import guess
from jaxgrad.diagnosis.births import Birth, births
from jaxgrad.diagnosis.parts import Activation, Softmax, Structure
from jaxgrad.diagnosis.passes import Instrument, Measurement, forward_values
from jaxgrad.diagnosis.problem import Problem
from jaxgrad.diagnosis.structure import read_structure
from jaxgrad.diagnosis.training import Run, Trainer
from jaxgrad.diagnosis.wiring import Wiring, wire
from jaxgrad.graph.ir import Value
from jaxgrad.optim.order import Order, clip_order
from jaxgrad.optim.reading import flattened, read_steps

Progress = Callable[[str], None]
# A run that takes this share off its loss is learning.
LEARNS = 0.3
# One that takes this share off is well enough: other circumstances are not tried.
WELL = 0.5
# A loss below this share of a guess's is that of a model that knows something.
KNOWS = 0.7
_STEPS = (80, 160)
_BUDGET = 4e10  # floating-point operations of one training


class Evidence:
    """Everything that is known of a problem; what costs something is found when it is asked for.

    Attributes:
        problem: the problem.
        optimizer: the user's, or None.
        wiring: the dataflow of the loss.
        structure: what the loss is built of.
        instrument: the instrumented pass.
        initial: its measurement on the given parameters.
        notes: probes that could not be run.
        clip_norm: norm above which the optimizer clips, once a rule has found it.
    """

    def __init__(self, problem: Problem, optimizer: Any, progress: Progress | None) -> None:
        self.problem, self.optimizer = problem, optimizer
        self.tell: Progress = progress or (lambda _: None)
        self.notes: list[str] = []
        self.tell("tracing the loss")
        self.wiring: Wiring = wire(problem)
        self.structure: Structure = read_structure(self.wiring)
        self.instrument = Instrument(problem, self.wiring, self.structure)
        self.undifferentiable = ""
        self.clip_norm: float | None = None
        self._runs: dict[Any, Run] = {}

    # ----------------------------------------------------------------------------- passes

    @functools.cached_property
    def initial(self) -> Measurement:
        """One pass on the given parameters."""
        self.tell("measuring the layers at the given parameters")
        return self.instrument.measure(self.problem.values)

    @functools.cached_property
    def values(self) -> dict[Value, np.ndarray]:
        """Tensors of the head, the labels and the data, as they are."""
        found = self.structure
        wanted = [s.source for s in found.softmaxes if s.head]
        wanted += [d.prediction for d in found.differences]
        wanted += [d.target for d in found.differences if isinstance(d.target, int)]
        wanted += [v for h in found.log_heads for v in (h.source, h.bare)]
        wanted += [b.target for b in found.binaries]
        wanted += [i.value for i in found.indices]
        wanted += [m.predicate for m in found.masks]
        wanted += [v for a in found.activations for f in a.affine for v in self.data_of(f.op)]
        self.tell("looking at data, labels and outputs")
        return forward_values(self.problem, self.wiring, list(dict.fromkeys(wanted)))

    def data_of(self, op: Any) -> list[Value]:
        """The operands of an operation that come from the data alone."""
        inputs = [v for v in op.inputs if isinstance(v, int)]
        return [v for v in inputs if v in self.wiring.from_data and v not in self.wiring.depends]

    @functools.cached_property
    def births(self) -> tuple[Birth | None, Birth | None]:
        """Where NaN or infinity was made first: at the given parameters, or where the run broke."""
        self.tell("looking for the operation that made NaN or infinity")
        run = self.main if self.initial.finite else None
        values = self.problem.values if run is None else run.values
        return births(self.problem, self.wiring, values, self.broken_batch)

    @property
    def broken_batch(self) -> Any:
        """The batch at which the run broke, the problem's own if it did not."""
        if self.initial.finite and self.main.stopped is not None:
            return self.problem.batches[self.main.stopped % len(self.problem.batches)]
        return self.problem.batch

    # ----------------------------------------------------------------------------- heads

    @functools.cached_property
    def head(self) -> Softmax | None:
        """The softmax of a classification: a logarithm is taken of it."""
        logs = any(h.kind == "log" for h in self.structure.log_heads)
        heads = [s for s in self.structure.softmaxes if s.head and (s.kind == "log" or logs)]
        return heads[-1] if heads else None

    @functools.cached_property
    def chance(self) -> float | None:
        """Loss of equal logits where the loss is a cross-entropy: ln K, if it is a mean."""
        return guess.chance(self.problem, self.wiring, self.structure, self.head)

    @functools.cached_property
    def baseline(self) -> float | None:
        """Loss of a model that knows nothing: `chance`, or that of predictions of zero."""
        wanted = guess.predictions(self.structure, self.wiring)
        return self.chance or guess.loss_of_zeros(self.problem, self.wiring, wanted)

    @functools.cached_property
    def constant(self) -> float | None:
        """Loss of a regression's best constant output, as a network gives that ignores its input.

        Targets far from zero, such as images, are mostly their mean: learning that alone takes off
        most of the loss.
        """
        return guess.loss_of_means(self.problem, self.wiring, self.structure, self.values)

    @functools.cached_property
    def marginal_entropy(self) -> float | None:
        """Loss of an output that knows the labels' frequencies and nothing of the input."""
        index = next((i for i in self.structure.indices if i.head), None)
        if self.chance is None or index is None or self.head is None:
            return None
        labels = np.asarray(self.values.get(index.value, ()))
        return guess.marginal_entropy(labels, self.chance / math.log(self.head.size))

    @property
    def is_trained(self) -> bool:
        """Whether the given parameters already know something, where a softmax tells it.

        A bias at the output lowers the loss of rare binary labels too.
        """
        known = self.chance is not None and self.head is not None
        return known and self.initial.value < KNOWS * (self.chance or 0.0)

    def hidden(self) -> list[Activation]:
        """Activations between layers, in forward order, that gate nothing."""
        is_head = self.wiring.is_head
        return [a for a in self.structure.activations if not (a.gate or is_head(a.output))]

    # ----------------------------------------------------------------------------- training

    @functools.cached_property
    def steps(self) -> int:
        """Number of steps of a training, fewer for big models."""
        flops = 0.0
        for op in self.wiring.ops():
            if op.name in ("dot_general", "conv_general_dilated"):
                sizes = [float(np.prod(self.wiring.shape(r))) for r in op.inputs[:2]]
                out = float(np.prod(self.wiring.shape(op.outputs[0])))
                work = math.sqrt(sizes[0] * sizes[1] * out)  # exact for a product of matrices
                flops += 6 * work * float(np.prod(self.wiring.lengths[op] or (1,)))
        return int(np.clip(_BUDGET / max(flops, 1.0), *_STEPS))

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The compiled training; with Adam alone if the user's optimizer cannot be run."""
        if self.optimizer is not None:
            trainer = Trainer(self.problem, self.optimizer, self.steps)
            try:
                trainer.check()
                return trainer
            except Exception as error:
                self.notes.append(
                    f"the optimizer could not be run, so nothing is said of it: {error}"
                )
                self.optimizer = None
        return Trainer(self.problem, None, self.steps)

    def run(self, **circumstances: Any) -> Run:
        """A training, remembered by its circumstances (numbers only)."""
        key = tuple(sorted(circumstances.items()))
        if key not in self._runs:
            words = ", ".join(f"{k} {v}" for k, v in key) or "as given"
            self.tell(f"training {self.steps} steps ({words})")
            self._runs[key] = self.trainer.run(**circumstances)
        return self._runs[key]

    def run_from(self, values: list[Array] | None = None, stack: Any = None) -> Run:
        """A training from other parameters or on other data."""
        self.tell(f"training {self.steps} steps from other parameters or on other data")
        return self.trainer.run(values, stack=stack)

    @property
    def main(self) -> Run:
        """The training as given."""
        return self.run()

    @functools.cached_property
    def patient(self) -> Trainer:
        """The training three times as long: a slow start is no fault."""
        self.tell(f"training {3 * self.steps} steps")
        return self.trainer.lasting(3 * self.steps)

    @functools.cached_property
    def longer(self) -> Run:
        """The training as given, three times as long."""
        return self.patient.run()

    def progress(self, run: Run) -> float:
        """The share of its loss that a run took off, from the smaller of first loss and a guess's.

        1 for a positive loss that went to zero; negative for a run that made it worse.
        """
        known = np.isfinite(self.initial.value) and run.levels is None
        return taken_off(self.initial.value if known else run.first, run.last, self.baseline)

    def gains(self, run: Run, times: float = 2.0, by: float = 0.1) -> bool:
        """Whether another training takes off so many times as much as the given one, and `by` more.

        The share that is taken off by a run that made it worse counts as none.
        """
        own = max(self.progress(self.main), 0.0)
        return self.progress(run) >= max(times * own, own + by)

    @functools.cached_property
    def alternatives(self) -> dict[str, Run]:
        """The same training at other learning rates, and with Adam at 1e-3."""
        found = {"scale 0.1": self.run(scale=0.1), "scale 0.01": self.run(scale=0.01)}
        found["scale 10"] = self.run(scale=10.0)
        if self.optimizer is not None:
            found["Adam 1e-3"] = self.run(reference=True)
        return found

    @functools.cached_property
    def learns(self) -> bool:
        """Whether the training as given gets somewhere: in itself, or next to the alternatives.

        A loss that nothing lowers has converged, or is noise: that is no failure of the training.
        """
        own = self.progress(self.main)
        if own >= LEARNS:
            return True
        if self.main.stopped is not None:
            return False
        best = max(self.progress(run) for run in self.alternatives.values())
        return best < 0.1 or own > 0.4 * best

    @functools.cached_property
    def stuck(self) -> bool:
        """Whether the training as given gets nowhere, whatever the learning rate.

        For rules that have seen a symptom: what is not `learns` is stuck, and so is a loss at
        chance that nothing lowers.
        """
        if self.improves or self.is_trained:
            return False
        if self.main.stopped is not None:
            return True
        own = self.progress(self.main)
        best = max(self.progress(run) for run in self.alternatives.values())
        return best < 0.1 or own <= 0.4 * best

    @property
    def improves(self) -> bool:
        """Whether the training as given lowers the loss markedly; needs no alternative run."""
        return self.progress(self.main) >= LEARNS

    @functools.cached_property
    def final(self) -> Measurement:
        """One pass at the end of the training as given."""
        return self.instrument.measure(self.main.values)

    def kept(self, run: Run) -> float | None:
        """How much of the output's spread over the data is left at the end of a training.

        The standard deviation over the inputs, relative to that at the given parameters: 1e-6 of a
        model whose output no longer depends on its input. None where there is no output to look at.
        """
        before = output_spread(self, self.initial)
        if not before or run.stopped is not None:
            return None
        final = self.final if run is self.main else self.instrument.measure(run.values)
        after = output_spread(self, final)
        return None if after is None else after / before

    @property
    def plain_optimizer(self) -> Any:
        """The user's transformation itself, whose closures can be read."""
        held: Any = self.optimizer
        return held if hasattr(held, "init") else getattr(held, "tx", None)

    @functools.cached_property
    def clip(self) -> Order | None:
        """Where the optimizer clips; None where it has no clip that could be read."""
        if self.optimizer is None:
            return None
        read = flattened(read_steps(self.optimizer))
        if read and not any(step.kind == "clip" for step in read):
            return None
        self.tell("probing the optimizer")
        try:
            return clip_order(self.optimizer, self.problem.tree(self.problem.values))
        except Exception as error:  # an optimizer that needs more than gradients
            self.notes.append(f"the optimizer could not be probed: {error}")
            return None

    @functools.cached_property
    def every(self) -> int:
        """Number of micro-steps from update to update; 1 without accumulation."""
        moved = self.main.update_norms > 0
        if not moved.any() or moved.mean() > 0.6:
            return 1
        first = int(np.argmax(moved))
        second = np.flatnonzero(moved[first + 1 :])
        return int(second[0]) + 1 if second.size else first + 1


def taken_off(first: float, last: float, chance: float | None) -> float:
    """The share of a loss that a run took off; -inf where it ended in no number."""
    base = min(first, chance) if chance is not None and first > 0 else first
    if not math.isfinite(last):
        return -math.inf
    return (base - last) / max(abs(base), 1e-12)


def output_spread(evidence: Evidence, measured: Measurement) -> float | None:
    """Standard deviation of the model's output over the data, mean over its units."""
    for value in reversed(evidence.structure.outputs):
        tensor = measured.tensors.get(value)
        if tensor is None or not np.isfinite(tensor.row["rms"]).all():
            continue
        if tensor.units.shape[-1]:
            return float(tensor.units[..., 3, :].mean())
        rms, mean = np.max(tensor.row["rms"]), np.max(tensor.row["mean"])
        if np.isnan(tensor.row["example_share"]).all():  # one number an example
            return math.sqrt(max(float(rms**2 - mean**2), 0.0))
        return float(rms) * math.sqrt(float(np.nanmax(tensor.row["example_share"])))
    return None


def leaf_index(evidence: Evidence) -> dict[str, int]:
    """Name -> position of the parameter leaves."""
    return {name: i for i, name in enumerate(evidence.problem.names)}
