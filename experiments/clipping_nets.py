"""Networks trained with a clip before the update, after it or nowhere, and what is measured."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.atlas import deep, frame, training
from jaxgrad import data, nn, optim, tree
from jaxgrad.nn import transformer

# Learning rate of each rule; momentum's step is ten times its rate, Lion's is the rate.
RATES = {"SGD": 0.1, "momentum": 0.02, "Adam": 0.002, "Lion": 0.0004}
RULES = {"SGD": optim.sgd, "momentum": optim.momentum, "Adam": optim.adam, "Lion": optim.lion}
INFINITE = float("inf")
# name: (threshold of a clip before the update, of one after it, the spike)
SETTINGS = {
    "none": (INFINITE, INFINITE, ""),
    "before": (1.0, INFINITE, ""),
    "after": (INFINITE, 1.0, ""),
    "none, spike": (INFINITE, INFINITE, "large"),
    "before, spike": (1.0, INFINITE, "large"),
    "after, spike": (INFINITE, 1.0, "large"),
    "none, small spike": (INFINITE, INFINITE, "small"),
    "before, small spike": (1.0, INFINITE, "small"),
    "before at 0.01": (0.01, INFINITE, ""),
    "before at 0.001": (0.001, INFINITE, ""),
}
# Steps whose mean loss is kept as one number.
EVERY = 25


@dataclass(frozen=True)
class Config:
    """Digits with every rule in every setting, and the English text with AdamW.

    Attributes:
        rules: names in `RULES`.
        width: of the network on the digits.
        hidden: its hidden layers.
        seeds: networks a setting.
        steps: of training.
        batch: digits a step.
        spike_at: the step whose gradient is wrong.
        spike: by this factor, in the settings that ask for damage.
        small_spike: by this one, in those that ask for what is remembered.
        window: steps after the spike that make its damage.
        later: steps after the spike from which training should go on as before.
        text_width: of the transformer.
        text_depth: its blocks.
        length: characters it reads.
        text_batch: windows a step.
        text_steps: of AdamW.
        by_value: threshold of a clip by value, as a share of the norm.
        text_rate: its learning rate after a warm-up of a tenth of the steps.
    """

    rules: tuple[str, ...] = ("SGD", "momentum", "Adam", "Lion")
    width: int = 48
    hidden: int = 3
    seeds: int = 4
    steps: int = 400
    batch: int = 32
    spike_at: int = 150
    spike: float = 1000.0
    small_spike: float = 50.0
    window: int = 20
    later: int = 50
    text_width: int = 32
    text_depth: int = 2
    length: int = 32
    text_batch: int = 16
    text_steps: int = 200
    by_value: float = 0.02
    text_rate: float = 0.003


def _rule(name: str, before: jax.Array, after: jax.Array) -> optax.GradientTransformation:
    return optim.chain(
        optim.clip_by_global_norm(before), RULES[name](RATES[name]),
        optim.clip_by_global_norm(after),
    )  # fmt: skip


def _logits(params: Any, x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jax.nn.relu(nn.linear(layer, x))
    return nn.linear(params[-1], x)


def settings(rule: str, config: Config) -> frame.Arrays:
    """Loss, raw norm and step by step of training; axes (seeds, settings, steps)."""
    shapes = [(64, config.width), *[(config.width, config.width)] * config.hidden]
    shapes += [(config.width, 10)]
    keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
    params = [
        deep.draw("he_normal", k, shape, config.seeds)
        for k, shape in zip(keys[1:], shapes, strict=True)
    ]
    x, y = training.digits()
    before, after, spikes = zip(*SETTINGS.values(), strict=True)
    size = {"": 1.0, "small": config.small_spike, "large": config.spike}
    factors = np.asarray([size[s] for s in spikes])

    def one(params: Any, before: jax.Array, after: jax.Array, factor: jax.Array) -> dict:
        tx = _rule(rule, before, after)

        def step(carry: Any, both: Any) -> tuple[Any, tuple]:
            params, state = carry
            key, number = both
            images, labels = training.draw(key, x, y, config.batch)

            def loss(params: Any) -> jax.Array:
                return training.cross_entropy(_logits(params, images), labels)

            value, grads = jax.value_and_grad(loss)(params)
            wrong = jnp.where(number == config.spike_at, factor, 1.0)
            grads = jax.tree.map(lambda g: wrong * g, grads)
            updates, state = tx.update(grads, state, params)
            figures = value, tree.global_norm(grads), tree.global_norm(updates)
            return (optax.apply_updates(params, updates), state), figures

        numbers = jax.random.split(keys[0], config.steps), jnp.arange(config.steps)
        _, (losses, norms, updates) = lax.scan(step, (params, tx.init(params)), numbers)
        return _reduced(config, losses, norms, updates)

    over_settings = jax.vmap(one, in_axes=(None, 0, 0, 0))
    every = frame.compiled(jax.vmap(over_settings, in_axes=(0, None, None, None)))
    return every(params, jnp.asarray(before), jnp.asarray(after), jnp.asarray(factors))


def _reduced(config: Config, losses: jax.Array, norms: jax.Array, updates: jax.Array) -> dict:
    at, later = config.spike_at, config.spike_at + config.later
    return {
        "loss": losses.reshape(-1, EVERY).mean(1),
        "after_spike": jnp.mean(losses[at + 1 : at + 1 + config.window]),
        "spike_step": updates[at],
        "usual_step": jnp.mean(updates[at - config.window : at]),
        "later_rate": jnp.mean((updates / norms)[later : later + config.window]),
        "mean_step": jnp.mean(updates),
        "engaged": jnp.mean(norms > 1.0),
        "engaged_last": jnp.mean(norms[-(len(norms) // 4) :] > 1.0),
        "after_engaged": jnp.mean(updates > 1.0),
    }


def text(config: Config) -> frame.Arrays:
    """A transformer's raw norm under AdamW: no clip, then a clip at 1.0; axes (seeds, 2, ...)."""
    ids, vocabulary = training.text()
    model = transformer.Config(
        vocabulary, width=config.text_width, depth=config.text_depth, max_length=config.length,
        scan=True,
    )  # fmt: skip
    params = jax.vmap(lambda key: transformer.init(key, model))(
        jax.random.split(jax.random.key(3), config.seeds)
    )
    warm = optim.warmup_constant(0.0, config.text_rate, config.text_steps // 10)

    def one(params: Any, threshold: jax.Array, seed: jax.Array) -> dict:
        tx = optim.chain(optim.clip_by_global_norm(threshold), optim.adamw(warm))

        def step(carry: Any, key: jax.Array) -> tuple[Any, tuple]:
            params, state = carry
            window = data.text_windows(ids, key, batch_size=config.text_batch, length=config.length)

            def loss(params: Any) -> jax.Array:
                logits = transformer.apply(params, window[:, :-1], model)
                return training.cross_entropy(logits, window[:, 1:])

            value, grads = jax.value_and_grad(loss)(params)
            norm = tree.global_norm(grads)
            cut = jax.tree.map(
                lambda g: jnp.clip(g, -config.by_value * norm, config.by_value * norm), grads
            )
            inner = sum(
                jnp.sum(a * b)
                for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(grads), strict=True)
            )
            updates, state = tx.update(grads, state, params)
            cosine = inner / norm / tree.global_norm(cut)
            return (optax.apply_updates(params, updates), state), (value, norm, cosine)

        keys = jax.random.split(jax.random.fold_in(jax.random.key(4), seed), config.text_steps)
        _, (losses, norms, cosines) = lax.scan(step, (params, tx.init(params)), keys)
        fifths = norms.reshape(5, -1)
        return {
            "loss": losses.reshape(20, -1).mean(1),
            "norm": norms.reshape(20, -1).mean(1),
            "engaged": jnp.mean(fifths > 1.0, 1),
            "value_cosine": jnp.mean(cosines),
        }

    over_thresholds = jax.vmap(one, in_axes=(None, 0, None))
    every = frame.compiled(jax.vmap(over_thresholds, in_axes=(0, None, 0)))
    return every(params, jnp.asarray([INFINITE, 1.0]), jnp.arange(config.seeds))


def points(config: Config) -> dict:
    return {
        **{f"digits-{r}": partial(settings, r, config) for r in config.rules},
        "text": partial(text, config),
    }
