"""The recording of a run: curves and snapshots of bounded size, and how they are read back."""

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgrad import store
from jaxgrad.monitor.summary import SCALARS

KIND, VERSION = "jaxgrad recording", 1


class Curve:
    """Every step's scalars: `capacity` points at most, each standing for equally many steps.

    Neighbors are merged when the curve is full. A point keeps mean, smallest and largest, so that a
    spike of one step outlives every merge.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.stride = capacity, 1
        self.points: list[dict[str, Any]] = []

    def add(self, step: int, values: list[float]) -> None:
        """Adds a step."""
        row = np.asarray(values, np.float64)
        new = {"first": step, "last": step, "count": 1, "mean": row, "low": row, "high": row}
        if self.points and self.points[-1]["count"] < self.stride:
            self.points[-1] = _merged(self.points[-1], new)
            return
        self.points.append(new)
        if len(self.points) > self.capacity:
            pairs = zip(self.points[::2], [*self.points[1::2], None], strict=False)
            self.points = [a if b is None else _merged(a, b) for a, b in pairs]
            self.stride *= 2

    def to_dict(self) -> dict[str, Any]:
        """The curve as arrays, (points,) and (points, scalars)."""
        empty = np.zeros((0, len(SCALARS)))
        table = {key: [p[key] for p in self.points] for key in ("mean", "low", "high")}
        counts = {
            key: np.asarray([p[key] for p in self.points], np.int64)
            for key in ("first", "last", "count")
        }
        stacked = {key: np.stack(rows) if rows else empty for key, rows in table.items()}
        return {"stride": self.stride, "scalars": list(SCALARS), **counts, **stacked}

    def restore(self, data: dict[str, Any]) -> None:
        """The inverse of `to_dict`."""
        self.stride = int(data["stride"])
        columns = ("first", "last", "count", "mean", "low", "high")
        rows = zip(*(data[name] for name in columns), strict=True)
        self.points = [dict(zip(columns, row, strict=True)) for row in rows]


def _merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    count = a["count"] + b["count"]
    mean = (a["mean"] * a["count"] + b["mean"] * b["count"]) / count
    # a NaN in one of them is in the mean; the extremes are those of the other
    low, high = np.fmin(a["low"], b["low"]), np.fmax(a["high"], b["high"])
    ends = {"first": a["first"], "last": b["last"], "count": count}
    return ends | {"mean": mean, "low": low, "high": high}


class Snapshots:
    """Some steps layer by layer: at equal distances, the last one, and those around a break."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.stride, self.seen = capacity, 1, 0
        self.kept: dict[int, dict[str, np.ndarray]] = {}
        self.latest: tuple[int, dict[str, np.ndarray]] | None = None
        self.around_break: dict[int, dict[str, np.ndarray]] = {}

    def add(self, step: int, rows: dict[str, np.ndarray], *, broken: bool) -> None:
        """Adds a step; `broken` if something in it is NaN or infinite."""
        if broken and not self.around_break:
            self.around_break = {step: rows}
            if self.latest is not None:
                self.around_break[self.latest[0]] = self.latest[1]
        if self.seen % self.stride == 0:
            self.kept[step] = rows
            if len(self.kept) > self.capacity:
                self.kept = dict(list(self.kept.items())[::2])
                self.stride *= 2
        self.latest = (step, rows)
        self.seen += 1

    def table(self) -> dict[int, dict[str, np.ndarray]]:
        """All that is kept, by step, ascending."""
        extra = {} if self.latest is None else {self.latest[0]: self.latest[1]}
        return dict(sorted((self.kept | self.around_break | extra).items()))

    def to_dict(self) -> dict[str, Any]:
        """The snapshots as arrays, (steps, rows) each."""
        table = self.table()
        names = sorted(set().union(*table.values())) if table else []
        width = {n: next(len(r[n]) for r in table.values() if n in r) for n in names}
        blank = {n: np.full(width[n], np.nan, np.float32) for n in names}
        return {
            "steps": np.asarray(list(table), np.int64), "stride": self.stride, "seen": self.seen,
            "kept": list(self.kept), "around_break": list(self.around_break),
            "rows": {n: np.stack([r.get(n, blank[n]) for r in table.values()]) for n in names},
        }  # fmt: skip

    def restore(self, data: dict[str, Any]) -> None:
        """The inverse of `to_dict`."""
        self.stride, self.seen = int(data["stride"]), int(data["seen"])
        every = {
            int(step): {name: rows[i] for name, rows in data["rows"].items()}
            for i, step in enumerate(data["steps"])
        }
        self.kept = {int(step): every[int(step)] for step in data["kept"]}
        self.around_break = {int(step): every[int(step)] for step in data["around_break"]}
        if every:
            last = max(every)
            self.latest = (last, every[last])


@dataclass(frozen=True, eq=False)
class Recording:
    """A run that was recorded.

    Attributes:
        names: the layers' rows, in forward order.
        parameter_names: the parameter leaves.
        site_parameters: of every row, the leaves of its layer.
        facts: what is the same at every step: `classes`, `optimizer`, `leaf_sizes`, `leaf_ranks`,
            `leaf_dtypes`, `opaque`, `uncovered`, where they are known.
        curve: `first`, `last` and `count` of the steps that a point stands for, (points,).
        mean, low, high: of every scalar of `jaxgrad.monitor.summary.SCALARS`, (points,) each.
        steps: the steps that are kept layer by layer, (S,).
        rows: what is kept of them, (S, layers), (S, leaves), or (S, bins) for `exponents`.
    """

    names: tuple[str, ...]
    parameter_names: tuple[str, ...]
    site_parameters: tuple[tuple[str, ...], ...]
    facts: dict[str, Any]
    curve: dict[str, np.ndarray]
    mean: dict[str, np.ndarray]
    low: dict[str, np.ndarray]
    high: dict[str, np.ndarray]
    steps: np.ndarray
    rows: dict[str, np.ndarray]

    @property
    def exact(self) -> bool:
        """Whether every point of the curve is one step."""
        return bool((self.curve["count"] == 1).all())

    @property
    def chance(self) -> float | None:
        """Loss of a guess, if the number of classes was given."""
        classes = self.facts.get("classes")
        return None if classes is None else math.log(classes)


def load_recording(folder: str | os.PathLike[str]) -> Recording:
    """Reads what a `Recorder` wrote.

    Args:
        folder: the run folder.

    Returns:
        The recording.

    Raises:
        StoreError: if the folder is missing, damaged, or holds something else.
    """
    record = store.load_run(folder)
    if record.get("kind") != KIND:
        raise store.StoreError(
            f"{folder} holds no recording of jaxgrad.monitor.Recorder (its kind is "
            f"{record.get('kind')!r}, expected {KIND!r}); record the run with one to diagnose it."
        )
    if record["version"] != VERSION:
        raise store.StoreError(
            f"{folder}: expected a recording of version {VERSION}, found {record['version']}."
        )
    facts, curve = record["facts"], record["curve"]

    def column(part: str) -> dict[str, np.ndarray]:
        return {name: curve[part][:, i] for i, name in enumerate(curve["scalars"])}

    return Recording(
        tuple(facts.get("names", ())), tuple(facts.get("parameter_names", ())),
        tuple(tuple(owners) for owners in facts.get("site_parameters", ())), facts,
        {key: curve[key] for key in ("first", "last", "count")},
        column("mean"), column("low"), column("high"),
        record["snapshots"]["steps"], record["snapshots"]["rows"],
    )  # fmt: skip
