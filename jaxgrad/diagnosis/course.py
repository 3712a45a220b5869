"""What the pictures of a report are drawn from: how a run went, layer by layer and step by step."""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.passes import Measurement
from jaxgrad.diagnosis.past import Past
from jaxgrad.diagnosis.tapping import UNITS
from jaxgrad.monitor.summary import exponents

_PROFILES = ("activation_rms", "gradient_rms", "weight_gradient_rms")


def _none() -> np.ndarray:
    return np.zeros(0)


@dataclass(frozen=True, eq=False)
class Course:
    """Arrays on the host; empty where nothing was measured.

    Attributes:
        initial, final: RMS by layer in forward order: of the activation, of the gradient with
            respect to it, of the weight gradient (NaN where a layer has no weights).
        steps: numbers of the steps, (T,).
        losses, raw_norms, clipped_norms: of every step, (T,); clipped norms are NaN without a clip.
        leaf_names, leaf_steps, update_ratio: update RMS over weight RMS, (S, leaves).
        heat_names, heat_steps, heat: gradient RMS, (S, rows).
        heat_of: what the rows of `heat` are: "layer" or "parameter".
        units: by layer, the share of the data on which each unit works, now.
        zero_shares: share of exact zeros, (S, rows of `heat`); where units were not looked at.
        exponents: by time, how many gradient elements have which power of two, then exact zeros.
    """

    initial: dict[str, np.ndarray] = field(default_factory=dict)
    final: dict[str, np.ndarray] | None = None
    steps: np.ndarray = field(default_factory=_none)
    losses: np.ndarray = field(default_factory=_none)
    raw_norms: np.ndarray = field(default_factory=_none)
    clipped_norms: np.ndarray = field(default_factory=_none)
    leaf_names: tuple[str, ...] = ()
    leaf_steps: np.ndarray = field(default_factory=_none)
    update_ratio: np.ndarray = field(default_factory=_none)
    heat_names: tuple[str, ...] = ()
    heat_steps: np.ndarray = field(default_factory=_none)
    heat: np.ndarray = field(default_factory=_none)
    heat_of: str = "layer"
    units: tuple[tuple[str, np.ndarray], ...] = ()
    zero_shares: np.ndarray = field(default_factory=_none)
    exponents: dict[str, np.ndarray] = field(default_factory=dict)


def course_of(evidence: Evidence) -> Course:
    """The course of a live diagnosis: what was measured anyway, and one pass at the run's end."""
    first = evidence.initial
    known: dict[str, Any] = {
        "initial": _profiles(evidence, first),
        "units": _working(evidence, first),
        "exponents": {"at initialization": _powers(first)},
    }
    if () not in evidence._runs:
        return Course(**known)
    run, names = evidence.main, evidence.problem.names
    steps = np.arange(len(run.losses))
    ran = steps[: run.stopped] if run.stopped is not None else steps
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = run.update_rms / run.weight_rms
    wide = [i for i, value in enumerate(evidence.problem.values) if value.ndim >= 2]
    clip = evidence.clip_norm
    raw = np.asarray(run.gradient_norms, np.float64)
    known |= {
        "steps": steps, "losses": run.losses, "raw_norms": raw,
        "clipped_norms": np.minimum(raw, clip) if clip else np.full_like(raw, math.nan),
        "leaf_names": tuple(names[i] for i in wide), "leaf_steps": ran,
        "update_ratio": np.asarray(ratio, np.float64)[ran][:, wide],
        "heat_names": tuple(names), "heat_steps": ran, "heat_of": "parameter",
        "heat": np.asarray(run.gradient_rms, np.float64)[ran],
    }  # fmt: skip
    if run.stopped is None:
        last = evidence.final
        known |= {"final": _profiles(evidence, last), "units": _working(evidence, last)}
        known["exponents"]["now"] = _powers(last)
    return Course(**known)


def _profiles(evidence: Evidence, measured: Measurement) -> dict[str, np.ndarray]:
    index = {name: i for i, name in enumerate(evidence.problem.names)}
    rms = [float(np.sqrt(np.mean(np.square(g, dtype=np.float64)))) for g in measured.grads]
    weights = [
        max((rms[index[p]] for p in owners if p in index), default=math.nan)
        for owners in measured.row_parameters
    ]
    columns = (measured.rows["rms"], measured.rows["gradient_rms"], np.asarray(weights))
    return dict(zip(_PROFILES, (np.asarray(c, np.float64) for c in columns), strict=True))


def _working(evidence: Evidence, measured: Measurement) -> tuple[tuple[str, np.ndarray], ...]:
    """By activation, the share of the data on which each unit is neither silent nor saturated."""
    found = []
    for activation in evidence.hidden():
        tensor = measured.tensors.get(activation.output)
        column = {"tanh": "inside_tanh", "sigmoid": "inside_sigmoid", "relu": "active"}
        if tensor is None or activation.kind not in column or not tensor.units.shape[-1]:
            continue
        table = tensor.units.reshape(-1, *tensor.units.shape[-2:])
        shares = table[:, UNITS.index(column[activation.kind])]
        many = len(shares) > 1
        for k, row in enumerate(shares):
            found.append((f"{activation.where}[{k}]" if many else activation.where, row))
    return tuple(found)


def _powers(measured: Measurement) -> np.ndarray:
    # compiled as one program: one by one, its thirty operations take longer to compile
    return np.asarray(jax.jit(exponents)(measured.grads))


def course_of_past(past: Past) -> Course:
    """The course of a run that was recorded."""
    recording = past.recording
    ran = ~past.broken_rows
    final = int(np.flatnonzero(ran)[-1]) if ran.any() else 0
    histogram = {}
    if "exponents" in recording.rows:
        table = recording.rows["exponents"]
        histogram = {"at initialization": table[0]}
        histogram |= {"now": table[final]} if final else {}
    ratios = past.ratios
    return Course(
        initial=_recorded(past, 0), final=_recorded(past, final) if final else None,
        steps=np.asarray(recording.curve["first"]), losses=past.losses, raw_norms=past.norms,
        clipped_norms=np.asarray(recording.mean["clipped_norm"], np.float64),
        leaf_names=tuple(recording.parameter_names[i] for i in past.matrices),
        leaf_steps=past.steps[ran], update_ratio=_none() if ratios is None else ratios[ran],
        heat_names=recording.names, heat_steps=past.steps, heat=past.rows("gradient_rms"),
        zero_shares=past.rows("activation_zero_share"), exponents=histogram,
    )  # fmt: skip


def _recorded(past: Past, k: int) -> dict[str, np.ndarray]:
    index = {name: i for i, name in enumerate(past.recording.parameter_names)}
    leaves = past.rows("weight_gradient_rms")[k]
    weights = [
        max((float(leaves[index[p]]) for p in owners if p in index), default=math.nan)
        for owners in past.recording.site_parameters
    ]
    columns = (past.rows("activation_rms")[k], past.rows("gradient_rms")[k], np.asarray(weights))
    return dict(zip(_PROFILES, columns, strict=True))
