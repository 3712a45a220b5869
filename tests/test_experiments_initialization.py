"""Initialization: the verdicts follow the data; the tiny run agrees with theory."""

import numpy as np
import pytest
from atlas_cases import measured, spread, tampered, verdict, words

from experiments.initialization import EXPERIMENT
from experiments.initialization_nets import Config
from jaxgrad import theory

TINY = EXPERIMENT.presets["tiny"]
CONFIG = Config(
    activations=("tanh", "sigmoid", "relu", "gelu"), kept=(1, 10),
    initializers=("xavier_normal", "he_normal", "torch_linear"), shapes=((64, 64), (16, 64)),
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return measured(EXPERIMENT, tmp_path_factory.mktemp("initialization"))


def made(kept=1.0, off=0.0, torch=2.0, doubles=2.0, backward=1.0, he=0.9, xavier_loss=2.3):
    """Layers as the folk statements have them; each argument leaves one of them."""
    rules, depths = len(CONFIG.initializers), len(CONFIG.kept)
    path = np.ones((rules, depths)) * kept ** np.arange(depths)
    signal = {
        "square": spread(path, 3, 0), "variance": spread(path, 3, 0),
        "log_gain": spread(np.log(path), 3, 0), "theory_square": path * np.exp(off) ** path,
        "theory_log_gain": np.log(path) + off * np.arange(depths) * 10,
    }  # fmt: skip
    variances = np.broadcast_to(
        np.asarray([2 / doubles, 2.0, torch])[:, None], (2, 3, len(CONFIG.shapes))
    )
    loss = np.ones((3, 3, 3, 4)) * np.reshape([xavier_loss, 0.1, 2.3], (3, 1, 1))
    return {
        **{f"signal-{a}": dict(signal) for a in CONFIG.activations},
        "variances": {"fan_in_variance": variances, "he_backward": np.full((2, 2), backward)},
        "train": {"loss": loss, "accuracy": np.ones((3, 3, 3)) * [[0.1], [he], [0.1]]},
    }  # fmt: skip


def test_every_verdict_has_data_that_lead_to_it():
    assert set(words(EXPERIMENT, CONFIG, made()).values()) == {"holds"}
    other = made(9.0, 0.5, 1 / 3, 1.2, 2.0, 0.1, 1.0)
    assert set(words(EXPERIMENT, CONFIG, other).values()) == {"false"}


def test_conditions_name_what_holds():
    calm = made()["signal-tanh"]
    data = {**made(9.0, 0.5), "signal-tanh": calm, "signal-relu": calm}
    found = {c.key: c.judge(CONFIG, data) for c in EXPERIMENT.claims}
    assert found["theory"].condition == "tanh, relu"
    assert found["xavier"].condition == "tanh with Xavier"
    assert found["xavier_gradient"].condition == "tanh with Xavier"
    assert found["he"].condition == "relu with He"
    assert found["he"].divergence == pytest.approx(np.log(9))
    data = made(xavier_loss=1.0)
    assert verdict(EXPERIMENT, "published", CONFIG, data).condition == "He is to learn"
    square = made(doubles=1.2, torch=1.0, backward=2.0)["variances"]
    square = {k: np.array(v) for k, v in square.items()}
    square["fan_in_variance"][:, :, 0] = [1.0, 2.0, 2.0]
    square["he_backward"][:, 0] = 1.0
    data = {**made(), "variances": square}
    for key in ("torch", "doubles", "backward"):
        assert verdict(EXPERIMENT, key, CONFIG, data).condition == "64 to 64", key


@pytest.mark.slow
def test_the_tiny_run_follows_theory(tiny):
    assert max(tiny.traces.values()) <= 1 and set(tiny.traces) == set(tiny.data)
    found = words(EXPERIMENT, TINY, tiny.data)
    assert found["theory"] == "holds" and found["torch"] == "false"
    assert found["backward"] == "holds" and found["doubles"] == "holds if"
    scaled = tiny.data["variances"]["fan_in_variance"].mean(0)
    for (n_in, n_out), values in zip(TINY.shapes, scaled.T, strict=True):
        law = [2 * n_in / (n_in + n_out), 2, 1 / 3]
        # Var of a sample variance of a normal: 2 / count; of a uniform less
        np.testing.assert_allclose(values, law, rtol=4 * np.sqrt(2 / (2 * n_in * n_out)))
    # ReLU halves mean squares: sigma_w^2 / 2 a layer (He 1, Xavier 1/2, PyTorch 1/6)
    depth, relu = np.asarray(TINY.kept), tiny.data["signal-relu"]
    logs = np.outer(np.log([1 / 2, 1, 1 / 6]), depth)
    np.testing.assert_allclose(relu["theory_log_gain"], logs / 2, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(np.log(relu["theory_square"][:2]), logs[:2], atol=1e-5)
    # He ReLU's gradient, averaged over inputs, against the exact law at this width
    arrays, at = tiny.data["signal-relu"], TINY.initializers.index("he_normal")
    law = theory.log_gain([TINY.width] * TINY.kept[-1])
    logs = 2 * arrays["log_gain"][:, at, -1]
    assert abs(logs.mean() - law.mean) < 4 * np.sqrt(law.variance / len(logs))


@pytest.mark.slow
def test_tampering_with_the_real_data_flips_the_verdicts(tiny):
    for key, point, name, change in (
        ("theory", "signal-relu", "theory_square", lambda a: a * 3.0 ** np.arange(a.shape[-1])),
        ("xavier", "signal-tanh", "variance", lambda a: a + 1),
        ("xavier_gradient", "signal-tanh", "log_gain", lambda a: 0 * a),
        ("he", "signal-relu", "square", lambda a: a * 0.2 ** np.arange(a.shape[-1])),
        ("torch", "variances", "fan_in_variance", lambda a: 0 * a + 1),
        ("doubles", "variances", "fan_in_variance", lambda a: 0 * a + 1),
        ("backward", "variances", "he_backward", lambda a: 2 * a),
        ("published", "train", "accuracy", lambda a: 1 - np.round(a)),
    ):  # fmt: skip
        other = tampered(tiny.data, point, name, change)
        before, after = (verdict(EXPERIMENT, key, TINY, d) for d in (tiny.data, other))
        assert (after.word, after.condition) != (before.word, before.condition), key
    assert len(EXPERIMENT.figures(TINY, tiny.data)) == 2
