"""The command line: the only file of the package that prints or exits."""

# pyright: reportUnusedCallResult=false
# (progress bars return task numbers, files the characters written)

import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

try:
    import rich.console
    import rich.progress
    import tyro
except ImportError as error:
    raise SystemExit(f"error: {error}. The command needs: pip install 'jaxgrad[report]'") from error

from jaxgrad import store
from jaxgrad.demo.loading import UsageError, load_task
from jaxgrad.demo.models import Task, all_tasks
from jaxgrad.demo.study import study
from jaxgrad.report.record import RunRecord, reading, rows
from jaxgrad.report.terminal import plain_table, rich_table


@dataclass(frozen=True)
class Main:
    """Four models on real data: where the gradient goes, at initialization and while training.

    Prints one table a model and writes OUT/NAME/report.html, with OUT/index.html above them.
    """

    out: Path = Path("results")
    """Folder for the reports."""
    steps: int | None = None
    """Training steps a model; by default 300 for the digits, 200 for the transformer."""
    seed: int = 0
    """Of the parameters and the batches."""


@dataclass(frozen=True)
class Diagnose:
    """The same for a loss of your own, and why it does not train; or why a recorded run did not.

    FILE.py defines LOSS(params, batch), PARAMS and BATCH: values, or functions without arguments
    that make them; a BATCH function is called anew for every step. An OPTIMIZER, an optax
    transformation, is used and judged. A RUN is a folder that `jaxgrad.monitor.Recorder` wrote:
    nothing is run then. The exit status is 1 if there is an error-level finding.
    """

    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.py:LOSS|RUN")]
    """Your file, and the name of the loss in it; or the folder of a recorded run."""
    out: Path = Path("results")
    """Folder for the report; that of a recorded run is written into the run's own folder."""
    steps: int = 100
    """Training steps; 0 measures the initialization only."""
    learning_rate: float = 1e-3
    """Adam's, where the file has no OPTIMIZER."""


# How many batches a diagnosis trains on.
_BATCHES = 16
_DESCRIPTION = (
    "Where does the gradient go? Without a command: the main job, four models on real data."
)
_COMMANDS = (
    Annotated[Main, tyro.conf.subcommand("main")]
    | Annotated[Diagnose, tyro.conf.subcommand("diagnose")]
)


def main(
    arguments: Sequence[str] | None = None, after_main: Callable[[Path], None] | None = None
) -> None:
    """Runs a command and exits.

    The status is 0 if it was done, 1 if a diagnosis has an error-level finding, and 2 if the
    command was called wrongly.

    Args:
        arguments: the command line without the program's name; by default the process's own.
        after_main: takes the folder of the main job's reports when they are written; for what
            lies outside the package.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given = ["main", *given]  # the main job needs no name
    command: Any = tyro.cli(_COMMANDS, prog="jaxgrad", description=_DESCRIPTION, args=given)
    again = shlex.join(["./scripts/run", *(given[1:] if given[0] == "main" else given)])
    try:
        _check(command)
        if isinstance(command, Diagnose) and Path(command.target).is_dir():
            sys.exit(0 if _recorded_is_healthy(Path(command.target)) else 1)
        tasks = _tasks(command)
        _study_all(tasks, command.out, again)
        if isinstance(command, Diagnose) and not _healthy(tasks[0](), command):
            sys.exit(1)
        if isinstance(command, Main) and after_main is not None:
            after_main(command.out)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _check(command: Main | Diagnose) -> None:
    if command.steps is not None and command.steps < 0:
        raise UsageError(f"--steps: expected 0 or more, got {command.steps}.")
    if command.out.exists() and not command.out.is_dir():
        raise UsageError(f"--out: {command.out} is a file; expected a folder.")


def _tasks(command: Main | Diagnose) -> list[Callable[[], Task]]:
    if isinstance(command, Main):
        return list(all_tasks(steps=command.steps, seed=command.seed))
    task = load_task(command.target, steps=command.steps, learning_rate=command.learning_rate)
    return [lambda: task]


def _study_all(tasks: Sequence[Callable[[], Task]], out: Path, again: str) -> None:
    from jaxgrad.report.html import write_index, write_report

    console = rich.console.Console()
    records = []
    for place, make in enumerate(tasks, 1):
        with _progress(console) as tell:
            task = make()
            label = f"[{place}/{len(tasks)}] {task.name}"
            tell(label, 0, 0)
            record = _studied(
                task, again, lambda what, *n, label=label: tell(f"{label}: {what}", *n)
            )
        store.save_run(out / record.name, record.to_dict())
        path = write_report(record, out / record.name)
        _show(console, record, path)
        records.append(record)
    if len(records) > 1:
        print(f"all reports: {write_index(records, out)}")


def _healthy(task: Task, command: Diagnose) -> bool:
    """Prints and saves what `jaxgrad.diagnose` says; whether there is no error."""
    from jaxgrad.diagnosis import diagnose

    batches = list(itertools.islice(task.batches(), _BATCHES))
    training = {"optimizer": task.optimizer, "batches": batches} if command.steps else {}
    with _progress(rich.console.Console()) as tell:
        report = diagnose(
            task.loss, task.params, batches[0], **training,
            progress=lambda what: tell(f"diagnosis: {what}", 0, 0),
        )  # fmt: skip
    return _reported(report, command.out / task.name)


def _recorded_is_healthy(run: Path) -> bool:
    """The same for a run that is over."""
    from jaxgrad.diagnosis import diagnose_run

    try:
        report = diagnose_run(run)
    except ValueError as error:  # a StoreError is one
        raise UsageError(str(error)) from error
    return _reported(report, run)


def _reported(report: Any, folder: Path) -> bool:
    """Prints a diagnosis and saves it in a folder; whether it has no error."""
    report.save(folder / "diagnosis.json")
    print(f"{report}\ndiagnosis: {report.save(folder / 'diagnosis.html')}", flush=True)
    return all(finding.severity != "error" for finding in report.findings)


def _studied(task: Task, again: str, tell: Callable[[str, int, int], None]) -> RunRecord:
    try:
        return study(task, command=again, progress=tell)
    except (TypeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(f"{task.title}: {type(error).__name__}: {first}") from error


def _show(console: rich.console.Console, record: RunRecord, path: Path) -> None:
    title = f"{record.title}, at initialization"
    table = rows(record.initial, record.initial_gains)
    if console.is_terminal:
        console.print(rich_table(table, title, elsewhere=str(path)))
    else:
        print(plain_table(table, title, elsewhere=str(path)))
    print(f"at initialization: {reading(record.initial, record.initial_loss)}")
    if record.final is not None:
        print(f"after training:    {reading(record.final, record.final_loss)}")
    facts = ("loss", "test accuracy", "test loss", "training", "time")
    print("; ".join(f"{label}: {record.facts[label]}" for label in facts if label in record.facts))
    print(f"report: {path}\n", flush=True)


@contextmanager
def _progress(console: rich.console.Console) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on a terminal; else one line for every stage, on stderr."""
    if not console.is_terminal:
        seen: set[str] = set()

        def tell_plainly(what: str, _done: int, _total: int) -> None:
            if what not in seen:
                seen.add(what)
                print(what, file=sys.stderr, flush=True)

        yield tell_plainly
        return
    columns = (
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bar:
        number = bar.add_task("starting", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(number, description=what, completed=done, total=total or None)

        yield tell


if __name__ == "__main__":
    main()
