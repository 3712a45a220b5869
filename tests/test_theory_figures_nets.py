"""Figures of residual networks, norms and attention, found again in networks of numpy."""

import jax.numpy as jnp
import numpy as np
import scipy.special

from jaxgrad import theory


def norm_and_scale(x, axis=0):
    centered = x - x.mean(axis, keepdims=True)
    scale = np.sqrt(np.mean(centered**2, axis, keepdims=True))
    return centered / scale, scale


def norm_backward(g, y, scale, axis=0):
    """The gradient through a layer normalization with output y."""
    inner = g - g.mean(axis, keepdims=True) - y * np.mean(g * y, axis, keepdims=True)
    return inner / scale


# ------------------------------------------------------------------------------- residual networks


def test_relu_residual_blocks_have_the_published_gains_and_shares_that_shrink(x64):
    n, depth, nets = 256, 50, 6
    s = np.array([1.0, depth**-0.5, 0.01])
    logs, shrinks = [], []
    for net in range(nets):
        rng = np.random.default_rng([1, net])
        w1, w2 = rng.standard_normal((2, depth, n, n)) / n**0.5
        w1 *= 2**0.5
        h, gates = rng.standard_normal((n, 3)), []
        for a, b in zip(w1, w2, strict=True):
            z = a @ h
            gates.append(z > 0)
            h = h + s * (b @ np.maximum(z, 0))
        g = rng.standard_normal((n, 3))
        norms = [np.linalg.norm(g, axis=0)]
        for a, b, gate in zip(w1[::-1], w2[::-1], gates[::-1], strict=True):
            g = g + s * (a.T @ (gate * (b.T @ g)))
            norms.append(np.linalg.norm(g, axis=0))
        logs.append(np.log(norms[-1] / norms[0]))
        shrinks.append(np.mean(np.diff(norms, axis=0) < 0, axis=0))
    mean = np.mean(logs, 0)
    predicted = np.asarray(theory.branch_log_gain(s, depth))
    figures, sd = np.array([17.09, 0.506]), np.array([0.39, 0.057])
    assert np.all(np.abs(mean[:2] - figures) < 4 * sd * np.sqrt(2 / nets)), mean
    # the mean of the logarithm lies below the logarithm of the mean, by L / n at most
    assert np.all(np.abs(mean - predicted) < 4 * np.append(sd, 0.01) / nets**0.5 + depth / n)
    share = np.mean(shrinks, 0)
    for k, figure in ((1, 0.128), (2, 0.444)):
        p = float(theory.shrink_probability(n, s[k]))
        error = (p * (1 - p) / (depth * nets)) ** 0.5
        assert abs(share[k] - p) < 4 * error, (share[k], p)
        assert abs(figure - p) < 4 * error


def test_tanh_residual_nets_have_the_published_gains(x64):
    n, nets, figures = 256, 6, {25: (2.54, 0.04), 100: (5.43, 0.12)}
    found = {depth: [] for depth in figures}
    for net in range(nets):
        rng = np.random.default_rng([2, net])
        w = rng.standard_normal((100, n, n)) / n**0.5
        h = [rng.standard_normal(n)]
        for layer in w:
            h.append(h[-1] + layer @ np.tanh(h[-1]))
        for depth, logs in found.items():
            g = rng.standard_normal(n)
            top = np.linalg.norm(g)
            for k in reversed(range(depth)):
                g = g + (1 - np.tanh(h[k]) ** 2) * (w[k].T @ g)
            logs.append(np.log(np.linalg.norm(g) / top))
    for depth, (figure, error) in figures.items():
        ours = np.std(found[depth], ddof=1) / nets**0.5
        assert abs(np.mean(found[depth]) - figure) < 4 * np.hypot(ours, error), found[depth]
        mean_field = float(theory.residual_profile("tanh", depth, 1.0).log_gain[0])
        assert abs(np.mean(found[depth]) - mean_field) < 4 * ours + 2 * depth / n
    # q grows by nearly one a block, and the log gain as 0.54 sqrt(L)
    deep = theory.residual_profile("tanh", 200, 1.0)
    np.testing.assert_allclose(deep.log_gain[0] / 200**0.5, 0.54, atol=5e-3)
    assert 0.7 < float(deep.q[-1]) / 200 < 1
    np.testing.assert_allclose(0.5**54, 5.6e-17, rtol=0.01)  # a skip scaled by one half


# ------------------------------------------------------------------------------------------- norms

_CDF = scipy.special.ndtr
UNITS = {  # phi, phi', figures of phi(LN(W h)) and of LN(phi(W h)): predicted, measured
    "sigmoid": (
        scipy.special.expit, lambda z: scipy.special.expit(z) * scipy.special.expit(-z),
        (0.3909, 0.3849), (1.017, 1.013),
    ),
    "relu": (lambda z: np.maximum(z, 0), lambda z: z > 0, (1.0, 0.981), (1.2112, 1.2025)),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2, (1.085, 1.066), (1.085, 1.091)),
    "gelu": (
        lambda z: z * _CDF(z), lambda z: _CDF(z) + z * np.exp(-(z**2) / 2) / (2 * np.pi) ** 0.5,
        (1.035, 1.018), (1.148, 1.145),
    ),
    "silu": (
        lambda z: z * scipy.special.expit(z),
        lambda z: scipy.special.expit(z) * (1 + z * scipy.special.expit(-z)),
        (1.033, 1.021), (1.101, 1.097),
    ),
    "erf": (
        scipy.special.erf, lambda z: 2 / np.pi**0.5 * np.exp(-(z**2)), (1.107, 1.092), None,
    ),
}  # fmt: skip


def normalized_gain(phi, slope, before, nets=3, n=256, depth=50):
    """Factor a layer of |gradient| in phi(LN(W h)), or LN(phi(W h)): mean of the logs."""
    logs = []
    for net in range(nets):
        rng = np.random.default_rng([3, net])
        w = rng.standard_normal((depth, n, n)) / n**0.5
        h, kept = norm_and_scale(rng.standard_normal(n))[0], []
        for layer in w:
            z = layer @ h
            if before:
                y, scale = norm_and_scale(z)
                kept.append((y, scale, slope(y)))
                h = phi(y)
            else:
                h, scale = norm_and_scale(phi(z))
                kept.append((h, scale, slope(z)))
        g = rng.standard_normal(n)
        top = np.linalg.norm(g)
        for layer, (y, scale, steep) in zip(w[::-1], kept[::-1], strict=True):
            g = norm_backward(g * steep, y, scale) if before else norm_backward(g, y, scale) * steep
            g = layer.T @ g
        logs.append(np.log(np.linalg.norm(g) / top) / depth)
    return np.exp(np.mean(logs))


def test_normalized_layers_without_skips_have_the_published_factors(x64):
    for name, (phi, slope, first, last) in UNITS.items():
        predicted = float(theory.norm_then_activation_chi(name)) ** 0.5
        np.testing.assert_allclose(predicted, first[0], atol=6e-4, err_msg=name)
        measured = normalized_gain(phi, slope, before=True)
        np.testing.assert_allclose(measured, first[1], rtol=0.02, err_msg=name)
        if last is not None:
            predicted = float(theory.activation_then_norm_chi(name)) ** 0.5
            np.testing.assert_allclose(predicted, last[0], atol=6e-4, err_msg=name)
            measured = normalized_gain(phi, slope, before=False)
            np.testing.assert_allclose(measured, last[1], rtol=0.02, err_msg=name)


def test_pre_ln_exponents_are_those_of_the_formula_and_not_one_half(x64):
    depth = np.array([6, 12, 24, 48, 96])
    last = np.asarray(theory.last_weight_gradient(128, depth, "pre"))
    np.testing.assert_allclose(np.polyfit(np.log(depth), np.log(last), 1)[0], -0.453, atol=1e-3)
    at = np.arange(5, 97)
    gradient = np.asarray(theory.pre_ln_profile(96).gradient)[at]
    exponent = np.polyfit(np.log(at), np.log(gradient), 1)[0]
    assert abs(exponent - -0.442) < 0.04, exponent
    # the decay that counts the norm alone: sqrt(2/3) a sublayer, over 95 of them
    np.testing.assert_allclose(95 / 2 * np.log(2 / 3), -19.3, atol=0.05)


# --------------------------------------------------------------------------------------- attention


def post_ln_uniform_attention(tokens, rng, d=192, depth=24):
    """|dL/dx_l| for l = 0..24: uniform attention and ReLU feed-forward, each LN(x + F(x))."""
    x = norm_and_scale(rng.standard_normal((tokens, d)), 1)[0]
    layers = []
    for _ in range(depth):
        v, w1, w2 = rng.standard_normal((3, d, d)) / d**0.5
        y, first = norm_and_scale(x + x.mean(0) @ v, 1)
        z = y @ w1
        x, second = norm_and_scale(y + np.maximum(z, 0) @ w2, 1)
        layers.append((v, w1, w2, y, first, z > 0, x, second))
    g = rng.standard_normal((tokens, d))
    norms = [np.linalg.norm(g)]
    for v, w1, w2, y, first, gate, out, second in reversed(layers):
        g = norm_backward(g, out, second, 1)
        g = g + ((g @ w2.T) * gate) @ w1.T
        g = norm_backward(g, y, first, 1)
        g = g + (g.sum(0) @ v.T) / tokens
        norms.append(np.linalg.norm(g))
    return np.array(norms[::-1])


def test_post_ln_attention_halves_all_but_the_common_mode(x64):
    at = [22, 18, 12, 6]
    figures = {64: [0.711, 0.253, 0.168, 0.168], 16: [0.744, 0.415, 0.378, 0.376]}
    for tokens, figure in figures.items():
        runs = [post_ln_uniform_attention(tokens, np.random.default_rng([4, k])) for k in range(4)]
        profile = np.exp(np.mean(np.log(runs), 0))
        ratio = profile[at] / profile[23]
        np.testing.assert_allclose(ratio, figure, rtol=0.15)
        predicted = np.asarray(theory.post_ln_attention_profile(24, float(tokens)).gradient)
        np.testing.assert_allclose(ratio, predicted[at] / predicted[23], rtol=0.15)
        assert profile[0] > profile[6]  # it rises again at the bottom


def test_attention_without_skips_collapses_doubly_exponentially():
    def distances(rng, skip, tokens=32, d=64, layers=12):
        """log10 of the relative distance to equal tokens, layer by layer."""
        x, logs = rng.standard_normal((tokens, d)), []
        for _ in range(layers):
            q, k, v = rng.standard_normal((3, d, d)) / d**0.5
            logits = (x @ q) @ (x @ k).T / d**0.5
            weights = scipy.special.softmax(logits, 1)
            x = (x if skip else 0) + (skip or 1) * (weights @ (x @ v))
            logs.append(np.log10(np.linalg.norm(x - x.mean(0)) / np.linalg.norm(x)))
        return logs

    def over_nets(skip):
        runs = np.array([distances(np.random.default_rng([5, k]), skip) for k in range(12)])
        return runs.mean(0), runs.std(0, ddof=1)

    mean, sd = over_nets(0.0)
    figures = np.array([-0.12, -1.62, -6.5])  # one net
    assert np.all(np.abs(figures - mean[:3]) < 4 * sd[:3]), (mean, sd)
    assert mean[2] < 3 * mean[1] < 9 * mean[0]
    assert mean[3] < -14  # the machine's own rounding
    for skip, figure in ((1.0, -0.82), (12**-0.5, -0.02)):
        mean, sd = over_nets(skip)
        assert abs(figure - mean[-1]) < 4 * sd[-1] + 0.005, (mean[-1], sd[-1])
        assert mean[-1] > -1.5


def test_moments_of_relu_and_of_wide_softmaxes_are_the_published_ones(x64):
    rng, keys = np.random.default_rng(6), 512
    for s, figures in (
        (0.5, (0.2831, 0.2840, 1.2792, 1.2840)),
        (1.0, (1.679, 1.718, 2.622, 2.718)),
    ):
        p = scipy.special.softmax(s * rng.standard_normal((4000, keys)), 1)
        g = rng.standard_normal(p.shape)
        back = p * (g - (g * p).sum(1, keepdims=True))
        for k, values in ((0, p.var(1) * keys**2), (2, (back**2).mean(1) * keys**2)):
            error = values.std() / len(values) ** 0.5
            off = values.mean() - figures[k]
            assert abs(off) < 4 * 2**0.5 * error + 1e-3, (s, k, off)
        np.testing.assert_allclose([np.expm1(s**2), np.exp(s**2)], figures[1::2], atol=4e-4)
    mean = theory.gaussian_mean(lambda x: jnp.maximum(x, 0), 4.0)
    variance = theory.variance_map("relu", 4.0, 1.0) - mean**2
    known = 2 / (2 * np.pi) ** 0.5, 4 * (np.pi - 1) / (2 * np.pi)
    np.testing.assert_allclose([mean, variance], known, rtol=1e-12)
