"""Fair timing on a machine that is not idle; `harness` says why it is done so."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


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


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        _ = sys.stderr.write(f"\r\033[K{text}")
        _ = sys.stderr.flush()
