"""Accumulations that hide: in wrappers, behind warm-ups, in half precision, in jitted steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgrad import checks, optim

PARAMS = {"a": jnp.ones((4, 3)), "b": jnp.full(5, 0.5)}
K = 4
warm = optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 100)


def multi(rule, mean):
    return optax.MultiSteps(rule, K, use_grad_mean=mean).gradient_transformation()


def hand(rule, mean):
    return optim.accumulate(rule, K, mean=mean)


WRAPPED = {
    "warm-up": lambda mean: multi(optax.sgd(warm), mean),
    "if finite": lambda mean: optax.apply_if_finite(multi(optax.sgd(0.1), mean), 3),
    "if finite, by hand": lambda mean: optim.apply_if_finite(hand(optim.adam(0.1), mean), 3),
    "loss scale": lambda mean: optim.dynamic_loss_scale(hand(optim.sgd(0.1), mean)),
    "masked": lambda mean: optax.masked(multi(optax.sgd(0.1), mean), {"a": True, "b": True}),
    "labels": lambda mean: optax.partition(
        {"x": multi(optax.sgd(0.1), mean), "y": multi(optax.adam(0.1), mean)},
        {"a": "x", "b": "y"},
    ),
    "flat": lambda mean: optim.flat(hand(optim.adam(0.1), mean)),
    "chain": lambda mean: optax.chain(
        optax.clip_by_global_norm(1.0), optax.apply_if_finite(multi(optax.lion(0.1), mean), 3)
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_sums_are_found_through_wrappers_and_warm_ups_and_means_pass(name):
    checks.assert_accumulates(WRAPPED[name](True), PARAMS, every=K)
    with pytest.raises(AssertionError, match="accumulation sums"):
        checks.assert_accumulates(WRAPPED[name](False), PARAMS, every=K)


def test_what_cannot_be_judged_is_said():
    def make(learning_rate):
        return multi(optax.adam(learning_rate), mean=False)

    hidden = optax.inject_hyperparams(make)(learning_rate=0.1)
    with pytest.warns(UserWarning, match="summed or averaged was not judged"):
        checks.assert_accumulates(hidden, PARAMS, every=K)
    with pytest.warns(UserWarning, match="a sum and a mean do the same here"):
        checks.assert_accumulates(multi(optax.sign_sgd(0.1), mean=False), PARAMS, every=K)
    with pytest.raises(ValueError, match="no update came out"):
        checks.assert_accumulates(multi(optax.sgd(0.0), mean=True), PARAMS, every=K)


def test_token_weights_reach_an_accumulator_inside_wrappers():
    tokens = [1, 5, 2, 9]
    for weights, fault in (("tokens", None), (None, "misweighted")):
        inner = optim.accumulate(optim.adam(0.1), K, weights=weights)
        for tx in (
            optim.apply_if_finite(inner, 2),
            optim.chain(optim.clip_by_value(1.0), inner),
        ):
            if fault is None:
                checks.assert_accumulates(tx, PARAMS, every=K, weights=tokens)
                continue
            with pytest.raises(AssertionError, match=fault):
                checks.assert_accumulates(tx, PARAMS, every=K, weights=tokens)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rounding_of_half_precision_is_no_fault_and_a_sum_still_is(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    for rule in (optim.adam(0.1), optim.sgd(0.1)):
        checks.assert_accumulates(hand(rule, True), params, every=K)
        with pytest.raises(AssertionError, match="accumulation sums"):
            checks.assert_accumulates(hand(rule, False), params, every=K)


# ---------------------------------------------------------------------------- step functions

rng = np.random.default_rng(0)
X, Y = (jnp.array(rng.standard_normal((16, n)), jnp.float32) for n in (4, 3))
MASK = jnp.array(np.arange(16) < 9, jnp.float32)
LINEAR = {"w": jnp.full((4, 3), 0.3), "b": jnp.zeros(3)}


def loss(p, batch):
    p = jax.tree.map(jnp.float32, p)
    return jnp.mean((batch[0] @ p["w"] + p["b"] - batch[1]) ** 2)


def token_loss(p, batch):
    error = (batch[0] @ p["w"] + p["b"] - batch[1]) ** 2
    return jnp.sum(batch[2][:, None] * error) / jnp.maximum(jnp.sum(batch[2]), 1)


def scanned(fault="none", tx=None, loss=loss, weigh=lambda part: 1.0):
    """A training step as users write it; without a rule it returns the gradient."""

    def step(p, batch):
        parts = jax.tree.map(lambda x: x.reshape(K, -1, *x.shape[1:]), batch)

        def body(carry, part):
            total, weights = carry
            g, w = jax.grad(loss)(p, part), weigh(part)
            keep = 0.0 if fault == "erased" else 1.0
            total = jax.tree.map(lambda t, x: keep * t + w * x.astype(t.dtype), total, g)
            return (total, keep * weights + w), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), p)
        (total, weights), _ = jax.lax.scan(body, (zeros, 0.0), parts)
        g = jax.tree.map(
            lambda t, x: (t / (1 if fault == "sums" else weights)).astype(x.dtype), total, p
        )
        if tx is None:
            return {"loss": jnp.zeros(()), "grads": g}
        updates, state = tx.update(g, tx.init(p), p)
        return optax.apply_updates(p, updates), state, {"loss": jnp.zeros(())}

    return step


def judge(step, params=LINEAR, loss=loss, batch=(X, Y)):
    checks.assert_accumulates(step, params, every=K, loss=loss, batch=batch)


RULES = {
    "adam": optax.adam(0.1),
    "clip, adamw": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.1)),
    "lion": optax.lion(0.1),
}


@pytest.mark.parametrize("name", RULES)
def test_steps_with_rules_that_hide_the_gradient_are_judged_by_exchanging_examples(name):
    with pytest.warns(UserWarning, match="a sum could not be told from a mean"):
        judge(scanned(tx=RULES[name]))
    with pytest.raises(AssertionError, match=r"accumulation erased: .* last micro-batch only"):
        judge(scanned("erased", RULES[name]))
    weighted = scanned(tx=RULES[name], loss=token_loss, weigh=lambda part: part[2].sum())
    with pytest.warns(UserWarning, match="a sum could not be told"):
        judge(weighted, loss=token_loss, batch=(X, Y, MASK))


def test_a_step_function_may_donate_what_it_is_given():
    step = jax.jit(scanned(tx=optax.sgd(0.1)), donate_argnums=0)
    params = jax.tree.map(jnp.array, LINEAR)
    judge(step, params)
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))
    with pytest.raises(AssertionError, match="accumulation erased"):
        judge(jax.jit(scanned("erased", optax.sgd(0.1)), donate_argnums=0), params)


def test_gradients_in_dicts_are_found():
    judge(scanned())
    for fault in ("erased", "sums"):
        with pytest.raises(AssertionError, match=f"accumulation {fault}"):
            judge(scanned(fault))


def test_a_step_functions_own_error_is_told():
    def buggy(params, batch):
        raise KeyError("my own bug")

    with pytest.raises(ValueError, match=r"whole batch: KeyError: 'my own bug'; list: .*stack: "):
        judge(buggy)


def test_a_step_on_one_micro_batch_only_is_found_though_it_makes_sense_on_a_stack():
    with pytest.raises(AssertionError, match="accumulation erased"):
        judge(lambda p, batch: jax.grad(loss)(p, jax.tree.map(lambda x: x[-4:], batch)))


def test_rounding_of_bfloat16_gradients_is_no_fault_of_a_step_function():
    params = jax.tree.map(jnp.bfloat16, LINEAR)
    judge(scanned(), params)
    with pytest.raises(AssertionError, match="accumulation sums"):
        judge(scanned("sums"), params)
