"""Diagnosis of programs of other fields (RL, densities, autoencoders), each beside its twin."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diagnosis_cases import CLASSES, WIDTH, data, dense, examined, net, primary

pytestmark = pytest.mark.filterwarnings("ignore")


# --------------------------------------------------------------------------- learning rates


def density() -> tuple[Any, Any, list[Any]]:
    """The negative log-likelihood of two affine couplings: a loss without a zero.

    Four coordinates of mere noise add a constant to it, and so take from every share.
    """
    rng = np.random.default_rng(0)
    a = rng.standard_normal((16, 64, 1))
    xs = np.concatenate([a, np.sin(2 * a) + 0.2 * rng.standard_normal(a.shape)], -1)
    noise = rng.standard_normal((16, 64, 4))
    batches = [
        (jnp.asarray(x, jnp.float32), jnp.asarray(n)) for x, n in zip(xs, noise, strict=True)
    ]
    params = [dense((1, 32, 32, 2), 1.0, seed) for seed in (1, 2)]
    params = [[*layers[:-1], jax.tree.map(jnp.zeros_like, layers[-1])] for layers in params]

    def loss(params: Any, batch: Any) -> Any:
        x, logs = batch[0], jnp.zeros((64, 1))
        for layers in params:
            a, b = x[:, 1:], x[:, :1]
            log_scale, shift = jnp.split(net(layers, a), 2, axis=1)
            x, logs = jnp.concatenate([a, b * jnp.exp(log_scale) + shift], 1), logs + log_scale
        energy = 0.5 * (jnp.square(x).sum(1) + jnp.square(batch[1]).sum(1))
        return jnp.mean(energy - logs[:, 0]) + 3 * jnp.log(2 * jnp.pi)

    return loss, params, batches


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (optax.exponential_decay(1e-3, transition_steps=1, decay_rate=0.9), "lr.too_low"),
        (optax.exponential_decay(1e-3, transition_steps=100, decay_rate=0.9), None),
        (optax.cosine_decay_schedule(2e-2, 100), None),
    ],
)
def test_a_decay_by_the_step_shows_on_a_density_whose_loss_has_no_zero(
    rate: optax.Schedule, expected: str | None
) -> None:
    loss, params, batches = density()
    report = examined(loss, params, batches, optax.adam(rate))
    assert (report.primary and report.primary.code) == expected
    if report.primary is not None:
        facts = report.primary.evidence
        before = facts["loss_at_first"] - facts["loss_at_the_end"]
        assert facts["loss_at_the_end"] - facts["loss_taken_up_again"] > 1.5 * before


@pytest.mark.parametrize(("rate", "expected"), [(0.1, "lr.too_high"), (0.003, None)])
def test_a_run_that_overshoots_and_comes_back_half_way_is_too_fast(
    rate: float, expected: str | None
) -> None:
    """It takes off more than half of its start, and leaves far more than a slower one."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((WIDTH, CLASSES))
    batches = []
    for _ in range(16):
        x = rng.standard_normal((64, WIDTH)).astype(np.float32)
        a = rng.integers(0, CLASSES, 64)
        reward = np.tanh(x @ w)[np.arange(64), a] * 2 + 0.5 * rng.standard_normal(64)
        batches.append((x, a.astype(np.int32), reward.astype(np.float32)))

    def loss(layers: Any, batch: Any) -> Any:
        q = jnp.take_along_axis(net(layers, batch[0]), batch[1][:, None], 1)[:, 0]
        return optax.huber_loss(q, batch[2]).mean()

    layers = dense((WIDTH, 64, 64, CLASSES), 1.0)
    tx = optax.rmsprop(rate, decay=0.95, eps=1e-6)
    assert primary(loss, layers, batches, tx) == expected


# --------------------------------------------------------------------------- initialization


@pytest.mark.parametrize(("gain", "expected"), [(1e-4, "init.too_small"), (1.0, None)])
def test_an_autoencoder_of_tiny_weights_that_learns_the_mean_alone_is_found(
    gain: float, expected: str | None
) -> None:
    """The mean of its images is most of the loss, and that much the last bias learns."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((3, WIDTH))
    batches = [
        jnp.asarray(np.tanh(rng.standard_normal((64, 3)) @ mix) + 2.0, jnp.float32)
        for _ in range(16)
    ]
    layers = dense((WIDTH, 24, 12, 6, 12, 24, WIDTH), gain)

    def loss(layers: Any, x: Any) -> Any:
        h = x
        for layer in layers[:-1]:
            h = jnp.tanh(h @ layer["w"] + layer["b"])
        return jnp.mean(jnp.square(h @ layers[-1]["w"] + layers[-1]["b"] - x))

    assert primary(loss, layers, batches, optax.sgd(0.1, momentum=0.9)) == expected


# --------------------------------------------------------------------------- labels


def picked(layers: Any, batch: Any) -> Any:
    logs = jax.nn.log_softmax(net(layers, batch[0]))
    return -logs[jnp.arange(len(batch[1])), batch[1]].mean()


@pytest.mark.parametrize(("first", "expected"), [(1, "data.labels_out_of_range"), (0, None)])
def test_labels_from_one_are_found_where_an_index_is_silently_clamped(
    first: int, expected: str | None
) -> None:
    batches = [(x, y + first) for x, y in data(count=16)]
    assert primary(picked, dense((WIDTH, 32, CLASSES)), batches) == expected


def test_clamped_labels_that_a_mask_takes_out_are_healthy() -> None:
    batches = [(x, np.where(np.arange(len(y)) % 4 == 0, 255, y)) for x, y in data(count=16)]

    def loss(layers: Any, batch: Any) -> Any:
        logs = jax.nn.log_softmax(net(layers, batch[0]))
        each = -logs[jnp.arange(len(batch[1])), batch[1]]
        known = batch[1] < CLASSES
        return jnp.where(known, each, 0.0).sum() / known.sum()

    assert primary(loss, dense((WIDTH, 32, CLASSES)), batches) is None


def test_states_that_are_picked_by_row_and_length_are_no_classes() -> None:
    """The last state of a sequence, of none at all the last of its padding."""
    rng = np.random.default_rng(0)
    batches = []
    for x, y in data(count=16):
        long = rng.standard_normal((len(x), 6, WIDTH)).astype(np.float32)
        length = np.where(np.arange(len(x)) % 8 == 0, 0, rng.integers(1, 7, len(x)))
        long[np.arange(len(x)), length - 1] = x
        batches.append((long, length.astype(np.int32), y))

    def loss(layers: Any, batch: Any) -> Any:
        h = jax.nn.relu(batch[0] @ layers[0]["w"] + layers[0]["b"])
        logs = jax.nn.log_softmax(net(layers[1:], h[jnp.arange(len(h)), batch[1] - 1]))
        return -logs[jnp.arange(len(h)), batch[2]].mean()

    assert primary(loss, dense((WIDTH, 32, 32, CLASSES)), batches) is None
