"""Recurrent networks: verdicts follow the data; exponents add up to the determinant."""

import numpy as np
import pytest
from atlas_cases import measured, spread, tampered, verdict, words

from experiments import recurrent, recurrent_nets

EXPERIMENT = recurrent.EXPERIMENT
TINY = EXPERIMENT.presets["tiny"]
CELLS = len(recurrent_nets.EXPONENTS)


def _lines(rates, seeds=3):
    """Profiles that fall or grow steadily: rates in nats a step, (seeds, settings, times)."""
    times = np.arange(0, TINY.steps + 1, max(TINY.steps // 25, 1))
    return spread(np.asarray(rates, float)[:, None] * times, seeds, 1e-6)


def _untied():
    """Profiles that end where the law of independent layers has them, with its spread."""
    mean, spread_ = recurrent.untied(TINY, TINY.steps)
    ends = mean + spread_ * np.c_[[-1.0, 0.0, 1.0]]
    return ends[..., None] * np.linspace(0, 1, 26)


@pytest.fixture
def ideal():
    """Data for which every statement holds."""
    gated = {c: [b for k, b in recurrent_nets.biases(TINY.steps).values() if k == c]
             for c in ("gru", "lstm")}  # fmt: skip
    exponents = np.full((2, CELLS, TINY.exponents_width), -0.1)
    task = {
        cell: {
            "loss": spread(np.full(count, loss), 2),
            "log_gradient": spread(np.full(count, gradient), 2),
        }
        for cell, count, loss, gradient in (
            ("vanilla", 3, 0.69, -50), ("gru", 2, 0.1, -1), ("lstm", 3, 0.1, -1)
        )
    }  # fmt: skip
    return {
        "vanilla": {
            "gaussian": _untied(),
            "orthogonal": _lines(np.log(TINY.orthogonal) * 2),
        },
        "gru": {"log_gradient": _lines(np.zeros(len(gated["gru"])))},
        "lstm": {"log_gradient": _lines(np.log(1 / (1 + np.exp(-np.array(gated["lstm"])))))},
        "exponents": {
            "exponents": exponents,
            "rate": spread(exponents[0, :, 0], 2, 1e-6),
            "log_determinant": exponents.sum(-1),
        },
        **{f"task-{cell}": arrays for cell, arrays in task.items()},
    }


def test_data_that_are_as_stated_hold(ideal):
    flat = tampered(ideal, "lstm", "log_gradient", lambda a: 0 * a)
    found = {**words(EXPERIMENT, TINY, ideal), "gates": words(EXPERIMENT, TINY, flat)["gates"]}
    assert set(found.values()) == {"holds"}
    # a gate that decays as its bias says is not one that keeps
    assert verdict(EXPERIMENT, "gates", TINY, ideal).word == "holds if"
    assert verdict(EXPERIMENT, "forget_bias", TINY, flat).word == "false"


@pytest.mark.parametrize(
    ("key", "point", "name", "change", "word"),
    [
        ("singular_value", "vanilla", "orthogonal", lambda a: 0 * a, "false"),
        ("singular_value", "vanilla", "orthogonal", lambda a: -np.abs(a), "holds if"),
        ("mean_field", "vanilla", "gaussian", lambda a: 0.1 * a + 9, "false"),
        ("mean_field", "vanilla", "gaussian", lambda a: a + 9, "holds if"),
        ("mean_field", "vanilla", "gaussian", lambda a: 5 * a - 4 * a.mean(0), "holds if"),
        ("forget_bias", "lstm", "log_gradient", lambda a: 2 * a - 1, "false"),
        ("lyapunov", "exponents", "rate", lambda a: a - 0.1, "false"),
        ("lyapunov", "exponents", "rate", lambda a: a - [0, 0, 0.1], "holds if"),
        ("one_number", "exponents", "exponents", lambda a: a + np.linspace(9, 0, 6), "false"),
        ("one_number", "exponents", "exponents",
         lambda a: a + np.c_[[0, 0, 1]] * np.linspace(1, 0, 6), "holds if"),
        ("memory_task", "task-lstm", "loss", lambda a: a + 0.5, "holds if"),
        ("memory_task", "task-vanilla", "loss", lambda a: 0 * a, "false"),
        ("survival", "task-vanilla", "loss", lambda a: 0 * a, "holds if"),
    ],
)  # fmt: skip
def test_a_verdict_follows_its_data(ideal, key, point, name, change, word):
    found = verdict(EXPERIMENT, key, TINY, tampered(ideal, point, name, change))
    assert found.word == word, found.measured


def test_claims_about_gates_and_survival_can_be_false(ideal):
    other = ideal
    for cell in ("gru", "lstm"):
        other = tampered(other, cell, "log_gradient", lambda a: a - 20)
    assert verdict(EXPERIMENT, "gates", TINY, other).word == "false"
    for cell in ("vanilla", "gru", "lstm"):
        other = tampered(other, f"task-{cell}", "log_gradient", lambda a: -51 - a)
    assert verdict(EXPERIMENT, "survival", TINY, other).word == "false"


@pytest.mark.slow
def test_tiny_cells_have_exponents_that_add_up_to_their_determinants(tmp_path):
    result = measured(EXPERIMENT, tmp_path)
    assert max(result.traces.values()) == 1
    arrays = result.data["exponents"]
    total = np.asarray(arrays["exponents"], float).sum(-1)
    np.testing.assert_allclose(total, arrays["log_determinant"], rtol=1e-3, atol=0)
    # no gradient outgrows the largest singular value of the whole
    assert np.all(arrays["rate"] <= arrays["exponents"][..., 0] + 1e-5)
    # gain^T bounds the gradient of an orthogonal vanilla cell below gain 1
    ends = np.asarray(result.data["vanilla"]["orthogonal"], float)[:, 0, -1]
    assert np.all(ends <= TINY.steps * np.log(TINY.orthogonal[0]) + 1e-3)
    other = tampered(result.data, "exponents", "rate", lambda a: a - 1)
    assert verdict(EXPERIMENT, "lyapunov", TINY, other).word == "false"
