"""The experiments: `python -m experiments run NAME|all --preset quick|full`, and their report."""

import argparse
import importlib
import sys
from collections import Counter
from pathlib import Path

from experiments.atlas import frame, report, running

# In the order of the note; a name is that of its file.
NAMES = (
    "chain_rule", "vanishing", "exploding", "clipping", "residual", "layer_norm", "initialization",
    "edge_of_chaos", "optimizers", "accumulation", "pre_post_ln", "recurrent", "precision",
    "dead_units", "cures", "width", "thousand_layers",
)  # fmt: skip
FOLDER = Path(__file__).parent / "results" / "atlas"


def load(name: str) -> frame.Experiment:
    """The experiment of a file."""
    return importlib.import_module(f"experiments.{name}").EXPERIMENT


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser(
        "run", help="run one experiment, or all of them; a killed run resumes"
    )
    run.add_argument("name", choices=[*NAMES, "all"])
    run.add_argument("--preset", choices=["quick", "full"], default="quick")
    run.add_argument("--folder", type=Path, default=FOLDER, help="for points and results")
    write = commands.add_parser(
        "report", help="write the atlas of the stored results; runs no experiment"
    )
    write.add_argument("--folder", type=Path, default=FOLDER, help="where the results lie")
    write.add_argument("--output", type=Path, default=Path("results/atlas"))
    options = parser.parse_args(arguments)
    if options.command == "report":
        return write_report(options.folder, options.output)
    for name in NAMES if options.name == "all" else (options.name,):
        _run(load(name), options.preset, options.folder)
    return 0


def write_report(folder: Path, output: Path, *, chatty: bool = True) -> int:
    """Writes the atlas and says where; the status is 1 if a stored result could not be used.

    Args:
        folder: where the results lie.
        output: folder for the two files.
        chatty: whether each experiment's verdicts are said too.
    """
    experiments = [load(name) for name in NAMES]
    written = report.write(experiments, folder, output, _say if chatty else None)
    tally = ", ".join(f"{number} {state}" for state, number in written.counts.items() if number)
    _say(f"{sum(written.counts.values())} statements: {tally}")
    _say(f"atlas: {written.html} and {written.markdown}")
    for fault in written.faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if written.faults else 0


def _run(experiment: frame.Experiment, preset: str, folder: Path) -> None:
    result = running.run(experiment, preset, folder, _say)
    words: Counter[str] = Counter()
    for claim in experiment.claims:
        verdict = claim.judge(result.config, result.data)
        condition = f" {verdict.condition}" if verdict.condition else ""
        _say(f"{claim.statement}\n  {verdict.word.upper()}{condition}: {verdict.measured}")
        words[verdict.word] += 1
    tally = ", ".join(f"{number} {word}" for word, number in words.items())
    _say(f"{experiment.name}: {tally}; {sum(result.seconds.values()):.0f} s of measuring")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
