"""Pre-LN and Post-LN: verdicts follow the data; tiny nets have the gradients of the theory."""

import numpy as np
import pytest
from atlas_cases import measured, spread, tampered, verdict, words

from experiments import pre_post_ln, pre_post_ln_judges, pre_post_ln_nets
from jaxgrad import theory

EXPERIMENT = pre_post_ln.EXPERIMENT
TINY = EXPERIMENT.presets["tiny"]
CHANCE = {"digits": np.log(10.0), "text": np.log(4.0)}
TRAININGS = ("digits-{}-1", "digits-{}-3", "text-{}")


@pytest.fixture(scope="module")
def ideal():
    """Data for which the statements hold: Post-LN stalls at the higher rate, not warmed up."""
    depths = pre_post_ln_nets.kept(TINY.depth)
    modes = pre_post_ln_judges.two_modes(TINY)
    data = {
        "labels": {"digits": np.ones(10), "text": np.ones(4)},
        "feed_forward": {
            **{
                f"{norm}_last": spread(theory.last_weight_gradient(24, depths, norm), 3)
                for norm in ("pre", "post")
            },
            "pre_profile": spread(np.ones(len(depths)), 3),
            "post_log_gain": spread(-TINY.depth * np.log(1.5) / 2, 3),
        },
        "attention": {"pre": spread(np.zeros(TINY.blocks), 3), "post": spread(modes, 3)},
    }
    for name in TRAININGS:
        chance = CHANCE[name.split("-")[0]]
        data[name.format("pre")] = {"loss": np.full((2, 2, 2), 0.5 * chance)}
        stalls = np.array([[0.5, 0.5], [1.0, 0.5]]) * chance
        data[name.format("post")] = {"loss": np.stack([stalls, stalls])}
    for norm in ("pre", "post"):
        falls = np.array([[2.0, 2.0, 1.0], [2.0, 2.0, 1.5], [2.0, 3.0, 1.5]])
        data[f"stability-{norm}"] = {"predicted": np.ones(2), "losses": np.stack([falls, falls])}
    return data


def test_data_that_are_as_stated_hold(ideal):
    found = words(EXPERIMENT, TINY, ideal)
    # stalling is not diverging; a power of -1/2 is not sqrt(1 + L/2); a decay is not two modes
    assert found.pop("diverges") == "false" and found.pop("root_depth") == "false"
    assert found.pop("post_decays") == "holds if"
    assert set(found.values()) == {"holds"}


def _everywhere(data, norm, change):
    for name in TRAININGS:
        data = tampered(data, name.format(norm), "loss", change)
    return data


def test_outcomes_are_told_apart():
    losses = np.array([0.5, 1.0, 1.3, np.nan, np.inf])
    words = ["trains", "stalls", "diverges", "diverges", "diverges"]
    assert pre_post_ln_judges.outcomes(losses, 1.0).tolist() == words


def test_post_ln_diverges_where_its_loss_does(ideal):
    # Pre-LN's best rate is the higher one; Post-LN is lost there
    best = _everywhere(ideal, "pre", lambda a: a * np.c_[[1.0, 0.5]])
    gone = _everywhere(best, "post", lambda a: a * np.c_[[1.0, np.nan]])
    assert verdict(EXPERIMENT, "diverges", TINY, gone).word == "holds"
    one = tampered(best, "text-post", "loss", lambda a: a * 3)
    assert verdict(EXPERIMENT, "diverges", TINY, one).condition == "text, 3 blocks"
    assert verdict(EXPERIMENT, "stalls", TINY, gone).word == "false"


def test_trainings_are_judged_by_task(ideal):
    healthy = _everywhere(ideal, "post", lambda a: a / 2)
    for key in ("stalls", "warm_up", "five_to_ten"):
        assert verdict(EXPERIMENT, key, TINY, healthy).word == "false"
    for key, change in (
        ("stalls", lambda a: a * 1.1), ("warm_up", lambda a: 2 * a),
        ("five_to_ten", lambda a: a / 2),
    ):  # fmt: skip
        one = tampered(ideal, "digits-post-1", "loss", change)
        assert verdict(EXPERIMENT, key, TINY, one).word == "holds if", key
    cold = _everywhere(ideal, "post", lambda a: np.repeat(a[..., :1], 2, -1))
    assert verdict(EXPERIMENT, "warm_up", TINY, cold).word == "false"


@pytest.mark.parametrize(
    ("key", "point", "name", "change", "word"),
    [
        ("last_gradient", "feed_forward", "pre_last", lambda a: a * 1.2, "holds if"),
        ("root_depth", "feed_forward", "pre_last", None, "holds"),
        ("pre_flat", "feed_forward", "pre_profile", lambda a: a * np.linspace(2, 1, a.shape[1]),
         "holds if"),
        ("two_modes", "attention", "post", lambda a: a + 1, "false"),
        ("two_modes", "attention", "post", lambda a: a + np.eye(4)[0], "holds if"),
        ("stable_rate", "stability-pre", "losses", lambda a: a * [1, 0.5, 1], "holds if"),
    ],
)  # fmt: skip
def test_a_verdict_follows_its_data(ideal, key, point, name, change, word):
    if key == "root_depth":  # an interval around -1/2
        law = pre_post_ln_nets.kept(TINY.depth) ** (-0.5 + 0.01 * np.c_[[-1, 0, 1]])
        other = tampered(ideal, point, name, lambda _: law)
    else:
        other = tampered(ideal, point, name, change)
    found = verdict(EXPERIMENT, key, TINY, other)
    assert found.word == word, found.measured


def test_claims_of_two_cases_can_be_false(ideal):
    other = tampered(ideal, "feed_forward", "pre_last", lambda a: a * 1.2)
    other = tampered(other, "feed_forward", "post_last", lambda a: a * 1.2)
    other = tampered(
        other, "feed_forward", "pre_profile", lambda a: a * np.linspace(2, 1, a.shape[1])
    )
    other = tampered(other, "attention", "pre", lambda a: a + 1)
    other = tampered(other, "feed_forward", "post_log_gain", lambda a: a * 0)
    other = tampered(other, "attention", "post", lambda a: a * 0)
    for norm in ("pre", "post"):
        other = tampered(other, f"stability-{norm}", "losses", lambda a: a * [1, 0.5, 1])
    keys = ("last_gradient", "pre_flat", "post_decays", "stable_rate")
    assert {verdict(EXPERIMENT, key, TINY, other).word for key in keys} == {"false"}


@pytest.mark.slow
def test_tiny_nets_have_the_gradients_of_the_theory(tmp_path):
    result = measured(EXPERIMENT, tmp_path)
    assert max(result.traces.values()) == 1
    arrays = result.data["feed_forward"]
    depths = pre_post_ln_nets.kept(TINY.depth)
    for norm in ("pre", "post"):
        law = np.asarray(theory.last_weight_gradient(TINY.width, depths, norm))
        assert np.all(np.abs(arrays[f"{norm}_last"].mean(0) / law - 1)[1:] < 0.4)
    # the last block of the whole net is the last of the cut ones
    np.testing.assert_allclose(arrays["pre_last"][:, -1], arrays["pre_profile"][:, -1], rtol=1e-4)
    np.testing.assert_allclose(arrays["post_q"], 1, rtol=1e-3)
    other = tampered(result.data, "feed_forward", "post_last", lambda a: a * 3)
    assert verdict(EXPERIMENT, "last_gradient", TINY, other).word != "holds"
