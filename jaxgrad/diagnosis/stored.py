"""Diagnosis of a run that is over: what its recording shows, and what it cannot show.

The program is not there, so nothing can be tried again: no other learning rate, no other weights,
no look at the data. What only a probe could settle stays unsaid, or is said as what it is, a
symptom, with less confidence.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxgrad.diagnosis import causes, stored_events, stored_layers
from jaxgrad.diagnosis.course import course_of_past
from jaxgrad.diagnosis.finding import Finding, Report, matches
from jaxgrad.diagnosis.past import Past
from jaxgrad.monitor import Recording, load_recording

# The registry, in the order of a run's life.
RULES: list[Callable[[Past], list[Finding]]] = [
    stored_events.clip_after_update, stored_layers.no_gradient, stored_layers.nonfinite,
    stored_layers.dead, stored_layers.init_scale, stored_layers.rounded_away,
    stored_events.ascent, stored_events.clip_always, stored_events.rate_too_high,
    stored_events.rate_too_low, stored_events.spike,
]  # fmt: skip


def diagnose_run(run: str | os.PathLike[str] | Recording, ignore: Sequence[str] = ()) -> Report:
    """Says of a recorded run why it did not train, or that nothing that was recorded is wrong.

    Args:
        run: the folder that a `jaxgrad.monitor.Recorder` wrote, or what `load_recording` read.
        ignore: findings that are known and meant, as ``"code"`` or ``"code:where"`` with ``*``.

    Returns:
        The report, in the words of `jaxgrad.diagnose`; its notes say what could not be judged.

    Raises:
        StoreError: if the folder is missing, damaged, or holds something else.
        ValueError: if no step was recorded.
    """
    past = Past(run if isinstance(run, Recording) else load_recording(run))
    found = [finding for rule in RULES for finding in rule(past)]
    primary, findings = causes.judge([f for f in found if not matches(f, ignore)])
    notes = tuple(_notes(past))
    return Report(primary, findings, _rows(past), _facts(past), notes, course_of_past(past))


def _rows(past: Past) -> tuple[dict[str, Any], ...]:
    recording = past.recording
    index = {name: i for i, name in enumerate(recording.parameter_names)}
    gradients = past.first("weight_gradient_rms")
    rows = []
    for k, name in enumerate(recording.names):
        owners = [p for p in recording.site_parameters[k] if p in index]
        sizes = [float(gradients[index[p]]) for p in owners]
        rows.append(
            {
                "name": name,
                "activation_rms": float(past.first("activation_rms")[k]),
                "gradient_rms": float(past.first("gradient_rms")[k]),
                "zero_share": float(past.first("activation_zero_share")[k]),
                "weight_gradient_rms": float(np.max(sizes)) if sizes else None,
                "parameters": owners,
            }
        )
    return tuple(rows)


def _facts(past: Past) -> dict[str, Any]:
    curve = past.recording.curve
    return {
        "loss": float(past.losses[0]), "gradient_norm": float(past.norms[0]),
        "chance": past.recording.chance,
        "parameters": sum(past.recording.facts.get("leaf_sizes", [])) or None,
        "steps": int(curve["count"].sum()), "loss_at_the_end": past.last,
        "update_over_weight": past.typical_ratio, "stopped": past.stopped,
        "first_step": int(curve["first"][0]), "last_step": int(curve["last"][-1]),
    }  # fmt: skip


def _notes(past: Past) -> list[str]:
    recording = past.recording
    notes = [
        "a stored run: the program was not there, so nothing was tried again and data, outputs, "
        "structure and dtypes of the layers were not seen; a fault that only those show is not "
        "found, and causes that are told apart by trial carry less confidence"
    ]
    if not past.from_the_start:
        notes.append(
            f"the recording begins at step {past.steps[0]}: nothing is said of the initialization"
        )
    if past.ratios is None:
        notes.append("no updates were recorded: nothing is said of the learning rate")
    if not np.isfinite(recording.mean["clipped_norm"]).any():
        notes.append(
            "no clipped norms were recorded (monitor.watch in the optimizer, and its state given "
            "to the recorder): nothing is said of how often a clip is active"
        )
    if "optimizer" not in recording.facts:
        notes.append("no optimizer was given to the recorder: nothing is said of where it clips")
    elif "error" in recording.facts["optimizer"]:
        notes.append(f"the optimizer could not be probed: {recording.facts['optimizer']['error']}")
    if recording.chance is None:
        notes.append("the number of classes was not given to the recorder: chance is not known")
    for key, words in recording.facts.items():
        if key.startswith("unmatched_"):
            what = key.removeprefix("unmatched_")
            notes.append(
                f"the {what} that were recorded do not match the parameters, and were left out "
                f"leaf by leaf: {words}"
            )
    if not recording.exact:
        notes.append("the run is long: points of its curves stand for several steps")
    notes += [f"not looked into: {name}" for name in recording.facts.get("opaque", [])]
    return notes
