"""Diagnosis of programs where a plain reading of symptoms errs: one test a lesson."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgrad as jg
from jaxgrad import data

pytestmark = pytest.mark.filterwarnings("ignore")


def dense(key, sizes, gain):
    keys = jax.random.split(jax.random.key(key), len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (m, n)) * np.sqrt(gain / m), "b": jnp.zeros(n)}
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def applied(layers, x, activation):
    for layer in layers[:-1]:
        x = activation(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def alarms(report):
    return [f.code for f in report.findings if f.severity != "info"]


def residual_of_sine(layers, x):
    """u'' = -sin: the loss sees derivatives of the net, and its values at the ends alone."""

    def u(t):
        return applied(layers, t[None], jnp.tanh)[0]

    residual = jax.vmap(lambda t: jax.grad(jax.grad(u))(t) + jnp.sin(t))(x)
    return jnp.mean(residual**2) + u(jnp.array(0.0)) ** 2 + u(jnp.array(np.pi)) ** 2


def test_values_that_the_loss_differentiates_and_does_not_use_have_not_vanished():
    rng = np.random.default_rng(0)
    batches = [jnp.asarray(rng.uniform(0, np.pi, 64), jnp.float32) for _ in range(4)]
    report = jg.diagnose(
        residual_of_sine, dense(0, [1, 32, 32, 1], 1.0), batches[0], optimizer=optax.adam(1e-3),
        batches=batches,
    )  # fmt: skip
    assert alarms(report) == [], report


def classification(layers, batch):
    logits = applied(layers, batch[0], jax.nn.relu)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


@pytest.mark.parametrize(("trained", "expected"), [(True, []), (False, ["lr.too_low"])])
def test_small_steps_are_a_fault_at_the_start_and_no_fault_in_fine_tuning(trained, expected):
    train = data.digits().train
    batches = [(train.x[i : i + 128], train.y[i : i + 128]) for i in range(0, 1024, 128)]
    layers = dense(1, [64, 64, 10], 2.0)
    if trained:
        tx = optax.adam(1e-3)
        state = tx.init(layers)

        @jax.jit
        def step(layers, state, batch):
            updates, state = tx.update(jax.grad(classification)(layers, batch), state)
            return optax.apply_updates(layers, updates), state

        for k in range(300):
            layers, state = step(layers, state, batches[k % len(batches)])
    rate = 1e-5 if trained else 1e-7
    report = jg.diagnose(
        classification, layers, batches[0], optimizer=optax.adam(rate), batches=batches
    )
    assert alarms(report) == expected, report


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "expected"), [(0.3, ["lr.too_high"]), (3e-3, [])])
def test_a_loss_that_falls_to_the_frequencies_of_the_labels_hides_no_high_rate(rate, expected):
    text = data.english_text()
    ids, width = np.asarray(text.ids), 48
    keys = jax.random.split(jax.random.key(2), 4)
    many = len(text.vocabulary)

    def normal(key, m, n):
        return jax.random.normal(key, (m, n)) / np.sqrt(m)

    params = {
        "embed": 0.3 * jax.random.normal(keys[0], (many, width)),
        "in": normal(keys[1], width, 3 * width),
        "state": normal(keys[2], width, 3 * width),
        "out": {"w": normal(keys[3], width, many), "b": jnp.zeros(many)},
    }

    def loss(params, windows):
        def step(h, x):
            of_x, of_h = x @ params["in"], h @ params["state"]
            z, r = jnp.split(jax.nn.sigmoid(of_x + of_h)[:, : 2 * width], 2, -1)
            new = jnp.tanh(of_x[:, 2 * width :] + r * of_h[:, 2 * width :])
            h = (1 - z) * new + z * h
            return h, h

        xs = jnp.swapaxes(params["embed"][windows[:, :-1]], 0, 1)
        _, hs = jax.lax.scan(step, jnp.zeros((windows.shape[0], width)), xs)
        logits = hs @ params["out"]["w"] + params["out"]["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:].T).mean()

    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(ids) - 33, (12, 32))
    batches = [jnp.asarray(np.stack([ids[s : s + 33] for s in row])) for row in starts]
    report = jg.diagnose(loss, params, batches[0], optimizer=optax.adam(rate), batches=batches)
    assert alarms(report) == expected, report


def test_the_discarded_branch_of_a_where_is_named_by_the_operation_behind_its_gradient():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 10)).astype(np.float32)
    counts = rng.poisson(np.exp(0.3 * x.sum(-1))).astype(np.float32)

    def deviance(layers, batch):
        rate = jnp.maximum(applied(layers, batch[0], jax.nn.relu)[:, 0], 0.0)
        return -jnp.where(rate > 0, batch[1] * jnp.log(rate) - rate, 0.0).mean()

    report = jg.diagnose(
        deviance, dense(0, [10, 32, 1], 2.0), (x, counts), optimizer=optax.adam(1e-3)
    )
    assert report.primary.code == "gradient.nonfinite", report
    found = report.primary.evidence
    assert (found["operation"], found["pass"]) == ("log", "backward")
    assert "jnp.log(safe)" in report.primary.fix
