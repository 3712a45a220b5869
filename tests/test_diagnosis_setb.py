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
