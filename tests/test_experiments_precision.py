"""Precision: what the types lose follows theory; verdicts follow the data."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from experiments import precision
from experiments.atlas import measuring, products, running
from jaxgrad.graded import log_singular_values_mp
from jaxgrad.nn import mlp

CONFIG = precision.EXPERIMENT.presets["tiny"]
JUDGES = {claim.key: claim.judge for claim in precision.CLAIMS}
NETS = (("sigmoid", "xavier_normal"), ("relu", "he_normal"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return running.run(precision.EXPERIMENT, "tiny", tmp_path_factory.mktemp("points"))


def net(lost_half=0.0, lost_brain=0.0, depth=4, seeds=2):
    """A net whose fp16 loses everything from some layer on, counted from the output."""
    zero = np.zeros((seeds, 1, 2, depth))
    if lost_half:
        zero[..., 0, : depth - int(lost_half) + 1] = 1
    return {
        "float16_zero": zero, "bfloat16_zero": np.full((seeds, 1, depth), lost_brain),
        "float16_finite": np.ones((seeds, 1, 2)), "gain": np.array([0.01]),
        "log2_rms": np.tile(np.linspace(-40, -10, depth + 1), (seeds, 1, 1)),
    }  # fmt: skip


HAND = dataclasses.replace(CONFIG, nets=NETS, depth=4, scales=(0, 16))
GOOD = {"sigmoid": net(), "relu": net()}


def word(key, data, config=HAND):
    return JUDGES[key](config, data).word


def test_the_verdicts_on_flushing_take_every_word():
    bad = net(lost_brain=0.5)
    assert word("range", GOOD) == "holds"
    assert word("range", {**GOOD, "relu": bad}) == "holds if"
    assert word("range", dict.fromkeys(GOOD, bad)) == "false"
    lost = net(lost_half=2)
    lost["float16_zero"][:, :, 1] = 1
    assert word("loss_scale", GOOD) == "holds"
    assert word("loss_scale", {**GOOD, "relu": lost}) == "holds if"
    assert word("loss_scale", dict.fromkeys(GOOD, lost)) == "false"
    overflow = net()
    overflow["float16_finite"] = overflow["float16_finite"] * 0.9
    assert word("loss_scale", dict.fromkeys(GOOD, overflow)) == "false"


def test_the_layer_of_loss_is_judged_against_the_formula():
    # (25 - 10 + log2 0.6745) / log2 100 = 2.17 layers
    right, wrong = net(lost_half=2), net(lost_half=4)
    only = {k: v[0] if k == "gain" else v[:, 0] for k, v in right.items()}
    layers, predicted = precision.layers_to_loss(only)
    assert np.all(layers == 2) and predicted == pytest.approx((15 + np.log2(0.6745)) / np.log2(100))
    assert word("depth", dict.fromkeys(GOOD, right)) == "holds"
    assert word("depth", {"sigmoid": right, "relu": wrong}) == "holds if"
    assert word("depth", dict.fromkeys(GOOD, wrong)) == "false"


def test_the_verdict_on_training_compares_with_float32():
    def runs(*scores):
        return {"accuracy": np.array([scores, np.asarray(scores) + 1e-3])}

    def data(half, brain):
        return {"train-float32": runs(0.9, 0.9), "train-float16": half, "train-bfloat16": brain}

    assert word("training", data(runs(0.9, 0.9), runs(0.9, 0.9))) == "holds"
    verdict = JUDGES["training"](HAND, data(runs(0.1, 0.9), runs(0.1, 0.1)))
    assert (verdict.word, verdict.condition) == ("holds if", "float16 x 2^8")
    assert word("training", data(runs(0.1, 0.1), runs(0.1, 0.1))) == "false"


def test_the_verdict_on_norms_names_the_range_that_is_right():
    exponent = np.arange(-3, 4)
    true = 8 * 10.0**exponent

    def data(plain):
        return {"norms": {"exponent": exponent, "plain": plain, "safe": true}}

    assert word("zero_norm", data(true)) == "holds"
    verdict = JUDGES["zero_norm"](HAND, data(np.where(exponent < -1, 0, true)))
    assert (verdict.word, verdict.condition) == ("holds if", "elements from 1e-1 to 1e3")
    assert word("zero_norm", data(0 * true)) == "false"


@pytest.mark.slow
def test_the_verdicts_on_products_take_every_word(tiny):
    arrays, config = tiny.data["products"], CONFIG.product
    exact = {**arrays, "right": np.full_like(arrays["right"], config.width)}
    assert products.judge_spectrum(config, exact).word == "holds"
    assert products.judge_spectrum(config, arrays).word == "holds if"
    off = {**arrays, "right": 0 * arrays["right"]}
    assert products.judge_spectrum(config, off).word == "false"
    assert products.judge_range(config, arrays).word == "false"
    for key, change in (("log_determinant", 1.01), ("error", 1e9), ("law_mean", 3)):
        assert products.judge_range(config, {**arrays, key: arrays[key] * change}).word == "holds"


@pytest.mark.slow
def test_tampered_measurements_flip_the_verdicts(tiny):
    assert max(tiny.traces.values()) <= 1
    before = {key: judge(tiny.config, tiny.data).word for key, judge in JUDGES.items()}
    data = copy.deepcopy({name: dict(arrays) for name, arrays in tiny.data.items()})
    flushed = data["sigmoid"]
    flushed["bfloat16_zero"] = 1 - flushed["bfloat16_zero"]
    flushed["float16_zero"] = 0 * flushed["float16_zero"]
    data["norms"]["plain"] = data["norms"]["safe"]
    right = np.full_like(data["products"]["right"], CONFIG.product.width)
    data["products"] |= {"right": right, "error": np.ones(2)}
    for key in ("range", "depth", "loss_scale", "product_spectrum", "product_range", "zero_norm"):
        assert JUDGES[key](tiny.config, data).word != before[key], key
    assert len(precision.figures(tiny.config, tiny.data)) == 2


@pytest.mark.slow
def test_graded_products_are_those_of_multi_precision_and_plain_ones_are_not(tiny):
    config, arrays = CONFIG.product, tiny.data["products"]
    exact = log_singular_values_mp(products.layers(config)[:, 0].astype(np.float64))
    np.testing.assert_allclose(arrays["graded_end"][0], exact, rtol=0, atol=1e-3)
    assert np.abs(arrays["plain_end"][0] - exact).max() > 50
    assert np.all(arrays["right"][:, 0] == config.width) and arrays["right"][0, -1] < config.width


def test_powers_leave_float32_at_the_predicted_layer():
    config = dataclasses.replace(CONFIG.product, depth=950, seeds=2, width=1)
    _, powers = jax.jit(products._multiplied)(
        jnp.asarray(products.layers(config)), jnp.asarray(config.factors)
    )
    small, large = (np.log(config.factors[0]), np.log(config.factors[1]))
    assert int(np.argmax(powers[:, 0] == 0)) + 1 == np.ceil(products.TINY / small) == 829
    assert int(np.argmax(~np.isfinite(powers[:, 1]))) + 1 == np.ceil(products.HUGE / large) == 931


@pytest.mark.slow
def test_the_share_that_fp16_flushes_is_that_of_gaussian_elements(tiny):
    arrays = tiny.data["sigmoid"]
    rms, share = 2.0 ** arrays["log2_rms"][..., :-1], arrays["float16_zero"][..., 0, :]
    law = scipy.special.erf(2.0**precision.ZERO_EXPONENT / (np.sqrt(2) * rms))
    assert np.abs(law - share).max() < 0.25
    middle = (law > 0.02) & (law < 0.98)
    assert middle.any() and share[law < 1e-4].max() < 0.01 and share[law > 0.999].min() > 0.95


def test_deep_mlps_have_the_shapes_and_scales_of_the_models_own_init():
    for rule, norm in (("none", "none"), ("deep_norm", "layer")):
        model = mlp.Config(3, 2, 40, 30, residual=rule, norm=norm, scan=True)
        ours = jax.jit(lambda k, m=model: measuring.deep_mlp(k, m))(jax.random.key(0))
        theirs = jax.eval_shape(lambda k, m=model: mlp.init(k, m), jax.random.key(0))
        assert jax.tree.map(jnp.shape, ours) == jax.tree.map(lambda a: a.shape, theirs)
        if rule != "none":
            kernel = ours["blocks"]["outer"]["kernel"]
            beta = (8 * 15) ** -0.25
            assert float(kernel.std()) == pytest.approx(beta * (2 / 40) ** 0.5, rel=0.02)
            assert len(np.unique(kernel)) > 0.99 * kernel.size
    with pytest.raises(ValueError, match="scanned"):
        measuring.deep_mlp(jax.random.key(0), mlp.Config(3, 2))
