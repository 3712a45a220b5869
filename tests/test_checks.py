"""The checks, on transformations right and wrong, from optax and from users."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jaxgrad import checks, optim
from jaxgrad.optim.reading import read_steps

PARAMS = {"a": jnp.ones((4, 3)), "b": jnp.full(5, 0.5)}
LABELS = {"a": "x", "b": "y"}
chain, norm_clip = optax.chain, optax.clip_by_global_norm


def users_clip(limit):
    """A clip as torch writes it."""

    def update(updates, state, params=None):
        factor = jnp.minimum(1.0, limit / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda u: u * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def recorder(tx):
    """A wrapper that keeps the raw gradient and its norm for a log."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {"inner": tx.init(params), "norm": jnp.zeros(()), "last": zeros}

    def update(updates, state, params=None):
        out, inner = tx.update(updates, state["inner"], params)
        return out, {"inner": inner, "norm": optax.tree.norm(updates), "last": updates}

    return optax.GradientTransformation(init, update)


class UsersAdam:
    """Adam in one class, with its own clip at the right or the wrong place."""

    def __init__(self, clips_first):
        self.clips_first = clips_first

    def init(self, params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return zeros, zeros, jnp.zeros((), jnp.int32)

    def update(self, grads, state, params=None):
        def clip(tree):
            norm = jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(tree)))
            return jax.tree.map(lambda x: jnp.where(norm > 1, x / norm, x), tree)

        m, v, t = state
        g, t = clip(grads) if self.clips_first else grads, t + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, v, g)
        u = jax.tree.map(
            lambda m, v: -0.1 * m / (1 - 0.9**t) / (jnp.sqrt(v / (1 - 0.99**t)) + 1e-8), m, v
        )
        return u if self.clips_first else clip(u), (m, v, t)


def injected(first):
    def make(lr, limit):
        parts = [norm_clip(limit), optax.adam(lr)]
        return chain(*parts) if first else chain(*parts[::-1])

    return optax.inject_hyperparams(make)(lr=0.1, limit=1.0)


FAST = [
    ("none", optax.sgd(0.1)),
    ("none", optax.adamw(1e-3, weight_decay=0.1)),
    ("none", optax.rmsprop(1e-3, momentum=0.9, eps=1.0)),
    ("none", chain(optax.trace(0.9), optax.scale_by_rms())),
    ("none", optax.adafactor(0.1, momentum=0.9)),
    ("stateless", chain(norm_clip(1.0), optax.sgd(0.1))),
    ("stateless", optim.clip_by_global_norm(1.0)),
    ("before", chain(norm_clip(1e-8), optax.adam(1e-3))),
    ("before", chain(optax.clip(1e13), optax.sgd(0.1, 0.9))),
    ("before", chain(optax.adaptive_grad_clip(0.01), optax.lion(1e-3))),
    ("before", recorder(chain(norm_clip(1.0), optax.adam(0.1)))),
    ("before", UsersAdam(clips_first=True)),
    ("before", optax.MultiSteps(chain(users_clip(1.0), optax.adam(0.1)), 4)),
    ("after", chain(optax.adam(1e-3), norm_clip(1.0))),
    ("after", chain(optax.sgd(0.1, 0.9), optax.clip(1e-8))),
    ("after", chain(optax.lion(0.1), norm_clip(1.0))),
    ("after", UsersAdam(clips_first=False)),
    ("after", injected(first=False)),
    ("after", chain(optax.adafactor(0.1), norm_clip(1.0))),
    ("both", chain(norm_clip(1.0), optax.adam(1e-3), norm_clip(1.0))),
    ("mixed", chain(optax.ema(0.9), norm_clip(1.0), optax.trace(0.9))),
    (
        "mixed",
        optax.partition(
            {"x": chain(norm_clip(1.0), optax.adam(0.1)), "y": optax.adam(0.1)}, LABELS
        ),
    ),
]


def multi_steps(inner, k):
    return optax.MultiSteps(inner, k).gradient_transformation()


two_clips = {
    "x": chain(norm_clip(1.0), optax.lion(0.1)),
    "y": chain(optax.clip(1.0), optax.sgd(0.1, 0.9)),
}
warm = optax.warmup_cosine_decay_schedule(0, 0.1, 10, 100)
skip = functools.partial(optax.skip_large_updates, max_squared_norm=4.0)
SLOW = [
    ("none", optax.lion(1e-3)),
    ("none", optax.adagrad(0.1)),
    ("none", optax.lamb(0.1)),
    ("none", optax.yogi(0.1)),
    ("none", optax.novograd(0.1)),
    ("none", optax.sm3(0.1)),
    ("none", optax.adadelta(0.1)),
    ("none", optax.adabelief(0.1)),
    ("none", optax.contrib.muon(0.1)),
    ("none", optax.contrib.prodigy(1.0)),
    ("none", optax.contrib.adopt(0.1)),
    ("none", optax.contrib.mechanize(optax.adam(0.1))),
    ("none", optim.schedule_free_adamw(0.1, 10)),
    ("none", chain(optax.normalize_by_update_norm(), optax.adam(0.1))),
    ("none", chain(optax.trace(0.9), optax.scale_by_adam())),
    ("none", optax.MultiSteps(optax.adam(0.1), 4, should_skip_update_fn=skip)),
    ("stateless", optax.MultiSteps(chain(norm_clip(1.0), optax.sgd(0.1)), 4)),
    ("before", injected(first=True)),
    ("before", chain(optax.clip_by_block_rms(1.0), optax.adamw(1e-3))),
    ("before", chain(norm_clip(1.0), optax.contrib.muon(0.1))),
    ("before", chain(norm_clip(1.0), optax.contrib.schedule_free_adamw(0.1))),
    ("before", chain(optax.add_decayed_weights(1e-4), norm_clip(1.0), optax.adam(warm))),
    (
        "before",
        chain(norm_clip(1.0), optax.MultiSteps(optax.adam(0.1), 8).gradient_transformation()),
    ),
    ("before", optax.MultiSteps(chain(norm_clip(1.0), optax.adam(0.1)), 100)),
    ("before", optax.apply_if_finite(chain(norm_clip(1.0), optax.adam(0.1)), 3)),
    ("before", optax.partition(two_clips, LABELS)),
    ("before", optim.dynamic_loss_scale(chain(optim.clip_by_global_norm(1.0), optim.adam(0.1)))),
    ("after", chain(optax.scale_by_adam(), norm_clip(1.0), optax.add_decayed_weights(0.1))),
    ("after", chain(optax.scale_by_adam(), optax.add_decayed_weights(0.01), norm_clip(1.0))),
    ("after", chain(optax.adam(warm), optax.clip_by_block_rms(1e3))),
    ("after", chain(optax.scale_by_rms(), norm_clip(1.0), optax.scale(-0.1))),
    ("after", chain(optax.adam(0.1), norm_clip(1e13))),
    ("after", optim.accumulate(optim.chain(optim.lion(0.1), optim.clip_by_global_norm(1.0)), 3)),
    ("after", optax.flatten(chain(optax.adam(0.1), norm_clip(1.0)))),
    ("both", chain(norm_clip(1.0), optax.lion(0.1), norm_clip(1.0))),
    ("mixed", chain(optax.masked(norm_clip(1.0), {"a": True, "b": False}), optax.adam(0.1))),
    ("mixed", chain(optax.scale_by_adam(), norm_clip(1.0), optax.trace(0.9))),
]


@pytest.mark.parametrize(("wanted", "tx"), FAST)
def test_clip_order_names_what_clips_where(wanted, tx):
    order = checks.clip_order(tx, PARAMS)
    assert order == wanted, (order.leaves, order.responses)


@pytest.mark.slow
@pytest.mark.parametrize(("wanted", "tx"), SLOW)
def test_clip_order_names_what_clips_where_in_rarer_cases(wanted, tx):
    order = checks.clip_order(tx, PARAMS)
    assert order == wanted, (order.leaves, order.responses)


def test_an_order_lists_its_leaves_and_names_clips_by_design():
    order = checks.clip_order(optim.adafactor(0.1), PARAMS)
    assert order == "none"
    assert order.intentional
    tx = optax.MultiSteps(chain(norm_clip(1.0), optax.adam(0.1)), 3)
    order = checks.clip_order(tx, PARAMS)
    assert not order.intentional
    assert order.leaves["acc_grads/a"] == "accumulator"
    assert order.leaves["inner_opt_state[1][0]/mu/b"] == "before"
    assert order.responses["acc_grads/a"] == "raw"


def test_a_clip_behind_adafactor_is_not_by_its_design():
    params = {"w": jnp.ones((256, 256)), "b": jnp.ones(8)}
    order = checks.clip_order(
        optax.chain(optax.adafactor(1e-2), optax.clip_by_global_norm(1e-3)), params
    )
    assert order == "after"
    assert not order.intentional


def test_a_missing_argument_is_named():
    with pytest.raises(TypeError, match="extra_args"):
        checks.clip_order(optax.polyak_sgd(), PARAMS)
    order = checks.clip_order(optax.polyak_sgd(), PARAMS, extra_args={"value": jnp.float32(1)})
    assert order == "none"


def test_the_assertion_tells_leaf_by_leaf_what_was_measured():
    checks.assert_clips_before_update(chain(norm_clip(1.0), optax.adam(0.1)), PARAMS)
    checks.assert_clips_before_update(chain(norm_clip(1.0), optax.sgd(0.1)), PARAMS)
    with pytest.raises(
        AssertionError, match=r"'after'(.|\n)*mu/a: after \(raw\)(.|\n)*scale_by_adam"
    ):
        checks.assert_clips_before_update(chain(optax.adam(0.1), norm_clip(1.0)), PARAMS)
    with pytest.raises(AssertionError, match="'none': it does not clip"):
        checks.assert_clips_before_update(optax.sgd(0.1), PARAMS)


def test_steps_are_read_in_order_from_closures():
    names = lambda tx: [step.name for step in read_steps(tx)]  # noqa: E731
    assert names(chain(norm_clip(1.0), optax.adam(0.1))) == ["clip_by_global_norm", "scale_by_adam"]
    tx = optim.chain(optim.lion(0.1), optim.clip_by_value(1.0))
    assert names(optim.accumulate(tx, 2)) == ["lion", "clip_by_value"]
    late = optax.inject_hyperparams(lambda lr: chain(optax.lion(lr), norm_clip(1.0)))(lr=0.1)
    assert names(late) == ["lion", "clip_by_global_norm"]


# ---------------------------------------------------------------------------- accumulation

INNER = {"sgd": optax.sgd(0.1), "adam": optax.adam(0.1), "lion": optax.lion(0.1)}


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_accumulations_in_transformations_are_judged(inner):
    k = 4

    def judge(tx, **more):
        checks.assert_accumulates(tx, PARAMS, every=k, **more)

    judge(optax.MultiSteps(inner, k))
    judge(optim.accumulate(inner, k))
    judge(chain(norm_clip(1.0), optax.MultiSteps(inner, k).gradient_transformation()))
    judge(optim.accumulate(inner, k, weights="tokens"), weights=[1, 5, 2, 9])
    with pytest.raises(AssertionError, match=r"accumulation sums: .* 4 times their mean"):
        judge(optax.MultiSteps(inner, k, use_grad_mean=False))
    with pytest.raises(AssertionError, match="accumulation sums"):
        judge(optim.accumulate(inner, k, mean=False))
    with pytest.raises(AssertionError, match="accumulation misweighted"):
        judge(optax.MultiSteps(inner, k), weights=[1, 5, 2, 9])
    with pytest.raises(AssertionError, match=r"accumulation early: .* after 2 of 4"):
        judge(optax.MultiSteps(inner, 2))
    with pytest.raises(AssertionError, match="accumulation late"):
        judge(optax.MultiSteps(inner, 8))
    with pytest.raises(AssertionError, match=r"accumulation early: .* after 1 of 4"):
        judge(inner)


def users_accumulation(inner, k, fault):
    def init(params):
        return inner.init(params), jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32)

    def update(grads, state, params=None):
        old, acc, i = state
        start = 0.0 if fault == "erased" else 1.0
        acc = jax.tree.map(lambda a, g: start * a + g, acc, grads)
        fed = jax.tree.map(lambda a: a / (k if fault == "none" else 1), acc)
        u, new = inner.update(fed, old, params)
        emit = i + 1 == k
        u = jax.tree.map(lambda x: jnp.where(emit, x, 0), u)
        new = jax.tree.map(lambda a, b: jnp.where(emit, a, b), new, old)
        acc = jax.tree.map(lambda a: jnp.where(emit, 0, a), acc)
        return u, (new, acc, jnp.where(emit, 0, i + 1))

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("inner", [optax.sgd(0.1), optax.adam(0.1)])
def test_accumulations_written_by_users_are_judged(inner):
    checks.assert_accumulates(users_accumulation(inner, 3, "none"), PARAMS, every=3)
    for fault in ("erased", "sums"):
        with pytest.raises(AssertionError, match=f"accumulation {fault}"):
            checks.assert_accumulates(users_accumulation(inner, 3, fault), PARAMS, every=3)


rng = np.random.default_rng(0)
X, Y = (jnp.array(rng.standard_normal((16, n)), jnp.float32) for n in (4, 3))
MASK = jnp.array(np.arange(16) < 9, jnp.float32)
LINEAR = {"w": jnp.full((4, 3), 0.3), "b": jnp.zeros(3)}


def loss(p, batch):
    return jnp.mean((batch[0] @ p["w"] + p["b"] - batch[1]) ** 2)


def token_loss(p, batch):
    error = (batch[0] @ p["w"] + p["b"] - batch[1]) ** 2
    return jnp.sum(batch[2][:, None] * error) / jnp.maximum(jnp.sum(batch[2]), 1)


def users_step(fault, takes, returns, loss, k=4):
    def step(p, batch):
        if takes == "whole":
            n = batch[0].shape[0] // k
            parts = [jax.tree.map(lambda x, i=i: x[i * n :][:n], batch) for i in range(k)]
        elif takes == "list":
            parts = batch
        else:
            parts = [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(batch[0].shape[0])]
        total = jax.tree.map(jnp.zeros_like, p)
        for part in parts:
            keep = 0.0 if fault == "erased" else 1.0
            g = jax.grad(loss)(p, part)
            total = jax.tree.map(lambda t, g, keep=keep: keep * t + g, total, g)
        if fault == "none":
            total = jax.tree.map(lambda t: t / len(parts), total)
        if returns == "gradient":
            return total
        new = jax.tree.map(lambda p, t: p - 0.1 * t, p, total)
        return new if returns == "parameters" else (new, jnp.zeros(()))

    return step


@pytest.mark.parametrize("returns", ["gradient", "parameters", "tuple"])
@pytest.mark.parametrize("takes", ["whole", "list", "stack"])
def test_accumulations_in_step_functions_are_judged(takes, returns):
    def judge(fault, loss=loss, batch=(X, Y)):
        step = users_step(fault, takes, returns, loss)
        checks.assert_accumulates(step, LINEAR, every=4, loss=loss, batch=batch)

    judge("none")
    with pytest.raises(AssertionError, match=r"accumulation erased: .* last micro-batch"):
        judge("erased")
    if takes != "whole" or returns == "gradient":  # else the learning rate hides a sum
        with pytest.raises(AssertionError, match="accumulation sums"):
            judge("sums")
    with pytest.raises(AssertionError, match="accumulation misweighted"):
        judge("none", token_loss, (X, Y, MASK))


def test_arguments_that_do_not_fit_are_named():
    step = users_step("none", "whole", "gradient", loss)
    with pytest.raises(ValueError, match="loss= and batch="):
        checks.assert_accumulates(step, LINEAR, every=4)
    with pytest.raises(ValueError, match="divisible by 5"):
        checks.assert_accumulates(step, LINEAR, every=5, loss=loss, batch=(X, Y))
    tx = optim.accumulate(optim.sgd(0.1), 4)
    with pytest.raises(ValueError, match="expected 4 numbers"):
        checks.assert_accumulates(tx, LINEAR, every=4, weights=[1, 2])
    with pytest.raises(ValueError, match="expected 4 gradients"):
        checks.assert_accumulates(tx, LINEAR, [LINEAR], every=4)
    checks.assert_accumulates(tx, LINEAR, every=4, loss=loss, batch=(X, Y))
    checks.assert_accumulates(tx, LINEAR, [LINEAR] * 4, every=4)


# ---------------------------------------------------------------------------- same updates


def test_same_updates_passes_equals_and_names_the_first_difference():
    checks.assert_same_updates(optax.adam(0.1), optim.adam(0.1), PARAMS)
    checks.assert_same_updates(optax.adam(0.1), optim.adam(0.1, numerics="optax"), PARAMS, rtol=0)
    checks.assert_same_updates(optax.adamw(0.1), optim.adamw(0.1), PARAMS, steps=10)
    with pytest.raises(
        AssertionError, match=r"step 1, leaf 'a', entry \(\d, \d\): .* relative|of that"
    ):
        checks.assert_same_updates(optax.adam(0.1), optax.adam(0.1, eps=1e-7), PARAMS)
    with pytest.raises(AssertionError, match="leaf"):
        checks.assert_same_updates(optax.adam(0.1), optax.adam(0.1, b2=0.998), PARAMS)
    with pytest.raises(AssertionError, match="leaf"):
        checks.assert_same_updates(
            optax.sgd(0.1, 0.9), optax.sgd(0.1, 0.9, nesterov=True), PARAMS, key=jax.random.key(7)
        )


def test_gradients_flow_through_a_healthy_net_and_the_report_names_a_blocked_layer():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {f"layer{k}": jax.random.normal(key, (16, 16)) / 4 for k, key in enumerate(keys)}
    batch = jax.random.normal(jax.random.key(1), (32, 16))

    def loss(params, batch, cut=None):
        h = batch
        for name, w in params.items():
            h = h @ w if name == "layer3" else jnp.tanh(h @ w)
            h = jax.lax.stop_gradient(h) if name == cut else h
        return jnp.mean((h - batch) ** 2)

    checks.assert_gradients_flow(loss, params, batch)
    blocked = functools.partial(loss, cut="layer1")
    with pytest.raises(AssertionError, match=r"gradient\.blocked at layer1"):
        checks.assert_gradients_flow(blocked, params, batch)
    checks.assert_gradients_flow(blocked, params, batch, ignore=["gradient.blocked"])
