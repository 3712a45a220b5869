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
