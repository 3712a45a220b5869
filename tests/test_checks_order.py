"""The order of clipping where it hides: adaptive thresholds, flattened states, odd rules."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jaxgrad import checks, optim

PARAMS = {"a": jnp.ones((4, 3)), "b": jnp.full(5, 0.5)}
LIST = [jnp.ones(3), jnp.ones((2, 2))]
chain, norm_clip = optax.chain, optax.clip_by_global_norm


def running_mean_clip(start, factor=2.0, decay=0.9):
    """Clips to a multiple of the running mean of past norms; without a start, not at first."""

    def init(params):
        return jnp.float32(0 if start is None else start)

    def update(updates, mean, params=None):
        norm = optax.tree.norm(updates)
        limit = jnp.where(mean > 0, factor * mean, jnp.inf)
        clipped = jax.tree.map(lambda u: u * jnp.minimum(1.0, limit / (norm + 1e-12)), updates)
        return clipped, decay * mean + (1 - decay) * jnp.minimum(norm, limit)

    return optax.GradientTransformation(init, update)


def percentile_clip(size=16):
    """AutoClip: a percentile of the last norms."""

    def update(updates, state, params=None):
        norms, t = state
        norm = optax.tree.norm(updates)
        norms = norms.at[t % size].set(norm)
        limit = jnp.nanpercentile(jnp.where(jnp.arange(size) <= t, norms, jnp.nan), 10)
        factor = jnp.minimum(1.0, limit / (norm + 1e-12))
        return jax.tree.map(lambda u: u * factor, updates), (norms, t + 1)

    return optax.GradientTransformation(lambda p: (jnp.zeros(size), jnp.int32(0)), update)


def norm_recorder():
    return optax.GradientTransformation(
        lambda params: jnp.zeros(()), lambda u, s, p=None: (u, optax.tree.norm(u))
    )


lookahead = optax.LookaheadParams.init_synced(PARAMS)
FAST = {
    "amsgrad": ("none", optax.amsgrad(0.1), PARAMS),
    "clip, amsgrad": ("before", chain(norm_clip(1.0), optax.amsgrad(0.1)), PARAMS),
    "centered rmsprop, clip": (
        "after",
        chain(optax.rmsprop(0.1, centered=True), norm_clip(1.0)),
        PARAMS,
    ),
    "running mean": ("before", chain(running_mean_clip(None), optax.adam(0.1)), PARAMS),
    "lars": ("before", chain(norm_clip(1.0), optax.lars(0.1)), PARAMS),
    "sign": ("stateless", chain(norm_clip(1.0), optax.sign_sgd(0.1)), PARAMS),
    "tiny threshold": ("before", chain(norm_clip(1e-25), optax.adam(0.1)), PARAMS),
    "a scalar first in a chain, parameters in a list": (
        "before",
        chain(running_mean_clip(1.0), optax.sgd(0.1, 0.9)),
        LIST,
    ),
    "lookahead": (
        "before",
        optax.lookahead(chain(norm_clip(1.0), optax.adam(0.1)), 5, 0.5),
        lookahead,
    ),
    "kept leaves of a flat state": (
        "before",
        optim.flat(optim.chain(optim.clip_by_global_norm(1.0), optim.adam(0.1)), 0),
        {"a": jnp.ones(3), "b": jnp.ones(2), "c": jnp.ones(4)},
    ),
}
SLOW = {
    "amsgrad, clip": ("after", chain(optax.amsgrad(0.1), norm_clip(1.0)), PARAMS),
    "running mean after": ("after", chain(optax.adam(0.1), running_mean_clip(None)), PARAMS),
    "running mean, momentum": (
        "before",
        chain(running_mean_clip(None), optax.sgd(0.1, 0.9)),
        PARAMS,
    ),
    "percentile": ("before", chain(percentile_clip(), optax.adam(0.1)), PARAMS),
    "a recorder clips nothing": ("none", chain(norm_recorder(), optax.adam(0.1)), LIST),
    "zero": ("before", chain(optim.clip_by_global_norm(0.0), optax.adam(0.1)), PARAMS),
    "infinity": ("none", chain(optim.clip_by_global_norm(np.inf), optax.adam(0.1)), PARAMS),
    "prodigy": ("after", chain(optax.contrib.prodigy(1.0), norm_clip(1.0)), PARAMS),
    "flattened prodigy": (
        "before",
        optax.flatten(chain(norm_clip(1.0), optax.contrib.prodigy(1.0))),
        PARAMS,
    ),
    "lookahead, clip": (
        "after",
        optax.lookahead(chain(optax.adam(0.1), norm_clip(1.0)), 5, 0.5),
        lookahead,
    ),
    "rprop": ("before", chain(norm_clip(1.0), optax.rprop(0.1)), PARAMS),
}
CASES = [pytest.param(*case, id=name) for name, case in FAST.items()]
CASES += [pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()]


@pytest.mark.parametrize(("wanted", "tx", "params"), CASES)
def test_clip_order_names_what_hides(wanted, tx, params):
    order = checks.clip_order(tx, params)
    assert order == wanted, (order.leaves, order.responses)


def test_an_adaptive_clip_is_named_as_such():
    tx = chain(running_mean_clip(None), optax.sgd(0.1, 0.9))
    responses = checks.clip_order(tx, PARAMS).responses
    assert responses["[1][0]/trace/a"] == "clipped (adaptive)"


def test_a_threshold_out_of_reach_is_told_from_no_clip():
    with pytest.raises(
        AssertionError, match=r"clip_by_global_norm.*no gradient of norm .* reaches"
    ):
        checks.assert_clips_before_update(chain(norm_clip(1e25), optax.sgd(0.1, 0.9)), PARAMS)


def test_parameters_that_are_no_arrays_are_named():
    with pytest.raises(TypeError, match=r"init\(params\)(.|\n)*parameters are arrays"):
        checks.clip_order(optax.adam(0.1), {"a": jnp.ones(2), "activation": jax.nn.relu})


def test_nothing_stays_alive_after_probing():
    def held():
        gc.collect()
        return [x.shape for x in jax.live_arrays() if x.shape == (61, 7)]

    _ = checks.clip_order(optax.sgd(0.1, 0.9), {"a": jnp.ones((61, 7))})
    assert held() == []
