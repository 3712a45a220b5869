"""The atlas: points are kept, killed runs resume, intervals cover, verdicts have their words."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.atlas import frame, running


@dataclasses.dataclass(frozen=True)
class Three:
    """A config."""

    values: tuple[float, ...] = (1.0, 2.0, 3.0)
    scale: float = 1.0


def judge(config, data):
    return frame.conclude({k: bool(a["x"] > 0) for k, a in data.items()}, "x")


def toy(die_at=None, **changes):
    def point(value, config):
        def measure():
            if value == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return {"x": np.array([value * config.scale])}

        return measure

    return frame.Experiment(
        "toy", "are all positive?", (frame.Claim("all", "all are positive", "x > 0", judge),),
        {"quick": Three(**changes)},
        lambda config: {f"v={v}": point(v, config) for v in config.values},
        lambda config, data: [],
    )  # fmt: skip


def test_a_killed_run_loses_the_point_in_flight_and_no_other(tmp_path):
    code = (
        "import sys; sys.path[:0] = ['tests']; from pathlib import Path; import test_atlas;"
        f"test_atlas.running.run(test_atlas.toy(die_at=3.0), 'quick', Path({str(tmp_path)!r}))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    lines = []
    result = running.run(toy(), "quick", tmp_path, lines.append)
    assert result.measured == ("v=3.0",)
    assert lines[0] == "toy [1/3] v=1.0: read" and lines[2].startswith(
        "toy [3/3] v=3.0: measured in"
    )
    assert running.run(toy(), "quick", tmp_path).measured == ()
    stored = running.load(toy(), "quick", tmp_path)
    assert stored["config"]["scale"] == 1.0 and stored["data"]["v=2.0"]["x"] == 2.0
    assert running.load(toy(scale=2.0), "quick", tmp_path) is None


def test_points_of_another_config_or_damaged_ones_are_measured_again(tmp_path):
    first = running.run(toy(), "quick", tmp_path)
    other = running.run(toy(scale=-1.0), "quick", tmp_path)
    assert other.measured == first.measured and judge(None, other.data).word == "false"
    (tmp_path / "points" / "toy-quick" / "v=2.0" / "arrays.npz").write_bytes(b"damaged")
    again = running.run(toy(scale=-1.0), "quick", tmp_path)
    assert again.measured == ("v=2.0",) and again.data["v=2.0"]["x"] == -2.0


def test_an_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).standard_normal((5, 4000))
    _, low, high = frame.interval(draws)
    assert abs(np.mean((low < 0) & (high > 0)) - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 4000)
    with pytest.raises(ValueError, match="at least 2 seeds"):
        frame.interval(draws[:1])


def test_a_verdict_has_a_condition_where_it_needs_one_and_nowhere_else():
    for word, condition in (("holds if", ""), ("holds", "always"), ("perhaps", "")):
        with pytest.raises(ValueError, match=r"^(word|condition):"):
            frame.Verdict(word, "", condition)
    with pytest.raises(ValueError, match="expected one of quick"):
        running.run(toy(), "fast", Path("unused"))


def test_one_call_for_all_seeds_traces_once_and_numbers_survive_the_file(tmp_path):
    def measure():
        return {"x": frame.over_seeds(lambda key: jax.random.normal(key, (3,)), 4)}

    experiment = dataclasses.replace(toy(), points=lambda config: {"a": measure, "nan": bad})
    result = running.run(experiment, "quick", tmp_path)
    assert result.traces == {"a": 1, "nan": 0}
    back = running.load(experiment, "quick", tmp_path)["data"]
    for name in ("a", "nan"):
        for key, values in result.data[name].items():
            assert back[name][key].dtype == values.dtype
            np.testing.assert_array_equal(back[name][key], values)


def bad():
    return {"x": np.array([np.nan, np.inf, 1e-38, 0.1], np.float32), "n": np.arange(3)}
