"""What a report is made of: one model's flow at initialization and after, and how it got there.

Everything is host data. A `Flow` of `value_and_grad_flow` is read by its field names only, so a
record can be made from any object that has them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class FlowLike(Protocol):
    """The fields of a `jaxgrad.flow.Flow` that a report reads; arrays of one entry a name."""

    @property
    def names(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def activation_rms(self) -> Any: ...  # noqa: D102
    @property
    def gradient_rms(self) -> Any: ...  # noqa: D102
    @property
    def activation_nonfinite(self) -> Any: ...  # noqa: D102
    @property
    def gradient_nonfinite(self) -> Any: ...  # noqa: D102
    @property
    def parameter_names(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def weight_rms(self) -> Any: ...  # noqa: D102
    @property
    def weight_gradient_rms(self) -> Any: ...  # noqa: D102
    @property
    def site_parameters(self) -> tuple[tuple[str, ...], ...]: ...  # noqa: D102


@dataclass(frozen=True)
class Gains:
    """What each layer does to a gradient that passes back through it.

    Attributes:
        names: the chain's layers, in forward order.
        values: root-mean-square gain of each, the Jacobian's Frobenius norm over sqrt(n_in): by so
            much the layer multiplies the RMS of a random cotangent.
    """

    names: tuple[str, ...]
    values: np.ndarray


@dataclass(frozen=True)
class Row:
    """One line of the table; numbers that were not measured are None.

    A layer that did not run (the branch of a `cond` not taken) has NaN and no non-finite value.
    """

    name: str
    activation_rms: float
    gradient_rms: float
    nonfinite: int
    gain: float | None = None
    weight_gradient_rms: float | None = None
    zero_share: float | None = None

    @property
    def ran(self) -> bool:
        """Whether the layer took part in the pass."""
        return self.nonfinite > 0 or not math.isnan(self.activation_rms)


@dataclass(frozen=True)
class History:
    """A training run.

    Attributes:
        steps: steps at which the flow was measured, (S,).
        gradient_rms: at those steps, (S, sites).
        losses: loss of every step, (T,).
    """

    steps: np.ndarray
    gradient_rms: np.ndarray
    losses: np.ndarray


@dataclass(frozen=True)
class RunRecord:
    """One model's report.

    Attributes:
        name: the folder's name.
        title: what the model is.
        description: one or two sentences for a reader who has not seen the model.
        initial: flow before the first step.
        final: flow after the last one, None without training.
        initial_loss, final_loss: the loss of the two passes, None where it is not known.
        initial_gains, final_gains: of the chain's layers, None where there is no chain.
        history: the training run, None without training.
        facts: short facts by their labels, shown in order.
        notes: what the reader must know about the reading itself (opaque regions, names made up).
        findings: objects with `code`, `severity`, `where`, `cause`, `fix`; the primary one first.
        command: what makes the report again.
    """

    name: str
    title: str
    description: str
    initial: FlowLike
    final: FlowLike | None = None
    initial_gains: Gains | None = None
    final_gains: Gains | None = None
    history: History | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    findings: Sequence[Any] = ()
    command: str = "./scripts/run"
    initial_loss: float | None = None
    final_loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The record as nested dicts and arrays, for `jaxgrad.store.save_run`."""
        history = self.history
        return {
            "name": self.name,
            "title": self.title,
            "description": self.description,
            "initial": _flow_dict(self.initial),
            "final": None if self.final is None else _flow_dict(self.final),
            "initial_gains": _gains_dict(self.initial_gains),
            "final_gains": _gains_dict(self.final_gains),
            "history": None if history is None else dict(vars(history)),
            "facts": dict(self.facts),
            "notes": list(self.notes),
            "findings": [_finding_dict(finding) for finding in self.findings],
            "command": self.command,
            "initial_loss": self.initial_loss,
            "final_loss": self.final_loss,
        }


def rows(flow: FlowLike, gains: Gains | None = None) -> tuple[Row, ...]:
    """The table's lines: a flow's sites, joined with the layers' gains and the sites' parameters.

    A site's weight gradient is the largest of its own parameters' RMS.
    """
    gain_of = {} if gains is None else dict(zip(gains.names, gains.values, strict=True))
    weight_gradient = _largest_weight_gradient(flow)
    activation = np.asarray(flow.activation_rms, np.float64)
    gradient = np.asarray(flow.gradient_rms, np.float64)
    bad = np.asarray(flow.activation_nonfinite) + np.asarray(flow.gradient_nonfinite)
    zeros = getattr(flow, "activation_zero_share", None)
    return tuple(
        Row(
            name=name,
            activation_rms=float(activation[i]),
            gradient_rms=float(gradient[i]),
            nonfinite=int(bad[i]),
            gain=float(gain_of[name]) if name in gain_of else None,
            weight_gradient_rms=weight_gradient[i],
            zero_share=None if zeros is None else float(np.asarray(zeros)[i]),
        )
        for i, name in enumerate(flow.names)
    )


def reading(flow: FlowLike, loss: float | None = None) -> str:
    """In words: how the gradient fares on its way from the last site to the first.

    A loss that is NaN or infinite is said first: its gradient may well look healthy, as that of a
    logarithm of a negative number does.
    """
    if loss is not None and not math.isfinite(loss):
        return f"The loss itself is {'NaN' if math.isnan(loss) else loss}. {reading(flow)}"
    ran = [row for row in rows(flow) if row.ran]
    if not ran:
        return "No layer was found to measure."
    bad = [row for row in ran if row.nonfinite]
    if bad:
        count = sum(row.nonfinite for row in bad)
        return f"{count:,} values are NaN or infinite; the first layer with one is {bad[0].name}."
    gradient = np.asarray([row.gradient_rms for row in ran])
    silent = np.flatnonzero(gradient == 0)
    if len(silent) == len(gradient):
        return "No gradient reaches any layer."
    if len(silent):
        others = f" and {len(silent) - 1} other layers" if len(silent) > 1 else ""
        return f"No gradient at all reaches {ran[int(silent[-1])].name}{others}."
    decades = math.log10(gradient[0]) - math.log10(gradient[-1])
    if abs(decades) < 1:
        ratio = f"{10**decades:.2g} times the last one's"
        return f"The gradient keeps its scale: the first layer's RMS is {ratio}."
    verb = "grows" if decades > 0 else "shrinks"
    return (
        f"The gradient {verb} {_times(abs(decades))} on its way from the last layer to the first."
    )


def is_alarming(flow: FlowLike, loss: float | None = None) -> bool:
    """Whether the first layer gets a gradient a thousand times off the last one's, or none, or NaN.

    A loss that is NaN or infinite is alarming whatever the layers get.

    A line for the eye, no diagnosis: `jaxgrad.diagnose` judges with the whole evidence.
    """
    if loss is not None and not math.isfinite(loss):
        return True
    ran = [row for row in rows(flow) if row.ran]
    gradient = np.asarray([row.gradient_rms for row in ran])
    if not ran or any(row.nonfinite for row in ran) or (gradient == 0).any():
        return True
    return abs(math.log10(gradient[0]) - math.log10(gradient[-1])) >= 3


def _times(decades: float) -> str:
    return f"{10**decades:,.0f} times" if decades < 6 else f"by {decades:.1f} powers of ten"


def _largest_weight_gradient(flow: FlowLike) -> list[float | None]:
    of_leaf = dict(zip(flow.parameter_names, np.asarray(flow.weight_gradient_rms), strict=True))
    largest = []
    for leaves in flow.site_parameters:
        values = [of_leaf[leaf] for leaf in leaves if leaf in of_leaf]
        # np.max lets NaN win; Python's max would drop it half the time
        largest.append(float(np.max(values)) if values else None)
    return largest


def _flow_dict(flow: FlowLike) -> dict[str, Any]:
    public = {name: getattr(flow, name) for name in dir(flow) if not name.startswith("_")}
    return {
        name: list(value) if isinstance(value, tuple) else np.asarray(value)
        for name, value in public.items()
        if isinstance(value, tuple) or hasattr(value, "dtype")
    }


def _gains_dict(gains: Gains | None) -> dict[str, Any] | None:
    if gains is None:
        return None
    return {"names": list(gains.names), "values": np.asarray(gains.values)}


def _finding_dict(finding: Any) -> dict[str, str]:
    fields = ("code", "severity", "where", "cause", "fix")
    return {name: str(getattr(finding, name, "")) for name in fields}
