"""A thousand layers: measured gains obey the exact law, and verdicts follow the data."""

import dataclasses

import numpy as np
import pytest

from experiments import thousand_layers as thousand
from experiments.atlas import running
from jaxgrad import theory

CONFIG = thousand.EXPERIMENT.presets["quick"]
TINY = thousand.EXPERIMENT.presets["tiny"]
JUDGES = {claim.key: claim.judge for claim in thousand.CLAIMS}
PASSED = thousand.shown(CONFIG.depth)
NAMES = tuple(thousand.NETS)


def net(drift=0.0, accuracy=0.9, seeds=2):
    """A net whose gradient drifts by some nats a layer, and its accuracy at two rates."""
    jitter = 1e-3 * np.arange(seeds)[:, None]
    return {
        "log_gain": drift * PASSED + jitter,
        "accuracy": np.full((seeds, 2), (0.1, accuracy)),
        "loss": np.ones((seeds, 2, 5)),
    }


def data(**changes):
    return dict.fromkeys(NAMES, net()) | {k.replace("_", " "): v for k, v in changes.items()}


def word(key, found):
    return JUDGES[key](CONFIG, found).word


def test_the_verdicts_on_flow_take_every_word():
    bad = net(drift=-0.01)
    assert word("flow", data()) == "holds"
    verdict = JUDGES["flow"](CONFIG, data(ReZero=bad))
    assert verdict.word == "holds if" and "ReZero" not in verdict.condition
    assert word("flow", dict.fromkeys(NAMES, bad)) == "false"
    # ReZero is predicted to keep the norm: its drift is the divergence
    drifting = data(ReZero=net(drift=0.5))
    assert JUDGES["flow"](CONFIG, drifting).divergence == pytest.approx(500, rel=0.01)


def test_the_verdict_on_he_depends_on_depth():
    assert word("he", data()) == "holds"
    verdict = JUDGES["he"](CONFIG, data(He_ReLU=net(drift=-0.02)))
    assert (verdict.word, verdict.condition) == ("holds if", "11 layers")
    assert word("he", data(He_ReLU=net(drift=-0.2))) == "false"


def test_the_verdicts_on_training_take_every_word():
    lost = net(accuracy=0.1)
    assert word("schemes", data()) == "holds"
    assert word("schemes", data(DeepNorm=lost)) == "holds if"
    assert word("schemes", dict.fromkeys(NAMES, lost)) == "false"
    assert word("others", dict.fromkeys(NAMES, lost)) == "holds"
    assert JUDGES["others"](CONFIG, data(He_ReLU=lost)).condition == "He ReLU"
    assert word("others", data()) == "false"
    half = net()
    half["accuracy"][0] = 0.1
    assert not thousand.learned({"x": half}, "x")[0] and thousand.learned({"x": net()}, "x")[2] == 1


def test_the_verdict_on_flow_and_training_wants_both_or_neither():
    stuck, lucky = net(accuracy=0.1), net(drift=-1.0)
    assert word("flow_trains", data()) == "holds"
    assert word("flow_trains", dict.fromkeys(NAMES, net(drift=1.0, accuracy=0.1))) == "holds"
    assert word("flow_trains", data(ReZero=stuck)) == "holds if"
    assert word("flow_trains", dict.fromkeys(NAMES, lucky)) == "false"


def test_predictions_are_those_of_the_profiles_of_theory():
    end = {name: thousand.predicted(name, PASSED, CONFIG.width)[-1] for name in NAMES}
    profile = theory.pre_ln_profile(CONFIG.depth)
    assert end["Pre-LN"] == pytest.approx(float(np.log(profile.q[-1] / profile.q[0])) / 2, rel=1e-3)
    assert end["He ReLU"] == pytest.approx(
        float(theory.log_gain((CONFIG.width,) * CONFIG.depth).mean) / 2, rel=1e-4
    )
    # the mean field of tanh at its critical point: 0.84 / sqrt(L)
    assert np.exp(end["orthogonal tanh"]) == pytest.approx(1000**-0.5, rel=0.01)
    assert end["ReZero"] == end["DeepNorm"] == end["Post-LN"] == 0


@pytest.mark.slow
def test_the_tiny_run_obeys_the_law_and_tampering_flips_its_verdicts(tmp_path):
    result = running.run(thousand.EXPERIMENT, "tiny", tmp_path)
    assert set(result.traces.values()) == {1}
    found = result.data
    np.testing.assert_allclose(found["ReZero"]["log_gain"], 0, atol=1e-4)
    law, gains = theory.log_gain((TINY.width,)), found["He ReLU"]["log_gain"]
    for k, depth in enumerate(thousand.shown(TINY.depth)):
        error = np.sqrt(depth * float(law.variance) / 4 / TINY.seeds)
        assert abs(gains[:, k].mean() - depth * float(law.mean) / 2) < 4 * error
    assert JUDGES["he"](TINY, found).word in ("false", "holds if")
    flat = {**found, "He ReLU": {**found["He ReLU"], "log_gain": 0 * gains}}
    assert JUDGES["he"](TINY, flat).word == "holds"
    assert JUDGES["flow"](TINY, found).word == "holds if"
    assert JUDGES["flow"](TINY, flat).word == "holds"
    assert len(thousand.figures(TINY, found)) == 1


def test_a_config_names_its_nets():
    assert dataclasses.asdict(CONFIG)["nets"][0][1] == thousand.NETS["He ReLU"]
