"""What rules refuse, and what they let pass: hyperparameters, Python numbers, empty trees."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad import optim
from tests.optim_cases import RULES

WITHOUT_RATE = "adafactor"  # its learning rate is optional
NAMES = sorted({case.name for case in RULES.values()} - {WITHOUT_RATE})


@pytest.mark.parametrize("name", NAMES)
def test_a_learning_rate_that_is_no_number_is_an_error_and_never_goes_uphill(name):
    for rate in (None, "0.1"):
        with pytest.raises(TypeError, match=r"learning_rate: expected a number or a schedule"):
            getattr(optim, name)(rate)
    p = jnp.ones((2, 2))
    free = optim.adafactor(None)
    assert np.all(free.update(p, free.init(p), p)[0] < 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_negative_weight_decay_is_an_error(name):
    if "weight_decay" not in inspect.signature(getattr(optim, name)).parameters:
        pytest.skip("does not decay")
    with pytest.raises(ValueError, match=r"weight_decay: expected a number >= 0, got -0\.1"):
        getattr(optim, name)(0.1, weight_decay=-0.1)


@pytest.mark.parametrize("key", RULES)
def test_an_empty_tree_has_an_empty_update(key):
    tx = RULES[key].hand(0.1)
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert tx.update({}, state, {})[0] == {}


def test_a_gradient_for_a_python_number_is_an_error_that_says_what_to_do():
    tx = optim.adam(0.1)
    state = tx.init({"w": 1.0})
    with pytest.raises(TypeError, match=r"Python number 1\.0.*jnp\.asarray"):
        tx.update({"w": jnp.ones(())}, state, {"w": 1.0})


def test_a_micro_batch_of_no_tokens_counts_for_nothing_even_if_its_gradient_is_nan():
    for mean, wanted in ((True, -2.0), (False, -6.0)):
        tx = optim.accumulate(optim.sgd(1.0), 3, weights="tokens", mean=mean)
        p = jnp.ones(1)
        state = tx.init(p)
        for g, n in ((np.nan, 0), (2.0, 3), (np.nan, 0)):
            u, state = tx.update(jnp.array([g]), state, p, tokens=n)
        assert float(u[0]) == wanted


def test_a_negative_number_of_tokens_is_loud():
    tx, p = optim.accumulate(optim.sgd(1.0), 1, weights="tokens"), jnp.ones(1)
    u, _ = tx.update(p, tx.init(p), p, tokens=-1)
    assert np.isnan(u).all()


def test_the_accumulator_has_the_dtype_asked_for():
    p = {"w": jnp.ones(2), "h": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(2, jnp.complex64)}
    acc = optim.accumulate(optim.sgd(1.0), 2, accumulator_dtype=jnp.bfloat16).init(p).acc_grads
    assert {k: v.dtype.name for k, v in acc.items()} == {
        "w": "bfloat16",
        "h": "bfloat16",
        "c": "complex64",
    }
