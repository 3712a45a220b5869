"""Calibration: the factor is the right one, whatever the framework, and nothing is harmed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgrad as jg
from jaxgrad.calibration import calibrate

WIDTH, DEPTH = 32, 50


def mlp_params(depth, width, gain, key=0, n_in=None, n_out=None):
    sizes = [n_in or width, *[width] * (depth - 1), n_out or width]
    keys = jax.random.split(jax.random.key(key), depth)
    return [
        {
            "w": gain / a**0.5 * jax.random.normal(k, (a, b)),
            "b": 0.1 * jax.random.normal(jax.random.fold_in(k, 1), (b,)),
        }
        for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def mlp(phi, params, x):
    for layer in params[:-1]:
        x = phi(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def mlp_loss(phi):
    def loss(params, batch):
        logits = mlp(phi, params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return loss


@pytest.fixture(scope="module")
def batch():
    x = jax.random.normal(jax.random.key(7), (48, WIDTH))
    return x, jnp.argmax(x[:, :10], axis=1)


def mean_squared_singular_values(f, x, batch_axis=0):
    """Of every layer of a chain, from its dense Jacobians."""
    chain = jg.factorize(f, x, batch_axis=batch_axis)
    return {
        name: float(jnp.sum(j**2) / (j.shape[0] * j.shape[1]))
        for name, j in zip(chain.names, jg.layer_jacobians(chain, x), strict=True)
    }


@pytest.mark.parametrize(
    ("phi", "gain"),
    [
        (jnp.tanh, 0.1),
        (jax.nn.relu, 6.0),
        pytest.param(jnp.tanh, 6.0, marks=pytest.mark.slow),
        pytest.param(jax.nn.relu, 0.1, marks=pytest.mark.slow),
    ],
)
def test_every_layers_mean_squared_singular_value_is_one(phi, gain, batch):
    params = mlp_params(6, WIDTH, gain, n_out=10)
    new, report = calibrate(mlp_loss(phi), params, batch, return_report=True)
    found = mean_squared_singular_values(lambda x: mlp(phi, new, x), batch[0])
    assert len(found) == 6
    for name, value in found.items():
        assert abs(value - 1) < 5e-3, (name, value, str(report))
    assert [row.status for row in report.layers if row.status != "no weight"] == ["scaled"] * 6
    for old, layer in zip(params, new, strict=True):
        np.testing.assert_array_equal(old["b"], layer["b"])
        ratio = layer["w"] / old["w"]
        np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)


def test_variance_target_sets_every_preactivation_to_one(batch):
    params = mlp_params(6, WIDTH, 5.0, n_out=10)
    new = calibrate(mlp_loss(jnp.tanh), params, batch, target="variance")
    h = batch[0]
    for layer in new:
        z = h @ layer["w"] + layer["b"]
        np.testing.assert_allclose(jnp.var(z), 1, rtol=5e-3)
        h = jnp.tanh(z)


def _train(loss, params, batch, steps, lr):
    tx = optax.sgd(lr, momentum=0.9)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[1])
    return np.asarray(run(params))


def stacked_tanh(params, batch):
    """Fifty tanh layers, scanned."""
    x, y = batch
    h = jnp.tanh(x @ params["in"])
    h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["blocks"])[0]
    return optax.softmax_cross_entropy_with_integer_labels(h @ params["out"], y).mean()


def stacked_params(gain):
    keys = jax.random.split(jax.random.key(3), 3)
    return {
        "in": gain / WIDTH**0.5 * jax.random.normal(keys[0], (WIDTH, WIDTH)),
        "blocks": gain / WIDTH**0.5 * jax.random.normal(keys[1], (DEPTH - 2, WIDTH, WIDTH)),
        "out": gain / WIDTH**0.5 * jax.random.normal(keys[2], (WIDTH, 10)),
    }


@pytest.mark.parametrize("gain", [0.5, 5.0])
def test_a_deep_tanh_net_under_a_wrong_initialization_trains_after_it(gain, batch):
    params = stacked_params(gain)
    new, report = calibrate(stacked_tanh, params, batch, return_report=True)
    blocks = [row for row in report.layers if "blocks[" in row.name]
    assert len(blocks) == DEPTH - 2 and all(abs(row.after - 1) < 5e-3 for row in blocks)
    ratios = new["blocks"] / params["blocks"]  # every slice has its own factor
    np.testing.assert_allclose(ratios, np.broadcast_to(ratios[:, :1, :1], ratios.shape), rtol=1e-5)
    assert len(np.unique(np.round(ratios[:, 0, 0], 5))) > DEPTH // 2
    before, after = (_train(stacked_tanh, p, batch, 150, 0.01) for p in (params, new))
    assert not before[-1] < 1.8, before[-1]
    assert after[-1] < 0.5, after[-1]


# -------------------------------------------------------------------------------- nothing is harmed


def pre_ln_transformer(params, batch):
    """Two heads, causal, learned positions; every block under its own scope."""

    def norm(p, h):
        h = h - h.mean(-1, keepdims=True)
        return h * jax.lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def attend(p, h):
        q, k, v = (jnp.einsum("btd,dhe->bhte", h, p[n]) for n in "qkv")
        scores = jnp.einsum("bhte,bhse->bhts", q, k) / q.shape[-1] ** 0.5
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        probs = jax.nn.softmax(jnp.where(mask, scores, -1e9))
        return jnp.einsum("bhts,bhse,hed->btd", probs, v, p["o"])

    tokens = batch[:, :-1]
    h = params["embed"][tokens] + params["positions"][: tokens.shape[1]]
    for i, p in enumerate(params["blocks"]):
        with jax.named_scope(f"block_{i}"):
            h = h + attend(p["attention"], norm(p["norm_1"], h))
            h = h + jax.nn.gelu(norm(p["norm_2"], h) @ p["up"]) @ p["down"]
    logits = norm(params["norm"], h) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def transformer_params(d=32, vocabulary=11, time=12, blocks=3):
    key = iter(jax.random.split(jax.random.key(5), 100))

    def draw(*shape, fan=None):
        return jax.random.normal(next(key), shape) / (fan or shape[0]) ** 0.5

    def norm():
        return {"scale": jnp.ones(d), "bias": jnp.zeros(d)}

    def heads():
        return {n: draw(d, 2, d // 2) for n in "qkv"} | {"o": draw(2, d // 2, d, fan=d)}

    return {
        "embed": draw(vocabulary, d, fan=1),
        "positions": 0.5 * draw(time, d, fan=1),
        "blocks": [
            {
                "norm_1": norm(),
                "attention": heads(),
                "norm_2": norm(),
                "up": draw(d, 2 * d),
                "down": draw(2 * d, d),
            }
            for _ in range(blocks)
        ],
        "norm": norm(),
        "head": draw(d, vocabulary),
    }


def test_a_well_initialized_pre_ln_transformer_stays_as_it_is_and_trains():
    starts = jax.random.randint(jax.random.key(2), (16, 1), 0, 11)
    tokens = (starts + 3 * jnp.arange(13)) % 11
    params = transformer_params()
    new, report = calibrate(pre_ln_transformer, params, tokens, return_report=True)
    statuses = {row.name: row.status for row in report.layers}
    assert [statuses[f"block_{i}"] for i in range(3)] == ["residual"] * 3, str(report)
    for old, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(new), strict=True):
        np.testing.assert_allclose(leaf, old, rtol=0.05)
    losses = _train(pre_ln_transformer, new, tokens, 60, 0.05)
    assert losses[-1] < 0.3 < losses[0]


def test_a_he_relu_net_stays_as_it_is(batch):
    params = mlp_params(8, 64, 2**0.5, n_in=WIDTH)
    params[-1]["w"] = params[-1]["w"] / 2**0.5
    new = calibrate(mlp_loss(jax.nn.relu), params, batch)
    ratios = [float((b["w"] / a["w"])[0, 0]) for a, b in zip(params, new, strict=True)]
    np.testing.assert_allclose(ratios, 1, atol=0.2)


def residual(params, batch):
    h = batch[0]
    for i, p in enumerate(params["blocks"]):
        with jax.named_scope(f"block_{i}"):
            h = h + jax.nn.relu(h @ p["up"]) @ p["down"]
    logits = h @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def residual_params(blocks):
    key = iter(jax.random.split(jax.random.key(5), 100))
    return {
        "blocks": [
            {
                "up": (2 / WIDTH) ** 0.5 * jax.random.normal(next(key), (WIDTH, WIDTH)),
                "down": (1 / WIDTH) ** 0.5 * jax.random.normal(next(key), (WIDTH, WIDTH)),
            }
            for _ in range(blocks)
        ],
        "out": jax.random.normal(next(key), (WIDTH, 10)) / WIDTH**0.5,
    }


def test_residual_blocks_are_shrunk_only_if_they_explode(batch):
    _, few = calibrate(residual, residual_params(3), batch, return_report=True)
    assert [row.status for row in few.layers] == ["residual"] * 3 + ["scaled"], str(few)
    new, many = calibrate(residual, residual_params(12), batch, return_report=True)
    blocks = many.layers[:12]
    assert all(row.status == "scaled" and abs(row.after - 1 - 1 / 12) < 0.01 for row in blocks)
    found = mean_squared_singular_values(lambda x: _stream(new, x), batch[0])
    np.testing.assert_allclose(list(found.values())[:12], 1 + 1 / 12, atol=0.02)


def _stream(params, x):
    for i, p in enumerate(params["blocks"]):
        with jax.named_scope(f"block_{i}"):
            x = x + jax.nn.relu(x @ p["up"]) @ p["down"]
    return x @ params["out"]


def test_data_far_from_scale_one_saturate_no_layer(batch):
    params = mlp_params(4, WIDTH, 1.0, n_out=10)
    raw = (128 + 60 * batch[0], batch[1])
    new = calibrate(mlp_loss(jnp.tanh), params, raw)
    z = raw[0] @ new[0]["w"] + new[0]["b"]
    np.testing.assert_allclose(jnp.mean(z**2), 1, rtol=0.01)


# ---------------------------------------------------------------------- weights that need attention


def test_tied_weights_belong_to_the_first_layer_that_uses_them(batch):
    params = {"w": mlp_params(1, WIDTH, 3.0)[0]["w"], "out": jnp.ones((WIDTH, 10))}

    def loss(p, batch):
        h = jnp.tanh(jnp.tanh(batch[0] @ p["w"]) @ p["w"].T)
        logits = h @ p["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    new, report = calibrate(loss, params, batch, return_report=True)
    assert "tied" in [row.status for row in report.layers], str(report)
    once, _ = calibrate(loss, new, batch, return_report=True)
    np.testing.assert_allclose(once["w"], new["w"], rtol=2e-3)


def test_dead_layers_are_named_in_a_warning_and_left(batch):
    params = mlp_params(4, WIDTH, 2.0, n_out=10)
    params[2]["w"] = jnp.zeros_like(params[2]["w"])
    with pytest.warns(UserWarning, match=r"layers \['params\[2\]'\] pass no gradient"):
        new = calibrate(mlp_loss(jnp.tanh), params, batch)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(new))
    np.testing.assert_array_equal(new[2]["w"], 0)


def test_layers_before_a_norm_are_named_insensitive(batch):
    params = mlp_params(3, WIDTH, 4.0, n_out=10)

    def loss(params, batch):
        h = batch[0]
        for i, p in enumerate(params[:-1]):
            with jax.named_scope(f"layer_{i}"):
                h = h @ p["w"]
                h = jnp.tanh(h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True)))
        logits = h @ params[-1]["w"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    new, report = calibrate(loss, params, batch, return_report=True)
    assert [row.status for row in report.layers][-2:] == ["insensitive", "scaled"], str(report)
    np.testing.assert_array_equal(new[1]["w"], params[1]["w"])


def test_bad_input_is_named(batch):
    params = mlp_params(3, WIDTH, 1.0, n_out=10)
    params[1]["w"] = params[1]["w"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"layer 'params\[1\]' gives NaN"):
        _ = calibrate(mlp_loss(jnp.tanh), params, batch)
    with pytest.raises(ValueError, match="no activation depends on both"):
        _ = calibrate(lambda p, b: jnp.sum(p["w"] ** 2), {"w": jnp.ones((3, 3))}, jnp.ones(2))
    with pytest.raises(ValueError, match="no layer of the chain has a weight"):
        _ = calibrate(lambda p, b: jnp.sum(jnp.tanh(p * b) * b), jnp.ones(3), jnp.ones((2, 3)))
    with pytest.raises(TypeError, match=r"one real scalar, got float32\[3\]"):
        _ = calibrate(lambda p, b: p * b, jnp.ones(3), jnp.ones(3))


# --------------------------------------------------------------------------------------- frameworks


def _check_framework(loss, params, batch, floor):
    new, report = calibrate(loss, params, batch, return_report=True)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    scaled = [row for row in report.layers if row.status == "scaled"]
    assert len(scaled) >= floor, str(report)
    assert all(abs(row.after - 1) < 5e-3 for row in scaled)
    for old, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(new), strict=True):
        if hasattr(old, "dtype"):
            assert leaf.dtype == old.dtype and leaf.shape == old.shape
            assert old.ndim > 1 or bool(jnp.all(old == leaf))  # biases and scales
    return report


def loss_of(apply):
    def loss(params, batch):
        logits = apply(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return loss


def test_flax_trees_are_calibrated(batch):
    from flax import linen

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            for _ in range(3):
                x = jnp.tanh(linen.Dense(WIDTH)(x))
            return linen.Dense(10)(x)

    flax_params = Net().init(jax.random.key(0), batch[0])
    flax_params = jax.tree.map(lambda p: 5 * p, flax_params)
    report = _check_framework(loss_of(Net().apply), flax_params, batch, 4)
    assert report.layers[0].name == "Dense_0" and report.layers[0].parameters == (
        "params/Dense_0/kernel",
    )


@pytest.mark.slow
def test_equinox_modules_are_calibrated(batch):
    import equinox as eqx

    model = eqx.nn.MLP(WIDTH, 10, WIDTH, 3, activation=jnp.tanh, key=jax.random.key(1))
    _ = _check_framework(loss_of(lambda m, x: jax.vmap(m)(x)), model, batch, 4)


@pytest.mark.slow
def test_haiku_trees_are_calibrated(batch):
    import haiku as hk

    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([WIDTH, WIDTH, 10])(x)))
    _ = _check_framework(loss_of(net.apply), net.init(jax.random.key(2), batch[0]), batch, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:calibrate")
def test_every_test_model_is_calibrated_or_says_why_not():
    import cases

    refused = {}
    for case in cases.select(without="low-precision effects empty complex"):
        built = case.build_loss()
        if built is None:
            continue
        loss, params, batch = built
        try:
            new, report = calibrate(loss, params, batch, return_report=True)
        except ValueError as error:
            refused[case.name] = str(error)
            continue
        assert jax.tree.structure(new) == jax.tree.structure(params), case.name
        for row in report.layers:
            assert np.isfinite(row.factor) and row.factor > 0, (case.name, str(report))
            if row.status == "scaled":
                assert 0.95 < row.after < 2.1, (case.name, str(report))
    for name, error in refused.items():
        assert "NaN or infinite" in error or "no layer of the chain has a weight" in error, name
    assert len(refused) < 12, refused


def test_a_tied_embedding_is_left_and_a_second_calibration_changes_nothing():
    """Scaled by the readout, it would change the input that the layers before were fitted to."""
    keys = jax.random.split(jax.random.key(3), 4)
    params = {
        "embedding": jax.random.normal(keys[0], (30, 24)),
        "w1": jax.random.normal(keys[1], (24, 24)),
        "w2": jax.random.normal(keys[2], (24, 24)) / 50,
    }
    tokens = jax.random.randint(keys[3], (64,), 0, 30)

    def loss(params, tokens):
        h = jnp.tanh(params["embedding"][tokens] @ params["w1"])
        h = jnp.tanh(h @ params["w2"])
        logits = h @ params["embedding"].T
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(64), tokens])

    once, report = jg.calibrate(loss, params, tokens, return_report=True)
    np.testing.assert_array_equal(once["embedding"], params["embedding"])
    assert [r.status for r in report.layers].count("scaled") == 2
    assert [r.status for r in report.layers].count("tied") == 1
    _, again = jg.calibrate(loss, once, tokens, return_report=True)
    for first, second in zip(report.layers, again.layers, strict=True):
        assert second.factor == pytest.approx(1.0, abs=2e-3)
        assert second.before == pytest.approx(first.after, rel=5e-3)
