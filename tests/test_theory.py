"""The theory against closed forms, multi-precision quadrature, scipy, and published figures."""

import functools

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
import scipy.stats

from jaxgrad import theory

Q = np.array([1e-3, 0.1, 0.7, 2.0, 10.0, 100.0])


def _gelu(q):
    square = np.pi / 2 + np.arcsin(q / (1 + q)) + 2 * q / ((1 + q) * np.sqrt(1 + 2 * q))
    slope = 1 / 4 + np.arcsin(q / (1 + q)) / (2 * np.pi)
    slope = slope + q * (5 * q + 3) / (2 * np.pi * (1 + q) * (2 * q + 1) ** 1.5)
    return q / (2 * np.pi) * square, slope


CLOSED_FORMS = {  # (E phi^2, E phi'^2)
    "linear": lambda q: (q, np.ones_like(q)),
    "relu": lambda q: (q / 2, np.full_like(q, 0.5)),
    "leaky_relu": lambda q: (q * (1 + 1e-4) / 2, np.full_like(q, (1 + 1e-4) / 2)),
    "erf": lambda q: (2 / np.pi * np.arcsin(2 * q / (1 + 2 * q)), 4 / np.pi / np.sqrt(1 + 4 * q)),
    "gelu": _gelu,
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_moments_are_those_of_the_closed_forms(name, x64):
    square, slope = CLOSED_FORMS[name](Q)
    np.testing.assert_allclose(theory.variance_map(name, Q, 1.0), square, rtol=1e-11, atol=0)
    np.testing.assert_allclose(theory.chi_1(name, Q, 1.0), slope, rtol=1e-11, atol=0)
    np.testing.assert_allclose(
        theory.variance_map(name, Q, 1.5, 0.5), 2.25 * square + 0.25, rtol=1e-11, atol=0
    )


@pytest.mark.parametrize("name", ["leaky_relu", "gelu"])
def test_single_precision_gives_the_same_to_its_own_accuracy(name):
    square, slope = CLOSED_FORMS[name](Q)
    got = theory.variance_map(name, jnp.asarray(Q, jnp.float32), 1.0)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, square, rtol=3e-6, atol=0)
    np.testing.assert_allclose(theory.chi_1(name, Q, 1.0), slope, rtol=3e-6, atol=0)


_MP = {
    "sigmoid": (lambda x: 1 / (1 + mp.exp(-x)), lambda x: mp.sech(x / 2) ** 2 / 4, ()),
    "tanh": (mp.tanh, lambda x: mp.sech(x) ** 2, ()),
    "silu": (
        lambda x: x / (1 + mp.exp(-x)),
        lambda x: (1 + mp.exp(-x) * (1 + x)) / (1 + mp.exp(-x)) ** 2,
        (),
    ),
    "selu": (
        lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * mp.expm1(x)),
        lambda x: 1.0507009873554805 * (1 if x > 0 else 1.6732632423543772 * mp.exp(x)),
        (0,),
    ),
    "hard_tanh": (lambda x: max(-1, min(1, x)), lambda x: int(abs(x) < 1), (-1, 1)),
}


@pytest.mark.parametrize("name", _MP)
def test_quadrature_agrees_with_multi_precision(name, x64):
    phi, slope, kinks = _MP[name]
    for q in (0.3, 5.0):
        root = mp.sqrt(q)
        ends = sorted({-12, -3, 0, 3, 12, *(float(k / root) for k in kinks)})

        def mean(f, ends=ends, root=root):
            return float(mp.quad(lambda z: f(root * z) * mp.npdf(z), ends))

        square, steep = mean(lambda x: phi(x) ** 2), mean(lambda x: slope(x) ** 2)
        np.testing.assert_allclose(theory.variance_map(name, q, 1.0), square, rtol=1e-11)
        np.testing.assert_allclose(theory.chi_1(name, q, 1.0), steep, rtol=1e-11)


def test_gauss_hermite_would_not_do(x64):
    z, w = np.polynomial.hermite_e.hermegauss(96)
    w = w / np.sqrt(2 * np.pi)
    exact = 1 / np.pi * np.arcsin(200 / 201) * 2  # erf at q = 100
    hermite = (w * np.vectorize(mp.erf)(10 * z).astype(float) ** 2).sum()
    assert abs(hermite - exact) > 1e-6
    assert abs(theory.variance_map("erf", 100.0, 1.0) - exact) < 1e-12


C = np.array([-0.9, -0.3, 0.0, 0.25, 0.8, 0.99, 1.0])


def test_pair_moments_are_those_of_the_closed_forms(x64):
    q = 1.7
    relu = (np.sqrt(1 - C**2) + (np.pi - np.arccos(C)) * C) / (2 * np.pi)
    np.testing.assert_allclose(theory.correlation_map("relu", C, q, 1.0), relu, atol=1e-11)
    gate = 1 / 4 + np.arcsin(C) / (2 * np.pi)
    # at c = 1 the gates' product jumps: E of a step that is 1/2 at its jump
    np.testing.assert_allclose(theory.chi("relu", C, q, 1.0), gate, atol=1e-9)
    erf = 2 / np.pi * np.arcsin(2 * q * C / (1 + 2 * q))
    np.testing.assert_allclose(theory.correlation_map("erf", C, q, 1.0) * q, erf, atol=1e-11)
    mean = 1 / (4 * np.pi) ** 0.5  # of GELU at q = 1; published is the covariance
    gelu = theory.correlation_map("gelu", C, 1.0, 1.0)[3] - mean**2, theory.chi("gelu", C, 1, 1)[3]
    np.testing.assert_allclose(gelu, [0.06812, 0.29509], atol=5e-6)


@pytest.mark.parametrize("name", ["gelu", "selu", "hard_tanh"])
def test_slopes_are_the_derivatives_of_the_maps(name, x64):
    q = jnp.array([0.3, 2.0])
    slope = jax.vmap(jax.grad(lambda q: theory.variance_map(name, q, 1.3)))(q)
    np.testing.assert_allclose(theory.variance_slope(name, q, 1.3), slope, rtol=1e-10)
    h = 1e-4
    ends = (theory.correlation_map(name, 0.4 + s, q, 1.3) for s in (h, -h))
    difference = functools.reduce(jnp.subtract, ends) / (2 * h)
    np.testing.assert_allclose(theory.chi(name, 0.4, q, 1.3), difference, rtol=1e-5)
    np.testing.assert_allclose(theory.chi(name, 1.0, q, 1.3), theory.chi_1(name, q, 1.3), rtol=1e-9)


def test_he_relu_correlations_come_together_at_the_known_rate(x64):
    step = jax.jit(lambda c: theory.correlation_map("relu", c, 1.0, jnp.sqrt(2.0)))
    c = jax.lax.fori_loop(0, 100, lambda _, c: step(c), jnp.zeros(()))
    np.testing.assert_allclose(1 - c, 3.58e-3, rtol=2e-3)  # 9 pi^2 / (2 l^2), 20 % early on


# -------------------------------------------------------------------------------- published figures


def test_tanh_phase_diagram_is_the_published_one(x64):
    sigma_w = jnp.sqrt(jnp.array([1.0, 1.3, 1.5, 2.0, 2.5, 4.0]))
    found = theory.mean_field("tanh", sigma_w, jnp.sqrt(0.05))
    table = {
        "q": [0.19359, 0.31532, 0.41804, 0.72176, 1.06396, 2.19549],
        "chi_1": [0.75903, 0.88016, 0.93864, 1.04767, 1.13352, 1.34240],
        "c": [1, 1, 1, 0.74408, 0.44680, 0.16506],
        "xi_q": [1.75, 1.79, 1.68, 1.39, 1.18, 0.87],
        "xi_c": [3.63, 7.83, 15.79, 25.2, 11.8, 6.98],
        "xi_gradient": [3.63, 7.83, 15.79, 21.5, 7.98, 3.40],
    }
    for name, values in table.items():
        digits = {"rtol": 2e-3, "atol": 6e-3} if name.startswith("xi") else {"rtol": 4e-5}
        np.testing.assert_allclose(getattr(found, name), values, **digits, err_msg=name)


def test_edge_of_chaos_is_the_published_one(x64):
    sigma_b = jnp.sqrt(jnp.array([0.05, 0.01, 0.1, 0.3]))
    sigma_w, q = theory.edge_of_chaos("tanh", sigma_b)
    np.testing.assert_allclose(sigma_w**2, [1.76095, 1.42421, 1.98607, 2.50513], rtol=6e-6)
    np.testing.assert_allclose(q[0], 0.57005, rtol=1e-5)
    np.testing.assert_allclose(theory.chi_1("tanh", q, sigma_w), 1, rtol=1e-12)
    np.testing.assert_allclose(theory.variance_map("tanh", q, sigma_w, sigma_b), q, rtol=1e-10)
    np.testing.assert_allclose(theory.edge_of_chaos("erf", 0.05**0.5)[0] ** 2, 1.37584, rtol=3e-6)
    np.testing.assert_allclose(theory.edge_of_chaos("relu", 0.0)[0] ** 2, 2, rtol=1e-12)
    np.testing.assert_allclose(theory.edge_of_chaos("tanh", 0.0)[0], 1, rtol=1e-9)
    np.testing.assert_allclose(theory.edge_of_chaos("sigmoid", 0.0)[0] ** 2, 103, rtol=1e-3)
    assert np.isnan(theory.edge_of_chaos("relu", 0.1)[0])


def test_gains_of_common_initializations_are_the_known_ones(x64):
    pytorch = (1 / 3**0.5, (1 / (3 * 256)) ** 0.5)
    sigma_w = jnp.array([1.0, 2**0.5, pytorch[0]])
    sigma_b = jnp.array([0.0, 0.0, pytorch[1]])
    gains = {  # Xavier, He, PyTorch
        "sigmoid": [0.2361, 0.3178, 0.1414],
        "tanh": [1.0, 1.0514, 0.5762],
        "relu": [0.7071, 1.0, 0.4082],
        "gelu": [0.5, 0.7071, 0.2892],
        "silu": [0.5, 0.7071, 0.2889],
    }
    for name, gain in gains.items():
        q = jnp.maximum(theory.variance_fixed_point(name, sigma_w, sigma_b), 1e-15)
        found = theory.chi_1(name, q, sigma_w) ** 0.5
        np.testing.assert_allclose(found, gain, atol=6e-5, err_msg=name)
    np.testing.assert_allclose(theory.variance_map("selu", 1.0, 1.0), 1, rtol=1e-12)
    below = 1.6732632423543772**2 * np.exp(2) * scipy.stats.norm.cdf(-2)
    slope = 1.0507009873554805**2 * (1 / 2 + below)  # 1.0716: it explodes, slowly
    np.testing.assert_allclose(theory.chi_1("selu", 1.0, 1.0), slope, rtol=1e-12)


def test_spectra_are_the_published_ones(x64):
    edges = [
        theory.largest_squared_singular_value(jnp.array([8, 32]), p, w)
        for p, w in ((1.0, "gaussian"), (0.5, "gaussian"), (0.5, "orthogonal"))
    ]
    known = [[23.09, 88.34], [43.55, 173.98], [20.37, 85.62]]
    np.testing.assert_allclose(np.array(edges), known, rtol=3e-4)
    for depth in (1, 3, 20):  # linear: (L + 1)^(L + 1) / L^L
        exact = (depth + 1.0) ** (depth + 1) / float(depth) ** depth
        found = theory.largest_squared_singular_value(depth)
        np.testing.assert_allclose(found, exact, rtol=1e-12)
    cases = {
        ("linear", 1.0, "gaussian"): 16,
        ("linear", 1.0, "orthogonal"): 0,
        ("relu", 1.0, "gaussian"): 32,
        ("relu", 1.0, "orthogonal"): 16,
        ("erf", 0.5, "orthogonal"): 5.466,
        ("erf", 0.1, "orthogonal"): 0.696,
        ("tanh", 0.5, "orthogonal"): 4.788,
        ("tanh", 0.01, "orthogonal"): 0.0116,
        ("hard_tanh", 0.5, "orthogonal"): 2.986,
        ("tanh", 0.5, "gaussian"): 20.788,
    }
    for (phi, q, weights), variance in cases.items():
        sigma_w = theory.slope_moment(phi, q, 2) ** -0.5
        mean, found = theory.squared_singular_values(phi, q, sigma_w, 16, weights)
        np.testing.assert_allclose(mean, 1, rtol=1e-12)
        np.testing.assert_allclose(found, variance, rtol=4e-3, atol=1e-11, err_msg=phi)


def test_finite_width_moment_is_the_measured_one_and_tends_to_the_limit(x64):
    found = [
        theory.second_moment_at_width(16, 4),
        theory.second_moment_at_width(16, 4, "relu"),
        theory.second_moment_at_width(8, 10),
    ]
    np.testing.assert_allclose(found, [5.748, 13.94, 30.43], rtol=1e-3)
    limits = [theory.second_moment_at_width(1e9, 7, phi) - 1 for phi in ("linear", "relu")]
    np.testing.assert_allclose(limits, [7, 14], rtol=1e-6)


def test_lyapunov_exponents_are_digammas(x64):
    exponents = theory.gaussian_lyapunov_exponents(4)
    np.testing.assert_allclose(exponents, [-0.13518, -0.32833, -0.63518, -1.32833], atol=6e-6)
    wide = theory.gaussian_lyapunov_exponents(64, 2.0)
    exact = [float(mp.psi(0, k / 2) + mp.log(2 / 64)) / 2 + np.log(2) for k in range(64, 0, -1)]
    np.testing.assert_allclose(wide, exact, rtol=1e-12)
    mean, sd = theory.gaussian_log_singular_values(64, 100, 2.0)
    np.testing.assert_allclose(mean, 100 * np.array(exact), rtol=1e-12)
    exact = [float(mp.sqrt(25 * mp.psi(1, k / 2))) for k in range(64, 0, -1)]
    np.testing.assert_allclose(sd, exact, rtol=1e-12)


@pytest.mark.parametrize(
    ("n", "mean", "variance"),
    [(16, -0.176397, 0.419593), (256, -0.00982866, 0.0198187)],
)
def test_log_gain_of_he_relu_is_the_exact_law(n, mean, variance, x64):
    one, ten = theory.log_gain([n]), theory.log_gain([n] * 10)
    np.testing.assert_allclose([one.mean, one.variance], [mean, variance], rtol=3e-6)
    np.testing.assert_allclose([ten.mean, ten.variance], [10 * mean, 10 * variance], rtol=3e-6)
    np.testing.assert_allclose(ten.dead, 1 - (1 - 0.5**n) ** 10, rtol=1e-12, atol=1e-17)
    # to leading order Hanin and Nica's -5 / 2n and 5 / n
    general = theory.log_gain_of("relu", 1.0, 2**0.5, n, 1)
    np.testing.assert_allclose(general.mean, -2.5 / n, rtol=1e-9)
    np.testing.assert_allclose(general.standard_deviation**2, 5 / n, rtol=1e-9)
    assert abs(one.variance * n / 5 - 1) < 6 / n


def test_log_gain_of_linear_layers_and_the_kurtosis_are_exact(x64):
    law = theory.log_gain([64] * 50, "linear")
    np.testing.assert_allclose([law.mean, law.variance], [-0.78532, 1.58717], rtol=1e-5)
    assert law.dead == 0
    wide = theory.log_gain([32], "linear", sigma_w=3.0)
    np.testing.assert_allclose(wide.mean - theory.log_gain([32], "linear").mean, np.log(9))
    np.testing.assert_allclose(theory.gain_kurtosis(np.full(5, 32)), 2.067, rtol=2e-4)
    np.testing.assert_allclose(theory.gain_kurtosis(np.array([10, 20]), "linear"), 1.2 * 1.1)


def test_residual_predictions_are_the_known_ones(x64):
    gains = [theory.residual_profile("tanh", depth, 1.0).log_gain[0] for depth in (25, 100, 200)]
    np.testing.assert_allclose(gains, [2.41, 5.27, 7.58], atol=6e-3)
    relu = theory.residual_profile("relu", 50, 2**0.5)
    np.testing.assert_allclose(relu.q[-1], 2.0**50, rtol=1e-10)
    np.testing.assert_allclose(relu.log_gain[::50], [25 * np.log(2), 0], atol=1e-10)
    np.testing.assert_allclose(theory.branch_log_gain(1.0, 50), 17.33, atol=4e-3)
    np.testing.assert_allclose(theory.branch_log_gain(0.5**0.5, 200), 100 * np.log(1.5))
    np.testing.assert_allclose(2 * theory.branch_log_gain(0.1, 100), np.log(2.705), atol=1e-4)


def test_probability_to_shrink_is_the_noncentral_chi_squared_s(x64):
    n, s = np.array([64, 64, 256, 16, 2]), np.array([0.1, 0.5, 0.05, 0.3, 1.0])
    found = theory.shrink_probability(n, s)
    np.testing.assert_allclose(found, scipy.stats.ncx2.cdf(n / s**2, n, n / s**2), rtol=1e-6)
    np.testing.assert_allclose(found[:4], [0.347, 0.0245, 0.345, 0.287], atol=5e-4)


def test_norm_predictions_are_the_known_ones(x64):
    before = [theory.norm_then_activation_chi(p) ** 0.5 for p in ("sigmoid", "relu", "tanh")]
    np.testing.assert_allclose(before, [0.3909, 1.0, 1.085], atol=4e-4)
    after = [theory.activation_then_norm_chi(p) ** 0.5 for p in ("relu", "gelu", "silu", "sigmoid")]
    np.testing.assert_allclose(
        after, [(np.pi / (np.pi - 1)) ** 0.5, 1.148, 1.101, 1.017], atol=5e-4
    )
    pre = theory.last_weight_gradient(128, np.array([6, 12, 24, 48, 96]), "pre")
    np.testing.assert_allclose(pre, [45.25, 34.21, 25.10, 18.10, 12.93], atol=6e-3)
    np.testing.assert_allclose(theory.last_weight_gradient(128, 6, "post"), 73.9, atol=6e-3)
    profile = theory.pre_ln_profile(96)
    np.testing.assert_allclose(profile.q[-1], 49)
    np.testing.assert_allclose(profile.gradient * jnp.sqrt(profile.q), 7)


def test_attention_profile_is_the_two_mode_recursion(x64):
    found = theory.post_ln_attention_profile(24, jnp.array([64.0, 16.0]))
    ratio = found.gradient[jnp.array([22, 18, 12, 6])] / found.gradient[23]
    known = [[0.718, 0.748], [0.247, 0.381], [0.177, 0.344], [0.184, 0.354]]
    np.testing.assert_allclose(ratio, known, atol=1.1e-3)
    assert np.all(np.diff(found.cosine, axis=0) > 0) and found.cosine[-1, 0] > 0.99
    alone = theory.post_ln_attention_profile(24, 64.0, feed_forward=False)
    assert alone.cosine[3] < found.cosine[3, 0]


def test_constants_satisfy_the_identities_that_they_come_from():
    for layers in (12, 48, 192):
        alpha, beta = theory.deep_norm(layers)
        np.testing.assert_allclose(2 * layers * 2 * beta**2 / alpha**2, 1)
    encoder, decoder = theory.deep_norm_encoder_decoder(6, 6)
    np.testing.assert_allclose(encoder, (0.81 * 6 ** (5 / 16), 0.87 * 6 ** (-5 / 16)))
    np.testing.assert_allclose(decoder, (18**0.25, 72**-0.25))
    np.testing.assert_allclose(theory.t_fixup_scales(6), (0.428, 0.369), atol=5e-4)
    assert theory.fixup_scale(100, 2) == pytest.approx(0.1)
    assert theory.fixup_scale(16, 3) == pytest.approx(0.5)
    assert [theory.layer_scale_init(d) for d in (12, 18, 24, 36)] == [0.1, 0.1, 1e-5, 1e-6]
    gain = theory.branch_log_gain(theory.residual_scale(50), 50)
    np.testing.assert_allclose(2 * gain, 50 * np.log1p(1 / 50), rtol=1e-6)


# ------------------------------------------------------------------------- fixed points, transforms


def test_fixed_points_are_fixed_and_reached_from_the_start(x64):
    sigma_w, sigma_b = jnp.meshgrid(jnp.array([0.5, 1.2, 2.5]), jnp.array([0.1, 0.6]))
    for name in ("tanh", "gelu"):
        q = theory.variance_fixed_point(name, sigma_w, sigma_b)
        once = jax.jit(functools.partial(theory.variance_map, name))
        np.testing.assert_allclose(
            jnp.where(jnp.isinf(q), 0, once(q, sigma_w, sigma_b) - q), 0, atol=1e-9
        )

        def layers(q, once=once):
            return jax.lax.fori_loop(0, 400, lambda _, q: once(q, sigma_w, sigma_b), q)

        late = layers(jnp.ones_like(q))
        finite = jnp.isfinite(q)
        np.testing.assert_allclose(late[finite], q[finite], rtol=1e-6)
        assert np.all(late[~finite] > 1e6)


def test_fixed_points_at_the_ends_of_the_range_say_so():
    he = 2**0.5  # keeps every q
    sigma_w, start = jnp.array([1.0, he, 1.6, he]), jnp.array([1.0, 1.0, 1.0, 3.0])
    fixed = theory.variance_fixed_point("relu", sigma_w, 0.0, start)
    np.testing.assert_array_equal(fixed, [0, 1, np.inf, 3])
    assert theory.variance_fixed_point("tanh", 1.0) == 0  # critical: a power law, to zero
    gelu = theory.mean_field("gelu", jnp.array([he, 30.0]))
    np.testing.assert_array_equal(gelu.q, [0, np.inf])
    np.testing.assert_allclose(gelu.chi_1, [0.5, np.nan], rtol=1e-5)


def test_functions_work_under_jit_and_vmap_in_both_precisions():
    def both(w, b):
        found = theory.mean_field("tanh", w, b)
        return found.q, found.chi_1, found.c, found.xi_c

    sigma_w, sigma_b = jnp.array([0.9, 1.5, 2.0]), jnp.array([0.2, 0.3, 0.4])
    single = jax.jit(jax.vmap(both))(sigma_w, sigma_b)
    with jax.enable_x64(True):
        plane = both(sigma_w.astype(float)[:, None], sigma_b.astype(float)[None, :])
    for a, b, digits in zip(single, plane, (2e-5, 2e-5, 4e-4, 4e-4), strict=True):
        assert a.dtype == jnp.float32 and b.dtype == jnp.float64 and b.shape == (3, 3)
        np.testing.assert_allclose(a, np.diagonal(b), rtol=digits)


def test_any_smooth_function_is_an_activation(x64):
    found = theory.chi_1(lambda x: jnp.tanh(x), 0.7, 1.3)
    np.testing.assert_allclose(found, theory.chi_1("tanh", 0.7, 1.3), rtol=1e-12)
    leaky = theory.leaky_relu(0.3)
    np.testing.assert_allclose(theory.chi_1(leaky, 2.0, 1.0), (1 + 0.09) / 2, rtol=1e-12)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"unknown activation 'swish'.*gelu"):
        _ = theory.chi_1("swish", 1.0, 1.0)
    with pytest.raises(ValueError, match="'pre' or 'post', got 'mid'"):
        _ = theory.last_weight_gradient(4, 4, "mid")
    with pytest.raises(ValueError, match="'relu' or 'linear', got 'tanh'; see log_gain_of"):
        _ = theory.log_gain([4], "tanh")
    with pytest.raises(ValueError, match="layers: expected a number of layers"):
        _ = theory.deep_norm(0)
    with pytest.raises(ValueError, match="at least 2 layers in a branch"):
        _ = theory.fixup_scale(3, 1)
    with pytest.raises(ValueError, match="width: expected at least 1"):
        _ = theory.gaussian_lyapunov_exponents(0)


def test_functions_lower_for_every_platform():
    functions = (
        lambda w: theory.mean_field("gelu", w, 0.1).xi_c,
        lambda w: theory.edge_of_chaos("tanh", w)[0],
        lambda w: theory.shrink_probability(16, w),
        lambda w: theory.log_gain([8, 8]).mean + theory.gaussian_lyapunov_exponents(4, w),
        lambda w: theory.largest_squared_singular_value(w, 0.5),
    )
    for f in functions:
        exported = jax.export.export(jax.jit(f), platforms=["cpu", "cuda", "tpu"])(jnp.ones(()))
        assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
