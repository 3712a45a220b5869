"""Exploding: the verdicts follow the data; the tiny run agrees with exact laws."""

import numpy as np
import pytest
from atlas_cases import measured, spread, tampered, verdict, words

from experiments.exploding import EXPERIMENT
from experiments.exploding_nets import KINDS, RULES, Config
from jaxgrad import theory

TINY = EXPERIMENT.presets["tiny"]
CONFIG = Config(
    gains=(1.0, 1.1), passed=(10, 20), dtypes=("float16", "float32"), range_gains=(2.0, 4.0),
    trained_gains=(1.0, 2.0),
)  # fmt: skip
GAUSSIAN = {"linear, Gaussian": "linear", "ReLU, He": "relu"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return measured(EXPERIMENT, tmp_path_factory.mktemp("exploding"))


def made(width_law=True, off=0.0, layers=(17, 9), norm=1.0, accuracy=(0.9, 0.9), loss=np.inf):
    """Gains as arithmetic has them, or with the drift of finite width in Gaussian kinds."""
    plain = np.outer(np.log(CONFIG.gains), CONFIG.passed)
    arrays = {}
    for kind in KINDS:
        drift = float(theory.log_gain([CONFIG.width], GAUSSIAN.get(kind, "linear")).mean) / 2
        drift = drift * np.asarray(CONFIG.passed) if width_law and kind in GAUSSIAN else 0
        arrays[f"gain-{kind}"] = {
            "log_gain": spread(plain + drift, 400, 1e-4),
            "mean_field": plain + off,
        }
    for k, dtype in enumerate(CONFIG.dtypes):
        element = spread(np.asarray([layers, (129, 65)][k], float), 2, 0)
        arrays[f"range-{dtype}"] = {
            "element": element, "plain_norm": norm * element, "scaled_norm": element,
        }  # fmt: skip
    for rule in RULES:
        right, last = (accuracy, 0.1) if "clipped" in rule else ((0.9, 0.1), (0.1, loss))
        arrays[f"train-{rule}"] = {
            "accuracy": spread(right, 3, 0), "first_norm": np.ones((3, 2)),
            "loss": np.ones((3, 2, 4)) * np.reshape(last * np.ones(2), (2, 1)),
        }  # fmt: skip
    return arrays


def test_every_verdict_has_data_that_lead_to_it():
    arithmetic = words(EXPERIMENT, CONFIG, made(width_law=False))
    assert arithmetic == {
        "factor": "holds", "width": "false", "tanh": "holds", "overflow": "holds",
        "norm": "holds", "diverges": "holds", "clip": "holds",
    }  # fmt: skip
    real = made(off=5.0, layers=(7, 3), norm=0.5, accuracy=(0.9, 0.1), loss=0.1)
    found = words(EXPERIMENT, CONFIG, real)
    assert found == {
        "factor": "holds if", "width": "holds", "tanh": "false", "overflow": "holds if",
        "norm": "false", "diverges": "false", "clip": "false",
    }  # fmt: skip
    assert verdict(EXPERIMENT, "overflow", CONFIG, real).condition == "float32"
    condition = verdict(EXPERIMENT, "factor", CONFIG, real).condition
    assert condition == "linear, orthogonal, tanh, orthogonal"
    assert verdict(EXPERIMENT, "norm", CONFIG, real).divergence == pytest.approx(np.log(2))
    fading = tampered(made(), "gain-linear, orthogonal", "log_gain", lambda a: a - 3)
    fading = tampered(fading, "gain-tanh, orthogonal", "log_gain", lambda a: a - 3)
    assert verdict(EXPERIMENT, "factor", CONFIG, fading).word == "false"
    short = tampered(made(layers=(7, 3)), "range-float32", "element", lambda a: a - 9)
    assert verdict(EXPERIMENT, "overflow", CONFIG, short).word == "false"


def test_conditions_name_what_holds():
    data = tampered(made(), "train-Adam", "loss", lambda a: 0 * np.nan_to_num(a) + 0.1)
    assert verdict(EXPERIMENT, "diverges", CONFIG, data).condition == "SGD at gain 2.0"
    data = tampered(
        made(accuracy=(0.9, 0.1)), "train-SGD", "loss", lambda a: np.full_like(a, np.nan)
    )
    assert verdict(EXPERIMENT, "clip", CONFIG, data).condition == "gain 1.0"
    data = tampered(made(norm=0.5), "range-float16", "plain_norm", lambda a: 2 * a)
    assert verdict(EXPERIMENT, "norm", CONFIG, data).condition == "float16"
    data = tampered(made(), "gain-ReLU, He", "log_gain", lambda a: a + 1)
    assert verdict(EXPERIMENT, "width", CONFIG, data).condition == "linear, Gaussian"


@pytest.mark.slow
def test_the_tiny_run_follows_theory(tiny):
    assert max(tiny.traces.values()) <= 1 and set(tiny.traces) == set(tiny.data)
    # orthogonal layers: exact to rounding, whatever the seed
    logs = tiny.data["gain-linear, orthogonal"]["log_gain"]
    exact = np.outer(np.log(TINY.gains), TINY.passed)
    np.testing.assert_allclose(logs, np.broadcast_to(exact, logs.shape), atol=2e-5)
    found = words(EXPERIMENT, TINY, tiny.data)
    assert found["width"] == "holds" and found["factor"] == "holds if"
    assert found["overflow"] == "holds" and found["norm"] == "false"
    # a norm that scales first is finite as long as the elements are
    for dtype in TINY.dtypes:
        arrays = tiny.data[f"range-{dtype}"]
        assert np.all(arrays["scaled_norm"] >= arrays["element"] - 4)
        assert np.all(arrays["plain_norm"] < 0.7 * arrays["element"])


@pytest.mark.slow
def test_tampering_with_the_real_data_flips_the_verdicts(tiny):
    exact = np.outer(np.log(TINY.gains), TINY.passed)
    found = tiny.data["gain-tanh, orthogonal"]["log_gain"].mean(0)
    for key, point, name, change in (
        ("factor", "gain-linear, orthogonal", "log_gain", lambda a: a - 1),
        ("width", "gain-ReLU, He", "log_gain", lambda a: 0 * a + exact + 1),
        ("tanh", "gain-tanh, orthogonal", "mean_field", lambda a: found),
        ("overflow", "range-float16", "element", lambda a: a + 9),
        ("norm", "range-float16", "plain_norm", lambda a: 2 * a),
        ("diverges", "train-SGD", "loss", lambda a: 0 * np.nan_to_num(a)),
        ("clip", "train-SGD, clipped at 1", "accuracy", lambda a: 1 - np.round(a)),
    ):
        other = tampered(tiny.data, point, name, change)
        before, after = (verdict(EXPERIMENT, key, TINY, d) for d in (tiny.data, other))
        assert (after.word, after.condition) != (before.word, before.condition), key
    assert len(EXPERIMENT.figures(TINY, tiny.data)) == 2
