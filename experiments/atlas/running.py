"""Runs that resume: a point is kept as soon as it is measured, and the result is one small file.

Points lie in folder/points/NAME-PRESET/POINT, written atomically: a run that was killed loses at
most the point in flight. The result, folder/NAME-PRESET.json, holds config, data, versions and
device, and is all that the report reads.
"""

import dataclasses
import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.atlas import frame
from jaxgrad import store

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        config: it was run with.
        data: {name of a point: its arrays}.
        measured: names of the points that this run measured; the others were read.
        traces: {name of a point measured: functions traced for it}.
        seconds: {name of a point: what its measurement took, compilation included}.
    """

    config: Any
    data: frame.Data
    measured: tuple[str, ...]
    traces: Mapping[str, int]
    seconds: Mapping[str, float]


def run(
    experiment: frame.Experiment, preset: str, folder: Path, progress: Progress | None = None
) -> Result:
    """Measures the points that are not stored yet, and writes the result.

    Args:
        experiment: what to run.
        preset: which of its configs.
        folder: where points and the result are kept.
        progress: takes a line a point; None is silence.

    Raises:
        ValueError: for an unknown preset.
    """
    if preset not in experiment.presets:
        raise ValueError(f"preset: expected one of {', '.join(experiment.presets)}, got {preset!r}")
    config = experiment.presets[preset]
    facts = _facts(config)
    points = experiment.points(config)
    data, measured, traces, seconds = {}, [], {}, {}
    for count, (name, measure) in enumerate(points.items(), 1):
        place = folder / "points" / f"{experiment.name}-{preset}" / name
        record = _stored(place, facts)
        word = "read"
        if record is None:
            before, start = frame.traces(), time.perf_counter()
            arrays = {key: np.asarray(value) for key, value in measure().items()}
            seconds[name] = time.perf_counter() - start
            traces[name] = frame.traces() - before
            record = {"config": facts, "arrays": arrays, "seconds": seconds[name]}
            _ = store.save_run(place, record)
            measured.append(name)
            word = f"measured in {seconds[name]:.1f} s"
        data[name], seconds[name] = record["arrays"], record["seconds"]
        if progress is not None:
            progress(f"{experiment.name} [{count}/{len(points)}] {name}: {word}")
    result = Result(config, data, tuple(measured), traces, seconds)
    _write(folder / f"{experiment.name}-{preset}.json", _record(experiment, preset, result))
    return result


def load(experiment: frame.Experiment, preset: str, folder: Path) -> dict[str, Any] | None:
    """The record of a stored result, its data as arrays; None where there is none for this config.

    A result of another config than the preset's present one is none: its numbers belong to another
    command.
    """
    record = read(experiment, preset, folder)
    return None if record is None or changed(experiment, preset, record) else record


def read(experiment: frame.Experiment, preset: str, folder: Path) -> dict[str, Any] | None:
    """The record of a stored result of any config, its data as arrays; None without a file.

    Raises:
        StoreError: the file is damaged.
    """
    path = folder / f"{experiment.name}-{preset}.json"
    if not path.is_file():
        return None
    try:
        record = store.from_json(path.read_text(encoding="utf-8"))
        data = {n: {k: _array(v) for k, v in a.items()} for n, a in record["data"].items()}
        return {**record, "config": dict(record["config"]), "data": data}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise store.StoreError(
            f"{path.name} is damaged ({type(error).__name__}: {error}); expected a result that "
            f"`{command(experiment, preset)}` wrote. Run it again."
        ) from error


def changed(
    experiment: frame.Experiment, preset: str, record: Mapping[str, Any]
) -> tuple[str, ...]:
    """The settings in which a record's config differs from the preset's present one."""
    now, then = _facts(experiment.presets[preset]), record["config"]
    absent = object()
    return tuple(k for k in {**now, **then} if now.get(k, absent) != then.get(k, absent))


def command(experiment: frame.Experiment, preset: str) -> str:
    """What makes the result again."""
    return f"python -m experiments run {experiment.name} --preset {preset}"


def _facts(config: Any) -> Any:
    return store.from_json(store.to_json(dataclasses.asdict(config)))


def _record(experiment: frame.Experiment, preset: str, result: Result) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "command": command(experiment, preset),
        "config": _facts(result.config),
        "data": {n: {k: _plain(v) for k, v in a.items()} for n, a in result.data.items()},
        "seconds": {name: round(s, 2) for name, s in result.seconds.items()},
        "date": datetime.date.today().isoformat(),
        "device": f"{device.platform}: {device.device_kind}",
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "jaxlib", "numpy", "optax")},
        },
    }


def _plain(array: np.ndarray) -> dict[str, Any]:
    """An array as strict JSON; floats with the digits that a float32 has."""
    array = np.asarray(array)
    floats = np.issubdtype(array.dtype, np.floating)
    values = [float(f"{v:.8g}") if floats else v for v in array.ravel().tolist()]
    return {"shape": list(array.shape), "dtype": str(array.dtype), "values": values}


def _array(plain: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(plain["values"], plain["dtype"]).reshape(plain["shape"])


def _write(path: Path, record: Any) -> None:
    """One line a point, so that a change can be read; replaced by a rename."""
    body = json.loads(store.to_json(record))
    lines = [f"{json.dumps(k)}: {_value(v)}" for k, v in body.items()]
    temporary = path.with_suffix(".json.part")
    _ = temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(temporary, path)


def _value(value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    rows = (f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in value.items())
    return "{\n" + ",\n".join(rows) + "\n}"


def _stored(folder: Path, facts: Any) -> dict[str, Any] | None:
    """A point's record, or None where it is missing, damaged or of another config."""
    try:
        record = store.load_run(folder)
    except store.StoreError:
        return None
    return record if record.get("config") == facts else None
