"""Short instrumented trainings: one compiled program, run under other circumstances.

The scale of the updates, a warm-up, other parameters, another optimizer and other data are
arguments of the program, so that a counterfactual costs its steps and no compilation.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jaxgrad.diagnosis.packing import step_figures
from jaxgrad.diagnosis.problem import FEW, Problem, arrays_of, count_examples

REFERENCE_RATE = 1e-3


@dataclass(frozen=True, eq=False)
class Run:
    """A short training.

    Attributes:
        losses: loss before every step, (T,); NaN from the first step that was not finite on.
        gradient_norms: norm of the raw gradient, (T,).
        update_norms: norm of what was added to the parameters, (T,).
        alignment: cosine between update and negative gradient, (T,).
        weight_rms, gradient_rms, update_rms: of every leaf, (T, leaves).
        rounded_away: share of every leaf's updates that did not change the parameter, (T, leaves).
        values: the last parameters; those of the first step that was not finite, if there is one.
        stopped: that step, or None.
        levels: mean loss of all batches before and after, where a batch says too little.
    """

    losses: np.ndarray
    gradient_norms: np.ndarray
    update_norms: np.ndarray
    alignment: np.ndarray
    weight_rms: np.ndarray
    gradient_rms: np.ndarray
    update_rms: np.ndarray
    rounded_away: np.ndarray
    values: list[Array]
    stopped: int | None
    loss_finite_at_stop: bool
    levels: tuple[float, float] | None = None

    @property
    def first(self) -> float:
        """The loss at the beginning."""
        return self.levels[0] if self.levels else float(self.losses[0])

    @property
    def last(self) -> float:
        """The loss at the end: median of the last tenth; infinite if the run broke down."""
        if self.stopped is not None:
            return float("inf")
        if self.levels:
            return self.levels[1]
        tail = self.losses[-max(len(self.losses) // 10, 1) :]
        return float(np.median(tail))

    @property
    def lowest(self) -> float:
        """The lowest smoothed loss of the run."""
        finite = self.losses[np.isfinite(self.losses)]
        if finite.size == 0:
            return float("inf")
        width = max(len(finite) // 10, 1)
        smooth = np.convolve(finite, np.ones(width) / width, mode="valid")
        return float(smooth.min())

    @property
    def drop(self) -> float:
        """By how much the loss fell, relative to its first value."""
        return (self.first - self.last) / max(abs(self.first), 1e-12)

    @property
    def warms_up(self) -> bool:
        """Whether the updates grow from next to nothing over the run."""
        norms = self.update_norms[self.update_norms > 0]
        if len(norms) < 8:
            return False
        start, end = float(norms[0]), float(np.median(norms[len(norms) // 2 :]))
        early = float(np.median(norms[: len(norms) // 4]))
        return start < 0.2 * end and early < 0.8 * end

    @property
    def update_ratio(self) -> float:
        """Median over steps and matrices of update RMS over weight RMS, where something moved."""
        return self.typical_ratio(0)

    def typical_ratio(self, start: int) -> float:
        """The same from a step on. Biases that begin at zero count only where nothing else is."""
        wide = [i for i, value in enumerate(self.values) if value.ndim >= 2]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = (self.update_rms / self.weight_rms)[start:, wide or slice(None)]
        ratio = ratio[np.isfinite(ratio) & (ratio > 0)]
        return float(np.median(ratio)) if ratio.size else 0.0


class Trainer:
    """The compiled training of a problem.

    Args:
        problem: the problem.
        tx: the user's optimizer, or None for the reference alone (Adam at 1e-3).
        steps: number of steps.
    """

    def __init__(self, problem: Problem, tx: Any, steps: int) -> None:
        self.problem, self.steps = problem, steps
        self.reference = optax.adam(REFERENCE_RATE)
        self.tx = (
            self.reference if tx is None else optax.with_extra_args_support(_transformation(tx))
        )
        self.own = tx is not None
        self._compiled_begin = jax.jit(self._begin)
        self._compiled_loss = jax.jit(self._loss)
        self._few = (count_examples(problem.batch) or FEW) < FEW
        self._compiled_step = jax.jit(self._step, donate_argnums=0)
        self.stack = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *map(arrays_of, problem.batches)
        )

    def _batch(self, stack: PyTree, t: Array) -> PyTree:
        count = len(self.problem.batches)
        picked = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, t % count, keepdims=False), stack
        )
        return _with_arrays(self.problem.batch, picked)

    def _grads(self, values: list[Array], batch: PyTree, key: Any) -> tuple[Array, list[Array]]:
        def objective(values: list[Array]) -> Array:
            return self.problem.value(values, batch, key)

        return jax.value_and_grad(objective)(values)

    def _begin(self, values: list[Array]) -> Any:
        tree = self.problem.tree(values)
        states = self.tx.init(tree), self.reference.init(tree)
        # strong types, which every step returns, and copies, as a step takes the buffers over
        return jax.tree.map(_settled, (values, states, jnp.asarray(True)))

    def _step(self, carry: Any, t: Array, stack: PyTree, controls: dict[str, Array]) -> Any:
        problem = self.problem
        values, states, ok = carry
        key = None if problem.key is None else jax.random.fold_in(problem.key, t)
        batch = self._batch(stack, t)
        loss, grads = self._grads(values, batch, key)
        tree, gradient = problem.tree(values), problem.tree(grads)
        extra = {
            "value": loss, "grad": gradient,
            "value_fn": lambda tree: problem.value(problem.flat(tree), batch, key),
        }  # fmt: skip
        louder = jax.tree.map(lambda g: (g * controls["gain"]).astype(g.dtype), gradient)
        own, own_state = self.tx.update(louder, states[0], tree, **extra)
        ref, ref_state = self.reference.update(gradient, states[1], tree)
        ramp = jnp.minimum(1.0, (t + 1) / jnp.maximum(controls["warmup"], 1.0))
        factor = controls["scale"] * ramp
        updates = [
            _wide(jnp.where(controls["reference"] > 0, b, a)) * factor * (1.0 if use else 0.0)
            for a, b, use in zip(
                problem.flat(own), problem.flat(ref), problem.trainable, strict=True
            )
        ]
        figures = step_figures(values, grads, updates)
        good = ok & jnp.isfinite(loss) & figures.pop("finite")
        moved = [
            jnp.where(good, (p + u).astype(p.dtype), p)
            for p, u in zip(values, updates, strict=True)
        ]
        figures |= {"loss": loss.astype(jnp.float32), "finite": jnp.isfinite(loss)}
        return (moved, (own_state, ref_state), good), figures | {"good": good}

    def _loss(self, values: list[Array], stack: PyTree, t: Array) -> Array:
        return self.problem.value(values, self._batch(stack, t))

    def level(self, values: Sequence[Array], stack: PyTree = None) -> float:
        """Mean loss of all batches: that of one or two examples is noise.

        Args:
            values: the parameters.
            stack: batches, stacked along a first axis; None for the problem's own.
        """
        stack = self.stack if stack is None else stack
        times = range(len(self.problem.batches))
        each = [self._compiled_loss(list(values), stack, np.int32(t)) for t in times]
        return float(np.mean(jax.device_get(each)))

    def check(self) -> None:
        """Traces the training, which raises what the optimizer raises."""
        controls = dict.fromkeys(("scale", "warmup", "reference", "gain"), jnp.float32(1))
        carry = jax.eval_shape(self._begin, list(self.problem.values))
        _ = jax.eval_shape(self._step, carry, jnp.int32(0), self.stack, controls)

    def lasting(self, steps: int) -> "Trainer":
        """The same compiled training, of another number of steps."""
        other = copy.copy(self)
        other.steps = steps
        return other

    def run(
        self,
        values: Sequence[Array] | None = None,
        *,
        scale: float = 1.0,
        warmup: int = 0,
        reference: bool = False,
        gain: float = 1.0,
        stack: PyTree = None,
    ) -> Run:
        """Trains.

        Args:
            values: parameters to start from; None for the problem's own.
            scale: factor of all updates.
            warmup: steps over which the updates are ramped up.
            reference: Adam at 1e-3 in the place of the user's optimizer.
            gain: factor of the gradients that the user's optimizer sees.
            stack: batches, stacked along a first axis; None for the problem's own.
        """
        controls = {
            "scale": jnp.float32(scale),
            "warmup": jnp.float32(warmup),
            "reference": jnp.float32(reference),
            "gain": jnp.float32(gain),
        }
        stack = self.stack if stack is None else stack
        start = list(self.problem.values if values is None else values)
        before = self.level(start, stack) if self._few else 0.0
        carry = self._compiled_begin(start)
        each = []
        # no scan: in a loop of XLA's on a CPU, a convolution takes up to thirty times as long
        for t in range(self.steps):
            carry, figures = self._compiled_step(carry, np.int32(t), stack, controls)
            each.append(figures)
        rows = jax.tree.map(lambda *steps: np.stack(steps), *jax.device_get(each))
        good = np.asarray(rows["good"])
        stopped = None if good.all() else int(np.argmin(good))
        losses = np.where(good, np.asarray(rows["loss"], np.float64), np.nan)
        finite = stopped is None or bool(rows["finite"][stopped])
        return Run(
            losses, rows["gradient_norm"], rows["update_norm"], rows["alignment"],
            rows["weight_rms"], rows["gradient_rms"], rows["update_rms"], rows["rounded_away"],
            carry[0], stopped, finite,
            (before, self.level(carry[0], stack)) if self._few else None,
        )  # fmt: skip


def _settled(x: Array) -> Array:
    typed = jnp.issubdtype(x.dtype, jax.dtypes.extended)
    return jnp.copy(x) if typed else jax.lax.convert_element_type(jnp.copy(x), x.dtype)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _transformation(tx: Any) -> Any:
    """An optax transformation, also out of an object that holds one (an `nnx.Optimizer`)."""
    if not hasattr(tx, "init") and hasattr(tx, "tx"):
        tx = tx.tx
    return optax.GradientTransformationExtraArgs(tx.init, _accepting(tx))


def _accepting(tx: Any) -> Any:
    wrapped = tx if isinstance(tx, optax.GradientTransformation) else None
    if wrapped is not None:
        return optax.with_extra_args_support(wrapped).update

    def update(grads: PyTree, state: PyTree, params: PyTree = None, **_: Any) -> Any:
        return tx.update(grads, state, params)

    return update


def _with_arrays(batch: PyTree, arrays: list[Array]) -> PyTree:
    leaves, treedef = jax.tree.flatten(batch)
    rest = iter(arrays)
    return treedef.unflatten([next(rest) if isinstance(x, jax.Array) else x for x in leaves])
