"""Faults as strangers write them, each beside its right twin: one mended rule a pair."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diagnosis_cases import CLASSES, WIDTH, data, dense, examined, net

pytestmark = pytest.mark.filterwarnings("ignore")


def codes(*args, **more):
    return [f.code for f in examined(*args, **more).findings if f.severity != "info"]


def ratings(rank=4, rows=24):
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, rows, rank)).astype(np.float32)
    picks = rng.integers(0, rows, (6, 2, 128))
    values = [(left[u] * right[i]).sum(1) / np.sqrt(rank) for u, i in picks]
    return [(u, i, y) for (u, i), y in zip(picks, values, strict=True)]


def factorization(params, batch):
    user, item, value = batch
    dots = (params["user"][user] * params["item"][item]).sum(-1)
    return jnp.mean((dots + params["bias"][item] - value) ** 2)


@pytest.mark.parametrize(("constant", "expected"), [(True, ["init.symmetric"]), (False, [])])
def test_latent_factors_that_all_start_equal_stay_one_factor(constant, expected):
    batches = [tuple(map(jnp.asarray, b)) for b in ratings()]
    shape = (24, 8)
    draw = {
        name: jnp.full(shape, 0.1)
        if constant
        else 0.3 * jax.random.normal(jax.random.key(k), shape)
        for k, name in enumerate(("user", "item"))
    }
    params = draw | {"bias": jnp.zeros(24)}
    assert codes(factorization, params, batches, optax.adam(2e-2)) == expected


@pytest.mark.parametrize(
    ("head", "expected"), [(jax.nn.softmax, ["loss.double_softmax"]), (lambda z: z, [])]
)
def test_probabilities_divided_by_a_temperature_are_no_logits(head, expected):
    teacher = dense((WIDTH, CLASSES), 4.0, seed=7)

    def distillation(layers, batch):
        soft = jax.nn.softmax(net(teacher, batch[0]) / 2)
        return 4 * optax.softmax_cross_entropy(head(net(layers, batch[0])) / 2, soft).mean()

    assert codes(distillation, dense(), data()) == expected


def test_logits_that_are_probabilities_times_a_large_factor_are_no_fault():
    def sharp(layers, batch):
        logits = 30 * jax.nn.softmax(net(layers, batch[0]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    assert "loss.double_softmax" not in codes(sharp, dense(), data())


def regression(layers, batch):
    return jnp.mean((net(layers, batch[0])[:, 0] - batch[1]) ** 2)


def linear_targets(shift, scale, count=16):
    rng = np.random.default_rng(3)
    w = rng.standard_normal((8, 2))
    xs = [rng.standard_normal((16, 8)).astype(np.float32) for _ in range(count)]
    return [
        (jnp.asarray(x), jnp.asarray(shift + scale * np.tanh(x @ w).sum(1), jnp.float32))
        for x in xs
    ]


@pytest.mark.parametrize("summed", [True, False])
def test_a_sum_of_gradients_that_breaks_a_run_which_their_mean_does_not_break(summed):
    sgd = optax.sgd(0.1, momentum=0.9)
    tx = optax.chain(optax.apply_every(8), sgd) if summed else optax.MultiSteps(sgd, 8)
    found = examined(regression, dense((8, 32, 32, 1)), linear_targets(1.0, 2.0), tx).primary
    assert (found is not None and found.code == "accumulation.sums") == summed, found


@pytest.mark.parametrize("raw", [True, False])
def test_energies_far_from_zero_are_told_though_the_loss_falls_a_lot(raw):
    batches = linear_targets(-400.0, 4.0) if raw else linear_targets(0.0, 1.0)
    expected = ["data.unnormalized"] if raw else []
    assert codes(regression, dense((8, 32, 32, 1)), batches, optax.adam(3e-3)) == expected


def waves(size=32, count=16, steps=16):
    rng = np.random.default_rng(8)
    batches = []
    for _ in range(count):
        y = rng.integers(0, CLASSES, size)
        phase = rng.uniform(0, 6, (size, 1, 2)) + 0.3 * (y + 1)[:, None, None] * np.arange(
            steps
        ).reshape(1, -1, 1)
        noise = 0.1 * rng.standard_normal((size, steps, 2))
        batches.append((jnp.asarray(np.sin(phase) + noise, jnp.float32), jnp.asarray(y)))
    return batches


def recurrent(draw, time_major):
    """A gated cell over sequences of (batch, time, 2)."""
    width = 24
    shapes = {"xz": (2, width), "hz": (width, width), "xc": (2, width), "hc": (width, width)}
    params = {n: draw(jax.random.key(i), s) for i, (n, s) in enumerate(shapes.items())}
    params["out"] = jax.random.normal(jax.random.key(9), (width, CLASSES)) / 5

    def loss(p, batch):
        def step(h, x):
            z = jax.nn.sigmoid(x @ p["xz"] + h @ p["hz"])
            return (1 - z) * h + z * jnp.tanh(x @ p["xc"] + h @ p["hc"]), None

        h, _ = jax.lax.scan(step, jnp.zeros((batch[0].shape[0], width)), time_major(batch[0]))
        logits = h @ p["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return loss, params


def usual(key, shape):
    return jax.random.normal(key, shape) * shape[0] ** -0.5


def transposed(x):
    return x.transpose(1, 0, 2)


def reshaped(x):
    return x.reshape(x.shape[1], x.shape[0], -1)


@pytest.mark.parametrize(
    ("draw", "time_major", "expected"),
    [
        (usual, transposed, []),
        (usual, reshaped, ["loss.output_mismatch"]),
        (jax.random.uniform, transposed, ["unit.saturated"]),
    ],
)
def test_examples_mixed_by_a_reshape_and_gates_shut_by_positive_weights(draw, time_major, expected):
    loss, params = recurrent(draw, time_major)
    assert codes(loss, params, waves(), optax.adam(1e-2)) == expected


@pytest.mark.parametrize(("kept", "expected"), [(False, ["gradient.blocked"]), (True, [])])
def test_a_sum_with_positions_that_is_thrown_away(kept, expected):
    rng = np.random.default_rng(9)
    batches = []
    for _ in range(16):
        x, y = 0.1 * rng.standard_normal((64, 6, WIDTH)), rng.integers(0, CLASSES, 64)
        x[np.arange(64), y, 0] += 3  # where the mark stands is the class
        batches.append((jnp.asarray(x, jnp.float32), jnp.asarray(y)))
    layers = dense((WIDTH, 32, 32, CLASSES))
    params = {"layers": layers, "positions": jax.random.normal(jax.random.key(4), (6, WIDTH))}
    params["embedding"] = jnp.eye(WIDTH)

    def loss(p, batch):
        x = batch[0] @ p["embedding"]
        mixed = x + p["positions"]
        h = jax.nn.relu((mixed if kept else x) @ p["layers"][0]["w"] + p["layers"][0]["b"])
        logits = net(p["layers"][1:], h.mean(1))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    assert codes(loss, params, batches, optax.adam(1e-2)) == expected


def test_a_head_that_the_loss_leaves_out_is_no_fault():
    def loss(p, batch):
        logits = net(p["layers"], batch[0])
        _ = logits + p["offset"]  # of another task
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    params = {"layers": dense(), "offset": jnp.zeros(CLASSES)}
    assert codes(loss, params, data(noise=3.0)) == []
