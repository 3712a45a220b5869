"""The theory against networks, measured through jaxgrad: z-tests where the law is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad as jg
from jaxgrad import theory

NETS, DEPTH = 400, 12


def _log_gains(phi, width, sigma_w):
    """`ln ||dL/dh_0||^2 - ln ||dL/dh_L||^2` of many nets, from one Flow each."""

    def loss(params, v):
        h = jg.tap(params["x"], "in")
        for w in params["weights"]:
            h = phi(h @ w)
        return jnp.vdot(jg.tap(h, "out"), v)

    def one(key):
        keys = jax.random.split(key, DEPTH + 2)
        scale = sigma_w / width**0.5
        weights = [scale * jax.random.normal(k, (width, width)) for k in keys[2:]]
        params = {"x": jax.random.normal(keys[0], (width,)), "weights": weights}
        v = jax.random.normal(keys[1], (width,))
        (_, flow), _ = jg.value_and_grad_flow(loss)(params, v)
        rms = {name: flow.gradient_rms[flow.names.index(name)] for name in ("in", "out")}
        return 2 * jnp.log(rms["in"] / rms["out"])

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), NETS)), float)


@pytest.mark.parametrize(
    ("name", "phi", "sigma_w"), [("relu", jax.nn.relu, 2**0.5), ("linear", lambda x: x, 1.0)]
)
def test_log_gain_of_gaussian_nets_has_the_exact_law(name, phi, sigma_w):
    width = 24
    gains = _log_gains(phi, width, sigma_w)
    law = theory.log_gain([width] * DEPTH, name)
    mean, variance = float(law.mean), float(law.variance)
    assert abs(gains.mean() - mean) / (variance / NETS) ** 0.5 < 4
    # the fourth moment of the sum is nearly a normal one's
    assert abs(gains.var(ddof=1) / variance - 1) / (2 / NETS) ** 0.5 < 4
    # and the infinite-width mean, which is zero, is far outside
    assert abs(gains.mean()) / (variance / NETS) ** 0.5 > 8
    kurtosis = np.exp(2 * gains).mean() / np.exp(gains).mean() ** 2
    assert 0.5 < kurtosis / float(theory.gain_kurtosis(np.full(DEPTH, width), name)) < 1.5


def test_lyapunov_spectrum_of_a_linear_chain_is_the_digamma_law():
    width, depth = 6, 80
    weights = jax.random.normal(jax.random.key(1), (depth, width, width)) / width**0.5
    chain = jg.Chain.scanned(lambda w, h: w @ h, weights)
    found = jg.log_singular_values(chain, jnp.ones(width))
    law = theory.gaussian_log_singular_values(width, depth)
    z = (np.asarray(found) - np.asarray(law.mean)) / np.asarray(law.standard_deviation)
    assert np.abs(z).max() < 4
    # the sum is ln |det|, whose law is exact
    sd = float(jnp.sqrt(jnp.sum(law.standard_deviation**2)))
    assert abs(float(jnp.sum(found) - jnp.sum(law.mean))) < 4 * sd


def test_second_moment_of_gaussian_products_is_the_exact_one():
    rng = np.random.default_rng(0)
    for name, n, depth in (("linear", 8, 4), ("relu", 8, 3)):
        j = np.broadcast_to(np.eye(n), (20000, n, n))
        for _ in range(depth):
            w = rng.normal(size=(20000, n, n)) / n**0.5
            if name == "relu":
                w = w * 2**0.5 * rng.integers(0, 2, size=(20000, n, 1))
            j = w @ j
        g = j @ np.swapaxes(j, 1, 2)
        second = (g**2).sum((1, 2)) / n
        error = second.std(ddof=1) / len(second) ** 0.5
        assert abs(second.mean() - float(theory.second_moment_at_width(n, depth, name))) < 4 * error


def test_the_share_of_shrinking_residual_blocks_is_the_predicted_one():
    n, s, draws = 16, 0.3, 20000
    rng = np.random.default_rng(1)
    g = np.eye(n)[0] + s * rng.normal(size=(draws, n)) / n**0.5
    share = ((g**2).sum(1) < 1).mean()
    p = float(theory.shrink_probability(n, s))
    assert abs(share - p) < 4 * (p * (1 - p) / draws) ** 0.5


# ------------------------------------------------------------------ the plane of (sigma_w, sigma_b)

WIDTH, LAYERS, SEEDS = 128, 24, 12
PLANE = [(1.0, 0.2), (1.3, 0.3), (1.33, 0.22), (2.0, 0.2), (2.5, 0.5)]


@pytest.fixture(scope="module")
def measured():
    """For every point of the plane and seed: q, log gain, and two inputs' correlation by layer."""

    def loss(params, v):
        h = params["x"]  # two inputs, pre-activations
        for i, (w, b) in enumerate(zip(params["w"], params["b"], strict=True)):
            h = jnp.tanh(jg.tap(h, f"h{i}")) @ w + b
        h = jg.tap(h, f"h{LAYERS}")
        return jnp.vdot(h[0], v), h

    def one(key, sigma_w, sigma_b):
        keys = jax.random.split(key, 4)
        q = theory.variance_fixed_point("tanh", sigma_w, sigma_b)
        w = sigma_w / WIDTH**0.5 * jax.random.normal(keys[0], (LAYERS, WIDTH, WIDTH))
        b = sigma_b * jax.random.normal(keys[1], (LAYERS, WIDTH))
        x = jnp.sqrt(q) * jax.random.normal(keys[2], (2, WIDTH))
        params = {"x": x, "w": list(w), "b": list(b)}
        v = jax.random.normal(keys[3], (WIDTH,))
        (_, h, flow), _ = jg.value_and_grad_flow(loss, has_aux=True)(params, v)
        at = {name: k for k, name in enumerate(flow.names)}
        # the gradient is that of the first input alone: its rms over two rows, at both ends
        gain = 2 * jnp.log(flow.gradient_rms[at["h0"]] / flow.gradient_rms[at[f"h{LAYERS}"]])
        late = range(LAYERS // 2, LAYERS + 1)
        squares = jnp.stack([flow.activation_rms[at[f"h{i}"]] for i in late])
        unit = h / jnp.linalg.norm(h, axis=1, keepdims=True)
        return jnp.mean(squares**2), gain, unit[0] @ unit[1]

    keys = jax.random.split(jax.random.key(3), SEEDS)
    plane = jnp.array(PLANE)
    run = jax.vmap(jax.vmap(one, (0, None, None)), (None, 0, 0))
    return [np.asarray(a, float) for a in jax.jit(run)(keys, plane[:, 0], plane[:, 1])]


def test_measured_q_chi_and_depth_scale_are_the_predicted_ones_over_the_plane(measured):
    q, gains, _ = measured
    plane = jnp.array(PLANE)
    predicted = theory.mean_field("tanh", plane[:, 0], plane[:, 1])
    # two inputs and half the layers average the sampling out but share the fluctuations of q
    error = theory.variance_fluctuation("tanh", predicted.q, plane[:, 0], WIDTH) / SEEDS**0.5
    bias = 4 / WIDTH  # mean-field theory's own order
    np.testing.assert_array_less(np.abs(q.mean(1) / predicted.q - 1), 4 * error + bias)
    law = theory.log_gain_of("tanh", predicted.q, plane[:, 0], WIDTH, LAYERS)
    error = law.standard_deviation / SEEDS**0.5
    z = (gains.mean(1) - law.mean) / error
    np.testing.assert_array_less(np.abs(z), 4)
    # the spread between networks is the stated one too, to its own error
    ratio = gains.std(1, ddof=1) / law.standard_deviation
    assert np.all((ratio > 0.45) & (ratio < 1.8)), ratio
    # the test can tell the points apart: neighbors' predictions fail it
    wrong = np.abs(np.roll(gains.mean(1), 1) - law.mean) / error
    assert np.all(wrong > 4), wrong
    # the sign of the gain is that of the phase, and its rate the depth scale
    rate = gains.mean(1) / LAYERS
    chaotic = np.asarray(predicted.chi_1) > 1.01
    assert np.all(rate[chaotic] > 0) and np.all(rate[[0, 1]] < 0)
    scale = 1 / np.abs(rate[[0, 3, 4]])
    np.testing.assert_allclose(scale, predicted.xi_gradient[jnp.array([0, 3, 4])], rtol=0.35)


def test_measured_correlations_come_to_the_fixed_point(measured):
    _, _, c = measured
    plane = jnp.array(PLANE)
    predicted = theory.mean_field("tanh", plane[:, 0], plane[:, 1])
    for k in (0, 1):  # ordered: 1 - c is e^(-24 / xi_c) of what it was, up to its own spread
        law = theory.log_gain_of("tanh", predicted.q[k], plane[k, 0], WIDTH, LAYERS)
        closeness = np.log(1 - np.minimum(c[k], 1 - 1e-7))
        highest = float(law.mean + 4 * law.standard_deviation)
        assert np.all(closeness < highest + 1), (closeness, highest)
    for k in (3, 4):  # chaotic: a fixed point below one, noisy at finite width
        error = c[k].std(ddof=1) / SEEDS**0.5
        assert abs(c[k].mean() - float(predicted.c[k])) < 4 * error + 4 / WIDTH, c[k].mean()


def test_mean_squared_singular_value_of_a_layer_is_chi_1():
    width, q, sigma_w = 200, 0.7, 1.6
    w = sigma_w / width**0.5 * jax.random.normal(jax.random.key(4), (3, width, width))
    chain = jg.Chain.scanned(lambda w, h: w @ jnp.tanh(h), w)
    h = jnp.sqrt(q) * jax.random.normal(jax.random.key(5), (width,))
    first = jg.layer_jacobians(chain, h)[0]
    gain = float(jnp.sum(first**2)) / width
    chi = float(theory.chi_1("tanh", q, sigma_w))
    mu = [float(theory.slope_moment("tanh", q, p)) for p in (2, 4)]
    error = ((mu[1] / mu[0] ** 2 - 1 + 2 / width) / width) ** 0.5
    assert abs(gain / chi - 1) < 4 * error


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "tolerance"), [("orthogonal", 0.1), ("gaussian", 0.15)])
def test_variance_of_squared_singular_values_is_the_free_probability_one(weights, tolerance):
    width, depth = 200, 6
    rng = np.random.default_rng(0)
    for phi, q in (("tanh", 0.5), ("hard_tanh", 0.5), ("erf", 0.1)):
        f = theory.activation(phi)
        sigma_w = float(theory.slope_moment(phi, q, 2) ** -0.5)
        found = []
        for _ in range(4):
            product = np.eye(width)
            for _ in range(depth):
                w = rng.normal(size=(width, width)) / width**0.5
                if weights == "orthogonal":
                    w = np.linalg.qr(w)[0]
                # every layer sees a fresh Gaussian pre-activation of mean square q
                slopes = np.asarray(f.derivative(jnp.asarray(q**0.5 * rng.normal(size=width))))
                product = sigma_w * slopes[:, None] * (w @ product)
            squares = np.linalg.svd(product, compute_uv=False) ** 2
            found.append(squares.var() / squares.mean() ** 2)
        predicted = theory.squared_singular_values(phi, q, sigma_w, depth, weights).variance
        np.testing.assert_allclose(np.mean(found), predicted, rtol=tolerance, err_msg=phi)
