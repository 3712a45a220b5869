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
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgrad import store

RESULTS = Path(__file__).parent.parent / "results"
PACKAGES = ("jax", "jaxlib", "numpy", "optax", "flax", "equinox", "dm-haiku", "torch")


@dataclass(frozen=True)
class Options:
    """How long to measure.

    Attributes:
        rounds: timed rounds; each runs every case once.
        compile_rounds: compilations of each case, from a cleared cache.
        sample_seconds: a sample repeats its call until about this long.
        strict: a failed claim makes the exit status non-zero.
        seed: of the order within the rounds, and of the intervals.
    """

    rounds: int = 30
    compile_rounds: int = 3
    sample_seconds: float = 0.02
    strict: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        name: as the table shows it.
        function: with jit=True a function JAX can trace; with jit=False anything callable (a
        function of another
            framework, or one with Python work of its own), timed as it stands, without compile
            time and memory.
        arguments: its positional arguments.
        jit: see `function`.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    jit: bool = True


@dataclass(frozen=True)
class Ratio:
    """A case over its baseline: the median, and the 95 % bootstrap interval of the median."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """What was measured of one case. Seconds a call; bytes; None where a case was not compiled.

    Attributes:
        name: the case's.
        seconds: median over rounds.
        samples: every round's seconds.
        time_ratio: seconds over the baseline's, paired within rounds.
        trace_seconds: tracing and lowering, median over compile rounds.
        compile_seconds: XLA's compilation, median over compile rounds.
        compile_ratio: trace + compile over the baseline's, paired within compile rounds.
        temporary_bytes, argument_bytes, output_bytes: from the compiled program's memory analysis.
        memory_ratio: temporary bytes over the baseline's.
        flops: from the compiled program's cost analysis.
        flops_ratio: over the baseline's.
    """

    name: str
    seconds: float
    samples: tuple[float, ...]
    time_ratio: Ratio
    trace_seconds: float | None = None
    compile_seconds: float | None = None
    compile_ratio: Ratio | None = None
    temporary_bytes: int | None = None
    argument_bytes: int | None = None
    output_bytes: int | None = None
    memory_ratio: float | None = None
    flops: float | None = None
    flops_ratio: float | None = None


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


def compare(
    cases: Sequence[Case], *, baseline: str, options: Options = Options()
) -> dict[str, Result]:
    """Measures every case beside the baseline.

    Args:
        cases: what to time; names must differ.
        baseline: the name of the case that ratios divide by.
        options: how long.

    Returns:
        A Result for each name, in the order of the cases.

    Raises:
        ValueError: two cases of one name, or no case of the baseline's name.
    """
    names = [case.name for case in cases]
    if len(set(names)) != len(names) or baseline not in names:
        raise ValueError(f"expected different names, {baseline!r} among them; got {names}.")
    rng = np.random.default_rng(options.seed)
    compiled, traces, compiles = _compile_all(cases, options, rng)
    samples = _time_all(cases, compiled, options, rng)
    memory = {name: _memory(program) for name, program in compiled.items()}
    flops = {name: _flops(program) for name, program in compiled.items()}
    results = {}
    for name in names:
        ratios = samples[name] / samples[baseline]
        result: dict[str, Any] = {
            "seconds": float(np.median(samples[name])),
            "samples": tuple(samples[name].tolist()),
            "time_ratio": _ratio(ratios, rng),
        }
        if name in compiled:
            result |= {
                "trace_seconds": float(np.median(traces[name])),
                "compile_seconds": float(np.median(compiles[name])),
                "flops": flops[name],
                **memory[name],
            }
        if name in compiled and baseline in compiled:
            whole, base = traces[name] + compiles[name], traces[baseline] + compiles[baseline]
            base_bytes = memory[baseline].get("temporary_bytes")
            result |= {
                "compile_ratio": _ratio(whole / base, rng),
                "memory_ratio": _divide(memory[name].get("temporary_bytes"), base_bytes),
                "flops_ratio": _divide(flops[name], flops[baseline]),
            }
        results[name] = Result(name, **result)
    return results


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


# ---------------------------------------------------------------------------------------- measuring


def _compile_all(
    cases: Sequence[Case], options: Options, rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    jitted = [case for case in cases if case.jit]
    traces: dict[str, list[float]] = {case.name: [] for case in jitted}
    compiles: dict[str, list[float]] = {case.name: [] for case in jitted}
    compiled = {}
    for _round in range(options.compile_rounds):
        for index in rng.permutation(len(jitted)):
            case = jitted[index]
            jax.clear_caches()
            start = time.perf_counter()
            lowered = jax.jit(case.function).lower(*case.arguments)
            middle = time.perf_counter()
            compiled[case.name] = lowered.compile()
            traces[case.name].append(middle - start)
            compiles[case.name].append(time.perf_counter() - middle)
            _progress(f"compiled {case.name}")
    return (
        compiled,
        {name: np.asarray(seconds) for name, seconds in traces.items()},
        {name: np.asarray(seconds) for name, seconds in compiles.items()},
    )


def _time_all(
    cases: Sequence[Case], compiled: Mapping[str, Any], options: Options, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    def sample(case: Case, repeats: int) -> float:
        function = compiled.get(case.name, case.function)
        start = time.perf_counter()
        for _repeat in range(repeats):
            _ = jax.block_until_ready(function(*case.arguments))
        return (time.perf_counter() - start) / repeats

    repeats = {}
    for case in cases:
        _ = sample(case, 1)  # the first call pays for transfers and lazy initialization
        repeats[case.name] = max(1, round(options.sample_seconds / max(sample(case, 2), 1e-9)))
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for index in range(options.rounds):
        for place in rng.permutation(len(cases)):
            case = cases[place]
            seconds[case.name].append(sample(case, repeats[case.name]))
        _progress(f"round {index + 1} of {options.rounds}")
    _progress("")
    return {name: np.asarray(values) for name, values in seconds.items()}


def _ratio(ratios: np.ndarray, rng: np.random.Generator) -> Ratio:
    draws = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def _divide(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return None
    if b == 0:
        return 1.0 if a == 0 else float("inf")
    return a / b


def _memory(program: Any) -> dict[str, int]:
    analysis = program.memory_analysis()
    if analysis is None:  # a backend without an account of its memory
        return {}
    return {
        "temporary_bytes": int(analysis.temp_size_in_bytes),
        "argument_bytes": int(analysis.argument_size_in_bytes),
        "output_bytes": int(analysis.output_size_in_bytes),
    }


def _flops(program: Any) -> float | None:
    cost = program.cost_analysis()
    return float(cost["flops"]) if cost and "flops" in cost else None


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        _ = sys.stderr.write(f"\r\033[K{text}")
        _ = sys.stderr.flush()
