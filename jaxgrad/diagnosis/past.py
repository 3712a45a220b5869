"""What is known of a run that is over, as the rules ask for it."""

import functools
import math

import numpy as np

from jaxgrad.diagnosis.evidence import KNOWS, LEARNS, taken_off
from jaxgrad.monitor import Recording


class Past:
    """A recording, read.

    Args:
        recording: the recording.

    Attributes:
        losses, norms: loss and raw gradient norm of every point of the curve, (points,).
        steps: the steps that are known layer by layer, (S,).

    Raises:
        ValueError: if no step was recorded.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        if len(recording.curve["first"]) == 0 or len(recording.steps) == 0:
            raise ValueError("the recording holds no step; record at least one")
        self.losses = np.asarray(recording.mean["loss"], np.float64)
        self.norms = np.asarray(recording.mean["gradient_norm"], np.float64)
        self.steps = recording.steps

    def rows(self, name: str) -> np.ndarray:
        """What was measured layer by layer, (S, layers) or (S, leaves)."""
        return np.asarray(self.recording.rows[name], np.float64)

    def first(self, name: str) -> np.ndarray:
        """The same at the first step."""
        return self.rows(name)[0]

    @property
    def from_the_start(self) -> bool:
        """Whether the first recorded step is the run's first."""
        return int(self.steps[0]) <= 1

    @functools.cached_property
    def stopped(self) -> int | None:
        """The first step whose loss or gradient is no number."""
        nonfinite = np.asarray(self.recording.high["nonfinite"]) > 0
        bad = np.flatnonzero(~np.isfinite(self.losses) | nonfinite)
        if not bad.size:
            return None
        point = int(bad[0])
        # the snapshot around the break knows the step itself
        first = int(self.recording.curve["first"][point])
        last = int(self.recording.curve["last"][point])
        known = [int(s) for s in self.steps[self.broken_rows] if first <= s <= last]
        return known[0] if known else first

    @functools.cached_property
    def broken_rows(self) -> np.ndarray:
        """Whether a snapshot holds NaN or infinity, (S,) of bool."""
        names = ("activation_nonfinite", "gradient_nonfinite", "weight_gradient_nonfinite")
        return np.asarray(np.any([self.rows(n).sum(-1) > 0 for n in names], axis=0))

    @functools.cached_property
    def last(self) -> float:
        """The loss at the end: median of the last tenth; infinite if the run broke down."""
        if self.stopped is not None and not math.isfinite(self.losses[-1]):
            return math.inf
        return float(np.median(self.losses[-max(len(self.losses) // 10, 1) :]))

    @functools.cached_property
    def progress(self) -> float:
        """The share of its loss that the run took off, from the smaller of first loss and chance.

        The first loss is that of the first tenth where every step has another batch.
        """
        first = float(self.losses[0])
        if not math.isfinite(first):
            return -math.inf
        return float(taken_off(first, self.last, self.recording.chance))

    @property
    def improves(self) -> bool:
        """Whether the run lowered its loss markedly."""
        return bool(self.progress >= LEARNS)

    @property
    def at_chance(self) -> bool:
        """Whether the run began at a guess's loss, so that it cannot have been trained before."""
        chance = self.recording.chance
        return chance is not None and bool(self.losses[0] > KNOWS * chance)

    @functools.cached_property
    def matrices(self) -> list[int]:
        """The leaves of two axes and more; all, where that is not known or there is none.

        Biases and scales begin at zero or one: what an update is to them says little.
        """
        every = list(range(len(self.recording.parameter_names)))
        ranks = self.recording.facts.get("leaf_ranks", [])
        return [i for i in every if len(ranks) == len(every) and ranks[i] >= 2] or every

    @functools.cached_property
    def ratios(self) -> np.ndarray | None:
        """Update RMS over weight RMS of the `matrices`, (S, matrices); NaN where nothing moved."""
        if "update_rms" not in self.recording.rows:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = (self.rows("update_rms") / self.rows("weight_rms"))[:, self.matrices]
        ratio[~(np.isfinite(ratio) & (ratio > 0))] = np.nan
        return ratio

    @functools.cached_property
    def typical_ratio(self) -> float:
        """Median of `ratios`; 0 where nothing moved, NaN where no updates were recorded."""
        if self.ratios is None:
            return math.nan
        known = self.ratios[np.isfinite(self.ratios)]
        return float(np.median(known)) if known.size else 0.0

    @property
    def warms_up(self) -> bool:
        """Whether the updates grow from next to nothing over the run."""
        norms = np.asarray(self.recording.mean["update_norm"], np.float64)
        norms = norms[np.isfinite(norms) & (norms > 0)]
        if len(norms) < 8:
            return False
        return bool(norms[0] < 0.2 * np.median(norms[len(norms) // 2 :]))

    def weighted(self) -> list[int]:
        """The rows that have parameters of their own."""
        return [k for k, owners in enumerate(self.recording.site_parameters) if owners]
