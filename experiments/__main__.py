"""The experiments: `python -m experiments run NAME|all --preset quick|full`, and the report."""

import argparse
import importlib
from pathlib import Path

from experiments.atlas import frame, running

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
    run.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    for name in NAMES if options.name == "all" else (options.name,):
        experiment = load(name)
        result = running.run(experiment, options.preset, options.folder, _say)
        for claim in experiment.claims:
            verdict = claim.judge(result.config, result.data)
            condition = f" {verdict.condition}" if verdict.condition else ""
            _say(f"{claim.statement}\n  {verdict.word.upper()}{condition}: {verdict.measured}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
