"""The benchmark harness finds a difference that is there, and only then."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import harness

QUICK = harness.Options(rounds=5, compile_rounds=1, sample_seconds=0.0)


def test_a_case_that_takes_three_times_as_long_has_the_ratio_three():
    cases = [
        harness.Case("slow", time.sleep, (0.015,), jit=False),
        harness.Case("fast", time.sleep, (0.005,), jit=False),
    ]
    results = harness.compare(cases, baseline="fast", options=QUICK)
    assert list(results) == ["slow", "fast"]
    assert results["fast"].time_ratio == harness.Ratio(1.0, 1.0, 1.0)
    assert 2.0 < results["slow"].time_ratio.median < 4.0
    assert len(results["slow"].samples) == 5
    assert results["slow"].compile_ratio is None


def test_flops_and_memory_are_the_compilers_account():
    x = jnp.ones((64, 64))
    cases = [
        harness.Case("one", lambda x: x @ x, (x,)),
        harness.Case("three", lambda x: (x @ x) @ (x @ jnp.cos(x)), (x,)),
    ]
    results = harness.compare(cases, baseline="one", options=QUICK)
    assert results["one"].flops == pytest.approx(2 * 64**3, rel=0.01)
    assert 2.9 < results["three"].flops_ratio < 3.2
    assert results["one"].argument_bytes == results["one"].output_bytes == 4 * 64**2
    assert results["three"].temporary_bytes >= 2 * 4 * 64**2


def test_asynchronous_work_is_waited_for():
    n = 1200
    x = jnp.ones((n, n))
    heavy = jax.jit(lambda x: x @ x @ x)
    _ = jax.block_until_ready(heavy(x))
    start = time.perf_counter()
    _ = jax.block_until_ready(heavy(x))
    blocked = time.perf_counter() - start
    result = harness.compare(
        [harness.Case("h", heavy, (x,), jit=False)], baseline="h", options=QUICK
    )
    assert result["h"].seconds > blocked / 4


def test_claims_hold_only_when_measured_and_within_the_bound():
    assert harness.Claim("c", 1.0, at_most=1.0).holds
    assert harness.Claim("c", harness.Ratio(1.02, 0.9, 1.2), at_most=1.03).holds
    assert not harness.Claim("c", 1.1, at_most=1.0).holds
    assert not harness.Claim("c", None, at_most=1.0).holds
    assert not harness.Claim("c", float("nan"), at_most=1.0).holds


def test_the_file_is_strict_json_and_names_no_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    case = harness.Case("a", jnp.sin, (jnp.ones(3),))
    results = harness.compare([case], baseline="a", options=QUICK)
    claims = [harness.Claim("a bound", float("inf"), at_most=1.0)]
    strict = harness.Options(strict=True)
    assert harness.finish("demo", {"table": results}, claims, strict) == 1
    assert harness.finish("demo", {"table": results}, claims, QUICK) == 0
    assert "FAILS: a bound: inf" in capsys.readouterr().out
    text = (tmp_path / "bench_demo.json").read_text()
    record = json.loads(text, parse_constant=pytest.fail)
    assert record["tables"]["table"]["a"]["seconds"] > 0
    assert record["machine"]["versions"]["jax"] == jax.__version__
    import platform

    assert platform.node() not in text
    assert [p.name for p in tmp_path.iterdir()] == ["bench_demo.json"]


def test_names_that_clash_or_lack_the_baseline_are_refused():
    case = harness.Case("a", np.sin, (1.0,), jit=False)
    for cases, baseline in ([case, case], "a"), ([case], "b"):
        with pytest.raises(ValueError, match="different names"):
            _ = harness.compare(cases, baseline=baseline)


def test_quick_means_three_rounds():
    assert harness.options(None, ["--quick"]).rounds == 3
    assert harness.options(None, ["--rounds", "7", "--strict"]) == harness.Options(7, strict=True)
