"""The update rules: verdicts follow the data; real updates have the sizes that the rules give."""

import numpy as np
import pytest
from atlas_cases import measured, spread, tampered, verdict, words

from experiments import optimizers, optimizers_nets

EXPERIMENT = optimizers.EXPERIMENT
TINY = EXPERIMENT.presets["tiny"]
QUICK = EXPERIMENT.presets["quick"]
RULES = optimizers_nets.RULES
PLACE = {name: k for k, name in enumerate(RULES)}


def _curves(config):
    """Losses in which every rule's window of good rates is as the statements have it."""
    table = np.log10(optimizers_nets.rates(config))
    center = {"SGD": -0.5, "momentum": -1.5, "Adam": -2.5, "AdamW": -2.5, "Lion": -3.25}
    reach = {"SGD": 0.6, "momentum": 0.6, "Adam": 1.2, "AdamW": 1.2, "Lion": 0.6}
    floor = {"SGD": 0.5, "momentum": 0.4, "Adam": 0.2, "AdamW": 0.2, "Lion": 0.25}
    rows = [
        np.where(np.abs(row - center[r]) < reach[r], floor[r], 2.0)
        for r, row in zip(RULES, table, strict=True)
    ]
    return np.array(rows)


@pytest.fixture
def ideal():
    """Data for which every statement holds (for `lion_memory`, none of what is counted)."""
    task = {
        "loss": spread(_curves(QUICK), 3, 1e-6),
        "slope": spread(np.full((len(RULES), QUICK.rates), -0.5), 3),
        "start": np.full(3, 2.3),
    }
    weights = 1e6
    return {
        "digits": task,
        "text": dict(task),
        "memory": {
            "bytes": np.array([[[weights, 2 * weights, 0]] * 2, [[weights, weights, 0]] * 2])
        },
        "scale": {"update": spread(np.ones((3, len(QUICK.scales))), 3)},
    }


def test_data_that_are_as_stated_hold(ideal):
    found = words(EXPERIMENT, QUICK, ideal)
    assert found.pop("lion_memory") == "holds if"
    assert set(found.values()) == {"holds"}
    half = tampered(ideal, "memory", "bytes", lambda a: np.stack([a[0], a[0] / 2]))
    assert verdict(EXPERIMENT, "lion_memory", QUICK, half).word == "holds"


def _columns(**factors):
    scale = np.ones((len(RULES), 1))
    for name, factor in factors.items():
        scale[PLACE[name]] = factor
    return scale


@pytest.mark.parametrize(
    ("key", "name", "change"),
    [
        ("sensitivity", "loss", lambda a: a[:, [2, 1, 0, 3, 4]]),
        ("default", "loss", lambda a: a * _columns(Adam=3)),
        ("smaller_updates", "slope", lambda a: a * 0),
        ("lion_rate", "loss", lambda a: np.concatenate([a[:, :4], np.roll(a[:, 4:], 4, -1)], 1)),
    ],
)
def test_a_verdict_follows_one_task_or_both(ideal, key, name, change):
    one = tampered(ideal, "text", name, change)
    found = verdict(EXPERIMENT, key, QUICK, one)
    assert found.condition == "digits", found.measured
    both = tampered(one, "digits", name, change)
    assert verdict(EXPERIMENT, key, QUICK, both).word == "false"


@pytest.mark.parametrize(
    ("key", "point", "name", "change", "word"),
    [
        ("lion_memory", "memory", "bytes", lambda a: np.stack([a[0], a[0]]), "false"),
        ("state", "memory", "bytes", lambda a: a * [1, 1.1, 1], "false"),
        ("state", "memory", "bytes", lambda a: a * [[[1, 1, 1]], [[1, 2, 1]]], "holds if"),
        ("scale_free", "scale", "update", lambda a: a * QUICK.scales, "false"),
        ("scale_free", "scale", "update",
         lambda a: a * np.stack([QUICK.scales, np.ones(5), np.ones(5)]), "holds if"),
    ],
)  # fmt: skip
def test_a_verdict_follows_its_data(ideal, key, point, name, change, word):
    found = verdict(EXPERIMENT, key, QUICK, tampered(ideal, point, name, change))
    assert found.word == word, found.measured


def test_runs_that_diverged_count_as_no_progress(ideal):
    other = tampered(ideal, "text", "loss", lambda a: np.where(a == 2.0, np.nan, a))
    np.testing.assert_array_equal(
        optimizers.windows(QUICK, other, "text"), optimizers.windows(QUICK, ideal, "text")
    )


@pytest.mark.slow
def test_tiny_runs_have_the_sizes_that_the_rules_give(tmp_path):
    result = measured(EXPERIMENT, tmp_path)
    assert max(result.traces.values()) == 1
    found = words(EXPERIMENT, TINY, result.data)
    assert found["state"] == "holds"
    assert "state is counted" in verdict(EXPERIMENT, "lion_memory", TINY, result.data).condition
    update = np.asarray(result.data["scale"]["update"], float)
    one = TINY.scales.index(1.0)
    # SGD's update is proportional to the gradient; Lion's is a sign, of size one
    np.testing.assert_allclose(update[:, 0] / update[:, 0, [one]] / TINY.scales, 1, rtol=1e-4)
    assert np.all(update[:, 2] <= 1 + 1e-6)
    slopes = np.asarray(result.data["digits"]["slope"], float)
    assert np.all(np.abs(slopes[:, PLACE["SGD"], 0] - 1) < 1e-3)
    other = tampered(result.data, "memory", "bytes", lambda a: np.stack([a[0], a[0]]))
    assert verdict(EXPERIMENT, "lion_memory", TINY, other).word == "false"
