"""Activations, initializers, norms and residual rules against torch, JAX and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import linen

from jaxgrad import nn, theory

torch = pytest.importorskip("torch", reason="torch (the extra 'peers') is not installed")

KEY = jax.random.key(0)

# ----------------------------------------------------------------------------------- activations

TORCH = {
    "identity": torch.nn.Identity(),
    "sigmoid": torch.nn.Sigmoid(),
    "tanh": torch.nn.Tanh(),
    "relu": torch.nn.ReLU(),
    "leaky_relu": torch.nn.LeakyReLU(0.01),
    "gelu": torch.nn.GELU(),
    "gelu_tanh": torch.nn.GELU(approximate="tanh"),
    "silu": torch.nn.SiLU(),
    "selu": torch.nn.SELU(),
    "softplus": torch.nn.Softplus(),
    "erf": torch.erf,
    "hard_tanh": torch.nn.Hardtanh(),
}


@pytest.mark.parametrize("name", sorted(nn.ACTIVATIONS))
def test_an_activation_and_its_slope_are_those_of_torch(name, x64):
    x = np.linspace(-6, 6, 100)  # zero and the kinks of hard_tanh are not among them
    there = torch.tensor(x, requires_grad=True)
    value = TORCH[name](there)
    value.sum().backward()
    here, pull = jax.vjp(nn.activation(name), jnp.asarray(x))
    np.testing.assert_allclose(here, value.detach().numpy(), rtol=1e-11, atol=1e-13)
    slope = pull(jnp.ones_like(here))[0]
    np.testing.assert_allclose(slope, there.grad.numpy(), rtol=1e-10, atol=1e-13)


def test_unknown_names_say_what_there_is():
    for lookup, names in (
        (nn.activation, nn.ACTIVATIONS),
        (nn.initializer, nn.INITIALIZERS),
        (lambda name: nn.mlp.init(KEY, nn.mlp.Config(2, 2, norm=name)), ("layer", "rms")),
        (lambda name: nn.branch_gains(name, SITE), nn.RULES),
    ):
        with pytest.raises(ValueError, match="'reluu'") as error:
            lookup("reluu")
        assert all(name in str(error.value) for name in names)


# ---------------------------------------------------------------------------------- initializers

jinit = jax.nn.initializers
OF_JAX = {
    "xavier_uniform": jinit.glorot_uniform(),
    "xavier_normal": jinit.variance_scaling(1.0, "fan_avg", "normal"),
    "xavier_truncated": jinit.glorot_normal(),
    "he_uniform": jinit.he_uniform(),
    "he_normal": jinit.variance_scaling(2.0, "fan_in", "normal"),
    "he_truncated": jinit.he_normal(),
    "lecun_uniform": jinit.lecun_uniform(),
    "lecun_normal": jinit.variance_scaling(1.0, "fan_in", "normal"),
    "lecun_truncated": jinit.lecun_normal(),
    "orthogonal": jinit.orthogonal(),
    "delta_orthogonal": jinit.delta_orthogonal(),
    "zeros": jinit.zeros,
}


@pytest.mark.parametrize("name", sorted(OF_JAX))
def test_with_one_key_the_weights_are_those_of_jax_bit_for_bit(name):
    shapes = [(3, 3, 8, 16)] if name == "delta_orthogonal" else [(24, 40), (40, 24), (3, 3, 8, 16)]
    for shape in shapes:
        ours = nn.initializer(name).weight(KEY, shape, jnp.float32)
        np.testing.assert_array_equal(ours, OF_JAX[name](KEY, shape, jnp.float32))


VARIANCES = {  # (variance of a 300 x 500 kernel, kurtosis of the law)
    "xavier_uniform": (2 / 800, 1.8),
    "xavier_normal": (2 / 800, 3.0),
    "xavier_truncated": (2 / 800, None),
    "he_uniform": (2 / 300, 1.8),
    "he_normal": (2 / 300, 3.0),
    "he_truncated": (2 / 300, None),
    "lecun_uniform": (1 / 300, 1.8),
    "lecun_normal": (1 / 300, 3.0),
    "lecun_truncated": (1 / 300, None),
    "torch_linear": (1 / 900, 1.8),
}


def z_of_variance(draws, variance, kurtosis):
    if kurtosis is None:
        kurtosis = 3 + float(scipy.stats.truncnorm(-2, 2).stats("k"))
    error = variance * np.sqrt((kurtosis - 1) / draws.size)
    return (np.mean(np.square(draws, dtype=np.float64)) - variance) / error


@pytest.mark.parametrize("name", sorted(VARIANCES))
def test_the_variance_of_the_draws_is_the_rule_s_to_four_standard_errors(name):
    variance, kurtosis = VARIANCES[name]
    draws = np.asarray(nn.initializer(name).weight(KEY, (300, 500), jnp.float32))
    assert abs(z_of_variance(draws, variance, kurtosis)) < 4
    doubled = np.asarray(nn.initializer(name, gain=2.0).weight(KEY, (300, 500), jnp.float32))
    np.testing.assert_array_equal(doubled, 2 * draws)
    # the test would see one percent too much
    assert abs(z_of_variance(draws * np.sqrt(1.05), variance, kurtosis)) > 4


def test_torch_linear_is_what_torch_does_for_weight_and_bias():
    n_in, n_out = 300, 500
    torch.manual_seed(0)
    theirs = torch.nn.Linear(n_in, n_out)
    ours = nn.weights_init(KEY, (n_in, n_out), "torch_linear")
    bound = 1 / np.sqrt(n_in)
    for leaf, tensor in ((ours["kernel"], theirs.weight), (ours["bias"], theirs.bias)):
        mine, other = np.asarray(leaf).ravel(), tensor.detach().numpy().ravel()
        for draws in (mine, other):
            assert np.abs(draws).max() <= bound * (1 + 1e-6)
            assert np.abs(draws).max() > bound * (1 - 20 / draws.size)
        assert scipy.stats.ks_2samp(mine, other).pvalue > 1e-3
    he = nn.weights_init(KEY, (n_in, n_out), "he_uniform")
    ratio = np.var(he["kernel"]) / np.var(ours["kernel"])
    np.testing.assert_allclose(ratio, 6, rtol=1e-5)  # the same draws: exactly a sixth of He's
    np.testing.assert_array_equal(he["bias"], 0)
    # fan_in of a convolution counts its receptive field, for the bias too
    conv = nn.weights_init(KEY, (3, 3, 4, 1000), "torch_linear")
    for leaf in jax.tree.leaves(conv):
        np.testing.assert_allclose(np.abs(leaf).max(), 1 / 6, rtol=2e-2)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_orthogonal_weights_keep_the_lengths_of_the_smaller_side(shape):
    w = np.asarray(nn.initializer("orthogonal", 3.0).weight(KEY, shape, jnp.float32), np.float64)
    gram = w.T @ w if shape[0] >= shape[1] else w @ w.T
    np.testing.assert_allclose(gram, 9 * np.eye(min(shape)), atol=2e-5)


def test_a_delta_orthogonal_convolution_keeps_the_norm_of_an_image():
    params = nn.weights_init(KEY, (3, 3, 8, 16), "delta_orthogonal")
    x = jax.random.normal(KEY, (2, 6, 6, 8))
    ours = float(jnp.linalg.norm(nn.conv(params, x)) / jnp.linalg.norm(x))
    assert abs(ours - 1) < 1e-5
    he = nn.weights_init(KEY, (3, 3, 8, 16), "he_normal")
    assert abs(float(jnp.linalg.norm(nn.conv(he, x)) / jnp.linalg.norm(x)) - 1) > 0.1


def test_impossible_kernels_are_refused():
    with pytest.raises(ValueError, match="fan_in, fan_out"):
        nn.initializer("he_normal").weight(KEY, (3,), jnp.float32)
    with pytest.raises(ValueError, match="16 inputs"):
        nn.initializer("delta_orthogonal").weight(KEY, (3, 3, 16, 8), jnp.float32)
    with pytest.raises(ValueError, match="use 'orthogonal'"):
        nn.initializer("delta_orthogonal").weight(KEY, (8, 8), jnp.float32)
    with pytest.raises(ValueError, match="fan_max"):
        nn.variance_scaling(1.0, "fan_max", "normal")


# ----------------------------------------------------------------------------------------- norms

N = 12
EPS = 1e-5


def stream(scale=1.0):
    return jnp.asarray(np.random.default_rng(0).standard_normal(N) * scale + 3.0)


def layer_norm_jacobian(x, eps=EPS):
    """(I - 1 1^T / n - xc xc^T / (n s^2)) / s with s^2 = var + eps."""
    centered = x - x.mean()
    square = np.mean(centered**2) + eps
    n = len(x)
    outer = np.outer(centered, centered) / (n * square)
    return (np.eye(n) - np.ones((n, n)) / n - outer) / np.sqrt(square)


@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_layer_norm_has_two_null_directions_up_to_epsilon(scale, x64):
    x = stream(scale)
    centered = np.asarray(x - x.mean())
    sigma = np.sqrt(np.mean(centered**2))
    practiced = np.asarray(jax.jacrev(lambda x: nn.layer_norm({}, x))(x))
    written = np.asarray(jax.jacrev(lambda x: nn.layer_norm_as_written({}, x))(x))
    np.testing.assert_allclose(practiced, layer_norm_jacobian(np.asarray(x)), rtol=0, atol=1e-9)
    for jacobian, left in (
        (practiced, EPS / (sigma**2 + EPS) ** 1.5),
        (written, EPS / (sigma + EPS) ** 2),
    ):
        size = np.abs(jacobian).max()
        assert np.abs(jacobian @ np.ones(N)).max() < 1e-13 * size
        # along x - mean only what epsilon leaves, exactly
        np.testing.assert_allclose(jacobian @ centered, left * centered, rtol=1e-7, atol=1e-12)
        assert np.abs(jacobian @ np.eye(N)[0]).max() > 0.1 * size


def test_norms_are_those_of_torch(x64):
    x = np.random.default_rng(0).standard_normal((5, N)) * 0.01
    scale, bias = np.random.default_rng(1).standard_normal((2, N))
    t = {name: torch.tensor(v) for name, v in (("x", x), ("scale", scale), ("bias", bias))}
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    theirs = torch.nn.functional.layer_norm(t["x"], (N,), t["scale"], t["bias"], EPS).numpy()
    np.testing.assert_allclose(nn.layer_norm(params, jnp.asarray(x)), theirs, rtol=1e-10)
    theirs = torch.nn.functional.rms_norm(t["x"], (N,), t["scale"], EPS).numpy()
    ours = nn.rms_norm({"scale": jnp.asarray(scale)}, jnp.asarray(x))
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    sigma = x.std(-1, keepdims=True)
    written = scale * (x - x.mean(-1, keepdims=True)) / (sigma + EPS) + bias
    ours = nn.layer_norm_as_written(params, jnp.asarray(x))
    np.testing.assert_allclose(ours, written, rtol=1e-10)


def test_epsilon_inside_the_root_damps_what_epsilon_outside_does_not(x64):
    """At sigma = 1e-3 the two forms differ threefold: .30 against .99 (sqrt(1e-6 / 1.1e-5))."""
    x = stream()
    x = (x - x.mean()) / x.std() * 1e-3
    rms = [float(jnp.std(f({}, x))) for f in (nn.layer_norm, nn.layer_norm_as_written)]
    np.testing.assert_allclose(rms, [1e-3 / np.sqrt(1e-6 + EPS), 1e-3 / (1e-3 + EPS)], rtol=1e-9)


@pytest.mark.parametrize(
    ("norm", "gain"), [(nn.layer_norm, EPS**-0.5), (nn.layer_norm_as_written, 1 / EPS)]
)
def test_at_zero_variance_the_gradient_is_the_centering_over_epsilon(norm, gain):
    def naive(x):
        return (x - x.mean()) / (x.std() + EPS)

    x = jnp.full(N, 0.5)
    centering = np.eye(N) - 1 / N
    jacobian = jax.jacrev(lambda x: norm({}, x))(x)
    np.testing.assert_allclose(jacobian, gain * centering, rtol=1e-5, atol=1e-5 * gain)
    assert np.isnan(jax.jacrev(naive)(x)).any()


def test_batch_norm_in_training_and_running_is_that_of_torch_and_of_flax(x64):
    x = np.random.default_rng(0).standard_normal((3, 7, N)) * 2 + 1
    theirs = torch.nn.BatchNorm1d(N, dtype=torch.float64)
    flat = torch.tensor(x.reshape(-1, N), requires_grad=True)
    params, state = nn.batch_norm_init(N)
    # a float32 average takes momentum in float32, 1.5e-8 away
    state = {name: leaf.astype(jnp.float64) for name, leaf in state.items()}
    flax_norm = linen.BatchNorm(momentum=0.9, epsilon=EPS, dtype=jnp.float64)
    flax_state = {"batch_stats": {"mean": jnp.zeros(N), "var": jnp.ones(N)}, "params": params}
    biased = state
    for _ in range(3):
        y = theirs(flat)
        ours, state = nn.batch_norm_training(params, state, jnp.asarray(x), unbiased=True)
        _, biased = nn.batch_norm_training(params, biased, jnp.asarray(x))
        _, changed = flax_norm.apply(
            flax_state, jnp.asarray(x), use_running_average=False, mutable="batch_stats"
        )
        flax_state = {**flax_state, **changed}
    np.testing.assert_allclose(ours.reshape(-1, N), y.detach().numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(state["mean"], theirs.running_mean.numpy(), rtol=1e-9)
    np.testing.assert_allclose(state["variance"], theirs.running_var.numpy(), rtol=1e-9)
    np.testing.assert_allclose(biased["variance"], flax_state["batch_stats"]["var"], rtol=1e-7)
    assert not np.allclose(biased["variance"], state["variance"], rtol=1e-3)
    theirs.eval()
    ours = nn.batch_norm(params, state, jnp.asarray(x)).reshape(-1, N)
    np.testing.assert_allclose(ours, theirs(flat).detach().numpy(), rtol=1e-9, atol=1e-12)
    weight = np.random.default_rng(2).standard_normal((21, N))
    theirs.train()
    (theirs(flat) * torch.tensor(weight)).sum().backward()

    def loss(x):
        return jnp.sum(nn.batch_norm_training(params, state, x)[0].reshape(-1, N) * weight)

    gradient = jax.grad(loss)(jnp.asarray(x)).reshape(-1, N)
    np.testing.assert_allclose(gradient, flat.grad.numpy(), rtol=1e-8, atol=1e-10)


def test_a_batch_of_one_value_is_refused():
    params, state = nn.batch_norm_init(N)
    with pytest.raises(ValueError, match="at least 2 values a feature, got 1"):
        nn.batch_norm_training(params, state, jnp.ones((1, N)))


def test_norms_of_half_precision_are_computed_in_single():
    x = jnp.asarray(np.random.default_rng(0).standard_normal(256) * 300 + 100, jnp.float16)
    for norm in nn.NORMS.values():
        y = norm.apply(norm.init(256), x)
        assert y.dtype == jnp.float16
        wide = norm.apply(norm.init(256), x.astype(jnp.float32))
        np.testing.assert_allclose(np.asarray(y, np.float32), wide, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------- residuals

SITE = nn.Site(branches=8, norm=nn.NORMS["layer"])


def expected_jacobian(name, h, a):
    """d block / dh by hand for the branch F(h) = A h."""
    eye = np.eye(N)
    normed = (h - h.mean()) / np.sqrt(h.var() + EPS)
    of_norm = layer_norm_jacobian(h)
    alpha = theory.deep_norm(4).alpha
    return {
        "none": a,
        "plain": eye + a,
        "pre_ln": eye + a @ of_norm,
        "post_ln": layer_norm_jacobian(h + a @ h) @ (eye + a),
        "sandwich": eye + layer_norm_jacobian(a @ normed) @ a @ of_norm,
        "deep_norm": layer_norm_jacobian(alpha * h + a @ h) @ (alpha * eye + a),
        "rezero": eye,
        "layer_scale": eye + 0.1 * a @ of_norm,
        "fixup": eye + a,
        "skip_init": eye,
    }[name]


@pytest.mark.parametrize("name", sorted(nn.RULES))
def test_the_jacobian_of_a_block_at_initialization_is_the_rule_s_formula(name, x64):
    a = np.random.default_rng(1).standard_normal((N, N)) / np.sqrt(N)
    h = stream()
    params = nn.residual_init(name, N, SITE)
    block = jax.jacrev(lambda h: nn.residual(name, lambda x: jnp.asarray(a) @ x, params, h, SITE))
    expected = expected_jacobian(name, np.asarray(h), a)
    if name in ("rezero", "skip_init"):
        np.testing.assert_array_equal(block(h), expected)  # the identity, exactly
    else:
        # the first value of LayerScale, 0.1, is a float32 parameter
        np.testing.assert_allclose(block(h), expected, rtol=0, atol=1e-8)
    gradients = jax.grad(
        lambda p: jnp.sum(nn.residual(name, jnp.tanh, p, h, SITE) ** 3), allow_int=False
    )(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_the_gains_of_the_branches_are_the_papers():
    for layers in (1, 6, 48):
        site = nn.Site(2 * layers, nn.NORMS["layer"])
        inner, last = nn.branch_gains("deep_norm", site)
        alpha = (2 * layers) ** 0.25
        assert abs(2 * layers * (inner**2 + last**2) / alpha**2 - 1) < 1e-12
    assert nn.branch_gains("fixup", nn.Site(16, nn.NORMS["none"])) == (16**-0.5, 0.0)
    deep = nn.Site(16, nn.NORMS["none"], layers_in_branch=3)
    assert nn.branch_gains("fixup", deep) == (16**-0.25, 0.0)
    plain = {"deep_norm", "fixup"}
    assert all(nn.branch_gains(r, SITE) == (1, 1) for r in nn.RULES if r not in plain)
