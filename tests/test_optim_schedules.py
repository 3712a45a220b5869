"""Schedules: their values at every joint, and their twins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad import optim

CASES = {
    "constant": (0.3,),
    "warmup_cosine": (0.0, 1.0, 10, 100, 0.1),
    "warmup_linear": (0.1, 1.0, 10, 60, 0.2),
    "warmup_stable_decay": (0.0, 2.0, 5, 20, 30, 0.1),
    "inverse_sqrt": (1.0, 16),
}


@pytest.mark.parametrize("name", CASES)
def test_a_schedule_equals_its_twin_at_every_step(name):
    ours, theirs = getattr(optim, name)(*CASES[name]), getattr(optim.chains, name)(*CASES[name])
    steps = jnp.arange(130)
    a = jax.jit(jax.vmap(lambda n: jnp.asarray(ours(n))))(steps)
    b = jax.jit(jax.vmap(lambda n: jnp.asarray(theirs(n))))(steps)
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
    assert float(ours(3)) == pytest.approx(float(a[3]), rel=1e-6)


def test_warm_up_cosine_has_the_values_of_the_reference():
    schedule = optim.warmup_cosine(0, 1, 10, 100, 0.1)
    for step, value in (
        (0, 0),
        (1, 0.1),
        (9, 0.9),
        (10, 1),
        (55, 0.55),
        (99, 0.100274),
        (500, 0.1),
    ):
        assert float(schedule(step)) == pytest.approx(value, abs=1e-6)


def test_stable_decay_has_three_phases_and_inverse_sqrt_halves_at_four_times_the_warm_up():
    schedule = optim.warmup_stable_decay(0.0, 2.0, 4, 10, 8, 0.0)
    values = [float(schedule(n)) for n in (0, 2, 4, 9, 14, 18, 22, 99)]
    np.testing.assert_allclose(values, [0, 1, 2, 2, 2, 1, 0, 0], atol=1e-6)
    decay = optim.inverse_sqrt(1.0, 16)
    np.testing.assert_allclose([decay(8), decay(16), decay(64)], [0.5, 1, 0.5], rtol=1e-6)


def test_no_warm_up_starts_at_the_peak():
    assert float(optim.warmup_cosine(0, 1, 0, 10)(0)) == 1
    assert float(optim.warmup_linear(0, 1, 0, 10)(5)) == pytest.approx(0.5)


def test_the_first_update_uses_schedule_of_zero():
    tx = optim.sgd(optim.warmup_linear(0.0, 1.0, 2, 10))
    p, state, seen = jnp.ones(1), tx.init(jnp.ones(1)), []
    for _ in range(3):
        u, state = tx.update(p, state)
        seen.append(float(u[0]))
    np.testing.assert_allclose(seen, [0, -0.5, -1])


def test_lengths_that_make_no_sense_are_errors():
    for make in (
        lambda: optim.warmup_cosine(0, 1, 10, 10),
        lambda: optim.warmup_linear(0, 1, 10, 10),
        lambda: optim.warmup_stable_decay(0, 1, -1, 5, 5),
        lambda: optim.inverse_sqrt(1.0, 0),
    ):
        with pytest.raises(ValueError, match="steps"):
            make()
