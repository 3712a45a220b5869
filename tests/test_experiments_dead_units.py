"""Dead units: masked nets are the smaller nets, shares follow theory, verdicts follow the data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dead_units
from experiments.atlas import births, masked, running, training

CONFIG = dead_units.EXPERIMENT.presets["quick"]
TINY = dead_units.EXPERIMENT.presets["tiny"]
JUDGES = {claim.key: claim.judge for claim in dead_units.CLAIMS}
ROWS = dead_units.settings(CONFIG)


def runs(dead=0.0, died=(0, 0), revived=(0, 0)):
    """Runs with one dead share, a number or a function of the setting, by seed, row and look."""
    share = np.array([dead(s) if callable(dead) else dead for s in ROWS])
    shape = (3, len(ROWS), 4)
    found = np.broadcast_to(share[:, None], shape) + 1e-4 * np.arange(3)[:, None, None]
    counts = {"died": died, "revived": revived}
    return {
        "dead": found, "off": found[..., -1], "accuracy": np.ones(shape[:2]),
        **{k: np.broadcast_to(np.array(v), (3, len(ROWS), 2)) for k, v in counts.items()},
    }  # fmt: skip


def verdict(key, relu=None, **others):
    return JUDGES[key](CONFIG, {"relu": relu or runs(), **others})


def test_the_verdict_on_the_rate_names_the_rates():
    assert verdict("rate", runs(0.5)).word == "holds"
    some = verdict("rate", runs(lambda s: 0.6 if s.rate > 2 else 0.0))
    assert (some.word, some.condition) == ("holds if", "rate 3")
    assert verdict("rate", runs(0.1)).word == "false"


def test_the_verdict_on_forever_counts_what_came_back():
    assert verdict("forever", runs(died=(5, 5))).word == "holds"
    some = verdict("forever", runs(died=(5, 5), revived=(0, 1)))
    assert some.condition == "first layer, gradient descent, first layer, momentum"
    assert verdict("forever", runs(died=(5, 5), revived=(1, 1))).word == "false"


def test_the_verdicts_on_biases_and_shapes_compare_pairs():
    def by_bias(s):
        return {0.1: 0.1, 1.0: 0.1}.get(s.bias, 0.4)

    assert verdict("bias", runs(by_bias)).word == "holds"
    assert verdict("bias", runs(lambda s: 0.1 if s.bias == 1 else 0.4)).condition == "bias 1"
    assert verdict("bias", runs(0.4)).word == "false"
    assert verdict("shape", runs(lambda s: s.depth / 20 + 1 / s.width)).word == "holds"
    assert verdict("shape", runs(lambda s: s.depth / 20)).condition == "depth"
    assert verdict("shape", runs(0.1)).word == "false"


def test_the_verdict_on_other_activations_takes_every_word():
    dying = runs(lambda s: 0.2 if s.rate > 2 else 0)
    assert verdict("others", leaky_relu=runs(), tanh=runs()).word == "holds"
    assert verdict("others", leaky_relu=runs(), tanh=dying).word == "holds if"
    assert verdict("others", leaky_relu=runs(0.2), tanh=runs(0.2)).word == "false"


def test_the_verdicts_on_births_take_every_word():
    config = CONFIG.birth
    p, ones = births.law(config), np.ones((3, config.depth))
    counts = np.round(config.nets * p)
    for shift, word in ((0, "holds"), ([0, 500, 0, 0, 0], "holds if"), (500, "false")):
        arrays = {"dead": counts + shift, "nets": np.array([config.nets])}
        assert births.judge_nets(config, arrays).word == word
    late = ones * (np.arange(config.depth) > 6) * 0.3
    for dead, word in ((0 * ones, "holds"), (late, "holds if"), (0.3 * ones, "false")):
        arrays = {"dead": dead, "predicted": 0.3 * ones[0], "off": dead}
        assert births.judge_units(config, arrays).word == word


def test_a_masked_net_is_the_smaller_net_and_so_is_its_gradient():
    setting = masked.Setting(depth=3, width=5, bias=0.1)
    params = masked.init(jax.random.key(0), setting, (6, 9))
    x, y = (a[:20] for a in training.digits())

    def small(params):
        h = jax.nn.relu(x @ params["embed"]["kernel"][:, :5] + 0.1)
        for k in range(2):
            h = jax.nn.relu(h @ params["blocks"]["kernel"][k, :5, :5] + 0.1)
        return h @ params["readout"]["kernel"][:5]

    def loss(logits):
        return training.cross_entropy(logits, y)

    np.testing.assert_allclose(
        masked.forward(params, x, setting, jax.nn.relu)[0], small(params), rtol=2e-5, atol=1e-5
    )
    ours, theirs = (
        jax.jit(jax.grad(lambda p, f=f: loss(f(p))))(params)
        for f in (lambda p: masked.forward(p, x, setting, jax.nn.relu)[0], small)
    )
    for name in ("embed", "blocks", "readout"):
        np.testing.assert_allclose(
            ours[name]["kernel"], theirs[name]["kernel"], rtol=1e-3, atol=1e-6
        )


def test_slopes_see_saturation_and_death():
    z = jnp.array([[-1.0, 5.0, 0.1], [-2.0, 4.0, -0.2]])
    off = dead_units._slopes(jax.nn.relu, z) < dead_units.OFF
    np.testing.assert_array_equal(jnp.all(off, 0), [True, False, False])
    off = dead_units._slopes(jnp.tanh, z) < dead_units.OFF
    np.testing.assert_array_equal(jnp.all(off, 0), [False, True, False])
    assert dead_units._slopes(jnp.tanh, jnp.array([jnp.nan]))[0] == 0


@pytest.mark.slow
def test_units_are_born_dead_as_often_as_the_gaussian_process_says():
    config = dataclasses.replace(TINY.birth, width=256, depth=6, seeds=16, draws=20_000)
    found = births.measure_units(config)
    error = found["dead"].std(0, ddof=1) / 4 + np.sqrt(found["predicted"] / config.draws)
    # covariances of 256 units fluctuate by 1 / 16
    assert np.all(np.abs(found["dead"].mean(0) - found["predicted"]) < 4 * error + 0.01)
    assert found["predicted"][-1] > 0.1


@pytest.mark.slow
def test_the_tiny_run_keeps_the_identity_and_tampering_flips_its_verdicts(tmp_path):
    result = running.run(dead_units.EXPERIMENT, "tiny", tmp_path)
    assert max(result.traces.values()) == 1
    data = {name: dict(arrays) for name, arrays in result.data.items()}
    plain = [i for i, s in enumerate(dead_units.settings(TINY)) if s.momentum == 0]
    died, revived = (data["relu"][k][:, plain] for k in ("died", "revived"))
    assert died[..., 0].sum() > 0 and revived[..., 0].sum() == 0
    assert JUDGES["born_dead"](TINY, data).word == "holds"
    data["born"]["dead"] = data["born"]["dead"] * 0
    assert JUDGES["born_dead"](TINY, data).word == "false"
    data["relu"]["dead"] = np.ones_like(data["relu"]["dead"])
    assert JUDGES["rate"](TINY, data).word == "holds"
    data["relu"]["dead"] = 0 * data["relu"]["dead"]
    assert JUDGES["rate"](TINY, data).word == "false"
    assert len(dead_units.figures(TINY, result.data)) == 2
