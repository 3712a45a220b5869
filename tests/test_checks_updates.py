"""Do two transformations make the same updates? Infinities, complex numbers, missing leaves."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxgrad import checks, optim

PARAMS = {"a": jnp.ones((4, 3)), "b": jnp.full(5, 0.5)}


def _differ(tx_a, tx_b, params=PARAMS, match="updates differ"):
    with pytest.raises(AssertionError, match=match):
        checks.assert_same_updates(tx_a, tx_b, params, steps=3)


def test_infinite_updates_are_compared_too():
    infinite = optax.scale(jnp.inf)
    checks.assert_same_updates(infinite, infinite, PARAMS, steps=2)
    _differ(infinite, optax.scale(-jnp.inf))
    _differ(infinite, optax.scale(1.0))
    _differ(optax.scale(1.0), infinite)


def test_the_imaginary_part_counts():
    conjugate = optax.stateless(lambda u, _: jax.tree.map(jnp.conj, u))
    p = {"a": jnp.ones(2, jnp.complex64)}
    checks.assert_same_updates(optax.sgd(0.1), optim.sgd(0.1), p, steps=3)
    _differ(optax.sgd(0.1), optax.chain(conjugate, optax.sgd(0.1)), p)


def test_leaves_without_gradients_and_empty_trees_are_passed_by():
    p = {"a": jnp.ones(2), "n": None, "i": jnp.arange(2)}
    checks.assert_same_updates(optim.adam(0.1), optim.adam(0.1), p, steps=3)
    _differ(optim.adam(0.1), optim.adam(0.2), p, match="leaf 'a'")
    checks.assert_same_updates(optax.sgd(0.1), optax.sgd(0.1), {}, steps=2)


def test_a_leaf_that_only_one_updates_is_named_by_the_structures():
    half = optax.stateless(lambda u, _: {"a": -0.1 * u["a"], "b": None})
    _differ(optax.sgd(0.1), half, match="differ in structure")
