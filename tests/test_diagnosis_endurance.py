"""Diagnosis of runs that get somewhere and come apart later, beside runs that are only rough."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diagnosis_cases import WIDTH, cross_entropy, data, dense, examined, net, primary

from jaxgrad.diagnosis import endurance
from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.problem import make_problem

RATE = 0.1
pytestmark = pytest.mark.filterwarnings("ignore")


def _regression(w: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    return jnp.square(batch[0] @ w - batch[1]).mean()


@pytest.mark.parametrize(("beyond", "expected"), [(0.05, "lr.too_high"), (-0.05, None)])
def test_a_rate_just_beyond_the_edge_of_stability_is_told(
    beyond: float, expected: str | None
) -> None:
    # two orthogonal features: the first is learned at once; the second, of no use and with almost
    # no weight, grows by this share at every step of gradient descent
    signs = 1 - 2 * (np.arange(64)[:, None] // [1, 2] % 2)
    x = (signs * [1.0, math.sqrt((2 + beyond) / (2 * RATE))]).astype(np.float32)
    batch = (x, 2 * x[:, 0])
    report = examined(_regression, jnp.array([0.0, 2e-4]), [batch], optax.sgd(RATE))
    assert (report.primary and report.primary.code) == expected
    if report.primary is not None:
        found = report.primary.evidence
        assert found["loss_as_given"] < 0.5 * found["first_loss"]
        assert found["loss_after_longer"] > found["first_loss"]
        assert found["loss_after_longer_at_a_tenth"] < 1e-3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_same_training_with_less_momentum_is_healthy(momentum: float) -> None:
    batches = data(size=64, count=8, noise=0.5)
    assert primary(cross_entropy, dense(), batches, optax.sgd(0.03, momentum=momentum)) is None


def test_noise_of_small_batches_is_no_collapse() -> None:
    batches = data(size=8, count=16, noise=1.0)
    assert primary(cross_entropy, dense(), batches, optax.adam(3e-3)) is None


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (np.linspace(4, 1, 50), False),
        (np.linspace(4, 1, 50) + 0.1 * np.sin(np.arange(50)), False),
        (np.r_[np.linspace(4, 1, 30), 2.0, 1.0], True),
        (np.linspace(1, 4, 50), True),
    ],
)
def test_rough_is_a_rise_by_a_share_of_the_fall(losses: np.ndarray, expected: bool) -> None:
    assert endurance._is_rough(losses) is expected


def test_a_longer_training_is_the_same_program_and_the_same_first_steps() -> None:
    batches = [jax.tree.map(jnp.asarray, b) for b in data()]
    problem = make_problem(
        cross_entropy, dense(), batches[0], batches=batches, has_aux=False, key=None, trainable=None
    )
    evidence = Evidence(problem, optax.adam(1e-2), None)
    short, longer = evidence.main, evidence.longer
    assert len(longer.losses) == 3 * len(short.losses)
    np.testing.assert_array_equal(longer.losses[: len(short.losses)], short.losses)
    assert evidence.patient._compiled_step is evidence.trainer._compiled_step


def _sines(count: int = 16) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    w, v = rng.standard_normal((WIDTH, 16)), rng.standard_normal(16)
    xs = [rng.standard_normal((32, WIDTH)).astype(np.float32) for _ in range(count)]
    noise = [0.1 * rng.standard_normal(32) for _ in range(count)]
    return [
        (x, (np.sin(x @ w) @ v / 3 + e).astype(np.float32)) for x, e in zip(xs, noise, strict=True)
    ]


def _fit(layers: Any, batch: Any) -> jax.Array:
    return jnp.square(net(layers, batch[0])[:, 0] - batch[1]).mean()


@pytest.mark.parametrize(("rate", "expected"), [(1.6e-2, "lr.too_high"), (1e-3, None)])
def test_a_rate_at_which_the_loss_stands_above_that_of_a_slower_run_is_told(
    rate: float, expected: str | None
) -> None:
    report = examined(_fit, dense((WIDTH, 64, 64, 1)), _sines(), optax.lion(rate))
    assert (report.primary and report.primary.code) == expected
    if report.primary is not None:
        found = report.primary.evidence
        assert found["loss_as_given"] < 0.7 * found["first_loss"]
        assert found["loss_after_longer_at_a_tenth"] < 0.5 * found["loss_after_longer"]


@pytest.mark.parametrize(("factor", "expected"), [(1e5, "loss.spike"), (1.0, None)])
def test_one_batch_that_spoils_a_rule_for_good_is_named(
    factor: float, expected: str | None
) -> None:
    batches = data(size=64, count=16)
    batches[1] = (batches[1][0] * np.float32(factor), batches[1][1])
    report = examined(cross_entropy, dense((WIDTH, 32, 4)), batches, optax.adagrad(0.02))
    assert (report.primary and report.primary.code) == expected
    if report.primary is not None:
        assert report.primary.where == "step 1"
