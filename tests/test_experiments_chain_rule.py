"""The chain rule: the verdicts follow the data; the tiny run is exact."""

import numpy as np
import pytest
from atlas_cases import measured, spread, tampered, verdict, words

from experiments.chain_rule import CELLS, EXPERIMENT, Config

TINY = EXPERIMENT.presets["tiny"]
CONFIG = Config(architectures=("MLP", "GRU"), activations=("sigmoid", "relu"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return measured(EXPERIMENT, tmp_path_factory.mktemp("chain_rule"))


def made(error=0.0, excess=0.0, formula=0.0, ratio=0.0):
    """Networks as the folk statements have them; each argument leaves one of them."""
    chain = {
        "error": np.full(2, error), "layers": np.full(2, 4), "log_norm": np.zeros(2),
        "log_norms": np.full(2, excess),
    }  # fmt: skip
    two = np.ones(2)
    return {
        "chain-MLP": chain,
        "chain-GRU": dict(chain),
        "hidden": {"error": spread(error * np.ones(len(CELLS)), 3, 0)},
        "weights": {"formula": spread(formula * two, 3, 0), "gain": spread(-3 * two, 3),
                    "ratio": spread((ratio - 3) * two, 3)},
    }  # fmt: skip


def test_every_verdict_has_data_that_lead_to_it():
    assert set(words(EXPERIMENT, CONFIG, made()).values()) == {"holds"}
    other = made(error=0.1, excess=1.0, formula=0.1, ratio=2.0)
    assert set(words(EXPERIMENT, CONFIG, other).values()) == {"false"}
    other["chain-GRU"] = made()["chain-GRU"]
    other["hidden"]["error"][:, 0] = 0
    other["weights"]["formula"][:, 1] = 0
    other["weights"]["ratio"][:, 0] = -3
    mixed = {c.key: c.judge(CONFIG, other) for c in EXPERIMENT.claims}
    assert {key: v.condition for key, v in mixed.items()} == {
        "product": "GRU", "norms": "GRU", "hidden": "vanilla", "backward": "relu",
        "weights": "sigmoid",
    }  # fmt: skip
    assert mixed["norms"].divergence == pytest.approx(1)
    assert mixed["weights"].divergence == pytest.approx(2)


@pytest.mark.slow
def test_the_tiny_run_is_exact(tiny):
    assert max(tiny.traces.values()) <= 1 and set(tiny.traces) == set(tiny.data)
    assert words(EXPERIMENT, TINY, tiny.data) == {
        "product": "holds", "backward": "holds", "weights": "holds if", "norms": "false",
        "hidden": "holds if",
    }  # fmt: skip
    assert verdict(EXPERIMENT, "hidden", TINY, tiny.data).condition == "vanilla, gru"
    # norms are submultiplicative
    for name in TINY.architectures:
        arrays = tiny.data[f"chain-{name}"]
        assert np.all(arrays["log_norms"] >= arrays["log_norm"] - 1e-5)


@pytest.mark.slow
def test_tampering_with_the_real_data_flips_the_verdicts(tiny):
    for key, point, name, change in (
        ("product", "chain-MLP", "error", lambda a: a + 0.1),
        ("backward", "weights", "formula", lambda a: a + 0.1),
        ("weights", "weights", "ratio", lambda a: 0 * a - 99),
        ("norms", "chain-LSTM", "log_norms", lambda a: tiny.data["chain-LSTM"]["log_norm"]),
        ("hidden", "hidden", "error", lambda a: 0 * a),
    ):
        other = tampered(tiny.data, point, name, change)
        before, after = (verdict(EXPERIMENT, key, TINY, d) for d in (tiny.data, other))
        assert after.word != before.word, key
    assert len(EXPERIMENT.figures(TINY, tiny.data)) == 1
