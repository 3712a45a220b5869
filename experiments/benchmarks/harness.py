"""What every benchmark shares: fair timing on a machine that is not idle.

A benchmark module `experiments/benchmarks/NAME.py` is run by `./scripts/bench NAME` and looks so:

    from experiments.benchmarks import harness

    def main() -> int:
        options = harness.options(__doc__)                   # --rounds N, --quick, --strict
        cases = [
            harness.Case("plain", jax.value_and_grad(loss), (params, batch)),
            harness.Case("flow", jg.value_and_grad_flow(loss), (params, batch)),
            harness.Case("torch hooks", torch_step, (), jit=False),     # timed as it is
        ]
        results = harness.compare(cases, baseline="plain", options=options)
        flow = results["flow"]
        claims = [
            harness.Claim("step time over value_and_grad", flow.time_ratio, at_most=1.03),
            harness.Claim("temporary memory over value_and_grad", flow.memory_ratio, at_most=1.01),
        ]
        return harness.finish("flow", {"12 blocks, unrolled": results}, claims, options)

    if __name__ == "__main__":
        raise SystemExit(main())

Why so:

- The cases are interleaved: every round runs each case once, in a shuffled order, and a ratio is
  the median over rounds of case / baseline *within* the round. A neighbor's load then falls on
  both sides of the ratio.
- Compilation is timed apart, from a cleared cache, and interleaved too (`compile_rounds`).
- A sample blocks until the result is ready; calls too short for the clock are repeated within a
  sample, each case by a count of its own.
- Memory is the compiler's own account (`memory_analysis`), which no neighbor can disturb.
- Versions, device, cores and load stand in the file. The machine's name does not.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.timing import Case, Options, Ratio, Result, compare
from jaxgrad import store

__all__ = ["Case", "Claim", "Options", "Ratio", "Result", "compare", "finish", "options"]

RESULTS = Path(__file__).parent.parent / "results"
PACKAGES = ("jax", "jaxlib", "numpy", "optax", "flax", "equinox", "dm-haiku", "torch")


@dataclass(frozen=True)
class Claim:
    """A bound that the benchmark exists to check.

    Attributes:
        what: in words.
        measured: a Ratio (its median counts), a number, or None if it could not be measured, which
        fails.
        at_most: the bound; the claim holds when measured <= at_most.
        control: a second copy of the baseline over the baseline, measured in the same run. Where
        the bound says "no slower", two copies of one program must pass, and what they differ by
        (their interval's upper end) widens it.
    """

    what: str
    measured: Ratio | float | None
    at_most: float
    control: Ratio | None = None

    @property
    def value(self) -> float | None:
        """The number that is compared."""
        return self.measured.median if isinstance(self.measured, Ratio) else self.measured

    @property
    def holds(self) -> bool:
        """Whether the claim was measured and holds; NaN does not."""
        widening = max(self.control.high, 1.0) if self.control else 1.0
        return self.value is not None and self.value <= self.at_most * widening


def options(description: str | None, arguments: Sequence[str] | None = None) -> Options:
    """Options from the command line: --rounds, --quick (3 rounds, 1 compilation), --strict."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=Options.rounds, help="timed rounds")
    parser.add_argument(
        "--quick", action="store_true", help="3 rounds and 1 compilation: does it run?"
    )
    parser.add_argument("--strict", action="store_true", help="a failed claim fails the command")
    given = parser.parse_args(arguments)
    if given.quick:
        return Options(rounds=3, compile_rounds=1, strict=given.strict)
    return Options(rounds=given.rounds, strict=given.strict)


def finish(
    name: str,
    tables: Mapping[str, Mapping[str, Result]],
    claims: Sequence[Claim],
    options: Options,
    extra: Mapping[str, Any] | None = None,
) -> int:
    """Prints the tables and claims, writes experiments/results/bench_NAME.json.

    Returns:
        The exit status: 1 if --strict was given and a claim failed, else 0.
    """
    for title, results in tables.items():
        print(format_table(title, results))
    for claim in claims:
        value = "not measured" if claim.value is None else f"{claim.value:.4g}"
        verdict = "holds" if claim.holds else "FAILS"
        noise = f"; the baseline's second copy: {claim.control.median:.4g}" if claim.control else ""
        noise += f", up to {claim.control.high:.4g}" if claim.control else ""
        print(f"{verdict}: {claim.what}: {value} (at most {claim.at_most:g}{noise})")
    record = {
        "benchmark": name,
        "made_by": f"./scripts/bench {name}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "options": asdict(options),
        "tables": {t: {n: asdict(r) for n, r in results.items()} for t, results in tables.items()},
        "claims": [{**asdict(c), "value": c.value, "holds": c.holds} for c in claims],
        "extra": dict(extra or {}),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"bench_{name}.json"
    partial = path.with_suffix(".part")
    _ = partial.write_text(store.to_json(record, indent=1) + "\n", encoding="utf-8")
    _ = partial.replace(path)
    print(f"wrote experiments/results/{path.name}")
    return int(options.strict and not all(claim.holds for claim in claims))


def format_table(title: str, results: Mapping[str, Result]) -> str:
    """One table as text."""
    lines = [
        title,
        f"  {'case':<28}{'ms':>10}{'ratio':>8}{'95 % of the ratio':>20}"
        f"{'compile s':>11}{'ratio':>7}{'temp MiB':>10}{'ratio':>7}{'flops':>8}",
    ]
    for r in results.values():
        interval = f"[{r.time_ratio.low:.3f}, {r.time_ratio.high:.3f}]"
        whole = None if r.compile_seconds is None else (r.trace_seconds or 0.0) + r.compile_seconds
        compile_ratio = r.compile_ratio.median if r.compile_ratio else None
        mebibytes = None if r.temporary_bytes is None else r.temporary_bytes / 2**20
        lines.append(
            f"  {r.name:<28}{r.seconds * 1e3:>10.3f}{r.time_ratio.median:>8.3f}{interval:>20}"
            f"{_cell(whole, 11, 2)}{_cell(compile_ratio, 7, 2)}{_cell(mebibytes, 10, 2)}"
            f"{_cell(r.memory_ratio, 7, 3)}{_cell(r.flops_ratio, 8, 3)}"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the numbers depend on, without the machine's name."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "versions": versions,
    }


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"
