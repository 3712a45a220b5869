"""Accumulation, guards and loss scaling: what is skipped, what is kept, what one NaN may spoil."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgrad import optim
from tests.optim_cases import SHAPES, same_bits, sample, train


def feed(tx, grads, params=None, **extra):
    params = jnp.zeros(grads[0].shape, jnp.float32) if params is None else params
    state, out = tx.init(params), []
    update = jax.jit(tx.update)
    for i, g in enumerate(grads):
        u, state = update(g, state, params, **{k: v[i] for k, v in extra.items()})
        out.append(np.asarray(u))
    return out, state


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("inner", ["momentum", "lion", "adamw"])
def test_with_optax_numerics_its_updates_are_those_of_multisteps(inner, mean):
    params, grads = sample(SHAPES["nested"], 4, steps=12)
    hand = optim.accumulate(
        getattr(optim, inner)(0.1, numerics="optax"), 3, mean=mean, numerics="optax"
    )
    chain = optim.chains.accumulate(getattr(optim.chains, inner)(0.1), 3, mean=mean)
    (a, _), _ = jax.jit(lambda p, g: train(hand, p, g))(params, grads)
    (b, _), _ = jax.jit(lambda p, g: train(chain, p, g))(params, grads)
    if inner == "lion":
        assert same_bits(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        # Inside a cond XLA may contract multiply-adds differently from beside it.
        scale = max(0.1, np.abs(y).max(initial=0))
        np.testing.assert_allclose(x, y, rtol=0, atol=scale * 4 * 2.0**-23)


def _tokens_loss(p, x, y):
    return jnp.mean((p[0] * x + p[1] - y) ** 2)


TOKENS = (2, 5, 1, 4)
WEIGHTED = {
    "name": lambda tx: optim.accumulate(tx, 4, weights="tokens"),
    "numbers": lambda tx: optim.accumulate(tx, 4, weights=TOKENS),
    "function": lambda tx: optim.accumulate(tx, 4, weights=lambda i: jnp.array(TOKENS)[i]),
}


@jax.jit
def _big_and_split(x, y):
    adam, p = optim.adam(0.1), jnp.array([0.3, -0.2])
    ends = np.cumsum((0, *TOKENS))
    big, _ = adam.update(jax.grad(_tokens_loss)(p, x, y), adam.init(p), p)
    out = {}
    for name, make in WEIGHTED.items():
        tx = make(adam)
        state = tx.init(p)
        for n, start, stop in zip(TOKENS, ends, ends[1:], strict=False):
            g = jax.grad(_tokens_loss)(p, x[start:stop], y[start:stop])
            u, state = tx.update(g, state, p, **({"tokens": n} if name == "name" else {}))
        out[name] = (u, state.inner_opt_state.mu)
    _, wanted = adam.update(jax.grad(_tokens_loss)(p, x, y), adam.init(p), p)
    return big, wanted.mu, out


@given(seed=st.integers(0, 2**31 - 1))
def test_an_unevenly_split_batch_does_what_one_big_batch_does(seed):
    x, y = np.random.default_rng(seed).standard_normal((2, 12)).astype(np.float32)
    big, mu, split = _big_and_split(x, y)
    for u, m in split.values():
        np.testing.assert_allclose(m, mu, rtol=0, atol=2e-6 * np.abs(mu).max())
        np.testing.assert_allclose(u, big, rtol=1e-4)


def test_weighted_sums_and_means_are_what_they_say():
    grads = [jnp.array([1.0]), jnp.array([4.0])]
    for mean, weights, wanted in (
        (True, None, 2.5),
        (False, None, 5.0),
        (True, [3, 1], 1.75),
        (False, [3, 1], 7.0),
    ):
        out, _ = feed(optim.accumulate(optim.sgd(1.0), 2, mean=mean, weights=weights), grads)
        np.testing.assert_allclose([o[0] for o in out], [0, -wanted], rtol=1e-6)


def test_a_schedule_of_the_number_of_micro_batches_counts_real_steps():
    every = lambda step: jnp.where(step < 1, 1, 3)  # noqa: E731
    out, state = feed(optim.accumulate(optim.sgd(1.0), every), [jnp.ones(1)] * 8)
    assert [float(o[0]) for o in out] == [-1, 0, 0, -1, 0, 0, -1, 0]
    assert int(state.gradient_step) == 3


def test_learning_rate_schedules_count_real_steps():
    tx = optim.accumulate(optim.sgd(lambda n: n + 1.0), 2)
    out, _ = feed(tx, [jnp.ones(1)] * 6)
    assert [float(o[0]) for o in out] == [0, -1, 0, -2, 0, -3]


def test_one_nan_micro_batch_spoils_one_step_where_multisteps_never_recovers():
    grads = [jnp.array([g, 1.0]) for g in (np.nan, 1.0, 1.0, 1.0, 1.0, 1.0)]
    theirs, _ = feed(optax.MultiSteps(optax.sgd(1.0), 2), grads)
    assert all(np.isnan(u[0]) for u in theirs)
    ours, _ = feed(optim.accumulate(optim.sgd(1.0), 2), grads)
    assert np.isnan(ours[1][0])
    np.testing.assert_array_equal(ours[3], [-1, -1])
    guarded = optim.accumulate(optim.apply_if_finite(optim.sgd(1.0), 5), 2)
    ours, _ = feed(guarded, grads)
    np.testing.assert_array_equal(ours, [[0, 0], [0, 0], [0, 0], [-1, -1], [0, 0], [-1, -1]])
    theirs, _ = feed(optax.MultiSteps(optax.apply_if_finite(optax.sgd(1.0), 5), 2), grads)
    assert not np.any(theirs)  # zero updates for ever


def test_the_accumulator_is_float32_for_half_precision_and_double_for_double(x64):
    p = {"h": jnp.ones(2, jnp.bfloat16), "d": jnp.ones(2, jnp.float64)}
    state = optim.accumulate(optim.sgd(1.0), 2).init(p)
    assert state.acc_grads["h"].dtype == jnp.float32
    assert state.acc_grads["d"].dtype == jnp.float64


def test_micro_batches_may_be_counted_by_any_integer_and_by_nothing_else():
    for every in (2, np.int64(2), jnp.int32(2), 2.0):
        out, _ = feed(optim.accumulate(optim.sgd(1.0), every), [jnp.ones(1)] * 2)
        assert float(out[1][0]) == -1
    for every in (0, -1, 1.5):
        with pytest.raises(ValueError, match="whole number of micro-batches"):
            optim.accumulate(optim.sgd(1.0), every)
    with pytest.raises(ValueError, match="one a micro-batch"):
        optim.accumulate(optim.sgd(1.0), 3, weights=[1, 2])
    tx = optim.accumulate(optim.sgd(1.0), 2, weights="tokens")
    with pytest.raises(TypeError, match="tokens=number of tokens"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1))


def test_has_updated_tells_real_steps():
    from jaxgrad.optim import has_updated

    tx = optim.accumulate(optim.sgd(1.0), 2)
    p = jnp.ones(1)
    state, seen = tx.init(p), []
    assert not has_updated(state)
    for _ in range(4):
        _, state = tx.update(p, state, p)
        seen.append(bool(has_updated(state)))
    assert seen == [False, True, False, True]


def test_extra_arguments_reach_the_inner_rule():
    inner = optax.polyak_sgd(max_learning_rate=1.0)
    tx = optim.accumulate(inner, 1)
    p = jnp.array([2.0])
    u, _ = tx.update(2 * p, tx.init(p), p, value=jnp.float32(4.0))
    np.testing.assert_allclose(u, [-1.0])


# ------------------------------------------------------------------------------------ guards


def test_apply_if_finite_equals_optax_and_gives_up_after_the_same_number():
    grads = [jnp.array([g]) for g in (1.0, np.nan, np.nan, np.nan, 1.0)]
    for numerics in ("exact", "optax"):
        tx = optim.apply_if_finite(optim.sgd(1.0), 2, numerics=numerics)
        ours, state = feed(tx, grads)
        theirs, wanted = feed(optim.chains.apply_if_finite(optax.sgd(1.0), 2), grads)
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(np.ravel(ours)[:4], [-1, 0, 0, np.nan])
        assert int(state.total_notfinite) == int(wanted.total_notfinite) == 3


def test_a_nan_made_by_the_rule_itself_is_rejected_where_optax_lets_it_pass():
    bad = optax.stateless(lambda u, _: jax.tree.map(jnp.log, u))
    ours, _ = feed(optim.apply_if_finite(bad, 3), [jnp.array([-1.0])])
    theirs, _ = feed(optax.apply_if_finite(bad, 3), [jnp.array([-1.0])])
    assert np.isnan(theirs).all()
    np.testing.assert_array_equal(ours, [[0]])


def test_rejected_steps_leave_the_state_as_it_was():
    tx = optim.apply_if_finite(optim.adam(0.1), 3)
    p = jnp.ones(2)
    _, good = tx.update(p, tx.init(p), p)
    _, after = tx.update(p * np.inf, good, p)
    assert same_bits(after.inner_state, good.inner_state)
    assert not after.last_finite
    with pytest.raises(ValueError, match="max_consecutive_errors"):
        optim.apply_if_finite(optim.adam(0.1), -1)


def test_the_loss_scale_falls_on_overflow_and_grows_after_a_period():
    tx = optim.dynamic_loss_scale(optim.sgd(1.0), 8.0, period=2)
    p = jnp.array([1.0], jnp.float16)
    state, scales = tx.init(p), []
    for g in (8.0, np.inf, 4.0, 4.0, 8.0):
        u, state = tx.update(jnp.array([g], jnp.float16), state, p)
        scales.append(float(optim.loss_scale(state)))
        assert u.dtype == jnp.float16
    assert scales == [8, 4, 4, 8, 8]
    assert int(state.skipped) == 1


def test_loss_scaling_changes_rounding_at_most_where_nothing_overflows():
    params, grads = sample(SHAPES["nested"], 2, steps=10)
    plain, scaled = optim.adam(0.1), optim.dynamic_loss_scale(optim.adam(0.1), 2.0**10)
    big = jax.tree.map(lambda g: g * 2**10, grads)
    a = jax.jit(lambda p, g: train(plain, p, g)[0])(params, grads)
    b = jax.jit(lambda p, g: train(scaled, p, g)[0])(params, big)
    for x, y in zip(jax.tree.leaves(a[0]), jax.tree.leaves(b[0]), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-7)


def test_loss_scaling_saves_half_precision_gradients_that_underflow():
    def loss(p, scale):  # the true gradient, 3e-9, is below float16's smallest number, 6e-8
        return jnp.sum((p * jnp.float16(1e-3)).astype(jnp.float32) * 3e-6 * scale)

    p = jnp.ones(1, jnp.float16)
    inner = optax.GradientTransformation(lambda p: jnp.zeros(1), lambda u, s, p=None: (u, u))
    tx = optim.dynamic_loss_scale(inner, 2.0**12)
    state = tx.init(p)
    assert not jax.grad(loss)(p, 1.0).any()
    g = jax.grad(loss)(p, optim.loss_scale(state))
    _, state = tx.update(g, state, p)
    np.testing.assert_allclose(state.inner_state, 3e-9, rtol=5e-2)


def test_a_loss_scale_out_of_order_is_an_error():
    with pytest.raises(ValueError, match="factor"):
        optim.dynamic_loss_scale(optim.sgd(1.0), factor=1.0)
    with pytest.raises(ValueError, match="min_scale"):
        optim.dynamic_loss_scale(optim.sgd(1.0), 2.0**30)
    with pytest.raises(ValueError, match="expected one dynamic_loss_scale"):
        optim.loss_scale(optim.sgd(1.0).init(jnp.ones(1)))
