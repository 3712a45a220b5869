"""Vanishing: the verdicts follow the data; the tiny run agrees with theory."""

import numpy as np
import pytest
from atlas_cases import measured, spread, tampered, verdict, words

from experiments.vanishing import EXPERIMENT, Config
from jaxgrad import theory

TINY = EXPERIMENT.presets["tiny"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return measured(EXPERIMENT, tmp_path_factory.mktemp("vanishing"))


CONFIG = Config(
    activations=("sigmoid", "relu"), trained_activations=("sigmoid", "relu"),
    initializers=("xavier_normal", "he_normal"), passed=(2, 10, 50), depths=(2, 50),
    deepest_activations=(),
)  # fmt: skip


def made(factor=0.9, off=0.0, accuracy=0.1, loss=2.3026):
    """Gains of `factor` a layer, theory off by `off` nats a layer, and nets that ended alike."""
    gains = np.log(factor) * np.asarray([CONFIG.passed] * 2, float)
    gain = {"log_gain": spread(gains, 4), "theory": gains + off * np.asarray(CONFIG.passed)}
    shape = (2, 2, len(CONFIG.depths))
    ended = {"loss": np.full((*shape, 3), loss), "accuracy": np.full(shape, accuracy)}
    kinds = ("sigmoid", "relu")
    return {**{f"gain-{a}": gain for a in kinds}, **{f"train-{a}-50": ended for a in kinds}}


def test_every_verdict_has_data_that_lead_to_it():
    fading = words(EXPERIMENT, CONFIG, made())
    assert fading == {
        "factor": "holds", "mean_field": "holds", "relu": "false", "sigmoid_stalls": "holds",
        "relu_learns": "false", "loss": "false", "survival": "holds if",
    }  # fmt: skip
    healthy = words(EXPERIMENT, CONFIG, made(factor=0.99, off=0.1, accuracy=0.9, loss=0.2))
    assert healthy == {
        "factor": "false", "mean_field": "false", "relu": "holds", "sigmoid_stalls": "false",
        "relu_learns": "holds", "loss": "false", "survival": "holds",
    }  # fmt: skip
    lost = words(EXPERIMENT, CONFIG, made(factor=0.5))
    assert lost["loss"] == "holds" and lost["survival"] == "holds if"
    assert words(EXPERIMENT, CONFIG, made(factor=0.5, loss=1.0))["loss"] == "false"
    # every net that lost its gradient learns, every other fails
    data = made(factor=0.5)
    for name in ("train-sigmoid-50", "train-relu-50"):
        data = tampered(
            data, name, "accuracy", lambda a: np.where(np.arange(2) == 1, 0.9, 0.1) + 0 * a
        )
    assert words(EXPERIMENT, CONFIG, data)["survival"] == "false"


def test_conditions_name_what_holds():
    data = tampered(made(), "train-sigmoid-50", "accuracy", lambda a: np.add(a, [0.8, 0]))
    found = verdict(EXPERIMENT, "sigmoid_stalls", CONFIG, data)
    assert found.word == "holds if" and found.condition == "50 layers"
    data = tampered(made(), "train-relu-50", "accuracy", lambda a: np.add(a, [[0, 0], [0.8, 0]]))
    found = verdict(EXPERIMENT, "relu_learns", CONFIG, data)
    assert found.condition == "He with 2 layers"
    data = tampered(made(factor=0.5), "train-relu-50", "loss", lambda a: a + 1)
    assert verdict(EXPERIMENT, "loss", CONFIG, data).condition == "sigmoid"


def test_the_divergence_is_that_of_the_whole_depth():
    found = verdict(EXPERIMENT, "factor", CONFIG, made(factor=0.3))
    assert found.divergence == pytest.approx(50 * np.log(3), rel=1e-3)
    assert verdict(EXPERIMENT, "mean_field", CONFIG, made(off=0.1)).divergence == pytest.approx(0.1)


@pytest.mark.slow
def test_the_tiny_run_follows_theory(tiny):
    assert max(tiny.traces.values()) <= 1 and set(tiny.traces) == set(tiny.data)
    # He ReLU: the exact law of Gaussian layers at this width
    layers = TINY.passed[-1]
    law = theory.log_gain([TINY.width] * layers)
    logs = 2 * tiny.data["gain-relu"]["log_gain"][:, TINY.initializers.index("he_normal"), -1]
    error = np.sqrt(law.variance / len(logs))
    assert abs(logs.mean() - law.mean) < 4 * error
    # ReLU without the biases' help: each layer passes half of sigma_w^2
    np.testing.assert_allclose(tiny.data["gain-relu"]["theory"][0, -1], 0, atol=1e-4)
    np.testing.assert_allclose(
        tiny.data["gain-relu"]["theory"][1, -1], layers * np.log(1 / 6) / 2, rtol=1e-5
    )
    found = words(EXPERIMENT, TINY, tiny.data)
    assert found["mean_field"] == "holds" and found["factor"] == "false"
    assert found["sigmoid_stalls"] == "holds if" and found["loss"] == "holds"


@pytest.mark.slow
def test_tampering_with_the_real_data_flips_the_verdicts(tiny):
    shift = 20 * np.log(0.9)
    data = tampered(tiny.data, "gain-sigmoid", "log_gain", lambda a: a - a.mean(0) + shift)
    assert verdict(EXPERIMENT, "factor", TINY, data).word == "holds"
    data = tampered(tiny.data, "gain-relu", "theory", lambda a: a + 5)
    assert verdict(EXPERIMENT, "mean_field", TINY, data).word == "holds if"
    data = tampered(tiny.data, "train-sigmoid-20", "accuracy", lambda a: 0 * a + 0.9)
    assert verdict(EXPERIMENT, "sigmoid_stalls", TINY, data).word == "false"
    assert len(EXPERIMENT.figures(TINY, tiny.data)) == 2
