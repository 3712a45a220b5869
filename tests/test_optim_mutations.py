"""Do the tests above see anything? Every rule with one thing changed must fail its oracle."""

import functools

import jax
import numpy as np
import pytest

from tests import optim_cases as cases
from tests import reference_optim as reference
from tests.optim_cases import SHAPES, sample, tie_free_sample, trainer

# (rule, what is changed in the float64 oracle). The hand-written rule must then disagree with it;
# each of these is a mistake that an implementation could make.
MUTANTS = {
    "sgd: sign": ("sgd", lambda f: _negated(f)),
    "momentum: (1 - beta) g": ("momentum", lambda f: _scaled_gradient(f, 0.1)),
    "momentum: beta": ("momentum", lambda f: functools.partial(f, momentum=0.89)),
    "nesterov: no look ahead": ("nesterov", lambda f: reference.momentum),
    "adam: sign": ("adam", lambda f: _negated(f)),
    "adam: b1": ("adam", lambda f: functools.partial(f, b1=0.899)),
    "adam: b2": ("adam", lambda f: functools.partial(f, b2=0.9989)),
    "adam: no bias correction of m": ("adam", lambda f: _without_correction(f, 0.9)),
    "adam: no bias correction of v": ("adam", lambda f: _without_correction(f, 0.999)),
    "adam: eps inside the root": ("adam", lambda f: _eps_inside(f)),
    "adam: eps before the correction": ("adam", lambda f: _eps_hat(f)),
    "adamw: decay in the gradient": ("adamw", lambda f: _l2(f, 0.1)),
    "adamw: decay of the new parameter": ("adamw", lambda f: _late_decay(f, 0.1)),
    "adamw: decay without learning rate": ("adamw", lambda f: _free_decay(f, 0.1)),
    "lion: betas swapped": ("lion", lambda f: functools.partial(f, b1=0.99, b2=0.9)),
    "lion: sign": ("lion", lambda f: _negated(f)),
    "lion: decay": ("lion", lambda f: functools.partial(f, weight_decay=0.11)),
    "rmsprop: eps outside": ("rmsprop", lambda f: functools.partial(f, eps_in_sqrt=False)),
    "rmsprop: decay": ("rmsprop", lambda f: functools.partial(f, decay=0.901)),
    "rmsprop: not centered": (
        "rmsprop-centered",
        lambda f: functools.partial(reference.rmsprop, centered=False),
    ),
    "adagrad: start": ("adagrad", lambda f: functools.partial(f, initial_accumulator_value=0.0)),
    "adagrad: eps": ("adagrad", lambda f: functools.partial(f, eps=1e-3)),
    "adafactor: decay rate": ("adafactor", lambda f: functools.partial(f, decay_rate=0.79)),
    "adafactor: no clip": ("adafactor", lambda f: functools.partial(f, clipping_threshold=1e9)),
    "adafactor: not factored": (
        "adafactor-factored",
        lambda f: functools.partial(reference.adafactor, min_dim_size_to_factor=128),
    ),
    "muon: beta": ("muon", lambda f: functools.partial(f, beta=0.94)),
    "muon: one iteration less": ("muon", lambda f: functools.partial(f, steps=4)),
    "schedule-free: b1": ("schedule_free_adamw", lambda f: functools.partial(f, b1=0.89)),
    "schedule-free: no decay": (
        "schedule_free_adamw",
        lambda f: functools.partial(f, weight_decay=0.0),
    ),
}


def _negated(f):
    return lambda p, grads, lr, **o: f(p, [-g for g in grads], lr, **o)


def _scaled_gradient(f, factor):
    return lambda p, grads, lr, **o: f(p, [factor * g for g in grads], lr, **o)


def _without_correction(f, decay):
    def mutant(p, grads, lr, **options):
        kept = reference._correction
        reference._correction = lambda d, t: 1.0 if d == decay else kept(d, t)
        try:
            return f(p, grads, lr, **options)
        finally:
            reference._correction = kept

    return mutant


def _eps_inside(f):
    return lambda p, grads, lr, **o: f(p, grads, lr, eps=0.0, eps_root=1e-8, **o)


def _eps_hat(f):
    """Keras adds eps to the uncorrected root: ``eps / sqrt(1 - b2^t)`` in our place."""

    def mutant(p, grads, lr, **options):
        kept, path = np.float64(p), []
        m = v = np.zeros_like(kept)
        for t, g in enumerate(grads, 1):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            c1, c2 = reference._correction(0.9, t), reference._correction(0.999, t)
            kept = kept - lr(t - 1) * m / c1 / (np.sqrt(v / c2) + 1e-8 / np.sqrt(c2))
            path.append(kept)
        return path

    return mutant


def _l2(f, decay):
    """The decay enters the moments, as in torch's Adam(weight_decay=)."""

    def mutant(p, grads, lr, **options):
        kept, path = np.float64(p), []
        m = v = np.zeros_like(kept)
        for t, g in enumerate(grads, 1):
            h = g + decay * kept
            m, v = 0.9 * m + 0.1 * h, 0.999 * v + 0.001 * h * h
            c1, c2 = reference._correction(0.9, t), reference._correction(0.999, t)
            kept = kept - lr(t - 1) * m / c1 / (np.sqrt(v / c2) + 1e-8)
            path.append(kept)
        return path

    return mutant


def _stepwise(p, grads, lr, decayed):
    plain, path, shift = reference.adam(np.float64(p), grads, lr), [], np.float64(p)
    before = np.float64(p)
    for t, after in enumerate(plain):
        shift = decayed(shift, after - before, lr(t))
        before = after
        path.append(shift)
    return path


def _late_decay(f, decay):
    return lambda p, grads, lr, **o: _stepwise(
        p, grads, lr, lambda p, u, rate: (p + u) - rate * decay * (p + u)
    )


def _free_decay(f, decay):
    return lambda p, grads, lr, **o: _stepwise(p, grads, lr, lambda p, u, rate: p + u - decay * p)


def _worst(key, oracle, seed):
    """The comparison of the oracle test: ulps of the larger of parameter and learning rate."""
    params, grads = (tie_free_sample if key == "lion" else sample)(SHAPES["nested"], seed)
    (_, path), _ = trainer(key, "hand", "exact")(params, grads, np.float32(0.1))
    case = cases.RULES[key]._replace(oracle=oracle)
    wanted = cases.oracle_path(case, params, grads, float(np.float32(0.1)))
    worst = 0.0
    for got, right in zip(jax.tree.leaves(path), wanted, strict=True):
        scale = np.maximum(np.abs(right).max(initial=1e-30, axis=0), 0.1)
        gap = np.abs(got - right) / (scale * np.finfo(np.float32).eps)
        worst = max(worst, float(gap.max(initial=0)))
    return worst


@pytest.mark.parametrize("name", MUTANTS)
def test_a_rule_with_one_thing_changed_is_caught(name):
    key, mutate = MUTANTS[name]
    case = cases.RULES[key]
    options = dict(case.oracle_options)

    def oracle(p, grads, lr, **_):
        f = mutate(case.oracle)
        changed = getattr(f, "keywords", {})
        return f(p, grads, lr, **{k: v for k, v in options.items() if k not in changed})

    limit = 100
    assert _worst(key, case.oracle, 5) <= limit
    assert max(_worst(key, oracle, seed) for seed in (5, 6)) > 10 * limit
