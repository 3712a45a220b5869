"""Figures of products of layers, found again: exact spectra, Gaussian layers, closed forms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad import nn, recurrent, spectrum, theory, tree
from jaxgrad.graded import graded_product, log_singular_values_mp, scale

N, LAYERS = 16, 1000


@functools.cache
def _compiled():
    return jax.jit(lambda stack: graded_product(stack).spectrum())


def logs_of(matrices):
    """Log singular values and the trusted ones; identities fill the stack: one compilation."""
    filled = np.broadcast_to(np.eye(N), (LAYERS, N, N)).copy()
    size = len(matrices[0])
    filled[: len(matrices), :size, :size] = matrices
    found = _compiled()(jnp.asarray(filled))
    return np.asarray(found.log()), np.asarray(found.certificate.trusted)


def haar(rng, count, n=N):
    q, r = np.linalg.qr(rng.standard_normal((count, n, n)))
    return q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]


def zigzag(rng, logs):
    """`Q[l+1] diag(e^logs[l]) Q[l]^T`: the log singular values are the sums of the logs."""
    bases = haar(rng, len(logs) + 1)
    return bases[1:] @ (np.exp(logs)[:, :, None] * bases[:-1].swapaxes(1, 2))


def direct_and_qr(matrices):
    """What a plain product in float64, and the diagonals of a QR sweep, make of it."""
    product, q, diagonal = np.eye(N), np.eye(N), np.zeros(N)
    for matrix in matrices:
        product = matrix @ product
        q, r = np.linalg.qr(matrix @ q)
        diagonal += np.log(np.abs(np.diag(r)))
    with np.errstate(divide="ignore"):
        return np.log(np.linalg.svd(product, compute_uv=False)), np.sort(diagonal)[::-1]


# ------------------------------------------------------------------------------- exact spectra


def tanh_net(rng, depth):
    h = rng.standard_normal(N)
    for _ in range(depth):
        w = rng.standard_normal((N, N)) / N**0.5
        h = np.tanh(w @ h)
        yield (1 - h**2)[:, None] * w


@pytest.mark.parametrize("kind", ["gaussian", "tanh"])
def test_all_singular_values_of_four_hundred_layers_are_those_of_multi_precision(kind, x64):
    """The figures: graded 4e-12, a plain product wrong by 774 and 909 nats, QR by about 3."""
    rng = np.random.default_rng(0)
    gaussian = rng.standard_normal((400, N, N)) / N**0.5
    matrices = list(gaussian if kind == "gaussian" else tanh_net(rng, 400))
    truth = log_singular_values_mp(matrices)
    found, trusted = logs_of(matrices)
    direct, diagonal = direct_and_qr(matrices)
    assert np.all(trusted[:-1])  # of the weakest mode the certificate may be more careful
    assert np.abs(found - truth).max() < 2e-11
    lost = truth[0] - 36 - truth[-1]  # what lies below the largest value's rounding
    assert abs(np.abs(direct - truth)[-1] - lost) < 10
    assert lost > 600
    assert 0.5 < np.abs(diagonal - truth).max() < 12
    if kind == "gaussian":
        law = theory.gaussian_log_singular_values(N, 400)
        z = (truth - np.asarray(law.mean)) / np.asarray(law.standard_deviation)
        assert np.abs(z).max() < 4
        assert abs(truth[-1] - -823) < 4 * 2**0.5 * float(law.standard_deviation[-1])


def test_a_zigzag_of_a_thousand_layers_keeps_its_known_spectrum(x64):
    rng = np.random.default_rng(1)
    logs = np.sort(0.5 * rng.standard_normal((LAYERS, N)) - 0.345, axis=1)[:, ::-1]
    truth = logs.sum(0)
    assert truth[0] > 500 and truth[-1] < -1100
    found, trusted = logs_of(zigzag(rng, logs))
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-10)
    assert np.all(trusted)


def test_modes_that_overtake_each_other_are_lost_and_said_to_be(x64):
    rng = np.random.default_rng(2)
    logs = rng.standard_normal((LAYERS, N)) * 1.2
    matrices = zigzag(rng, logs)
    found, _ = logs_of(matrices[:100])
    np.testing.assert_allclose(found, np.sort(logs[:100].sum(0))[::-1], rtol=0, atol=1e-8)
    error = np.abs(logs_of(matrices)[0] - np.sort(logs.sum(0))[::-1])
    assert 5e-4 < error.max() < 100
    assert error[logs_of(matrices)[1]].max(initial=0) < 1e-8


def test_circulant_layers_have_the_products_of_their_spectra_as_far_as_they_are_trusted(x64):
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((300, N)) / N**0.5
    index = (np.arange(N)[:, None] - np.arange(N)) % N
    truth = np.sort(np.log(np.abs(np.fft.fft(rows))).sum(0))[::-1]
    found, trusted = logs_of(rows[:, index])
    error = np.abs(found - truth)
    assert error[trusted].max(initial=0) < 1e-8
    shallow = np.sort(np.log(np.abs(np.fft.fft(rows[:20]))).sum(0))[::-1]
    np.testing.assert_allclose(logs_of(rows[:20, index])[0], shallow, rtol=0, atol=1e-9)


def test_fibonacci_householder_and_integer_layers_are_exact(x64):
    found, _ = logs_of([np.array([[1.0, 1.0], [1.0, 0.0]])] * 1000)
    golden = 1000 * np.log((1 + 5**0.5) / 2)
    np.testing.assert_allclose(golden, 481.2118250596, rtol=1e-12)
    np.testing.assert_allclose(found[[0, -1]], [golden, -golden], rtol=0, atol=1e-11)
    np.testing.assert_allclose(found[1:-1], 0, atol=1e-11)
    rng = np.random.default_rng(4)
    v = rng.standard_normal((999, N, 1))
    reflections = np.eye(N) - 2 * v @ v.swapaxes(1, 2) / (v**2).sum(1, keepdims=True)
    found, _ = logs_of(reflections)
    np.testing.assert_allclose(found, 0, atol=4 * 2.3e-16 * 1000**0.5)
    product = functools.reduce(lambda p, w: w @ p, reflections)
    np.testing.assert_allclose(np.linalg.det(product), -1, rtol=1e-10)
    integers = rng.integers(-9, 10, (300, 6, 6))
    exact = functools.reduce(lambda p, w: w.astype(object) @ p, integers, np.eye(6, dtype=object))
    square = sum(int(x) ** 2 for x in exact.ravel())
    assert len(str(square)) > 400  # entries of over 200 digits
    found, _ = logs_of(integers.astype(float))
    # the ten identities beside it have log zero, and ln of an integer is exact
    logs = found[np.argsort(-np.abs(found))]
    norm = np.max(logs) + 0.5 * np.log(np.sum(np.exp(2 * (logs - np.max(logs)))))
    np.testing.assert_allclose(norm, math.log(square) / 2, rtol=4e-15)


def test_the_rank_of_a_relu_net_is_its_smallest_number_of_active_units(x64):
    for seed, depth in ((5, 20), (6, 100)):
        rng = np.random.default_rng(seed)
        h, matrices, active = rng.standard_normal(N), [], []
        for _ in range(depth):
            w = rng.standard_normal((N, N)) * (2 / N) ** 0.5
            gate = w @ h > 0
            h = np.where(gate, w @ h, 0) / np.linalg.norm(np.where(gate, w @ h, 0))
            matrices.append(gate[:, None] * w)
            active.append(gate.sum())
        found, _ = logs_of(matrices)
        assert np.sum(np.isfinite(found)) == min(active)
        assert np.all(found[min(active) :] == -np.inf)


def test_rounding_of_orthogonal_products_grows_with_the_root_of_depth():
    """Largest |s - 1| of Haar layers: 1.7 eps sqrt(L) at n = 64 in float32."""
    layers = haar(np.random.default_rng(7), 1000, 64).astype(np.float32)
    product, found = np.eye(64, dtype=np.float32), {}
    for depth, layer in enumerate(layers, 1):
        product = layer @ product
        if depth in (10, 100, 1000):
            values = np.linalg.svd(product.astype(float), compute_uv=False)
            found[depth] = np.abs(values - 1).max() / np.finfo(np.float32).eps / depth**0.5
    np.testing.assert_allclose(list(found.values()), [1.65, 1.72, 1.72], rtol=0.25)


def test_halving_leaves_the_floats_at_their_own_layers():
    def layers(dtype):
        x, k = dtype(1), 0
        while x:
            x, k = x * dtype(0.5), k + 1
        return k

    assert (layers(np.float32), layers(np.float64)) == (150, 1075)
    if jax.default_backend() == "cpu":  # which flushes subnormals
        halves = jax.jit(lambda x: jax.lax.scan(lambda x, _: (x * 0.5,) * 2, x, length=200)[1])
        assert np.argmin(halves(jnp.float32(1)) > 0) + 1 == 127


def test_integer_exponents_lose_less_than_sums_of_logarithms():
    """n = 64, 2000 layers, float32: 2e-5 to 4e-5 against 3e-7 to 4e-6 in the figures."""
    depth, n = 2000, 64
    w = np.random.default_rng(8).standard_normal((depth, n, n)).astype(np.float32) * 0.7 / 8
    u = np.float32(np.ones(n) / 8)

    def step(carry, w):
        v, logs, mantissa, exponent = carry
        v = jnp.matmul(w, v, precision="highest")
        norm = jnp.linalg.norm(v)
        mantissa, exponent = scale.split(mantissa * norm, exponent)
        return (v / norm, logs + jnp.log(norm), mantissa, exponent), (v, norm)

    start = (u, jnp.float32(0), jnp.float32(1), jnp.int32(0))
    (_, logs, mantissa, exponent), (_, norms) = jax.jit(lambda w: jax.lax.scan(step, start, w))(w)
    # of the same norms: what is compared is how they are added up
    truth = np.log(np.asarray(norms, float)).sum()
    pair = np.log(float(mantissa)) + int(exponent) * np.log(2)
    assert abs(pair - truth) < 1e-5
    assert abs(float(logs) - truth) > 1e-5 + 3 * abs(pair - truth)


# ------------------------------------------------------------- Lyapunov exponents of known maps


def test_logistic_and_henon_maps_have_their_known_exponents(x64):
    def exponents(cell, start, steps):
        chain = recurrent.time_chain(cell, (), jnp.zeros((steps, 1)))
        return spectrum.lyapunov_exponents(chain, start, depths=[steps]).exponents[0]

    # x = sin^2(a) doubles the angle, so the sum of ln |4 - 8 x| is exact at every length
    x = 0.3
    for _ in range(20):
        x = 4 * x * (1 - x)
    logistic = exponents(lambda _, h, x: 4 * h * (1 - h), jnp.array([0.3]), 20)
    exact = np.log(2) + np.log(x * (1 - x) / 0.21) / 40
    np.testing.assert_allclose(logistic, [exact], rtol=1e-8)

    def henon(_, h, x):
        return jnp.stack([1 - 1.4 * h[0] ** 2 + h[1], 0.3 * h[0]])

    found = exponents(henon, jnp.array([0.1, 0.1]), 200)
    np.testing.assert_allclose(np.sum(found), -1.2039728043259, rtol=1e-11)
    np.testing.assert_allclose(found[0], 0.4209, atol=0.1)


# ------------------------------------------------------------------------ layers in closed form


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_norms_have_their_singular_values_in_closed_form(size, x64):
    n, eps = 24, 1e-5
    x = jnp.asarray(size * np.random.default_rng(9).standard_normal(n))
    variance, square = float(jnp.var(x)), float(jnp.mean(x**2))
    s, r, sigma = (variance + eps) ** 0.5, (square + eps) ** 0.5, variance**0.5
    cases = (
        (lambda x: nn.layer_norm({}, x), [1 / s] * (n - 2) + [eps / s**3, 0]),
        (lambda x: nn.rms_norm({"scale": jnp.ones(n)}, x), [1 / r] * (n - 1) + [eps / r**3]),
        (
            lambda x: nn.layer_norm_as_written({}, x),
            [1 / (sigma + eps)] * (n - 2) + [eps / (sigma + eps) ** 2, 0],
        ),
    )
    for norm, known in cases:
        values = np.linalg.svd(jax.jacfwd(norm)(x), compute_uv=False)
        np.testing.assert_allclose(values, known, rtol=1e-8, atol=1e-13 * known[0])
    y = np.asarray(nn.layer_norm({}, x * 1e6))  # Brody 2023: onto the plane, then onto the sphere
    np.testing.assert_allclose([y.sum(), np.linalg.norm(y)], [0, n**0.5], rtol=1e-3, atol=1e-12)


def test_attention_over_equal_tokens_has_no_gradient_for_queries_and_keys(x64):
    heads = nn.Heads(2, causal=False, rotary=False, qk_norm=False)
    params = nn.attention_init(jax.random.key(0), 8, heads, "xavier_normal", nn.Gains())
    params = jax.tree.map(lambda a: a.astype(float), params)
    x = jnp.tile(jnp.asarray(np.random.default_rng(10).standard_normal(8)), (5, 1))
    v = np.random.default_rng(11).standard_normal((5, 8))
    grads = jax.jit(jax.grad(lambda p: jnp.vdot(nn.attention(p, x, heads), v)))(params)
    size = {name: float(jnp.linalg.norm(g["kernel"])) for name, g in grads.items()}
    assert size["query"] < 1e-6 * size["value"] and size["key"] < 1e-6 * size["value"]
    assert size["value"] > 0.1
    p = jax.nn.softmax(x[0])
    exact = np.diag(p) - np.outer(p, p)
    np.testing.assert_allclose(jax.jacfwd(jax.nn.softmax)(x[0]), exact, rtol=0, atol=1e-15)


def test_weights_and_gradients_of_a_homogeneous_net_have_one_product_in_all_layers(x64):
    """Euler: `<W_l, dL/dW_l>` is equal, so first over last shows no vanishing: 0.61 at 2^-15."""
    depth = 30
    w = np.random.default_rng(12).standard_normal((depth, N, N)) / N**0.5  # Xavier
    x = np.random.default_rng(13).standard_normal(N)

    def loss(w, gain):
        h = jax.lax.scan(lambda h, w: (jax.nn.relu(gain * w @ h), None), x, w)[0]
        return jnp.sum(jnp.sin(1e4 * h))

    for gain in (1.0, 2**0.5):
        g = np.asarray(jax.jit(jax.grad(loss))(w, gain))
        products, terms = (w * g).sum((1, 2)), np.abs(w * g)
        # of both signs: what is left of a sum is as exact as its terms are
        assert np.all(np.abs(products - products[0]) < 1e-12 * terms.sum((1, 2)))
        # neuron by neuron: what comes in is what goes out
        out, into = (w * g).sum(2)[:-1], (w * g).sum(1)[1:]
        assert np.all(np.abs(out - into) <= 1e-12 * (terms.sum(2)[:-1] + terms.sum(1)[1:]))
        norms = np.linalg.norm(g, axis=(1, 2))
        assert 1 / 30 < norms[0] / norms[-1] < 30  # where the gain of Xavier is 2^-15


def test_norms_of_half_precision_leave_its_range_long_before_their_elements():
    big, small = jnp.full(64, 300, jnp.float16), jnp.full(64, 1e-4, jnp.float16)
    assert jnp.sqrt(jnp.sum(big * big)) == jnp.inf
    np.testing.assert_allclose(tree.global_norm(big), 2400, rtol=1e-3)
    np.testing.assert_allclose(tree.global_norm(small), 8e-4, rtol=1e-3)
    with np.errstate(over="ignore"):
        assert np.isinf(np.linalg.norm(np.full(64, 1e20, np.float32)))
    assert np.linalg.norm(np.full(64, 1e-20, np.float32)) > 0


# ------------------------------------------------------------------ products of Gaussian layers


def test_exponents_of_sixty_four_gaussian_units_tell_where_floats_give_up(x64):
    exponents = np.asarray(theory.gaussian_lyapunov_exponents(64))
    np.testing.assert_allclose(exponents[[0, -1]], [-0.00785, -2.7146], rtol=1e-4, atol=5e-6)
    gap = exponents[0] - exponents[-1]
    np.testing.assert_allclose([gap, 1000 * gap / np.log(10)], [2.707, 1175.5], rtol=1e-4)
    lost = [np.log(1 / np.finfo(dtype).eps) / gap for dtype in (np.float64, np.float32)]
    np.testing.assert_allclose(lost, [13.3, 5.9], atol=0.05)  # about 14 and 6 layers
    # the product of 200 layers: its true determinant by the layers', and numpy's
    rng, product, layers = np.random.default_rng(9), np.eye(64), 0.0
    for _ in range(200):
        w = rng.standard_normal((64, 64)) / 8
        product, layers = w @ product, layers + np.linalg.slogdet(w)[1]
    law = theory.gaussian_log_singular_values(64, 200)
    sd = float(jnp.sum(law.standard_deviation**2)) ** 0.5
    np.testing.assert_allclose(jnp.sum(law.mean), -6586, atol=4 * sd)
    assert abs(layers - float(jnp.sum(law.mean))) < 4 * sd
    assert abs(np.linalg.slogdet(product)[1] - -2024) < 400


@pytest.mark.parametrize(("width", "steps"), [(4, 100000), (8, 50000), (32, 5000)])
def test_the_qr_diagonal_of_gaussian_products_is_the_digamma_law(width, steps, x64):
    rng, chains = np.random.default_rng(width), 50
    q = np.broadcast_to(np.eye(width), (chains, width, width))
    logs = []
    for _ in range(steps // chains):
        q, r = np.linalg.qr(rng.standard_normal((chains, width, width)) / width**0.5 @ q)
        logs.append(np.log(np.abs(np.diagonal(r, axis1=1, axis2=2))))
    logs = np.concatenate(logs)
    law = theory.gaussian_log_singular_values(width, 1)
    mean, variance = np.asarray(law.mean), np.asarray(law.standard_deviation) ** 2
    z = (logs.mean(0) - mean) / np.sqrt(variance / steps)
    assert np.abs(z).max() < 4
    ratio = logs.var(0) / variance
    assert np.all(np.abs(ratio - 1) < 4 * np.sqrt(6 / steps) + 0.01), ratio
    if width == 4:  # the figures of one long run
        theirs = np.array([-0.13492, -0.33150, -0.63665, -1.33115])
        assert np.all(np.abs(theirs - logs.mean(0)) < 4 * np.sqrt(2 * variance / steps))


def test_powers_of_a_matrix_far_from_normal_exceed_its_spectral_radius(x64):
    w = 0.9 * np.random.default_rng(10).standard_normal((200, 200)) / 200**0.5
    radius = np.abs(np.linalg.eigvals(w)).max()
    fifth = np.linalg.norm(np.linalg.matrix_power(w, 5), 2)
    edge = 0.9**5 * float(theory.largest_squared_singular_value(5)) ** 0.5
    np.testing.assert_allclose([radius, fifth], [0.93, 1.99], rtol=0.15)
    assert radius**5 < 0.75
    assert 1.7 < fifth < 1.05 * edge
