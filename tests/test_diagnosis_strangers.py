"""Diagnosis of programs of strangers: what their faults had in common, each beside its twin."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diagnosis_cases import CLASSES, WIDTH, cross_entropy, data, dense, examined, net, primary

pytestmark = pytest.mark.filterwarnings("ignore")


# --------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("divisor", ["own tokens", "tokens of a typical batch"])
def test_a_constant_divisor_weighs_all_tokens_alike(divisor: str) -> None:
    masks = [np.arange(32) < (32 if i % 4 == 0 else 2) for i in range(8)]
    batches = [(*b, m.astype(np.float32)) for b, m in zip(data(count=8), masks, strict=True)]

    def loss(layers: Any, batch: Any) -> Any:
        x, y, mask = batch
        each = optax.softmax_cross_entropy_with_integer_labels(net(layers, x), y)
        return (each * mask).sum() / (mask.sum() if divisor == "own tokens" else 10.0)

    tx = optax.MultiSteps(optax.adam(1e-2), every_k_schedule=4)
    found = primary(loss, dense(), batches, tx)
    assert found == ("accumulation.misweighted" if divisor == "own tokens" else None)


# --------------------------------------------------------------------------- arguments


def test_a_module_of_flags_is_a_mask_though_it_can_be_called() -> None:
    model = eqx.nn.MLP(WIDTH, CLASSES, 32, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    mask = jax.tree.map(lambda _: False, params)
    mask = eqx.tree_at(lambda m: m.layers[1], mask, jax.tree.map(lambda _: True, mask.layers[1]))
    assert callable(mask)

    def loss(params: Any, batch: Any) -> Any:
        hidden = jax.lax.stop_gradient(jax.vmap(params.layers[0])(batch[0]))
        logits = jax.vmap(eqx.combine(params, static).layers[1])(jax.nn.relu(hidden))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    assert primary(loss, params, data(), optax.adam(1e-2), trainable=mask) is None
    assert primary(loss, params, data(), optax.adam(1e-2)) is not None


# --------------------------------------------------------------------------- clips


@pytest.mark.parametrize(
    ("clip", "expected"),
    [(optax.adaptive_grad_clip(0.1), None), (optax.clip(1e-4), "optimizer.clip_always")],
    ids=["adaptive", "by value"],
)
def test_a_clip_is_measured_by_all_that_it_leaves_of_a_gradient(
    clip: Any, expected: str | None
) -> None:
    """Zero biases have next to no size of their own, and are clipped to it at every step."""
    tx = optax.chain(clip, optax.sgd(0.1, momentum=0.9))
    assert primary(cross_entropy, dense((WIDTH, 32, CLASSES)), data(), tx) == expected


# --------------------------------------------------------------------------- units


@pytest.mark.parametrize(("bias", "expected"), [(-30.0, "unit.dead"), (0.3, None)])
def test_a_narrow_layer_that_is_silent_for_good_is_dead(bias: float, expected: str | None) -> None:
    layers = dense((WIDTH, 2, CLASSES), gain=4.0, seed=3)
    layers[0]["b"] = jnp.full(2, bias)
    report = examined(cross_entropy, layers, data())
    assert (report.primary and report.primary.code) == expected


# --------------------------------------------------------------------------- paths


@pytest.mark.parametrize("straight_through", [False, True])
def test_a_block_behind_a_table_that_learns_is_named_after_the_layer_before(
    straight_through: bool,
) -> None:
    """The nearest row of a codebook: the rows get gradients, what is compared with them none."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "codebook": jax.random.normal(keys[0], (16, 4)),
        "decoder": 0.4 * jax.random.normal(keys[1], (4, WIDTH)),
        "encoder": 0.4 * jax.random.normal(keys[2], (WIDTH, 4)),
    }

    def loss(p: Any, x: Any) -> Any:
        z = x @ p["encoder"]
        nearest = jnp.argmin(jnp.square(z[:, None] - p["codebook"]).sum(-1), -1)
        q = p["codebook"][nearest]
        if straight_through:
            moved = jnp.mean(jnp.square(jax.lax.stop_gradient(z) - q))
            kept = jnp.mean(jnp.square(z - jax.lax.stop_gradient(q)))
            q = z + jax.lax.stop_gradient(q - z)
            return jnp.mean(jnp.square(q @ p["decoder"] - x)) + moved + 0.25 * kept
        return jnp.mean(jnp.square(q @ p["decoder"] - x))

    report = examined(loss, params, [x for x, _ in data()])
    if straight_through:
        assert report.primary is None
    else:
        assert report.primary is not None
        assert (report.primary.code, report.primary.where) == ("gradient.blocked", "encoder")


# --------------------------------------------------------------------------- float16


def hand_made_sigmoid(x: Any) -> Any:
    """Right beyond the range of float16, too: exp(-x) is infinite, and the quotient zero."""
    return 1 / (1 + jnp.exp(-x))


@pytest.mark.parametrize(
    ("norm", "expected"),
    [("float16", "precision.overflow"), ("float32", None), ("sigmoid", None)],
)
def test_an_infinity_of_float16_that_becomes_a_zero_is_an_overflow_if_it_costs_the_run(
    norm: str, expected: str | None
) -> None:
    def loss(layers: Any, batch: Any) -> Any:
        x = batch[0].astype(jnp.float16)
        wide = jnp.float32 if norm == "float32" else jnp.float16
        if norm == "sigmoid":
            x = hand_made_sigmoid(x / 50)
        else:
            squares = jnp.sum(jnp.square(x.astype(wide)), -1, keepdims=True)
            x = x * jax.lax.rsqrt(squares / WIDTH).astype(jnp.float16)
        half = jax.tree.map(lambda w: w.astype(jnp.float16), layers)
        logits = net(half, x).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    report = examined(loss, dense((WIDTH, 32, CLASSES)), data(scale=600.0), optax.adam(1e-2))
    assert (report.primary and report.primary.code) == expected
    if report.primary is not None:
        facts = report.primary.evidence
        assert facts["loss_with_values_held"] < 0.5 * facts["loss_as_given"]


# --------------------------------------------------------------------------- terms of a loss


@pytest.mark.parametrize(
    ("reduce", "expected"), [(jnp.sum, "regularization.dominates"), (jnp.mean, None)]
)
def test_a_divergence_that_takes_long_to_pay_off_empties_the_code(
    reduce: Any, expected: str | None
) -> None:
    """Summed over the batch beside a mean of squares; a step of Adam is small beside it."""
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((3, 24)) / np.sqrt(3)
    made = [(rng.standard_normal((32, 3)) @ basis).astype(np.float32) for _ in range(6)]
    keys = jax.random.split(jax.random.key(1), 3)
    params = {
        "mu": jax.random.normal(keys[0], (24, 8)) / np.sqrt(24),
        "log_variance": 0.3 * jax.random.normal(keys[1], (24, 8)) / np.sqrt(24),
        "decoder": dense((8, 64, 24), 0.5, seed=2),
    }

    def loss(p: Any, x: Any, key: Any) -> Any:
        mu, log_variance = x @ p["mu"], x @ p["log_variance"]
        z = mu + jnp.exp(log_variance / 2) * jax.random.normal(key, mu.shape)
        divergence = 0.5 * (jnp.square(mu) + jnp.exp(log_variance) - 1 - log_variance).sum(-1)
        scale = 1.0 if reduce is jnp.sum else 0.01
        return jnp.mean(jnp.square(net(p["decoder"], z) - x)) + scale * reduce(divergence)

    tx = optax.adam(1.5e-3)
    assert primary(loss, params, made, tx, key=jax.random.key(2)) == expected


def boundary_value_problem(weight: float, std: float | None) -> tuple[Any, Any, list[Any]]:
    """u'' = f on an interval, u = 0 at both ends; weights of a given size, or 1 / fan_in."""
    sizes = ((1, 32), *[(32, 32)] * 4, (32, 1))
    keys = jax.random.split(jax.random.key(0), len(sizes))
    params = [
        ((std or s[0] ** -0.5) * jax.random.normal(k, s), jnp.zeros(s[1]))
        for k, s in zip(keys, sizes, strict=True)
    ]

    def solution(params: Any, x: Any) -> Any:
        h = x[None]
        for w, b in params[:-1]:
            h = jnp.tanh(h @ w + b)
        return (h @ params[-1][0] + params[-1][1])[0]

    def loss(params: Any, batch: Any) -> Any:
        xs, f = batch
        second = jax.vmap(jax.grad(jax.grad(solution, 1), 1), (None, 0))(params, xs)
        ends = solution(params, jnp.float32(0)) ** 2 + solution(params, jnp.float32(1)) ** 2
        return jnp.mean((second - f) ** 2) + weight * ends

    rng = np.random.default_rng(0)
    xs = [rng.random(64).astype(np.float32) for _ in range(8)]
    return loss, params, [(x, (-(np.pi**2) * np.sin(np.pi * x)).astype(np.float32)) for x in xs]


@pytest.mark.parametrize(
    ("weight", "std", "rate", "expected"),
    [
        (10.0, 0.02, 5e-4, "init.too_small"), (10.0, None, 5e-4, None),
        (1e5, None, 2e-3, "regularization.dominates"),
    ],
)  # fmt: skip
def test_a_boundary_condition_dominates_where_the_equation_is_given_up_for_it_alone(
    weight: float, std: float | None, rate: float, expected: str | None
) -> None:
    """How hard it pulls at first says nothing: behind tiny weights it pulls far harder, too.

    Those let the loss fall, only late: from weights of the needed scale it is long at its end.
    """
    report = examined(*boundary_value_problem(weight, std), optax.adam(rate))
    assert (report.primary and report.primary.code) == expected
