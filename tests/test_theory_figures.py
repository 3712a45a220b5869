"""Figures of mean-field and finite-width theory, found again in networks of numpy.

A measured figure is met where the difference lies within four standard errors of both measurements.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from jaxgrad import theory


def z_score(values, figure, sd, figure_nets):
    """Of the values' mean, against a figure that is the mean over `figure_nets` networks."""
    return (np.mean(values) - figure) / (sd * np.sqrt(1 / len(values) + 1 / figure_nets))


# ------------------------------------------------------------------- gains of 50 layers, width 256

WIDTH, DEPTH, NETS = 256, 50, 16
RULES = ("xavier", "he", "torch")
SIGMA_W = np.array([1.0, 2**0.5, 3**-0.5])
SIGMA_B = np.array([0.0, 0.0, (3 * WIDTH) ** -0.5])
GAINS = {  # by rule: mean-field gain, measured gain, log10 of the whole and its standard deviation
    "sigmoid": [(0.2355, 0.2346, -31.48, 0.11), (0.3167, 0.3153, -25.06, 0.14),
                (0.1413, 0.1411, -42.53, 0.14)],
    "tanh": [(0.9584, 0.9566, -0.96, 0.13), (1.0426, 1.0372, 0.79, 0.20),
             (0.5729, 0.5718, -12.14, 0.14)],
    "relu": [(0.7071, 0.7006, -7.73, 0.17), (1.0, 0.9933, -0.15, 0.30),
             (0.4082, 0.4063, -19.56, 0.24)],
    "gelu": [(0.5074, 0.5057, -14.80, 0.12), (0.7684, 0.7695, -5.69, 0.56),
             (0.2907, 0.2901, -26.87, 0.16)],
    "silu": [(0.5039, 0.5021, -14.96, 0.12), (0.7283, 0.7281, -6.89, 0.23),
             (0.2896, 0.2891, -26.95, 0.15)],
}  # fmt: skip


def _sigmoid_and_slope(z):
    s = scipy.special.expit(z)
    return s, s * (1 - s)


def _gelu_and_slope(z):
    below = scipy.special.ndtr(z)
    return z * below, below + z * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)


def _silu_and_slope(z):
    s = scipy.special.expit(z)
    return z * s, s * (1 + z * (1 - s))


UNITS = {
    "sigmoid": _sigmoid_and_slope,
    "tanh": lambda z: (np.tanh(z), 1 - np.tanh(z) ** 2),
    "relu": lambda z: (np.maximum(z, 0), (z > 0).astype(float)),
    "gelu": _gelu_and_slope,
    "silu": _silu_and_slope,
}


@functools.cache
def measured_gains():
    """{activation: log10 of |dL/dh_0| / |dL/dh_50|, (nets, rules)}; one draw serves all."""
    found = {name: np.empty((NETS, 3)) for name in UNITS}
    for net in range(NETS):
        rng = np.random.default_rng([1, net])
        uniform = rng.uniform(-(3**0.5), 3**0.5, (DEPTH, WIDTH, WIDTH)) / WIDTH**0.5
        normal = rng.standard_normal((DEPTH, WIDTH, WIDTH)) / WIDTH**0.5
        bias = rng.uniform(-(3**0.5), 3**0.5, (DEPTH, WIDTH, 1)) * SIGMA_B
        drawn = (uniform, normal, uniform)  # He's are drawn as Gaussians
        h = {name: np.tile(rng.standard_normal((WIDTH, 1)), 3) for name in UNITS}
        slopes = []
        for layer in range(DEPTH):
            slopes.append({})
            for name, unit in UNITS.items():
                z = [w[layer] @ h[name][:, k] for k, w in enumerate(drawn)]
                z = np.stack(z, 1) * SIGMA_W + bias[layer]
                h[name], slopes[-1][name] = unit(z)
        for name in UNITS:
            g = np.tile(rng.standard_normal((WIDTH, 1)), 3)
            top = np.linalg.norm(g, axis=0)
            for layer in reversed(range(DEPTH)):
                g = g * slopes[layer][name] * SIGMA_W
                g = np.stack([w[layer].T @ g[:, k] for k, w in enumerate(drawn)], 1)
            found[name][net] = np.log10(np.linalg.norm(g, axis=0) / top)
    return found


@functools.cache
def mean_field_log_gains(name, depth=800):
    """Natural log of the gain of the first l layers, (depth, rules), in float64."""

    def layer(q, _):
        z = SIGMA_W**2 * q + SIGMA_B**2
        return theory.variance_map(name, z, 1.0), jnp.log(theory.chi_1(name, z, SIGMA_W)) / 2

    with jax.enable_x64(True):
        run = jax.jit(lambda q: jax.lax.scan(layer, q, length=depth)[1])
        return np.cumsum(np.asarray(run(jnp.ones(3))), axis=0)


@pytest.mark.parametrize("name", GAINS)
def test_gains_of_fifty_layers_are_the_published_ones(name):
    theirs = np.array(GAINS[name])
    predicted = mean_field_log_gains(name)[DEPTH - 1]
    np.testing.assert_allclose(np.exp(predicted / DEPTH), theirs[:, 0], rtol=0, atol=6e-5)
    ours = measured_gains()[name]
    for k, rule in enumerate(RULES):
        mean, sd = theirs[k, 2:]
        assert abs(z_score(ours[:, k], mean, sd, NETS)) < 4, (rule, ours[:, k].mean(), mean)
        gain = 10 ** (ours[:, k].mean() / DEPTH)
        error = np.log(10) * sd / DEPTH / NETS**0.5
        assert abs(np.log(gain / theirs[k, 1])) < 4 * 2**0.5 * error + 2e-4, (rule, gain)
        # finite width keeps it below the mean-field gain, by about 1 / width
        off = abs(np.log(gain) - predicted[k] / DEPTH)
        assert off < 2.5 / WIDTH + 4 * np.log(10) * sd / DEPTH, rule
    scale = ours.std(0, ddof=1) / theirs[:, 3]
    assert np.all((scale > 0.4) & (scale < 2)), scale


def test_tanh_with_xavier_shrinks_as_a_power_of_depth():
    gains = np.exp(mean_field_log_gains("tanh")[:, 0])
    at = np.array([50, 200, 400, 800])
    np.testing.assert_allclose(gains[at - 1], [0.1197, 0.0596, 0.0421, 0.0298], rtol=2e-3)
    np.testing.assert_allclose((gains * np.arange(1, 801) ** 0.5)[[49, 799]], [0.847, 0.841], 2e-3)


def test_tanh_with_xavier_at_two_hundred_layers_has_the_measured_gain():
    depth, logs = 200, []
    for net in range(6):
        rng = np.random.default_rng([4, net])
        w = rng.uniform(-(3**0.5), 3**0.5, (depth, WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
        h = [rng.standard_normal(WIDTH)]
        for layer in w:
            h.append(np.tanh(layer @ h[-1]))
        g = rng.standard_normal(WIDTH)
        top = np.linalg.norm(g)
        for k in reversed(range(depth)):
            g = w[k].T @ (g * (1 - h[k + 1] ** 2))
        logs.append(np.log(np.linalg.norm(g) / top))
    error = np.std(logs, ddof=1) / len(logs) ** 0.5
    assert abs(np.mean(logs) - -3.40) < 4 * np.hypot(error, 0.25), logs
    mean_field = np.log(0.0596)  # finite width takes a further half of L / n, or less
    assert -depth / WIDTH - 4 * error < np.mean(logs) - mean_field < 4 * error


def test_smooth_relatives_of_relu_contract_and_selu_explodes(x64):
    he = 2**0.5
    ratio = theory.variance_map("gelu", jnp.array([1.0, 10.0]), he) / jnp.array([1.0, 10.0])
    np.testing.assert_allclose(ratio, [0.850, 0.990], atol=6e-4)
    chi = float(theory.chi_1("selu", 1.0, 1.0))
    np.testing.assert_allclose(chi, 1.07162, atol=5e-5)  # exactly 1.071575
    gain = chi**0.5
    np.testing.assert_allclose([gain, 50 * np.log10(gain)], [1.0352, 0.75], rtol=2e-3)
    q = theory.variance_fixed_point("sigmoid", 4.0)  # Glorot's factor of four
    np.testing.assert_allclose(theory.chi_1("sigmoid", q, 4.0) ** 0.5, 0.63, atol=5e-3)


def test_xavier_does_not_keep_the_variance_of_sigmoids(x64):
    def variance(q):
        mean, square = (
            theory.gaussian_mean(lambda x, p=p: jax.nn.sigmoid(x) ** p, q) for p in (1, 2)
        )
        return square - mean**2, mean

    first, mean = variance(1.0)
    q = theory.variance_fixed_point("sigmoid", 1.0)
    np.testing.assert_allclose([first, variance(q)[0], mean], [0.0434, 0.0147, 0.5], atol=6e-5)
    found = theory.mean_field("sigmoid", 1.0)
    np.testing.assert_allclose([found.chi_1, found.xi_c], [0.0557, 0.35], rtol=0.011)


@pytest.mark.parametrize(
    ("gain", "layers"),
    [("torch", (9, 45, 381)), ("xavier", (13, 61, 517)), (0.9, (165, 829, 7073))],
)
def test_gradients_leave_the_range_of_floats_after_the_known_numbers_of_layers(gain, layers, x64):
    if isinstance(gain, str):
        k = RULES.index(gain)
        q = theory.variance_fixed_point("sigmoid", SIGMA_W[k], SIGMA_B[k])
        gain = float(theory.chi_1("sigmoid", q, SIGMA_W[k])) ** 0.5
    # half of fp16's smallest subnormal; float32 without subnormals; half of float64's smallest
    found = np.ceil(np.array([-25, -126, -1075]) * np.log(2) / np.log(gain))
    np.testing.assert_array_equal(found, layers)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="accelerators keep subnormals")
def test_float32_gradients_of_deep_sigmoids_are_exact_zeros():
    def shares(key, half, bias):
        keys = jax.random.split(key, 4)
        w = jax.random.uniform(keys[0], (60, WIDTH, WIDTH), minval=-half, maxval=half)
        b = jax.random.uniform(keys[1], (60, WIDTH), minval=-bias, maxval=bias)

        def forward(h, wb):
            h = jax.nn.sigmoid(wb[0] @ h + wb[1])
            return h, h

        _, h = jax.lax.scan(forward, jax.random.normal(keys[2], (WIDTH,)), (w, b))

        def backward(g, wh):
            g = wh[0].T @ (g * wh[1] * (1 - wh[1]))
            return g, jnp.mean(g == 0)

        g = jax.random.normal(keys[3], (WIDTH,)) / WIDTH**0.5
        return jax.lax.scan(backward, g, (w[::-1], h[::-1]))[1]

    halves, biases = jnp.array([1 / 16, (3 / 256) ** 0.5]), jnp.array([1 / 16, 0.0])
    torch, xavier = jax.jit(jax.vmap(shares, (None, 0, 0)))(jax.random.key(0), halves, biases)
    assert torch[40 - 1] < 0.05 and torch[44 - 1] > 0.3 and torch[48 - 1] == 1, torch[39:48]
    assert xavier[52 - 1] < 0.05 and xavier[60 - 1] == 1, xavier[50:]
    assert np.float32(1e-30) * np.float32(1e-10) > 0  # numpy keeps what XLA flushes
    assert jax.jit(jnp.multiply)(np.float32(1e-30), np.float32(1e-10)) == 0


# ------------------------------------------------------------------------- tanh: chaos; Glorot 2010


def test_first_over_last_weight_gradient_of_tanh_nets_is_the_published_one(x64):
    width, depth, nets = 200, 100, 6
    figures = np.array([1.7e-6, 1.5e-3, 0.39, 2.8e2, 1.3e6])  # one net each
    sigma_w = np.sqrt(np.array([1.0, 1.3, 1.76, 2.5, 4.0]))
    q = np.asarray(theory.variance_fixed_point("tanh", sigma_w, 0.05**0.5))
    law = theory.log_gain_of("tanh", q, sigma_w, width, depth - 1)
    mean, sd = (np.asarray(x) / 2 for x in law)  # of the norm, not of its square
    found = np.empty((nets, 5))
    for net in range(nets):
        rng = np.random.default_rng([2, net])
        w = rng.standard_normal((depth, width, width)) / width**0.5
        b = 0.05**0.5 * rng.standard_normal((depth, width, 1))
        h = [np.tanh(np.sqrt(q) * rng.standard_normal((width, 5)))]
        for layer in range(depth):
            h.append(np.tanh(sigma_w * (w[layer] @ h[-1]) + b[layer]))
        delta = rng.standard_normal((width, 5)) * (1 - h[-1] ** 2)
        last = np.linalg.norm(delta, axis=0) * np.linalg.norm(h[-2], axis=0)
        for layer in range(depth - 1, 0, -1):
            delta = sigma_w * (w[layer].T @ delta) * (1 - h[layer] ** 2)
        found[net] = np.log(np.linalg.norm(delta, axis=0) * np.linalg.norm(h[0], axis=0) / last)
    error = 1 / width * depth / 2  # the order that the law leaves out
    assert np.all(np.abs(found.mean(0) - mean) < 4 * sd / nets**0.5 + error), found.mean(0) - mean
    spread = sd * np.sqrt(1 + 1 / nets)
    assert np.all(np.abs(np.log(figures) - found.mean(0)) < 4 * spread), np.log(figures)
    assert np.all(np.abs(np.roll(np.log(figures), 1) - found.mean(0)) > 4 * spread)


def test_figures_of_glorot_and_bengio_are_those_of_mean_field_and_of_a_net(x64):
    width, figures = 1000, {
        3**-0.5: ([0.458, 0.249, 0.140, 0.080, 0.047], [0.083, 0.175, 0.323, 0.572, 1]),
        1.0: ([0.626, None, None, None, 0.324], [0.407, 0.597, 0.751, 0.881, 1]),
    }  # fmt: skip
    rng = np.random.default_rng(3)
    w = rng.uniform(-1, 1, (5, width, width)) * (3 / width) ** 0.5
    for sigma, (activations, deltas) in figures.items():
        h, q = [rng.standard_normal((width, 16))], [1.0]
        for layer in w:
            h.append(np.tanh(sigma * (layer @ h[-1])))
            q.append(float(theory.variance_map("tanh", sigma**2 * q[-1], 1.0)))
        delta = [rng.standard_normal((width, 16)) * (1 - h[-1] ** 2)]
        chi = [1.0]
        for k in (4, 3, 2, 1):
            delta.append(sigma * (w[k].T @ delta[-1]) * (1 - h[k] ** 2))
            chi.append(chi[-1] * float(theory.chi_1("tanh", sigma**2 * q[k - 1], sigma)))
        relative = np.array([d.std() for d in delta[::-1]]) / delta[0].std()
        stds = np.array([a.std() for a in h[1:]])
        known = [k for k, figure in enumerate(activations) if figure is not None]
        theirs = np.array([activations[k] for k in known])
        for ours in (stds[known], np.sqrt(q[1:])[known]):
            np.testing.assert_allclose(ours, theirs, rtol=0.06)
        for ours in (relative, np.sqrt(chi[::-1])):
            np.testing.assert_allclose(ours, deltas, rtol=0.08)


# ---------------------------------------------------------------------------- exact at finite width


def log_gains(width, depth, nets, seed):
    """`ln |J u|^2` of He ReLU nets: u pushed beside an input; the gates are the input's."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((2, nets, width)).astype(np.float32)
    u[1] /= np.linalg.norm(u[1], axis=1, keepdims=True)
    logs = np.zeros(nets)
    for _ in range(depth):
        w = rng.standard_normal((nets, width, width), dtype=np.float32) * (2 / width) ** 0.5
        z = np.einsum("kij,akj->aki", w, u, optimize=True)
        u = z * (z[0] > 0)
        norm = np.linalg.norm(u, axis=2, keepdims=True)
        with np.errstate(divide="ignore"):
            logs += 2 * np.log(norm[1, :, 0])
        u = np.divide(u, norm, out=np.zeros_like(u), where=norm > 0)
    return logs


@pytest.mark.parametrize(
    ("width", "depth", "nets", "figure"),
    [(64, 50, 400, (-1.933, 4.185, 2000)), (16, 100, 2000, (-17.47, 41.0, 2000))],
)
def test_log_gains_of_he_relu_nets_have_the_exact_law(width, depth, nets, figure, x64):
    law = theory.log_gain([width] * depth)
    mean, variance, dead = (float(x) for x in law)
    logs = log_gains(width, depth, nets, width)
    alive = logs[np.isfinite(logs)]
    assert abs(alive.mean() - mean) < 4 * (variance / len(alive)) ** 0.5
    assert abs(alive.var(ddof=1) / variance - 1) < 4 * 1.1 * (2 / len(alive)) ** 0.5
    assert scipy.stats.binom.cdf(nets - len(alive), nets, dead) > 1e-4
    assert scipy.stats.binom.sf(nets - len(alive) - 1, nets, dead) > 1e-4
    # and so have the figures
    assert abs(figure[0] - mean) < 4 * (variance / figure[2]) ** 0.5
    assert abs(figure[1] / variance - 1) < 4 * 1.1 * (2 / figure[2]) ** 0.5


def test_typical_gains_and_shares_of_shrinking_layers_are_the_published_ones(x64):
    layer = theory.log_gain([64])
    np.testing.assert_allclose([layer.mean, layer.variance], [-0.0401086, 0.0829974], rtol=2e-6)
    hundred = [theory.log_gain([n] * 100) for n in (64, 16)]
    np.testing.assert_allclose([np.exp(x.mean / 2) for x in hundred], [0.135, 1.5e-4], rtol=0.015)
    np.testing.assert_allclose(hundred[0].variance ** 0.5 / 2 / np.log(10), 0.63, atol=5e-3)
    np.testing.assert_allclose(2000 * hundred[1].dead, 3.05, atol=5e-3)
    np.testing.assert_allclose(theory.gain_kurtosis(np.full(5, 32)), 2.067, atol=5e-4)
    for n, share in ((256, 0.516), (16, 0.566)):
        k = np.arange(n + 1)
        below = scipy.stats.chi2.cdf(n / 2, np.maximum(k, 1e-9))
        found = np.sum(scipy.stats.binom.pmf(k, n, 0.5) * below)
        np.testing.assert_allclose(found, share, atol=6e-4)
    logs = log_gains(16, 1, 20000, 5)
    assert abs(np.mean(logs < 0) - 0.566) < 4 * (0.566 * 0.434 / len(logs)) ** 0.5


def test_fourth_moment_and_kurtosis_of_a_jacobian_entry_are_the_exact_ones(x64):
    """`E Z^4 / (E Z^2)^2 = 3 prod (1 + 5 / n)` over the hidden layers."""
    width, depth, nets = 32, 2, 60000
    gains = np.exp(log_gains(width, depth, nets, 7))
    entry = np.sqrt(gains) * np.random.default_rng(8).standard_normal(nets)
    exact = float(theory.gain_kurtosis(np.full(depth, width)))
    for x, predicted in ((gains, exact), (entry**2, 3 * exact)):
        ratio = np.mean(x**2) / np.mean(x) ** 2
        influence = x**2 / np.mean(x) ** 2 - 2 * ratio * x / np.mean(x)
        assert abs(ratio - predicted) < 4 * influence.std() / nets**0.5, (ratio, predicted)


def test_he_correlations_at_a_thousand_layers_and_the_pytorch_gain_are_exact():
    c = 0.0
    for _ in range(1000):
        c = (np.sqrt(1 - c * c) + (np.pi - np.arccos(c)) * c) / np.pi
    np.testing.assert_allclose(1 - c, 4.313e-5, rtol=2e-4)
    np.testing.assert_allclose(9 * np.pi**2 / 2e6, 4.441e-5, rtol=2e-4)
    np.testing.assert_allclose(6**-0.5, 0.4082, atol=5e-5)
