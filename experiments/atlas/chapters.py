"""What the atlas says of an experiment: its claims judged anew from the stored data.

A verdict is never read from a file. Where there is nothing to judge, the entry says why: not run
yet, a result of another config, a damaged file, or a judge that failed on the data.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.atlas import frame, running
from experiments.atlas.pictures import Picture, draw
from jaxgrad import store

# The first one with a result that can be judged is shown.
PRESETS = ("full", "quick")
# States of an entry without a verdict; with one, its word is the state.
NOT_RUN, OUTDATED, FAILED = "not run yet", "older config", "not judged"
STATES = (*frame.WORDS, NOT_RUN, OUTDATED, FAILED)


@dataclass(frozen=True)
class Entry:
    """A statement, and what the stored data say of it.

    Attributes:
        key: unique in the atlas: EXPERIMENT-CLAIM.
        claim: the statement.
        state: one of STATES.
        verdict: None for a state that is no verdict.
        reason: why there is no verdict; "" where there is one.
        others: {preset: verdict} of the other presets whose verdict is another.
    """

    key: str
    claim: frame.Claim
    state: str
    verdict: frame.Verdict | None = None
    reason: str = ""
    others: Mapping[str, frame.Verdict] | None = None


@dataclass(frozen=True)
class Chapter:
    """An experiment with its verdicts and its figures.

    Attributes:
        experiment: what was run.
        number: its place in the atlas, from 1.
        preset: whose result is shown; the one to run where there is none.
        record: of the result without its data; None where there is none.
        entries: one a claim.
        pictures: its figures.
        notes: what the reader must know of stored results that are not shown.
        faults: notes that are errors: damaged files, judges and figures that failed.
    """

    experiment: frame.Experiment
    number: int
    preset: str
    record: Mapping[str, Any] | None
    entries: tuple[Entry, ...]
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What makes the result, or makes it again."""
        return running.command(self.experiment, self.preset)


def read_all(
    experiments: Sequence[frame.Experiment], folder: Path,
    progress: Callable[[str], None] | None = None,
) -> tuple[Chapter, ...]:  # fmt: skip
    """The atlas's chapters, in the order given.

    Args:
        experiments: what the atlas is about.
        folder: where their results lie.
        progress: takes a line a chapter; None is silence.
    """
    chapters = []
    for number, experiment in enumerate(experiments, 1):
        chapters.append(read(experiment, number, folder))
        if progress is not None:
            states = ", ".join(entry.state for entry in chapters[-1].entries)
            progress(f"atlas [{number}/{len(experiments)}] {experiment.name}: {states}")
    return tuple(chapters)


def read(experiment: frame.Experiment, number: int, folder: Path) -> Chapter:
    """One chapter, from the results that lie in the folder."""
    records, notes, faults = _records(experiment, folder)
    if not records:
        if faults:
            state, reason = FAILED, faults[0]
        elif notes:
            state, reason = OUTDATED, "The stored result is of an older config."
        else:
            state, reason = NOT_RUN, "No result is stored."
        entries = [Entry(_key(experiment, c), c, state, reason=reason) for c in experiment.claims]
        return Chapter(
            experiment, number, "quick", None, tuple(entries), notes=notes, faults=faults
        )
    preset, record = next(iter(records.items()))
    entries = tuple(_entry(experiment, claim, records) for claim in experiment.claims)
    wrong = [f"{e.key}: {e.reason}" for e in entries if e.state == FAILED]
    try:
        drawn = draw(experiment, experiment.presets[preset], record["data"], number)
    except Exception as error:
        drawn = ()
        wrong.append(f"The figures could not be drawn: {_words(error)}")
    plain = {key: value for key, value in record.items() if key != "data"}
    return Chapter(experiment, number, preset, plain, entries, drawn, notes, (*faults, *wrong))


def ranked(chapters: Sequence[Chapter]) -> list[tuple[Chapter, Entry, float]]:
    """(chapter, entry, divergence) where a statement predicts a ratio, the largest first.

    NaN stands with infinity: it is a divergence that could not be measured, never a small one.
    """
    found = [
        (chapter, entry, abs(entry.verdict.divergence))
        for chapter in chapters
        for entry in chapter.entries
        if entry.verdict is not None and entry.verdict.divergence is not None
    ]
    return sorted(found, key=lambda f: -math.inf if math.isnan(f[2]) else -f[2])


def counts(chapters: Sequence[Chapter]) -> dict[str, int]:
    """How many entries there are of each state."""
    states = [entry.state for chapter in chapters for entry in chapter.entries]
    return {state: states.count(state) for state in STATES}


# ------------------------------------------------------------------------------------------ parts


def _records(
    experiment: frame.Experiment, folder: Path
) -> tuple[dict[str, dict[str, Any]], tuple[str, ...], tuple[str, ...]]:
    """({preset: record} of the present configs, notes, faults)."""
    records, notes, faults = {}, [], []
    for preset in PRESETS:
        if preset not in experiment.presets:
            continue
        try:
            record = running.read(experiment, preset, folder)
        except store.StoreError as error:
            faults.append(str(error))
            continue
        if record is None:
            continue
        settings = running.changed(experiment, preset, record)
        if settings:
            notes.append(
                f"The stored {preset} result of {record.get('date', 'unknown date')} is of an "
                f"older config (other: {', '.join(settings)}) and is not shown; to measure anew: "
                f"{running.command(experiment, preset)}"
            )
        else:
            records[preset] = record
    return records, tuple(notes), tuple(faults)


def _entry(
    experiment: frame.Experiment, claim: frame.Claim, records: Mapping[str, Mapping[str, Any]]
) -> Entry:
    key, verdicts = _key(experiment, claim), {}
    first = next(iter(records))
    for preset, record in records.items():
        try:
            verdicts[preset] = claim.judge(experiment.presets[preset], record["data"])
        except Exception as error:
            if preset == first:
                reason = f"The judge failed on the stored {preset} data: {_words(error)}"
                return Entry(key, claim, FAILED, reason=reason)
    shown = verdicts.pop(first)
    others = {
        preset: v
        for preset, v in verdicts.items()
        if (v.word, v.condition) != (shown.word, shown.condition)
    }
    return Entry(key, claim, shown.word, shown, others=others)


def _key(experiment: frame.Experiment, claim: frame.Claim) -> str:
    return f"{experiment.name}-{claim.key}"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
