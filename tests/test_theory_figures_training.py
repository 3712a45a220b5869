"""Figures of optimizers, precision and dynamics, found again with jaxgrad's rules."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.stats

from jaxgrad import nn, optim, precision

STEPS, ELEMENTS, AT = 6500, 1024, 2000


@functools.cache
def _updates_of(name):
    tx = {
        "adam": optim.adam(1.0, eps=0.0),
        "clipped": optim.chain(
            optim.clip_by_global_norm(2 * ELEMENTS**0.5), optim.adam(1.0, eps=0.0)
        ),
    }[name]

    @jax.jit
    def run(key, factors):
        def step(state, at):
            factor, key = at
            g = factor * jax.random.normal(key, (ELEMENTS,))
            u, state = tx.update(g, state, g)
            return state, jnp.sqrt(jnp.mean(u**2))

        keys = jax.random.split(key, STEPS)
        return jax.lax.scan(step, tx.init(jnp.zeros(ELEMENTS)), (factors, keys))[1]

    return run


def update_sizes(name, factors):
    """Root mean square of each update under white noise times a factor a step."""
    return np.asarray(_updates_of(name)(jax.random.key(0), jnp.asarray(factors)), float)


def spike(size):
    factors = np.ones(STEPS, np.float32)
    factors[AT] = size
    return factors


def shrunken(a):
    """`E 1 / (1 + a z^2)` over normal z."""
    z = np.linspace(-12, 12, 400001)
    return np.trapezoid(scipy.stats.norm.pdf(z) / (1 + a * z**2), z)


def test_adam_under_noise_and_after_a_spike_has_the_published_steps():
    usual = 0.1 / 0.19**0.5  # sqrt((1 - b1) / (1 + b1))
    np.testing.assert_allclose([usual, 1 / usual], [0.2294, 4.36], atol=3e-3)
    plain = update_sizes("adam", np.ones(STEPS, np.float32))[1000:]
    np.testing.assert_allclose(plain.mean(), 0.2287, rtol=0.01)
    for size, figures in ((1000, (12.6, 0.215)), (100, (10.9, 0.59))):
        found = update_sizes("adam", spike(size)) / plain.mean()
        # v holds a = (1 - b2) K^2 z^2 b2^k of the spike, over its own bias correction
        weight = [0.001 * size**2 * 0.999**k / (1 - 0.999 ** (AT + 1 + k)) for k in (0, 100)]
        step = 0.1 * size * ((1 - shrunken(weight[0])) / weight[0]) ** 0.5 / usual
        np.testing.assert_allclose(found[AT], step, rtol=0.05)
        np.testing.assert_allclose(found[AT], figures[0], rtol=0.05)
        later = found[AT + 90 : AT + 111].mean()
        np.testing.assert_allclose(later, shrunken(weight[1]) ** 0.5, rtol=0.15)
        np.testing.assert_allclose(later, figures[1], rtol=0.15)
        assert found[AT] < 10**0.5 / usual  # the bound: 13.8
        if size == 1000:  # 3533 steps below half in one run; by the law about 4000
            below = np.sum(found[AT + 1 :] < 0.5)
            low, high = (1000 * np.log(1000 / 17.5) + d for d in (-900, 450))
            assert low < below < high and low < 3533 < high, below


def test_a_clip_protects_the_second_moment():
    plain = update_sizes("adam", np.ones(STEPS, np.float32))[1000:].mean()
    found = update_sizes("clipped", spike(1000)) / plain
    np.testing.assert_allclose(found[AT], 1.25, rtol=0.1)
    assert 0.9 < found[AT + 90 : AT + 111].mean() < 1.02
    assert np.all(found[AT + 1 :] > 0.5)


def test_the_largest_step_of_adam_comes_after_silence():
    zeros = np.zeros(STEPS, np.float32)
    zeros[-1] = 1
    largest = update_sizes("adam", zeros)[-1]
    exact = 0.1 / 0.001**0.5 * (1 - 0.999**STEPS) ** 0.5
    np.testing.assert_allclose(largest, exact, rtol=1e-4)
    np.testing.assert_allclose(0.1 / 0.001**0.5, 3.16227766, rtol=1e-8)
    np.testing.assert_allclose(largest, 3.1623, rtol=2e-3)


def test_epsilon_halves_updates_of_gradients_of_its_own_size_and_scales_do_not_matter(x64):
    g = jnp.asarray(np.random.default_rng(0).standard_normal(64))

    def after_three(eps, scale):
        tx = optim.adam(1.0, eps=eps)
        state = tx.init(g)
        for k in range(3):
            u, state = tx.update(scale * g * (k + 1), state, g)
        return np.asarray(u)

    np.testing.assert_array_equal(after_three(0.0, 2.0**-10), after_three(0.0, 1.0))
    np.testing.assert_allclose(after_three(0.0, 0.01), after_three(0.0, 1.0), rtol=1e-9)
    tx = optim.adam(1.0, eps=1e-8)
    u, _ = tx.update(jnp.array([1e-8]), tx.init(jnp.zeros(1)), jnp.zeros(1))
    np.testing.assert_allclose(u, [-0.5], rtol=1e-3)


# ------------------------------------------------------------------------------- weight decay


def lion_equilibrium(rate, decay, b1=0.9, b2=0.99):
    """Root mean square of weights whose steps are signs of a moving average of white noise."""
    h = np.concatenate([[1 - b1], b1 * (1 - b2) * b2 ** np.arange(20000)])
    rho = np.array([h[: len(h) - k] @ h[k:] for k in range(3000)]) / (h @ h)
    sums = 1 + 2 * np.sum(2 / np.pi * np.arcsin(rho[1:]) * (1 - rate * decay) ** np.arange(1, 3000))
    return (rate / (2 * decay) * sums) ** 0.5, rho[1]


def test_weights_under_noise_and_decay_settle_at_the_published_sizes():
    rate, decay, steps, elements = 0.01, 0.1, 6000, 2048

    def settled(tx):
        def step(carry, key):
            p, state = carry
            u, state = tx.update(jax.random.normal(key, (elements,)), state, p)
            return (p + u, state), jnp.mean(p**2)

        p = jnp.zeros(elements)
        keys = jax.random.split(jax.random.key(1), steps)
        squares = jax.jit(lambda k: jax.lax.scan(step, (p, tx.init(p)), k)[1])(keys)
        return float(np.sqrt(np.mean(np.asarray(squares)[-1000:])))

    predicted = (rate / (2 * decay)) ** 0.5
    np.testing.assert_allclose(predicted, 0.2236, atol=5e-5)
    lion, rho = lion_equilibrium(rate, decay)
    np.testing.assert_allclose([lion, rho], [1.44, 0.351], atol=1e-2)
    error = 4 / (2 * elements) ** 0.5  # the elements are independent
    for tx, law, figure in (
        (optim.lion(rate, b1=0.0, b2=0.0, weight_decay=decay), predicted, 0.2217),
        (optim.adamw(rate, weight_decay=decay), predicted, 0.2209),
        (optim.lion(rate, weight_decay=decay), lion, 1.435),
    ):
        found = settled(tx)
        assert abs(found / law - 1) < error and abs(found / figure - 1) < 2**0.5 * error, found


def test_decoupled_decay_is_a_power():
    tx = optim.adamw(1e-3, weight_decay=0.1)

    def step(carry, _):
        p, state = carry
        u, state = tx.update(jnp.zeros(1), state, p)
        return (p + u, state), None

    p = jnp.ones(1)
    (p, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=1000))((p, tx.init(p)))
    np.testing.assert_allclose(p, [(1 - 1e-4) ** 1000], rtol=2e-5)
    np.testing.assert_allclose([(1 - 1e-4) ** 1000, np.exp(-0.1)], [0.904833, 0.904837], atol=5e-7)


# ------------------------------------------------------------------------- descent in one dimension


def steps_to_minimum(x, rate, longest=np.inf):
    """Of cosh, to |x| < 1e-3; None where it diverges."""
    for k in range(20000):
        if abs(x) < 1e-3:
            return k
        x -= np.clip(rate * np.sinh(x), -longest, longest)
        if abs(x) > 50:
            return None
    return None


def test_clipped_descent_on_cosh_takes_the_published_numbers_of_steps():
    """Zhang et al. 2019: steps min(rate, clip / |g|) g; a constant rate must fit the start."""
    plain = [steps_to_minimum(x, 1 / np.cosh(x)) for x in (3.0, 5.0, 8.0)]
    clipped = [steps_to_minimum(x, 0.5, 0.5) for x in (3.0, 5.0, 8.0)]
    assert (plain, clipped) == ([71, 558, 11321], [14, 18, 24])
    assert steps_to_minimum(5.0, 0.5) is None


def test_descent_and_heavy_balls_turn_at_their_thresholds():
    def after(product, beta=0.0, steps=2000):
        x, v = 1.0, 0.0
        for _ in range(steps):
            v = beta * v - product * x
            x += v
        return abs(x)

    np.testing.assert_allclose([after(1.99), after(2.01)], [1.9e-9, 4.4e8], rtol=0.05)
    assert after(0.999 * 3.8, 0.9, 10000) < 1e-100
    assert after(1.001 * 3.8, 0.9, 10000) > 1e100


def test_modes_of_deep_linear_nets_follow_saxes_solutions():
    s, start, rate = 1.0, 0.01, 1e-3

    def error(rate):
        w, worst = start**0.5, 0.0
        for k in range(int(6 / rate)):
            grown = np.exp(2 * s * k * rate)
            worst = max(worst, abs(w**2 - s * grown / (grown - 1 + s / start)))
            w += rate * w * (s - w**2)
        return worst

    assert error(rate) < 3 * 1.6e-3
    np.testing.assert_allclose(error(rate) / error(rate / 2), 2, rtol=0.1)  # of order one
    layers, w = 4, 0.5**0.25
    for _ in range(10000):
        w += 1e-4 * w ** (layers - 1) * (s - w**layers)
    ode = scipy.integrate.solve_ivp(
        lambda _, a: layers * a ** (2 - 2 / layers) * (s - a), (0, 1), [0.5], rtol=1e-10, atol=1e-12
    )
    np.testing.assert_allclose(w**layers, ode.y[0, -1], rtol=1e-3)


# --------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(("scale", "share"), [(1.0, 0.40129), (1024.0, 0.002980)])
def test_fp16_flushes_the_gaussian_share_of_log_normal_gradients(scale, share):
    count = 1 << 19
    x = np.exp2(np.random.default_rng(1).normal(-24, 4, count)).astype(np.float32)
    exact = scipy.stats.norm.cdf((-25 - np.log2(scale) + 24) / 4)
    np.testing.assert_allclose(exact, share, rtol=1e-3)
    found = precision.losses({"g": x}, "float16", scale)["g"].underflow
    assert abs(found - exact) < 4 * (exact * (1 - exact) / count) ** 0.5


def test_sums_stall_and_small_updates_are_lost_where_they_must_be():
    types = {ml_dtypes.bfloat16: (8, 256), np.float16: (11, 2048), np.float32: (24, 16777216)}
    for dtype, (bits, stall) in types.items():
        assert dtype(1) + dtype(2.0**-bits) == dtype(1) != dtype(1) + dtype(2.0 ** (1 - bits))
        assert dtype(stall) + dtype(1) == dtype(stall) != dtype(stall - 1)
        assert dtype(stall - 1) + dtype(1) == dtype(stall)
    assert precision.limits("float16") == (65504, 2.0**-14, 2.0**-24)
    assert np.float16(2.0**-25) == 0 != np.float16(2.0**-25 * 1.001)


def test_accumulated_gradients_lose_what_their_type_loses():
    """Normal gradients; bfloat16 over 4096 is left out: its figure depends on their mean."""
    rng = np.random.default_rng(2)
    figures = {
        ml_dtypes.bfloat16: [0.0048, 0.0157],
        np.float16: [5.7e-4, 2e-3, 8.2e-3],
        np.float32: [6.7e-8, 2.4e-7, 9.9e-7],
    }

    def compensated(rows, dtype):
        total = lost = np.zeros(rows.shape[1], dtype)
        for row in rows:
            y = (row - lost).astype(dtype)
            new = (total + y).astype(dtype)
            lost, total = ((new - total).astype(dtype) - y).astype(dtype), new
        return total

    for dtype, theirs in figures.items():
        for n, figure in zip((16, 256, 4096), theirs, strict=False):
            g = rng.standard_normal((n, 256)).astype(np.float32)
            exact = g.astype(float).sum(0)
            total = np.zeros(256, dtype)
            for row in g.astype(dtype):
                total = (total + row).astype(dtype)
            error = np.linalg.norm(total.astype(float) - exact) / np.linalg.norm(exact)
            assert figure / 1.5 < error < figure * 1.5, (dtype, n, error)
            if dtype is ml_dtypes.bfloat16:
                kept = compensated(g.astype(dtype), dtype).astype(float)
                relative = np.linalg.norm(kept - exact) / np.linalg.norm(exact)
                assert relative < 0.004 < 4 * error, relative


def test_differences_of_squares_lose_a_variance_and_the_norms_here_do_not():
    x = np.random.default_rng(3).standard_normal(256)
    for mean, least in ((1e3, 0.01), (1e4, 1.0), (1e5, 100.0)):
        shifted = np.float32(x + mean)
        true = shifted.astype(float).var()
        fast = np.mean(shifted * shifted) - np.mean(shifted) ** 2
        assert abs(fast - true) > least, (mean, fast)
        y = shifted.astype(float)
        wanted = (y - y.mean()) / np.sqrt(y.var() + 1e-5)
        got = nn.layer_norm({}, jnp.asarray(shifted))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=max(1e-5, 2e-7 * mean))


def test_the_dynamic_loss_scale_settles_at_the_published_size():
    """Largest gradients 2^(-6 +- 1): a scale of 2^18.2 and 3.9e-4 of the steps skipped."""
    tx = optim.dynamic_loss_scale(optim.sgd(1.0), 2.0**16)

    def step(state, key):
        scale = optim.loss_scale(state)
        g = scale * jnp.exp2(-6 + jax.random.normal(key))
        g = jnp.where(g > 65504, jnp.inf, g)[None]
        _, state = tx.update(g, state, g)
        return state, (jnp.log2(scale), jnp.isinf(g[0]))

    start = tx.init(jnp.zeros(1))
    keys = jax.random.split(jax.random.key(2), 300000)
    logs, skipped = jax.jit(lambda k: jax.lax.scan(step, start, k)[1])(keys)
    skips = int(np.sum(skipped))
    assert abs(skips - 3.9e-4 * len(keys)) < 4 * skips**0.5, skips
    assert abs(np.mean(np.asarray(logs, float)) - 18.2) < 0.2


def test_numerical_derivatives_have_the_published_errors():
    f, slope = lambda x: np.exp(np.sin(x)), np.cos(0.7) * np.exp(np.sin(0.7))
    errors = {h: abs((f(0.7 + h) - f(0.7 - h)) / (2 * h) - slope) / slope for h in (6e-6, 1e-8)}
    assert 1e-13 < errors[6e-6] < 8e-11 and 1e-10 < errors[1e-8] < 8e-8, errors
    assert abs(f(0.7 + 1e-30j).imag / 1e-30 - slope) / slope < 4e-16


def test_the_noise_scale_is_unbiased_as_a_ratio_of_means_only():
    """McCandlish et al. 2018, appendix A.1: |G|^2 and tr(Sigma) from two batch sizes."""
    rng, n, small, big = np.random.default_rng(4), 32, 4, 64
    gradient, spread = np.full(n, 0.5), 1.7
    draws = 40000
    means = [gradient + spread * rng.standard_normal((draws, n)) / b**0.5 for b in (small, big)]
    gs, gb = ((m**2).sum(1) for m in means)
    square = (big * gb - small * gs) / (big - small)
    trace = (gs - gb) / (1 / small - 1 / big)
    exact = gradient @ gradient, spread**2 * n
    for found, truth in zip((square, trace), exact, strict=True):
        assert abs(found.mean() - truth) < 4 * found.std() / draws**0.5
    ratio, truth = trace.mean() / square.mean(), exact[1] / exact[0]
    influence = (trace - ratio * square) / square.mean()
    assert abs(ratio - truth) < 4 * influence.std() / draws**0.5
    assert np.mean(trace / square) > truth + 4 * np.std(trace / square) / draws**0.5


@pytest.mark.slow
@pytest.mark.parametrize("depth", [22, 30])
def test_he_trains_as_deep_as_xavier_stays_at_chance(depth):
    """He et al. 2015, figures 2 and 3: 22 ReLU layers move slowly under Xavier, 30 do not.

    Width 64 on the digits, SGD with momentum, 1,000 steps, three seeds each.
    """
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    x, y = (jnp.asarray(part) for part in datasets.load_digits(return_X_y=True))
    x = ((x - x.mean()) / x.std()).astype(jnp.float32)
    tx = optax.sgd(3e-3, momentum=0.9)

    def init(key, variance):
        keys = jax.random.split(key, depth)
        sizes = [(64, 64)] * (depth - 1) + [(64, 10)]
        layers = [
            jax.random.normal(k, size) * jnp.sqrt(variance / 64)
            for k, size in zip(keys, sizes, strict=True)
        ]
        return jnp.stack(layers[:-1]), jnp.zeros((depth - 1, 64)), layers[-1], jnp.zeros(10)

    def logits(params, inputs):
        kernels, biases, kernel, bias = params

        def layer(h, weights):
            return jax.nn.relu(h @ weights[0] + weights[1]), None

        return jax.lax.scan(layer, inputs, (kernels, biases))[0] @ kernel + bias

    def loss(params, chosen):
        terms = optax.softmax_cross_entropy_with_integer_labels(
            logits(params, x[chosen]), y[chosen]
        )
        return terms.mean()

    @jax.jit
    @jax.vmap
    def accuracy(key, variance):
        def step(carry, key):
            params, state = carry
            grads = jax.grad(loss)(params, jax.random.randint(key, (64,), 0, len(x)))
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        params = init(key, variance)
        start = params, tx.init(params)
        (params, _), _ = jax.lax.scan(step, start, jax.random.split(key, 1000))
        return jnp.mean(jnp.argmax(logits(params, x), -1) == y)

    keys = jnp.concatenate([jax.random.split(jax.random.key(0), 3)] * 2)
    reached = np.asarray(accuracy(keys, jnp.repeat(jnp.array([1.0, 2.0]), 3)))
    if depth == 30:
        assert np.all(reached[3:] > 0.8)
        assert np.all(reached[:3] < 0.3)  # a tenth is chance, a fifth two classes
    else:
        assert np.all(reached[3:] > 0.97)
        assert np.all((reached[:3] > 0.15) & (reached[:3] < 0.9))
