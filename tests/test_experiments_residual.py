"""Residual connections: the verdicts follow the data; the tiny run agrees with exact laws."""

import dataclasses

import numpy as np
import pytest
from atlas_cases import measured, spread, tampered, verdict, words

from experiments.residual import EXPERIMENT
from experiments.residual_nets import STREAMS, Config, depths_kept
from jaxgrad import theory

TINY = EXPERIMENT.presets["tiny"]
CONFIG = Config(rules=("plain", "post_ln"), scales=(0.1, 1.0), depth=8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return measured(EXPERIMENT, tmp_path_factory.mktemp("residual"))


def made(error=0.0, level=0.0, without=-20.0, shrinks=0.0, law=0.0, square=0.0, fitted=0.1):
    """Blocks as the folk statements have them; each argument leaves one of them."""
    depths, ones = len(depths_kept(CONFIG)), np.ones(2)
    rising = np.linspace(1, 0, depths)
    return {
        "shift": {"error": spread(error * ones, 3, 0)},
        **{f"stream-{r}": {"log_gradient": spread((without if r == "none" else level) * rising, 3)}
           for r in STREAMS},
        "branches": {"shrinks": spread(shrinks * ones, 4, 0), "theory": law * ones,
                     "square": spread(square + 1 + np.asarray(CONFIG.scales) ** 2, 4)},
        "fitted": {"log_gain": spread(fitted * np.ones(5), 3, 0), "loss": np.zeros(3)},
        "digits": {"shrinks": spread(shrinks * ones, 3, 0)},
    }  # fmt: skip


def test_every_verdict_has_data_that_lead_to_it():
    assert set(words(EXPERIMENT, CONFIG, made()).values()) == {"holds"}
    other = made(1.0, -5.0, -1.0, 0.4, 0.1, 0.5, -0.1)
    assert set(words(EXPERIMENT, CONFIG, other).values()) == {"false"}
    other["shift"]["error"][:, 0] = 0
    other["stream-pre_ln"]["log_gradient"] *= 0
    other["branches"]["shrinks"][:, 1] = other["branches"]["theory"][1] = 0
    other["branches"]["square"] = made()["branches"]["square"] + [0.5, 0]
    mixed = {c.key: c.judge(CONFIG, other) for c in EXPERIMENT.claims}
    assert {key: v.condition for key, v in mixed.items() if v.word == "holds if"} == {
        "shift": "plain", "highway": "Pre-LN", "never": "s = 1", "law": "s = 1",
        "mean_square": "s = 1",
    }  # fmt: skip
    assert mixed["trained"].divergence == pytest.approx(0.5)


def test_an_overflow_is_said_and_is_no_highway():
    data = tampered(made(), "stream-plain", "log_gradient", lambda a: np.nan * a)
    found = verdict(EXPERIMENT, "highway", CONFIG, data)
    assert found.condition == "Pre-LN, Post-LN" and "overflows" in found.measured


@pytest.mark.slow
def test_the_tiny_run_has_the_exact_laws(tiny):
    assert max(tiny.traces.values()) <= 1 and set(tiny.traces) == set(tiny.data)
    found = words(EXPERIMENT, TINY, tiny.data)
    assert found["shift"] == "holds if" and found["never"] != "holds"
    assert found["law"] == found["mean_square"] == "holds"
    errors = dict(zip(TINY.rules, tiny.data["shift"]["error"].max(0), strict=True))
    assert errors["plain"] == errors["rezero"] == 0  # bit for bit
    assert max(errors[r] for r in ("pre_ln", "sandwich", "layer_scale", "fixup")) < 1e-6
    assert min(errors[r] for r in ("none", "post_ln", "deep_norm")) > 0.1
    shares = tiny.data["branches"]["shrinks"]
    law = theory.shrink_probability(TINY.width, np.asarray(TINY.scales))
    error = np.sqrt(law * (1 - law) / shares.size * len(TINY.scales) / TINY.depth)
    assert np.all(np.abs(shares.mean(0) - law) < 4 * error + 1e-6)
    # the network that was to pass a tenth does, where it has learned to
    assert tiny.data["fitted"]["log_gain"].sum(1).max() < np.log(0.5)


@pytest.mark.slow
def test_tampering_with_the_real_data_flips_the_verdicts(tiny):
    for key, point, name, change in (
        ("shift", "shift", "error", lambda a: 0 * a),
        ("highway", "stream-pre_ln", "log_gradient", lambda a: a - 9),
        ("without", "stream-none", "log_gradient", lambda a: 0 * a),
        ("never", "branches", "shrinks", lambda a: a + 0.1),
        ("law", "branches", "shrinks", lambda a: a + 0.1),
        ("mean_square", "branches", "square", lambda a: a + 0.1),
        ("trained", "fitted", "log_gain", lambda a: 0 * a),
    ):
        other = tampered(tiny.data, point, name, change)
        before, after = (verdict(EXPERIMENT, key, TINY, d) for d in (tiny.data, other))
        assert (after.word, after.condition) != (before.word, before.condition), key
    assert len(EXPERIMENT.figures(TINY, tiny.data)) == 1


def test_the_config_says_which_depths_are_kept():
    assert list(depths_kept(dataclasses.replace(CONFIG, depth=12))) == [0, 4, 8, 12]
