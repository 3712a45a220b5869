"""Singular values of chains without the matrix: extremes, moments, growth by depth, alignment."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_graded
from hypothesis import strategies as st
from scipy.special import digamma, polygamma

import jaxgrad as jg
from jaxgrad import spectrum
from jaxgrad.spectrum import krylov, plan

KEY = jax.random.PRNGKey(0)
EPS = float(np.finfo(np.float32).eps)
PLATFORMS = ["cpu", "cuda", "tpu"]


def gaussian(count, n, gain=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return (gain * rng.standard_normal((count, n, n)) / np.sqrt(n)).astype(np.float32)


def orthogonal(count, n, seed=0):
    rng = np.random.default_rng(seed)
    return np.linalg.qr(rng.standard_normal((count, n, n)))[0].astype(np.float32)


def point(n, seed=9):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(n), jnp.float32)


def net(weights, act=jnp.tanh):
    return jg.Chain.from_layers(
        [(f"layer{k}", lambda h, w=w: act(w @ h)) for k, w in enumerate(weights)]
    )


def linear(weights):
    return net(weights, lambda h: h)


def tanh_jacobian(weights, x):
    """The whole Jacobian in float64, by hand."""
    product, h = np.eye(len(x)), np.asarray(x, np.float64)
    for w in np.asarray(weights, np.float64):
        h = np.tanh(w @ h)
        product = (1 - h**2)[:, None] * w @ product
    return product


def singular_values(matrix):
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)


def assert_bounded(logs, residuals, truth, rounding=1e-6):
    """The residuals' promise: `|s - sigma| <= rho s`, up to the rounding of the logarithm."""
    found = np.exp(np.asarray(logs, np.float64))
    assert np.all(np.asarray(residuals) >= 0)
    np.testing.assert_array_less(np.abs(found - truth), (residuals + rounding) * found)


def top_five_of_three(weights):
    """Of three linear 8 x 8 layers: one compilation for many tests."""
    return spectrum.top_singular_values(linear(weights), jnp.ones(8), 5, key=KEY)


# ---------------------------------------------------------------------------------- the largest


def test_top_values_of_a_tanh_net_are_those_of_the_dense_svd_within_their_residuals():
    weights, x = gaussian(5, 160), point(160)
    logs, residuals = spectrum.top_singular_values(net(weights), x, 5, key=KEY)
    truth = singular_values(tanh_jacobian(weights, x))[:5]
    assert_bounded(logs, residuals, truth)
    assert np.max(residuals) <= np.sqrt(EPS)
    np.testing.assert_allclose(logs, np.log(truth), rtol=0, atol=1e-5)


@hypothesis.given(st.integers(0, 10**6), st.floats(-40, 40))
def test_the_residual_bounds_the_error_whatever_the_layers(seed, log_gain):
    weights = gaussian(3, 8, np.exp(log_gain), seed)
    logs, residuals = (np.asarray(a, np.float64) for a in top_five_of_three(weights))
    scale = np.exp(log_gain)
    product = np.linalg.multi_dot([w.astype(np.float64) / scale for w in weights[::-1]])
    truth = np.log(singular_values(product)[:5]) + 3 * log_gain
    assert np.max(residuals) < 0.01
    bound = -np.log1p(-residuals) + EPS * np.abs(truth)
    np.testing.assert_array_less(np.abs(logs - truth), bound)


def test_values_a_thousand_layers_apart_are_those_of_the_exact_product():
    weights = gaussian(300, 10, seed=1)
    logs, residuals = spectrum.top_singular_values(linear(weights), jnp.ones(10), 4, key=KEY)
    truth = reference_graded.log_singular_values(weights)[:4]
    assert truth[0] - truth[3] > 30  # far beyond what float32 holds in one vector
    np.testing.assert_allclose(logs, truth, rtol=0, atol=1e-3)
    assert np.max(residuals) <= np.sqrt(EPS)


def test_a_thousand_equal_layers_compile_once_and_neither_underflow_nor_overflow():
    w = 0.5 * orthogonal(1, 150)[0]
    chain = linear([w + 0 for _ in range(1000)])
    made, _ = plan.plan_of(chain.run(jnp.ones(150)), "test")
    assert [segment.repeats for segment in made.segments] == [1000]
    logs, residuals = spectrum.top_singular_values(chain, jnp.ones(150), 3, key=KEY)
    bound = 4 * EPS * np.sqrt(1000) + EPS * 1000 * np.log(2)
    np.testing.assert_allclose(logs, -1000 * np.log(2), rtol=0, atol=bound)
    assert np.max(residuals) < 8 * EPS * np.sqrt(1000)


def test_repeated_patterns_become_one_scan():
    w = gaussian(1, 4)[0]
    layers = [("first", jnp.sin)]
    for k in range(6):
        layers += [(f"dense{k}", lambda h, w=w + k: w @ h), (f"act{k}", jnp.tanh)]
    made, arrays = plan.plan_of(jg.Chain.from_layers(layers).run(jnp.ones(4)), "test")
    assert [(len(s.steps), s.repeats) for s in made.segments] == [(1, 1), (2, 6)]
    assert {a.shape for a in arrays[1][0]} == {(6, 4, 4), (6, 4)}


def test_weights_that_all_layers_share_are_kept_once():
    w = jnp.asarray(gaussian(1, 4)[0])
    chain = jg.Chain.scanned(lambda x, h: jnp.tanh(w @ h + x), jnp.ones((7, 4)))
    made, arrays = plan.plan_of(chain.run(jnp.ones(4)), "test")
    assert made.segments[0].repeats == 7
    assert sorted(a.shape for a in arrays[0][0]) == [(4, 4), (7, 4), (7, 4)]


def test_values_that_come_in_pairs_are_all_found():
    rng = np.random.default_rng(4)
    n, kernels = 200, rng.standard_normal((3, 7)).astype(np.float32)

    def circular(kernel):
        def layer(h):
            padded = jnp.concatenate([h[-3:], h, h[:3]])
            return jnp.convolve(padded, kernel, mode="valid", precision="highest")

        return layer

    chain = jg.Chain.from_layers([(f"conv{k}", circular(c)) for k, c in enumerate(kernels)])
    spectra = np.prod([np.abs(np.fft.fft(c.astype(np.float64), n)) for c in kernels], axis=0)
    truth = np.sort(spectra)[::-1][:6]
    assert np.sum(np.isclose(truth[:-1], truth[1:], rtol=1e-9)) >= 2
    logs, residuals = spectrum.top_singular_values(chain, jnp.ones(n), 6, key=KEY)
    assert_bounded(logs, residuals, truth)
    np.testing.assert_allclose(logs, np.log(truth), rtol=0, atol=1e-4)


def test_every_example_of_a_batch_has_its_own_values():
    weights, xs = gaussian(3, 12), jnp.stack([point(12, s) for s in range(4)]) * 2

    def f(xs):
        for w in weights:
            xs = jnp.tanh(xs @ w.T)
        return xs

    chain = jg.factorize(f, xs, batch_axis=0)
    logs, residuals = spectrum.top_singular_values(chain, xs, 3, key=KEY)
    assert logs.shape == residuals.shape == (4, 3)
    truth = np.stack([singular_values(tanh_jacobian(weights, x))[:3] for x in xs])
    assert_bounded(logs, residuals, truth)
    assert np.ptp(truth[:, 0]) > 0.05  # the examples do differ


@pytest.mark.parametrize("n", [8, pytest.param(160, marks=pytest.mark.slow)])
def test_beyond_the_rank_the_values_are_zero_and_have_no_relative_residual(n):
    weights = gaussian(3, n, seed=3)
    weights[1][:, 3:] = 0  # the whole has rank 3
    logs, residuals = spectrum.top_singular_values(linear(weights), jnp.ones(n), 5, key=KEY)
    product = np.linalg.multi_dot(weights[::-1].astype(np.float64))
    np.testing.assert_allclose(logs[:3], np.log(singular_values(product)[:3]), rtol=0, atol=1e-5)
    assert np.all(np.isneginf(logs[3:])) and np.all(np.isinf(residuals[3:]))
    assert np.max(residuals[:3]) < 1e-3


@pytest.mark.parametrize(("fill", "value"), [(0.0, -np.inf), (np.nan, np.nan), (np.inf, np.nan)])
def test_zero_and_non_finite_jacobians_say_so(fill, value):
    weights = np.full((3, 8, 8), fill, np.float32)
    logs, residuals = top_five_of_three(weights)
    np.testing.assert_array_equal(logs, np.full(5, value))
    np.testing.assert_array_equal(residuals, np.full(5, np.inf if fill == 0 else np.nan))


def test_one_number_no_layer_and_a_narrow_middle():
    one = jg.Chain.from_layers([("tanh", jnp.tanh)])
    logs, residuals = spectrum.top_singular_values(one, jnp.full(1, 0.7), 1, key=KEY)
    np.testing.assert_allclose(logs, np.log(1 - np.tanh(0.7) ** 2), rtol=0, atol=1e-6)
    logs, residuals = spectrum.top_singular_values(
        jg.Chain.from_layers([]), jnp.ones(5), 5, key=KEY
    )
    np.testing.assert_allclose(logs, 0, atol=4 * EPS)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 9), (7, 2)))
    chain = jg.Chain.from_layers([("narrow", lambda h: a @ h), ("wide", lambda h: b @ h)])
    logs, residuals = spectrum.top_singular_values(chain, jnp.ones(9), 4, key=KEY)
    truth = singular_values(b.astype(np.float64) @ a)[:2]
    assert_bounded(logs[:2], residuals[:2], truth)
    assert np.all(np.isneginf(logs[2:]))


def test_a_layer_with_a_backward_rule_alone_is_searched_too():
    @jax.custom_vjp
    def act(h):
        return jnp.tanh(h)

    act.defvjp(lambda h: (jnp.tanh(h), h), lambda h, g: ((1 - jnp.tanh(h) ** 2) * g,))
    weights, x = gaussian(3, 8), point(8)
    logs, residuals = spectrum.top_singular_values(net(weights, act), x, 3, key=KEY)
    assert_bounded(logs, residuals, singular_values(tanh_jacobian(weights, x))[:3])


def test_the_search_restarts_and_its_bounds_hold_when_it_is_stopped_early(x64):
    n = 300
    a = np.random.default_rng(0).standard_normal((n, n)) / np.sqrt(n)
    truth = singular_values(a)[:6]

    def product(matrix):
        return lambda v: (jnp.matmul(v, matrix.T), jnp.zeros(v.shape[:-1], jnp.int32))

    def found(most, tolerance=1e-9):
        problem = krylov.Problem(n, n, 1, 6, tolerance, most, "float64", block=6)
        assert not problem.is_small and problem.basis < 70
        push, pull = product(jnp.asarray(a)), product(jnp.asarray(a.T))
        return jax.jit(lambda key: krylov.largest(push, pull, problem, key))(KEY)

    whole = found(5000)
    np.testing.assert_allclose(whole.values[0], truth, rtol=1e-13)
    assert np.max(whole.residuals / whole.values) <= 1e-9
    orthogonality = whole.right[0] @ whole.right[0].T - np.eye(6)
    assert np.max(np.abs(orthogonality)) < 1e-13
    stopped = found(36)
    residuals = np.asarray(stopped.residuals[0])
    assert np.max(residuals) > 1e-3
    distance = np.min(np.abs(np.asarray(stopped.values[0])[:, None] - singular_values(a)), axis=1)
    assert np.all(distance <= residuals)
    assert np.all(np.asarray(stopped.values[0]) <= truth * (1 + 1e-13))


def test_new_vectors_are_orthogonal_to_the_basis_however_little_of_them_is_outside():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((60, 5)))[0].T[None].astype(np.float32)
    inside = rng.standard_normal((1, 3, 5)).astype(np.float32)
    vectors = inside @ basis + 1e-4 * rng.standard_normal((1, 3, 60)).astype(np.float32)
    vectors[0, 1] = inside[0, 1] @ basis[0]  # nothing outside: a random vector takes its place
    new, found, own = krylov.orthonormalized(jnp.asarray(vectors), jnp.asarray(basis), KEY)
    np.testing.assert_allclose(np.matmul(new, new.mT)[0], np.eye(3), atol=1e-6)
    np.testing.assert_allclose(np.matmul(new, basis.transpose(0, 2, 1)), 0, atol=1e-6)
    rebuilt = np.matmul(found, basis) + np.matmul(own.mT, new)
    np.testing.assert_allclose(rebuilt, vectors, atol=2e-6)


def test_what_cannot_be_searched_is_refused_by_name():
    chain = net(gaussian(2, 4))
    for k in (0, 5):
        with pytest.raises(ValueError, match=r"expected 1 to 4 values .* got"):
            spectrum.top_singular_values(chain, jnp.ones(4), k, key=KEY)
    with pytest.raises(ValueError, match=r"block=\): expected 1 to k = 2"):
        spectrum.top_singular_values(chain, jnp.ones(4), 2, key=KEY, block=3)
    with pytest.raises(ValueError, match=r"tolerance"):
        spectrum.top_singular_values(chain, jnp.ones(4), 1, key=KEY, tolerance=2.0)
    counter = jg.Chain.from_layers([("count", lambda s: (s[0] * 2, s[1] + 1))])
    with pytest.raises(TypeError, match=r"int32 in the input"):
        spectrum.top_singular_values(counter, (jnp.ones(3), jnp.int32(0)), 1, key=KEY)
    loop = jg.Chain.from_layers(
        [("loop", lambda h: jax.lax.while_loop(lambda v: v[0] < 9, lambda v: 2 * v, h))]
    )
    with pytest.raises(ValueError, match=r"'loop'.*transpose"):
        spectrum.top_singular_values(loop, jnp.ones(3), 1, key=KEY)


# ---------------------------------------------------------------------------------- the smallest


def test_bottom_values_are_those_of_the_dense_svd_by_factors_and_by_given_solves():
    weights, x = gaussian(3, 160, seed=5) + 3 * np.eye(160, dtype=np.float32), point(160) / 9
    chain = net(weights)
    truth = np.log(singular_values(tanh_jacobian(weights, x)))[::-1][:3]
    logs, residuals = spectrum.bottom_singular_values(chain, x, 3, key=KEY)
    np.testing.assert_allclose(logs, truth, rtol=0, atol=1e-4)
    assert np.max(residuals) <= np.sqrt(EPS)
    inverses = np.linalg.inv(weights.astype(np.float64)).astype(np.float32)

    def solve(k, h, v, transposed):
        slope = 1 - jnp.tanh(h @ weights[k].T) ** 2
        if transposed:
            return (v @ inverses[k]) / slope
        return (v / slope) @ inverses[k].T

    given, _ = spectrum.bottom_singular_values(chain, x, 3, key=KEY, solve=solve)
    np.testing.assert_allclose(given, truth, rtol=0, atol=3e-4)


def test_layers_without_an_inverse_are_refused():
    weights = gaussian(2, 4)
    weights[1][:, 2] = 0
    with pytest.raises(ValueError, match=r"'layer1' is singular.*log_singular_values"):
        spectrum.bottom_singular_values(linear(weights), jnp.ones(4), 1, key=KEY)
    chain = jg.Chain.from_layers([("short", lambda h: h[:3]), ("long", lambda h: jnp.tile(h, 2))])
    with pytest.raises(ValueError, match=r"'short' has 4 inputs and 3 outputs"):
        spectrum.bottom_singular_values(chain, jnp.ones(4), 1, key=KEY)


# ---------------------------------------------------------------------------------- moments


def squares(weights, x):
    return singular_values(tanh_jacobian(weights, x)) ** 2


def test_moments_of_a_small_state_are_exact():
    for n in (1, 8):
        weights, x = gaussian(3, n), point(n)
        moments = spectrum.singular_moments(net(weights), x, key=KEY)
        truth = squares(weights, x)
        np.testing.assert_allclose(moments.mean, truth.mean(), rtol=1e-5)
        np.testing.assert_allclose(moments.variance, truth.var(), rtol=1e-5, atol=1e-12)
        assert moments.mean_se < 1e-5 * truth.mean()


@pytest.mark.parametrize("kind", ["tanh", "spiked", "near isometry"])
def test_the_standard_errors_cover_the_truth_and_the_estimates_have_no_bias(kind):
    n, runs = 80, 600
    weights, x = gaussian(3, n), point(n)
    if kind == "spiked":  # one direction dwarfs all others
        spike = np.outer(weights[0][0], weights[1][0])
        weights[2] = 0.1 * weights[2] + 3 * spike
    if kind == "near isometry":
        weights = orthogonal(3, n) * (1 + 0.01 * gaussian(3, n)[:, :1] * np.sqrt(n))
        chain = linear(weights)
        truth = singular_values(np.linalg.multi_dot(weights[::-1].astype(np.float64))) ** 2
    else:
        chain, truth = net(weights), squares(weights, x)
    estimate = jax.jit(
        jax.vmap(lambda key: spectrum.singular_moments(chain, x, key=key, probes=48))
    )
    found = estimate(jax.random.split(KEY, runs))
    for values, errors, true in (
        (found.mean, found.mean_se, truth.mean()),
        (found.variance, found.variance_se, truth.var()),
    ):
        value, error = np.asarray(values, np.float64), np.asarray(errors)
        covered = np.mean(np.abs(value - true) <= 1.96 * error)
        assert 0.90 <= covered <= 0.99, (kind, covered)
        assert abs(value.mean() - true) < 4 * value.std() / np.sqrt(runs) + 1e-6 * true
        np.testing.assert_allclose(np.sqrt(np.mean(error**2)), value.std(), rtol=0.15)


def test_few_probes_give_no_bias_either():
    # The square of the estimated mean is larger than that of the mean, by its variance.
    n, runs = 9, 20_000
    weights, x = gaussian(2, n), point(n)
    chain, truth = net(weights), squares(weights, x)
    estimate = jax.jit(jax.vmap(lambda k: spectrum.singular_moments(chain, x, key=k, probes=4)))
    found = estimate(jax.random.split(KEY, runs))
    for values, true in ((found.mean, truth.mean()), (found.variance, truth.var())):
        value = np.asarray(values, np.float64)
        assert abs(value.mean() - true) < 4 * value.std() / np.sqrt(runs)
    bias = np.mean(np.asarray(found.mean_se, np.float64) ** 2)
    assert bias > 10 * np.std(found.variance) / np.sqrt(runs)  # it would have been seen


def test_the_variance_of_a_near_isometry_is_not_lost_in_rounding():
    n, rng = 100, np.random.default_rng(0)
    factors = 1 + 1e-3 * rng.standard_normal(n)
    weights = np.stack([orthogonal(1, n, 1)[0], orthogonal(1, n, 2)[0] * factors[:, None]])
    weights = weights.astype(np.float32)
    truth = singular_values(weights[1].astype(np.float64) @ weights[0]) ** 2
    moments = spectrum.singular_moments(linear(weights), jnp.ones(n), key=KEY, probes=64)
    assert abs(moments.variance - truth.var()) < 4 * moments.variance_se
    assert moments.variance_se < 0.3 * truth.var()


def test_moments_of_long_chains_are_there_in_units_and_never_silently_lost():
    weights = gaussian(200, 8, 0.2, seed=2)
    chain, x = linear(weights), jnp.ones(8)
    with pytest.warns(RuntimeWarning, match=r"scaled_singular_moments"):
        assert spectrum.singular_moments(chain, x, key=KEY).mean == 0
    moments, unit = spectrum.scaled_singular_moments(chain, x, key=KEY)
    product, size = np.eye(8), 0.0
    for w in weights.astype(np.float64):
        product = w @ product
        size += np.log(np.linalg.norm(product))
        product /= np.linalg.norm(product)
    logs = np.log(singular_values(product)) + size
    expected = np.log(np.mean(np.exp(2 * (logs - logs[0])))) + 2 * logs[0]
    np.testing.assert_allclose(np.log(moments.mean) + unit, expected, rtol=0, atol=1e-3)
    square = np.exp(4 * (logs - logs[0])).mean() - np.exp(2 * (logs - logs[0])).mean() ** 2
    np.testing.assert_allclose(
        np.log(moments.variance) + 2 * unit, np.log(square) + 4 * logs[0], rtol=0, atol=2e-3
    )


def test_moments_of_a_batch_zeros_nan_and_too_few_probes():
    weights, xs = gaussian(2, 6), jnp.stack([point(6, s) for s in range(3)])

    def f(xs):
        for w in weights:
            xs = jnp.tanh(xs @ w.T)
        return xs

    moments = spectrum.singular_moments(jg.factorize(f, xs, batch_axis=0), xs, key=KEY)
    truth = np.stack([squares(weights, x) for x in xs])
    np.testing.assert_allclose(moments.mean, truth.mean(1), rtol=1e-5)
    np.testing.assert_allclose(moments.variance, truth.var(1), rtol=1e-5)
    zero = spectrum.singular_moments(linear(np.zeros((2, 6, 6), "f")), xs[0], key=KEY)
    assert tuple(map(float, zero)) == (0, 0, 0, 0)
    nan = spectrum.singular_moments(linear(np.full((2, 6, 6), np.nan, "f")), xs[0], key=KEY)
    assert np.all(np.isnan(nan))
    with pytest.raises(ValueError, match=r"probes"):
        spectrum.singular_moments(net(weights), xs[0], key=KEY, probes=3)


# ---------------------------------------------------------------------------------- by depth


def test_lyapunov_exponents_are_exact_at_every_depth_and_settle_at_the_digamma_formula():
    n, length = 4, 3000
    weights = gaussian(length, n, seed=7)
    chain = jg.Chain.scanned(lambda w, h: w @ h, jnp.asarray(weights))
    found = spectrum.lyapunov_exponents(chain, jnp.ones(n))
    assert found.depths[0] == 1 and found.depths[-1] == length and len(found.depths) > 15
    for index in (0, 5, 12):
        depth = int(found.depths[index])
        truth = reference_graded.log_singular_values(weights[:depth]) / depth
        np.testing.assert_allclose(found.exponents[index], truth, rtol=0, atol=1e-5)
    order = (n - np.arange(n)) / 2
    expected = 0.5 * (digamma(order) + np.log(2 / n))
    deviation = np.sqrt(polygamma(1, order) / 4 / length)
    assert np.max(np.abs(np.asarray(found.exponents[-1]) - expected) / deviation) < 4
    early = np.abs(np.asarray(found.exponents[2]) - expected)
    assert np.max(early) > 10 * np.max(np.abs(np.asarray(found.exponents[-1]) - expected))


def test_where_states_differ_in_size_missing_exponents_are_none():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((2, 4), (6, 2)))
    uneven = jg.Chain.from_layers([("a", lambda h: a @ h), ("b", lambda h: b @ h)])
    found = spectrum.lyapunov_exponents(uneven, jnp.ones(4))
    np.testing.assert_allclose(
        found.exponents[0], [*np.log(singular_values(a)), *[-np.inf] * 2], rtol=1e-5
    )
    with pytest.raises(ValueError, match=r"from 1 to 2"):
        spectrum.lyapunov_exponents(uneven, jnp.ones(4), depths=[3])


# ---------------------------------------------------------------------------------- alignment


def test_alignment_is_that_of_the_dense_svd_at_every_depth():
    weights, x = gaussian(4, 6, 1.2), point(6) / 2
    g = point(6, 3)
    found = spectrum.gradient_alignment(net(weights), x, g, k=6)
    states = [np.asarray(x, np.float64)]
    for w in weights:
        states.append(np.tanh(w @ states[-1]))
    g = np.asarray(g, np.float64)
    for k in range(5):
        suffix = tanh_jacobian(weights[k:], states[k]) if k < 4 else np.eye(6)
        u, s, _ = np.linalg.svd(suffix)
        norm = np.linalg.norm(g @ suffix)
        np.testing.assert_allclose(found.log_gradient_norms[k], np.log(norm), atol=1e-5)
        typical = np.linalg.norm(suffix) / np.sqrt(6) * np.linalg.norm(g)
        np.testing.assert_allclose(found.log_typical_norms[k], np.log(typical), atol=1e-5)
        np.testing.assert_allclose(found.log_singular_values[k], np.log(s), atol=1e-4)
        if k < 4:  # the identity has no singular vectors of its own
            expected = np.abs(g @ u) / np.linalg.norm(g)
            np.testing.assert_allclose(found.cosines[k], expected, atol=1e-4)
        parts = np.exp(np.asarray(found.log_singular_values[k])) * np.asarray(found.cosines[k])
        whole = np.sqrt(np.sum(parts**2)) * np.linalg.norm(g)
        np.testing.assert_allclose(np.exp(found.log_gradient_norms[k]), whole, rtol=1e-4)


def test_predicted_gradient_norms_are_those_that_the_flow_measures():
    weights, x = gaussian(8, 16, 0.6), point(16)
    params = {f"layer{k}": {"w": jnp.asarray(w)} for k, w in enumerate(weights)}

    def loss(params, x):
        for k in range(8):
            x = jg.tap(jnp.tanh(params[f"layer{k}"]["w"] @ x), f"h{k + 1}")
        return jnp.sum(x**3)

    (_, flow), _ = jg.value_and_grad_flow(loss)(params, x)
    chain = net(weights)
    last = chain.states(x)[-1]
    found = spectrum.gradient_alignment(chain, x, 3 * last**2)
    rows = [flow.names.index(f"h{k}") for k in range(1, 9)]
    measured = np.log(np.asarray(flow.gradient_rms)[rows] * np.sqrt(16))
    np.testing.assert_allclose(found.log_gradient_norms[1:], measured, rtol=0, atol=2e-5)


def test_the_norm_alone_misleads():
    # One direction passes whole, all others are lost: a gradient along it looks healthy.
    weights = np.broadcast_to(np.diag([1, 0.01, 0.01, 0.01]).astype(np.float32), (30, 4, 4))
    chain, x = linear(weights), jnp.ones(4)
    along, across = jnp.eye(4)[0], jnp.eye(4)[1]
    healthy = spectrum.gradient_alignment(chain, x, along)
    assert healthy.log_gradient_norms[0] == 0 and healthy.cosines[0, 0] == 1
    lost = spectrum.gradient_alignment(chain, x, across, k=2)
    np.testing.assert_allclose(lost.log_gradient_norms[0], 30 * np.log(0.01), rtol=1e-6)
    assert lost.cosines[0, 0] == 0 and np.isnan(lost.cosines[0, 1])  # 1e-60 beside 1
    with pytest.raises(ValueError, match=r"expected shapes \[\(4,\)\]"):
        spectrum.gradient_alignment(chain, x, jnp.ones(3))


# ---------------------------------------------------------------------------------- platforms


def of_chain(call):
    """A function of the input, so that everything is traced."""
    weights = gaussian(2, 4)
    layers = [*((f"l{k}", lambda h, w=w: jnp.tanh(w @ h)) for k, w in enumerate(weights))]
    return lambda x: call(jg.Chain.from_layers(layers), x)


@pytest.mark.parametrize(
    "call",
    [
        lambda c, x: spectrum.top_singular_values(c, x, 2, key=jax.random.PRNGKey(0)),
        lambda c, x: spectrum.bottom_singular_values(c, x, 2, key=jax.random.PRNGKey(0)),
        lambda c, x: spectrum.singular_moments(c, x, key=jax.random.PRNGKey(0)),
        lambda c, x: spectrum.lyapunov_exponents(c, x).exponents,
        lambda c, x: spectrum.gradient_alignment(c, x, x),
    ],
    ids=["top", "bottom", "moments", "lyapunov", "alignment"],
)
def test_it_lowers_for_every_platform(call):
    traced = jax.jit(of_chain(lambda c, x: jax.tree.leaves(call(c, x))))
    exported = jax.export.export(traced, platforms=PLATFORMS)(jnp.ones(4))
    assert exported.platforms == tuple(PLATFORMS)


def test_the_search_lowers_for_every_platform():
    def both(matrix, key):
        problem = krylov.Problem(200, 200, 1, 2, 1e-3, 100, "float32", block=2)
        assert not problem.is_small

        def product(m):
            return lambda v: (v @ m, jnp.zeros(v.shape[:-1], jnp.int32))

        return krylov.largest(product(matrix.T), product(matrix), problem, key).values

    exported = jax.export.export(jax.jit(both), platforms=PLATFORMS)(jnp.ones((200, 200)), KEY)
    assert exported.platforms == tuple(PLATFORMS)
