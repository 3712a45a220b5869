"""Figures of deep or wide networks, found again in networks of numpy: slow, run by --all."""

import numpy as np
import pytest

pytestmark = pytest.mark.slow


def _log_gain(g, top):
    return np.log(np.linalg.norm(g) / np.linalg.norm(top))


def test_tanh_with_xavier_at_eight_hundred_layers_has_the_measured_gain():
    width, depth, logs = 256, 800, []
    for net in range(6):
        rng = np.random.default_rng([40, net])
        half = 3**0.5 / width**0.5
        w = rng.uniform(-half, half, (depth, width, width)).astype(np.float32)
        h = [rng.standard_normal(width)]
        for layer in w:
            h.append(np.tanh(layer @ h[-1]))
        g = top = rng.standard_normal(width)
        for k in reversed(range(depth)):
            g = w[k].T @ (g * (1 - h[k + 1] ** 2))
        logs.append(_log_gain(g, top))
    error = np.std(logs, ddof=1) / len(logs) ** 0.5
    assert abs(np.mean(logs) - -4.41) < 4 * np.hypot(error, 0.32), logs
    mean_field = np.log(0.0298)  # finite width takes away up to L / n
    assert -depth / width - 4 * error < np.mean(logs) - mean_field < 4 * error


@pytest.mark.parametrize(("name", "figure", "error"), [("tanh", 7.75, 0.17), ("relu", 40.28, 0.4)])
def test_two_hundred_residual_blocks_have_the_published_gains(name, figure, error):
    """`x + W tanh(x)` (Yang, Schoenholz 2017), and `x + W2 relu(W1 x)` of square Xavier layers."""
    width, depth, logs = 256, 200, []
    for net in range(4):
        rng = np.random.default_rng([41, net])
        w1, w2 = rng.standard_normal((2, depth, width, width)) / width**0.5
        h = [rng.standard_normal(width)]
        for a, b in zip(w1, w2, strict=True):
            branch = a @ np.tanh(h[-1]) if name == "tanh" else b @ np.maximum(a @ h[-1], 0)
            h.append(h[-1] + branch)
        g = top = rng.standard_normal(width)
        for k in reversed(range(depth)):
            if name == "tanh":
                g = g + (1 - np.tanh(h[k]) ** 2) * (w1[k].T @ g)
            else:
                g = g + w1[k].T @ ((w1[k] @ h[k] > 0) * (w2[k].T @ g))
        logs.append(_log_gain(g, top))
    ours = np.std(logs, ddof=1) / len(logs) ** 0.5
    assert abs(np.mean(logs) - figure) < 4 * np.hypot(ours, error), logs
    if name == "relu":  # a factor of 1.5 a block, in mean square
        below = depth / 2 * np.log(1.5) - np.mean(logs)
        assert -4 * ours < below < depth / width + 4 * ours


@pytest.mark.parametrize(
    ("kind", "edge", "figure"),
    [
        ("linear Gaussian", 23.09, 21.3),
        ("ReLU Gaussian", 43.55, 41.9),
        ("ReLU orthogonal", 20.37, 18.9),
    ],
)
def test_the_largest_squared_singular_value_lies_below_the_edge_by_the_measured_share(
    kind, edge, figure
):
    """Pennington, Schoenholz, Ganguli 2018: 8 layers, width 600, in units of the mean square."""
    width, depth, found = 600, 8, []
    for net in range(6):
        rng = np.random.default_rng([42, net])
        product = np.eye(width)
        for _ in range(depth):
            layer = rng.standard_normal((width, width))
            if kind == "ReLU orthogonal":
                layer = np.linalg.qr(layer)[0]
            if kind != "linear Gaussian":
                layer = (rng.random(width) < 0.5)[:, None] * layer
            product = layer @ product
            product /= np.linalg.norm(product) / width**0.5
        found.append(np.linalg.norm(product, 2) ** 2)
    error = np.std(found, ddof=1) / len(found) ** 0.5
    assert abs(np.mean(found) - figure) < 4 * np.hypot(error, error) + 0.02 * figure, found
    assert np.mean(found) < edge


def test_the_stream_of_a_pre_ln_net_grows_by_one_half_a_block():
    """`q_l = 1 + l / 2`, Xavier ReLU blocks of width 128 (R. Xiong et al. 2020, lemma 2)."""
    width, depth, curves = 128, 96, []
    for net in range(4):
        rng = np.random.default_rng([43, net])
        x = rng.standard_normal((width, 8))
        q = [np.mean(x**2)]
        for _ in range(depth):
            w1, w2 = rng.standard_normal((2, width, width)) / width**0.5
            normal = (x - x.mean(0)) / x.std(0)
            x = x + w2 @ np.maximum(w1 @ normal, 0)
            q.append(np.mean(x**2))
        curves.append(np.polyfit(np.arange(depth + 1), q, 1))
    slope, intercept = np.mean(curves, 0)
    error = np.std(curves, 0, ddof=1)[1] / len(curves) ** 0.5
    assert abs(slope - 0.519) < 0.1 * 0.519, curves
    assert abs(intercept - 0.999) < 4 * error, curves
