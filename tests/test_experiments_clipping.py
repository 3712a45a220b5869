"""Clipping: the verdicts follow the data; the tiny run has the rules' own bounds."""

import numpy as np
import pytest
from atlas_cases import measured, tampered, verdict, words

from experiments.clipping import EXPERIMENT, NAMES
from experiments.clipping_nets import Config

TINY = EXPERIMENT.presets["tiny"]
CONFIG = Config(rules=("SGD", "Adam"))
SEEDS = 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return measured(EXPERIMENT, tmp_path_factory.mktemp("clipping"))


def rule(**given):
    """A rule's figures, one a setting; all ones but those given by the setting's name."""
    keys = ("after_spike", "spike_step", "usual_step", "later_rate", "mean_step")
    arrays = {key: np.ones((SEEDS, len(NAMES))) for key in keys}
    arrays |= {key: np.zeros((SEEDS, len(NAMES))) for key in ("engaged", "engaged_last")}
    arrays["loss"] = np.ones((SEEDS, len(NAMES), 4))
    arrays["after_spike"] = 0.1 * arrays["after_spike"]
    for key, values in given.items():
        for setting, value in values.items():
            arrays[key][:, NAMES.index(setting)] = value
    return arrays


def text(last=1.0, engaged=0.0, cosine=1.0):
    loss = np.ones((SEEDS, 2, 4))
    loss[:, 1, -1] = last
    return {
        "loss": loss, "norm": np.ones((SEEDS, 2, 4)), "engaged": np.full((SEEDS, 2, 5), engaged),
        "value_cosine": np.full((SEEDS, 2), cosine),
    }  # fmt: skip


FOLK = {
    "after_spike": {"after, spike": 2.0, "none, spike": 2.0},
    "spike_step": {"none, spike": 50.0},
    "mean_step": {"before at 0.001": 0.1},
}
AGAINST = {
    "after_spike": {"before, spike": 2.0},
    "later_rate": {"none, small spike": 0.1},
    "engaged_last": {"before": 0.5},
}


def data(sgd, adam, **words_of_text):
    return {"digits-SGD": rule(**sgd), "digits-Adam": rule(**adam), "text": text(**words_of_text)}


def test_every_verdict_has_data_that_lead_to_it():
    folk = words(EXPERIMENT, CONFIG, data(FOLK, FOLK, last=0.9))
    assert set(folk.values()) == {"holds"}
    against = words(EXPERIMENT, CONFIG, data(AGAINST, AGAINST, engaged=0.5, cosine=0.5))
    assert {key for key, word in against.items() if word == "false"} == {
        "before", "after", "step", "memory", "proportional", "rare", "text",
    }  # fmt: skip
    assert against["direction"] == "holds if"
    mixed = data(FOLK, AGAINST)
    for key in ("before", "after", "step", "memory", "proportional"):
        assert verdict(EXPERIMENT, key, CONFIG, mixed).condition == "SGD", key
    found = verdict(EXPERIMENT, "rare", CONFIG, mixed)
    assert found.condition == "text with AdamW, digits with SGD"
    found = verdict(EXPERIMENT, "memory", CONFIG, mixed)
    assert found.divergence == pytest.approx(np.log(10))


def test_a_broken_network_is_damage():
    broken = data(FOLK, {**FOLK, "after_spike": {"after, spike": np.nan, "none, spike": np.nan}})
    assert verdict(EXPERIMENT, "after", CONFIG, broken).word == "holds"


@pytest.mark.slow
def test_the_tiny_run_has_the_rules_bounds(tiny):
    assert max(tiny.traces.values()) <= 1 and set(tiny.traces) == set(tiny.data)
    sgd, adam = tiny.data["digits-SGD"], tiny.data["digits-Adam"]
    at = NAMES.index("before, spike")
    # a clip at 1.0 bounds SGD's step by its rate; at 0.001 it bounds every step
    assert sgd["spike_step"][:, at].max() <= 0.1 * (1 + 1e-5)
    assert sgd["spike_step"][:, NAMES.index("none, spike")].min() > 1
    assert sgd["mean_step"][:, NAMES.index("before at 0.001")].max() <= 1e-4 * (1 + 1e-5)
    # Adam's ceiling: (1 - b1) / sqrt(1 - b2) times its rate, an element
    count = 64 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10
    assert adam["spike_step"].max() <= 0.1 / 0.001**0.5 * 0.002 * count**0.5
    found = words(EXPERIMENT, TINY, tiny.data)
    assert found["memory"] == "holds if" and found["proportional"] == "holds if"
    assert verdict(EXPERIMENT, "memory", TINY, tiny.data).condition == "SGD"
    assert found["direction"] == "holds if"


@pytest.mark.slow
def test_tampering_with_the_real_data_flips_the_verdicts(tiny):
    for key, point, name, change in (
        ("before", "digits-SGD", "after_spike", lambda a: a + 5 * np.eye(len(NAMES))[4]),
        ("after", "digits-SGD", "after_spike", lambda a: a + 5 * np.eye(len(NAMES))[5]),
        ("step", "digits-SGD", "spike_step", lambda a: 0 * a + 1e-3),
        ("memory", "digits-Adam", "later_rate", lambda a: 0 * a + 1),
        ("proportional", "digits-SGD", "mean_step", lambda a: 0 * a + 1),
        ("rare", "digits-SGD", "engaged_last", lambda a: 0 * a + (a[:, 1].mean() < 0.05)),
        ("text", "text", "loss", lambda a: a * [[[1], [0.5]]]),
        ("direction", "text", "value_cosine", lambda a: 0 * a + 1),
    ):
        other = tampered(tiny.data, point, name, change)
        before, after = (verdict(EXPERIMENT, key, TINY, d) for d in (tiny.data, other))
        assert (after.word, after.condition) != (before.word, before.condition), key
    assert len(EXPERIMENT.figures(TINY, tiny.data)) == 2
