"""The table that the optimizer tests run over: rules, their options, and fixed trees of leaves."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgrad import optim
from tests import reference_optim as reference

STEPS = 50


class Case(NamedTuple):
    """A rule with options, as it is written by hand, as a chain, and in NumPy (None: no oracle)."""

    name: str
    options: dict[str, Any]
    oracle: Any
    oracle_options: dict[str, Any]

    def hand(self, lr, **more):
        return getattr(optim, self.name)(lr, **{**self.options, **more})

    def chain(self, lr):
        return getattr(optim.chains, self.name)(lr, **self.options)


def _case(name, oracle_options=None, **options):
    oracle = getattr(reference, name, None)
    if oracle_options is None:
        oracle_options = options
    return Case(name, options, oracle, oracle_options)


RULES = {
    "sgd": _case("sgd"),
    "sgd-momentum-nesterov": _case("sgd", momentum=0.5, nesterov=True),
    "momentum": _case("momentum"),
    "nesterov": _case("nesterov", momentum=0.8),
    "adam": _case("adam"),
    "adam-nesterov-eps_root": _case("adam", b1=0.8, b2=0.95, eps_root=1e-3, nesterov=True),
    "adamw": _case("adamw", weight_decay=0.1),
    "adamw-long-memory": _case("adamw", b2=0.99999, eps=1e-6),
    "lion": _case("lion", weight_decay=0.1),
    "rmsprop": _case("rmsprop"),
    "rmsprop-outside": _case("rmsprop", eps_in_sqrt=False, momentum=0.9),
    "rmsprop-centered": _case("rmsprop", centered=True, eps=1e-2),
    "adagrad": _case("adagrad"),
    "adafactor": _case("adafactor"),
    "adafactor-factored": _case("adafactor", min_dim_size_to_factor=4),
    "muon": _case("muon"),
    "schedule_free_adamw": _case("schedule_free_adamw", weight_decay=0.01),
}
CLIPS = {
    "clip_by_value": (0.5,),
    "clip_by_global_norm": (1.0,),
    "clip_by_block_rms": (0.3,),
    "adaptive_clip": (0.1,),
    "add_decayed_weights": (0.01,),
}

# Every shape is a compilation: a nested tree with None, empty, scalar and zero-size leaves.
SHAPES = {
    "nested": {"block": {"w": (5, 4), "wide": (4, 9), "b": (4,)}, "list": [(), (0,), None]},
    "scalar": (),
    "empty": {},
    "big": [(70, 70), (3, 2, 2, 5)],
}


def is_shape(node):
    return isinstance(node, tuple)


def tree_of(shapes, make):
    return jax.tree.map(make, shapes, is_leaf=is_shape)


def sample(shapes, seed, exponent=0, steps=STEPS, dtype=np.float32):
    """Parameters of size one, and gradients of size ``2**exponent``, over six decades."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        return rng.standard_normal(shape).astype(dtype)

    def gradients(shape):
        size = np.ldexp(10.0 ** rng.uniform(-5, 1, shape), exponent)
        return (size * rng.standard_normal((steps, *shape))).astype(dtype)

    return tree_of(shapes, draw), tree_of(shapes, gradients)


def tie_free_sample(shapes, seed, dtype=np.float32):
    """A sample in which Lion's two terms never cancel to within rounding, where signs are XLA's."""
    while True:
        params, grads = sample(shapes, seed, dtype=dtype)
        if all(_cancels(np.float64(g)) > 1e-5 for g in jax.tree.leaves(grads)):
            return params, grads
        seed += 1


def _cancels(grads, b1=0.9, b2=0.99):
    m, least = np.zeros(grads.shape[1:]), 1.0
    for g in grads:
        old, new = b1 * m, (1 - b1) * g
        least = min(least, np.min(np.abs(old + new) / (np.abs(old) + np.abs(new)), initial=1.0))
        m = b2 * m + (1 - b2) * g
    return least


def train(tx, params, grads, extra=None):
    """All steps in one scan: every update, and the parameters after every step."""

    def body(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params, **(extra or {}))
        params = optax.apply_updates(params, updates)
        return (params, state), (updates, params)

    steps = [g.shape[0] for g in jax.tree.leaves(grads)] or [STEPS]
    start = (params, tx.init(params))
    (_, state), paths = jax.lax.scan(body, start, grads, length=steps[0])
    return paths, state


@functools.cache
def trainer(key, kind, numerics="exact"):
    """A jitted training run, one compilation per rule, kind and tree structure."""
    case = RULES[key]
    make = case.chain if kind == "chain" else functools.partial(case.hand, numerics=numerics)
    return jax.jit(lambda params, grads, lr: train(make(lr), params, grads))


def same_bits(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y, equal_nan=True) for x, y in leaves)


def oracle_path(case, params, grads, lr):
    """The float64 path of every leaf, as a flat list of (steps, *shape)."""
    rate = lr if callable(lr) else lambda step: lr
    return [
        np.stack(case.oracle(np.float64(p), list(np.float64(g)), rate, **case.oracle_options))
        for p, g in zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True)
    ]


def ones_like(tree):
    return jax.tree.map(jnp.ones_like, tree)
