"""Watching a transformation: the same updates, and three norms that are not mistaken."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgrad import monitor

PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
GRADS = {"w": jnp.full((3, 2), 2.0), "b": jnp.full(2, -1.0)}
RAW = float(np.sqrt(6 * 4 + 2))


def run(tx, steps, grads=GRADS):
    @jax.jit
    def go(params):
        def body(carry, _):
            p, s = carry
            u, s = tx.update(grads, s, p)
            return (optax.apply_updates(p, u), s), u

        return jax.lax.scan(body, (params, tx.init(params)), length=steps)

    (params, state), updates = go(PARAMS)
    return params, state, updates


@pytest.mark.parametrize(
    "tx",
    [optax.adamw(1e-2), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))],
    ids=["adamw", "clipped"],
)
def test_the_updates_are_those_of_the_watched_transformation(tx):
    plain, _, _ = run(tx, 5)
    watched, _, _ = run(monitor.watch(tx, every=2), 5)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(watched), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-7)  # XLA fuses the two programs differently


def test_raw_clipped_and_update_norms_are_three_numbers():
    tx = monitor.watch(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)))
    _, state, _ = run(tx, 3)
    figures = state.figures
    np.testing.assert_allclose(figures.raw, RAW, rtol=1e-6)
    np.testing.assert_allclose(figures.clipped, 1.0, rtol=1e-6)
    np.testing.assert_allclose(figures.update, 0.1, rtol=1e-6)
    np.testing.assert_allclose(figures.alignment, 1.0, rtol=1e-6)
    assert int(state.measured) == int(state.clipped_steps) == int(state.count) == 3


def test_a_clip_after_the_rule_clips_no_gradient():
    tx = monitor.watch(optax.chain(optax.sgd(0.1), optax.clip_by_global_norm(0.01)))
    _, state, _ = run(tx, 1)
    np.testing.assert_allclose(state.figures.clipped, state.figures.raw)
    assert int(state.clipped_steps) == 0
    np.testing.assert_allclose(state.figures.update, 0.01, rtol=1e-6)


def test_only_every_so_many_steps_are_measured():
    _, state, _ = run(monitor.watch(optax.sgd(0.1), every=3), 7)
    assert int(state.count) == 7 and int(state.measured) == 3


def test_ascent_shows_as_a_cosine_of_minus_one_and_nan_as_a_count():
    bad = {"w": GRADS["w"].at[0, 0].set(jnp.nan), "b": GRADS["b"]}
    _, state, _ = run(monitor.watch(optax.sgd(-0.1)), 1)
    np.testing.assert_allclose(state.figures.alignment, -1.0, rtol=1e-6)
    _, state, _ = run(monitor.watch(optax.sgd(0.1)), 1, bad)
    assert float(state.figures.nonfinite) == 1


def test_watching_less_than_every_step_makes_no_sense():
    with pytest.raises(ValueError, match="every >= 1"):
        _ = monitor.watch(optax.sgd(0.1), every=0)
