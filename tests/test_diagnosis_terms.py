"""Diagnosis of weight decay and of targets in their raw units, each beside its healthy twin."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diagnosis_cases import CLASSES, WIDTH, cross_entropy, data, dense, examined, net

pytestmark = pytest.mark.filterwarnings("ignore")

WARM = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 20, 2_000)


@pytest.mark.parametrize(("decay", "expected"), [(30.0, "regularization.dominates"), (0.01, None)])
def test_a_decay_behind_a_rate_that_begins_at_zero_is_weighed(
    decay: float, expected: str | None
) -> None:
    tx = optax.adamw(WARM, weight_decay=decay)
    report = examined(cross_entropy, dense((WIDTH, 32, CLASSES)), data(), tx)
    assert (report.primary and report.primary.code) == expected
    if report.primary is not None:
        # Adam's step is about one a parameter, and the decay takes `decay` times the parameter
        rms = np.sqrt(np.mean(np.square(np.concatenate([np.ravel(p["w"]) for p in dense()]))))
        ratio = report.primary.evidence["penalty_over_data"]
        assert 0.2 * decay * rms < ratio < 5 * decay * rms


@pytest.mark.parametrize("rule", [optax.lamb, optax.adafactor, optax.lars])
def test_steps_that_go_by_the_size_of_the_parameters_are_no_decay(rule: Any) -> None:
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.3 if rule is optax.lars else 0.02, 20, 2_000)
    report = examined(cross_entropy, dense((WIDTH, 32, CLASSES)), data(), rule(rate))
    assert "regularization.dominates" not in [f.code for f in report.findings]


def test_a_decay_that_overshoots_zero_is_the_cause_of_what_breaks() -> None:
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.03, weight_decay=100.0))
    report = examined(cross_entropy, dense((WIDTH, 32, CLASSES)), data(), tx)
    assert report.primary is not None
    assert report.primary.code == "regularization.dominates"
    np.testing.assert_allclose(report.primary.evidence["decay_over_parameters"], 3.0, rtol=1e-3)


def _columns(scale: float, count: int = 8) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs and four columns of targets, in units of their own."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((WIDTH, 4))
    xs = [rng.standard_normal((32, WIDTH)).astype(np.float32) for _ in range(count)]
    means = np.array([1.0, 30.0, 100.0, 300.0])
    return [(x, (scale * (np.tanh(x @ w) + means * (scale > 1))).astype(np.float32)) for x in xs]


@pytest.mark.parametrize(("scale", "expected"), [(300.0, "data.unnormalized"), (1.0, None)])
@pytest.mark.parametrize("written", [False, True])
def test_raw_targets_of_which_only_the_means_are_learned_are_told(
    scale: float, expected: str | None, written: bool
) -> None:
    def loss(layers: Any, batch: Any) -> jax.Array:
        y = batch[1] + 1.0 if written else batch[1]
        layers = [layer | {"w": jnp.asarray(layer["w"])} for layer in layers]
        h = jnp.tanh(net(layers[:2], batch[0]))
        return jnp.square(h @ layers[2]["w"] + layers[2]["b"] - y).mean()

    params = dense((WIDTH, 32, 32, 4), gain=1.0)
    report = examined(loss, params, _columns(scale), optax.sgd(0.02, momentum=0.9))
    assert (report.primary and report.primary.code) == expected


@pytest.mark.parametrize(("axis", "expected"), [(0, "loss.output_mismatch"), (-1, None)])
def test_a_softmax_of_sequences_over_their_batch_is_told(axis: int, expected: str | None) -> None:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 6, (16, 1)) + np.arange(13) for _ in range(8)]
    batches = [(t[:, :-1] % 6, t[:, 1:] % 6) for t in tokens]

    def loss(layers: Any, batch: Any) -> jax.Array:
        logs = jax.nn.log_softmax(net(layers, jax.nn.one_hot(batch[0], WIDTH)), axis=axis)
        return -jnp.take_along_axis(logs, batch[1][..., None], -1).mean()

    report = examined(loss, dense((WIDTH, 32, 6)), batches, optax.adam(1e-2))
    assert (report.primary and report.primary.code) == expected
