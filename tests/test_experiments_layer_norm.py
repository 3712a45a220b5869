"""Layer normalization: the verdicts follow the data; the tiny run agrees with closed forms."""

import numpy as np
import pytest
from atlas_cases import measured, spread, tampered, verdict, words

from experiments.layer_norm import EXPERIMENT
from experiments.layer_norm_nets import Config, rates
from jaxgrad.nn.normalization import EPSILON

TINY = EXPERIMENT.presets["tiny"]
CONFIG = Config(
    factors=(0.1, 10.0), sigmas=(1e-3, 1.0), widths=(4, 64), activations=("relu",),
    trained_factors=(10.0,),
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return measured(EXPERIMENT, tmp_path_factory.mktemp("layer_norm"))


def made(change=0.0, ratio=1.0, loss=(1.0, 1.0, 1.0), rms=1.0, gain=1.0, theory=0.0, passed=1.0):
    """Layers as the folk statements have them; each argument leaves one of them."""
    ones = np.ones(2)
    return {
        "scale": {"output_change": spread(change * ones, 3, 0), "cosine": spread(0 * ones, 3),
                  "gradient_ratio": spread(ratio * ones, 3)},
        "epsilon": {"rms": spread([ones, rms * ones, ones], 3, 0),
                    "constant_gain": spread(rms * EPSILON**-0.5 * np.ones(3), 3, 0)},
        "null": {"passed": spread(passed * ones, 3), "ones": spread(0 * ones, 3, 0),
                 "input": spread(0 * ones, 3, 0)},
        "deep-relu": {"log_gain": spread(np.log(gain) * ones, 3, 1e-4),
                      "theory": theory + np.log(gain) * ones},
        "train": {"loss": spread(np.multiply.outer(loss, np.ones(20)), 3, 0),
                  "growth": spread(loss, 3, 0), "pythagoras": spread(np.ones(3), 3, 0)},
    }  # fmt: skip


def test_every_verdict_has_data_that_lead_to_it():
    assert rates(CONFIG) == [(1.0, 1.0), (10.0, 1.0), (10.0, 100.0)]
    assert set(words(EXPERIMENT, CONFIG, made()).values()) == {"holds"}
    other = made(0.5, 10.0, (1.2, 2.0, 3.0), 3.0, 1.2, 0.1, 0.7)
    assert set(words(EXPERIMENT, CONFIG, other).values()) == {"false"}
    other["scale"]["output_change"][:, 1] = 0
    other["scale"]["gradient_ratio"][:, 1] = 1
    other["epsilon"]["rms"][:, :, 1] = 1
    other["epsilon"]["constant_gain"][:, 2] = np.nan
    other["epsilon"]["constant_gain"][:, 0] = EPSILON**-0.5
    other["null"]["passed"][:, 1] = 1
    other["deep-relu"]["log_gain"][:, 0] = 0
    other["deep-relu"]["theory"][0] = 0
    other["train"]["growth"][:, 1] = 1
    mixed = {c.key: c.judge(CONFIG, other) for c in EXPERIMENT.claims}
    assert {key for key, v in mixed.items() if v.word == "holds if"} == {
        "forward", "backward", "growth", "placement", "constant", "null", "prevents", "theory",
    }  # fmt: skip
    assert mixed["forward"].condition == "alpha = 10"
    assert mixed["constant"].condition == "sqrt(var + eps)"
    assert mixed["null"].condition == "width 64"


def test_training_is_judged_by_rate_and_scale():
    plain, scaled = (1.0, 2.0, 1.0), (1.0, 1.0, 2.0)
    assert verdict(EXPERIMENT, "training", CONFIG, made(loss=plain)).word == "false"
    assert verdict(EXPERIMENT, "effective", CONFIG, made(loss=plain)).word == "holds"
    assert verdict(EXPERIMENT, "training", CONFIG, made(loss=scaled)).word == "holds"
    assert verdict(EXPERIMENT, "effective", CONFIG, made(loss=scaled)).word == "false"
    found = verdict(EXPERIMENT, "training", CONFIG, made(loss=plain))
    assert found.divergence == pytest.approx(np.log(2))


@pytest.mark.slow
def test_the_tiny_run_has_the_closed_forms(tiny):
    assert max(tiny.traces.values()) <= 1 and set(tiny.traces) == set(tiny.data)
    scale, factors = tiny.data["scale"], np.asarray(TINY.factors)
    at = factors == 10  # beyond epsilon's reach
    np.testing.assert_allclose(scale["gradient_ratio"][:, at], 0.1, rtol=1e-4)
    assert np.abs(scale["cosine"][:, at]).max() < 1e-4
    sigmas = np.asarray(TINY.sigmas)
    rms = tiny.data["epsilon"]["rms"][0]
    np.testing.assert_allclose(rms[0], sigmas / np.sqrt(sigmas**2 + EPSILON), rtol=1e-4)
    np.testing.assert_allclose(rms[1], sigmas / (sigmas + EPSILON), rtol=1e-4)
    gains = tiny.data["epsilon"]["constant_gain"][0]
    np.testing.assert_allclose(gains[:2], [EPSILON**-0.5, 1 / EPSILON], rtol=1e-4)
    assert np.isnan(gains[2])
    found = words(EXPERIMENT, TINY, tiny.data)
    assert found.pop("theory") != "false"  # twenty layers have not settled everywhere
    assert found == {
        "forward": "holds if", "backward": "false", "training": "false", "effective": "holds",
        "growth": "holds", "placement": "holds if", "constant": "holds if", "null": "holds if",
        "prevents": "holds if",
    }  # fmt: skip
    np.testing.assert_allclose(
        tiny.data["null"]["passed"].mean(0), np.sqrt(1 - 2 / np.asarray(TINY.widths)), rtol=0.02
    )


@pytest.mark.slow
def test_tampering_with_the_real_data_flips_the_verdicts(tiny):
    for key, point, name, change, word in (
        ("forward", "scale", "output_change", lambda a: 0 * a, "holds"),
        ("backward", "scale", "gradient_ratio", lambda a: 1 + 0 * a, "holds"),
        ("training", "train", "loss", lambda a: 0 * a + a[:, :1], "holds"),
        ("effective", "train", "loss", lambda a: a * [[1], [1], [2]], "false"),
        ("growth", "train", "growth", lambda a: 2 * a, "false"),
        ("placement", "epsilon", "rms", lambda a: 1 + 0 * a, "holds"),
        ("constant", "epsilon", "constant_gain", lambda a: 1 + 0 * a, "false"),
        ("null", "null", "passed", lambda a: 0 * a + 1, "holds"),
        ("prevents", "deep-sigmoid", "log_gain", lambda a: 0 * a - 1, "holds if"),
        ("theory", "deep-relu", "theory", lambda a: a + 0.2, "holds if"),
    ):
        other = tampered(tiny.data, point, name, change)
        before, after = (verdict(EXPERIMENT, key, TINY, d) for d in (tiny.data, other))
        assert after.word == word and after != before, key
    assert len(EXPERIMENT.figures(TINY, tiny.data)) == 2
