"""What every experiment shares: points, claims, intervals, verdicts.

An experiment is a frozen config, a list of points (each one compiled measurement that returns
arrays) and claims: statements, each with a rule that turns the arrays into a verdict. A verdict is
computed from the data every time it is asked for; none is stored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import scipy.stats

WORDS = ("holds", "holds if", "false")

Arrays = dict[str, Any]
Data = Mapping[str, Arrays]

_TRACES = [0]


@dataclass(frozen=True)
class Verdict:
    """What the data say of a statement.

    Attributes:
        word: "holds", "holds if" or "false".
        measured: the numbers with their intervals, in words.
        condition: under which it holds; only with "holds if".
        divergence: how far the idealization is from the measurement, in nats: the largest
            |ln(measured / predicted)|; None for a statement without a ratio to measure.
    """

    word: str
    measured: str
    condition: str = ""
    divergence: float | None = None

    def __post_init__(self) -> None:
        if self.word not in WORDS:
            raise ValueError(f"word: expected one of {', '.join(WORDS)}, got {self.word!r}")
        if (self.word == "holds if") != bool(self.condition):
            raise ValueError("condition: it belongs to 'holds if', and only to it")


@dataclass(frozen=True)
class Claim:
    """One statement and how it is judged.

    Attributes:
        key: a short name, unique in its experiment.
        statement: as the field says it.
        predicted: the formula or number that it implies, and its source.
        judge: (config, {name of a point: its arrays}) -> Verdict.
        intuition: what a practitioner should take from it, in a sentence or two; "" for nothing.
    """

    key: str
    statement: str
    predicted: str
    judge: Callable[[Any, Data], Verdict]
    intuition: str = ""


@dataclass(frozen=True)
class Experiment:
    """A question, its measurements and what they decide.

    Attributes:
        name: of its file.
        question: in a sentence.
        claims: the statements put to the test.
        presets: frozen configs by name: "tiny" (for tests: seconds), "quick" and "full".
        points: config -> {name of a point: the measurement}, each returning small arrays with the
            seeds on the first axis. A point traces at most one function made by `compiled`.
        figures: (config, data) -> one or two matplotlib figures.
    """

    name: str
    question: str
    claims: tuple[Claim, ...]
    presets: Mapping[str, Any]
    points: Callable[[Any], Mapping[str, Callable[[], Arrays]]]
    figures: Callable[[Any, Data], list[Any]]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit`, with the traces counted: see `traces`. Wrap the outermost function only."""

    def counted(*args: Any) -> Any:
        _TRACES[0] += 1
        return function(*args)

    return jax.jit(counted)


def traces() -> int:
    """How often functions made by `compiled` were traced in this process, all together."""
    return _TRACES[0]


def mapped(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function over the leading axis of its arguments, in one compiled call, on the host."""
    return jax.device_get(compiled(jax.vmap(function))(*arguments))


def over_seeds(function: Callable[[jax.Array], Any], seeds: int, *, seed: int = 0) -> Any:
    """The function of a key, for all seeds in one compiled call.

    Args:
        function: key -> pytree of arrays, without a seeds axis.
        seeds: how many keys.
        seed: what they are split from.

    Returns:
        numpy arrays with a leading axis of seeds.
    """
    return mapped(function, jax.random.split(jax.random.key(seed), seeds))


def interval(values: Any, confidence: float = 0.95) -> tuple[Any, Any, Any]:
    """(mean, low, high): Student's interval over the first axis, the seeds.

    Raises:
        ValueError: for fewer than two seeds, which have no interval.
    """
    values = np.asarray(values, np.float64)
    count = len(values)
    if count < 2:
        raise ValueError(f"values: expected at least 2 seeds on the first axis, got {count}")
    mean = values.mean(0)
    error = values.std(0, ddof=1) / np.sqrt(count)
    reach = scipy.stats.t.ppf((1 + confidence) / 2, count - 1) * error
    return mean, mean - reach, mean + reach


def conclude(
    good: Mapping[str, bool], measured: str, *, divergence: float | None = None
) -> Verdict:
    """The common rule: "holds" where every case is good, "false" where none, else "holds if"."""
    if not good:
        raise ValueError("good: expected at least one case")
    if all(good.values()):
        return Verdict("holds", measured, divergence=divergence)
    if not any(good.values()):
        return Verdict("false", measured, divergence=divergence)
    condition = ", ".join(name for name, g in good.items() if g)
    return Verdict("holds if", measured, condition, divergence)
