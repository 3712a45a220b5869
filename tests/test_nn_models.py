"""The models: forms that must agree, Jacobians that must factor, torch with the same weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad as jg
from jaxgrad import nn
from jaxgrad.nn import mlp, recurrent, resnet, transformer

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def double(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 6)))
CONFIGS = {
    "mlp": mlp.Config(5, 3, width=8, depth=3, residual="pre_ln", norm="layer", activation="gelu"),
    "resnet": resnet.Config(2, 3, widths=(4, 6), blocks=2),
    "transformer": transformer.Config(11, width=8, depth=3, heads=2, qk_norm=True),
    "encoder": transformer.Config(
        11, n_out=3, width=8, depth=3, heads=2, causal=False, positions="rotary", pool=True,
        residual="deep_norm", norm="rms",
    ),
    "vanilla": recurrent.Config(5, 3, width=8, cell="vanilla", scan=False),
    "gru": recurrent.Config(5, 3, width=8, cell="gru", scan=False),
    "lstm": recurrent.Config(5, 3, width=8, cell="lstm", scan=False),
}  # fmt: skip
INPUTS = {
    "mlp": normal(4, 5),
    "resnet": normal(4, 6, 6, 2),
    "transformer": TOKENS,
    "encoder": TOKENS,
    "vanilla": normal(6, 2, 5),
    "gru": normal(6, 2, 5),
    "lstm": normal(6, 2, 5),
}
MODULES = {"mlp": mlp, "resnet": resnet, "transformer": transformer, "encoder": transformer}


def build(name, **changes):
    """(parameters, loss(params, x), x, config)."""
    config = dataclasses.replace(CONFIGS[name], **changes)
    module = MODULES.get(name, recurrent)
    params = module.init(KEY, config)
    params = params[0] if name == "resnet" else params

    def loss(params, x):
        return jnp.mean(jnp.square(module.apply(params, x, config) - 0.5))

    return params, loss, INPUTS[name], config


def unrolled_form(name, tree):
    """A stacked tree of parameters (or gradients) in the unrolled layout."""
    if name in ("vanilla", "gru", "lstm"):
        return tree
    if name == "resnet":
        stages = tuple({**s, "blocks": nn.unstack(s["blocks"])} for s in tree["stages"])
        return {**tree, "stages": stages}
    return {**tree, "blocks": nn.unstack(tree["blocks"])}


def assert_close(a, b, rtol=2e-6):
    """To the largest element of the tree: a bias before a BatchNorm has a gradient of rounding."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * size)


@pytest.mark.parametrize("name", CONFIGS)
def test_unrolled_scanned_and_rematerialized_are_one_function(name):
    params, loss, x, _ = build(name)
    plain = jax.jit(jax.value_and_grad(loss))(params, x)
    scanned_params, scanned_loss, *_ = build(name, scan=True)
    jax.tree.map(np.testing.assert_array_equal, unrolled_form(name, scanned_params), params)
    scanned = jax.jit(jax.value_and_grad(scanned_loss))(scanned_params, x)
    assert_close(scanned[0], plain[0])
    assert_close(unrolled_form(name, scanned[1]), plain[1], 1e-5)
    _, again, *_ = build(name, scan=True, remat=True)
    remade = jax.jit(jax.value_and_grad(again))(scanned_params, x)
    assert_close(remade, scanned)
    assert "remat" not in str(jax.make_jaxpr(scanned_loss)(scanned_params, x))
    assert "remat" in str(jax.make_jaxpr(again)(scanned_params, x))
    assert "scan" in str(jax.make_jaxpr(again)(scanned_params, x))


@pytest.mark.parametrize("name", CONFIGS)
def test_in_bfloat16_parameters_gradients_and_outputs_stay_float32(name):
    params, loss, x, config = build(name, scan=True)
    _, half_loss, *_ = build(name, scan=True, dtype="bfloat16")
    value, gradients = jax.jit(jax.value_and_grad(loss))(params, x)
    half, half_gradients = jax.jit(jax.value_and_grad(half_loss))(params, x)
    assert half.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(half_gradients)} == {jnp.dtype("float32")}
    assert half != value  # it was computed in another precision
    np.testing.assert_allclose(half, value, rtol=0.05)
    a, b = (np.concatenate([np.ravel(g) for g in jax.tree.leaves(t)])
            for t in (gradients, half_gradients))  # fmt: skip
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.98
    assert "bf16" in str(jax.make_jaxpr(half_loss)(params, x))
    assert config.dtype is None


@pytest.mark.parametrize("name", CONFIGS)
def test_a_train_step_lowers_for_every_platform(name):
    params, loss, x, _ = build(name, scan=True, remat=True)

    def step(params, x):
        value, gradients = jax.value_and_grad(loss)(params, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

    exported = jax.export.export(jax.jit(step), platforms=["cpu", "cuda", "tpu"])(params, x)
    assert exported.platforms == ("cpu", "cuda", "tpu")


# ------------------------------------------------------------------------------- layers, by name


def blocks_of(count, name="block"):
    return tuple(f"{name}{k}" for k in range(count))


@pytest.mark.parametrize("name", ["mlp", "resnet", "transformer", "encoder"])
def test_factorize_finds_the_layers_under_their_names(name):
    config = dataclasses.replace(CONFIGS[name], **({"norm": "layer"} if name == "resnet" else {}))
    if name == "mlp":
        params, x = mlp.init(KEY, config), normal(5)
        chain = jg.factorize(lambda x: mlp.apply(params, x, config), x)
        assert chain.names == ("embed", *blocks_of(3), "readout")
    elif name == "resnet":
        params, x = resnet.init(KEY, config)[0], normal(1, 6, 6, 2)
        chain = jg.factorize(lambda x: resnet.apply(params, x, config), x)
        first, second = blocks_of(2, "stage0_block"), blocks_of(2, "stage1_block")
        assert chain.names == ("embed", *first, "stage1_down", *second, "readout")
    else:
        params, x = transformer.init(KEY, config), normal(6, 8)

        def of_stream(h):
            h = transformer.trunk(params, h, config)
            with jax.named_scope("readout"):
                return transformer.readout(params, h, config)

        chain = jg.factorize(of_stream, x)
        assert [n.split("/")[0] for n in chain.names if n.startswith("block")]
        assert {n.split("/")[0] for n in chain.names} == {*blocks_of(3), "readout"}
    product = jg.jacobian_product(chain, x).to_dense()
    whole = jax.jacrev(lambda x: jnp.ravel(chain(x)))(x).reshape(product.shape)
    np.testing.assert_allclose(product, whole, rtol=0, atol=2e-5 * np.abs(whole).max())


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("cell", ["vanilla", "gru"])
def test_factorize_finds_a_layer_a_time_step(cell, scan):
    config = recurrent.Config(5, 3, width=8, cell=cell, scan=scan)
    params, xs = recurrent.init(KEY, config), normal(4, 5)
    chain = jg.factorize(lambda h: recurrent.run(params["cell"], h, xs, config)[0], normal(8))
    assert chain.names == (tuple(f"step[{k}]" for k in range(4)) if scan else blocks_of(4, "step"))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", ["mlp", "transformer", "resnet", "lstm"])
def test_a_flow_has_a_row_for_every_block_and_the_gradients_of_jax(name, scan):
    params, loss, x, _ = build(name, scan=scan)
    (value, flow), gradients = jax.jit(jg.value_and_grad_flow(loss))(params, x)
    expected, reference = jax.jit(jax.value_and_grad(loss))(params, x)
    assert_close(value, expected)
    assert_close(gradients, reference)
    names = " ".join(flow.names)
    stem, count = {"mlp": ("block", 3), "transformer": ("block", 3), "lstm": ("step", 6),
                   "resnet": ("stage1_block", 2)}[name]  # fmt: skip
    for k in range(count):
        assert (f"{stem}[{k}]" if scan else f"{stem}{k}") in names, flow.names
    assert np.all(np.isfinite(flow.gradient_rms)) and float(flow.nonfinite) == 0


# ------------------------------------------------------------------------------------- Jacobians


def test_the_jacobian_of_a_pre_ln_block_is_the_identity_plus_that_of_its_branch(x64):
    config = CONFIGS["mlp"]
    params = double(mlp.init(KEY, config))["blocks"][1]
    h = normal(8).astype(jnp.float64)

    def branch(h):
        normed = (h - h.mean()) / jnp.sqrt(h.var() + 1e-5)
        inner = normed @ params["inner"]["kernel"] + params["inner"]["bias"]
        return jax.nn.gelu(inner, approximate=False) @ params["outer"]["kernel"]

    jacobian = jax.jacrev(lambda h: mlp.block(params, h, config))(h)
    of_branch = jax.jacrev(branch)(h)
    np.testing.assert_allclose(jacobian, np.eye(8) + of_branch, rtol=0, atol=1e-13)
    assert np.abs(of_branch).max() > 0.1


def test_a_pre_ln_transformer_block_is_two_identities_plus_branches(x64):
    config = transformer.Config(11, width=8, depth=3, heads=2)
    params = double(transformer.init(KEY, config))["blocks"][0]
    h = normal(5, 8).astype(jnp.float64)
    norm = nn.NORMS["layer"].apply

    def mix(h):
        normed = norm(params["residual_attention"]["norm"], h)
        return nn.attention(params["attention"], normed, nn.Heads(2, causal=True))

    def feed_forward(h):
        normed = norm(params["residual_mlp"]["norm"], h)
        inner = jax.nn.gelu(nn.linear(params["up"], normed), approximate=False)
        return nn.linear(params["down"], inner)

    def dense(f, h):
        return jax.jacrev(f)(h).reshape(40, 40)

    expected = (np.eye(40) + dense(feed_forward, h + mix(h))) @ (np.eye(40) + dense(mix, h))
    jacobian = dense(lambda h: transformer.block(params, h, config), h)
    # JAX's attention sums its logits in float32, whatever it is given
    np.testing.assert_allclose(jacobian, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_causal_transformer_has_no_gradient_from_the_future(positions):
    def blocks(causal):
        config = transformer.Config(
            11, width=8, depth=2, heads=2, causal=causal, positions=positions
        )
        params = transformer.init(KEY, config)
        jacobian = jax.jacrev(lambda h: transformer.trunk(params, h, config))(normal(6, 8))
        return np.abs(np.transpose(jacobian, (0, 2, 1, 3))).max((2, 3))  # out time, in time

    future = np.triu(np.ones((6, 6), bool), 1)
    assert np.all(blocks(causal=True)[future] == 0)
    assert np.all(blocks(causal=True)[~future] > 0)
    assert np.all(blocks(causal=False) > 0)


def test_attention_is_the_softmax_average_of_the_values(x64):
    heads = nn.Heads(2, causal=True, rotary=True, qk_norm=True)
    params = double(nn.attention_init(KEY, 8, heads, "lecun_normal", nn.Gains()))
    x = normal(5, 8).astype(jnp.float64)
    q, k, v = (
        np.asarray(nn.linear(params[name], x)).reshape(5, 2, 4)
        for name in ("query", "key", "value")
    )
    q, k = (a / np.sqrt(np.mean(a**2, -1, keepdims=True) + 1e-5) for a in (q, k))
    turn = np.exp(1j * np.arange(5)[:, None] * 10_000.0 ** (-np.arange(0, 4, 2) / 4))[:, None]
    q, k = ((a[..., :2] + 1j * a[..., 2:]) * turn for a in (q, k))
    logits = np.einsum("snd,tnd->nst", q, k.conj()).real / np.sqrt(4)
    logits = np.where(np.tril(np.ones((5, 5))), logits, -np.inf)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    mixed = np.einsum("nst,tnd->snd", weights, v).reshape(5, 8)
    expected = mixed @ np.asarray(params["out"]["kernel"])
    np.testing.assert_allclose(nn.attention(params, x, heads), expected, rtol=1e-6, atol=1e-7)


def test_rotary_positions_keep_norms_and_depend_on_the_distance_only(x64):
    q, k = (jnp.broadcast_to(normal(6, seed=s).astype(jnp.float64), (9, 1, 6)) for s in (1, 2))
    turned = nn.rotary(q)
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-14
    )
    products = np.asarray(turned[:, 0] @ nn.rotary(k)[:, 0].T)
    for distance in range(-8, 9):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=0, atol=1e-13)
    assert np.ptp(products[0]) > 0.1
    with pytest.raises(ValueError, match="even head size, got 5"):
        nn.rotary(jnp.ones((3, 1, 5)))


def test_with_qk_norm_attention_ignores_the_scale_of_queries_and_keys():
    x = normal(5, 8)
    for qk_norm in (True, False):
        heads = nn.Heads(2, causal=False, qk_norm=qk_norm)
        params = nn.attention_init(KEY, 8, heads, "lecun_normal", nn.Gains())
        louder = {**params, "query": jax.tree.map(lambda a: 30 * a, params["query"])}
        change = jnp.abs(nn.attention(louder, x, heads) - nn.attention(params, x, heads)).max()
        assert (change < 1e-4) == qk_norm


# ------------------------------------------------------------------- other forms of the same maps


@pytest.mark.parametrize(
    ("cell", "make"),
    [("vanilla", "RNN"), ("gru", "GRU"), ("lstm", "LSTM")],
)
def test_a_cell_with_the_weights_of_torch_is_that_of_torch(cell, make, x64):
    torch = pytest.importorskip("torch", reason="torch (the extra 'peers') is not installed")
    torch.manual_seed(0)
    theirs = getattr(torch.nn, make)(5, 8, dtype=torch.float64)
    config = recurrent.Config(5, 3, width=8, cell=cell)

    def leaf(name):
        return jnp.asarray(getattr(theirs, name).detach().numpy())

    params = {
        "input": {"kernel": leaf("weight_ih_l0").T, "bias": leaf("bias_ih_l0")},
        "hidden": {"kernel": leaf("weight_hh_l0").T, "bias": leaf("bias_hh_l0")},
    }
    shapes = jax.tree.map(jnp.shape, recurrent.init(KEY, config)["cell"])
    assert shapes == jax.tree.map(jnp.shape, params)
    xs = np.random.default_rng(0).standard_normal((6, 2, 5))
    there = torch.tensor(xs, requires_grad=True)
    outputs, _ = theirs(there)
    outputs.pow(2).sum().backward()

    def run(xs):
        state = recurrent.initial_state(config, (2,), jnp.float64)
        return recurrent.run(params, state, xs, config)[1]

    np.testing.assert_allclose(run(jnp.asarray(xs)), outputs.detach().numpy(), rtol=0, atol=1e-14)
    gradient = jax.grad(lambda xs: jnp.sum(run(xs) ** 2))(jnp.asarray(xs))
    np.testing.assert_allclose(gradient, there.grad.numpy(), rtol=0, atol=1e-13)


def test_gates_are_drawn_one_by_one_and_the_lstm_remembers_at_first():
    config = recurrent.Config(5, 3, width=8, gain=2.0)
    params = recurrent.init(KEY, config)["cell"]
    for gate in jnp.split(params["hidden"]["kernel"], 4, -1):
        np.testing.assert_allclose(gate.T @ gate, 4 * np.eye(8), atol=1e-5)
    np.testing.assert_array_equal(params["hidden"]["bias"], np.repeat([0, 1, 0, 0], 8))


def test_running_averages_make_the_examples_of_a_resnet_independent():
    config = CONFIGS["resnet"]
    params, state = resnet.init(KEY, config)
    x = INPUTS["resnet"]
    training = jax.jit(lambda s, x: resnet.apply_training(params, s, x, config))
    for _ in range(200):
        outputs, state = training(state, x)
    np.testing.assert_allclose(outputs, resnet.apply(params, x, config), rtol=1e-5, atol=1e-5)
    together = resnet.apply(params, x, config, state)
    # averages over one repeated batch are its statistics
    np.testing.assert_allclose(together, outputs, rtol=0, atol=1e-3)
    alone = jnp.concatenate([resnet.apply(params, x[k : k + 1], config, state) for k in range(4)])
    np.testing.assert_allclose(alone, together, rtol=0, atol=2e-6)
    coupled = jnp.concatenate([resnet.apply(params, x[k : k + 1], config) for k in range(4)])
    assert np.abs(coupled - outputs).max() > 0.01


@pytest.mark.parametrize("residual", ["rezero", "skip_init", "fixup"])
def test_zero_branches_leave_the_stream_of_a_deep_net_alone(residual):
    config = mlp.Config(5, 3, width=8, depth=20, residual=residual, scan=True)
    params, h = mlp.init(KEY, config), normal(8)
    out = nn.through(lambda p, h: (mlp.block(p, h, config), None), params["blocks"], h)[0]
    np.testing.assert_array_equal(out, h)
    inner = params["blocks"]["inner"]["kernel"]
    expected = 2 / 8 * (1 / 20 if residual == "fixup" else 1)
    assert abs(float(jnp.var(inner)) / expected - 1) < 0.2


def test_configurations_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="'lstmm'"):
        recurrent.Config(2, 2, cell="lstmm")
    with pytest.raises(ValueError, match="norms around the branch"):
        resnet.Config(2, 2, residual="pre_ln")
    with pytest.raises(ValueError, match="rotary"):
        transformer.Config(11, positions="sinusoidal")
    with pytest.raises(ValueError, match="divisor of the width 8, got 3"):
        transformer.init(KEY, transformer.Config(11, width=8, heads=3))
    config = transformer.Config(11, width=8, heads=2, depth=1, max_length=4)
    with pytest.raises(ValueError, match="only 4 are learned"):
        transformer.apply(transformer.init(KEY, config), TOKENS, config)
