"""The networks of the experiment on vanishing gradients, and what is measured on them."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.atlas import deep, frame, training
from experiments.atlas.measuring import log_gains
from jaxgrad import data as real_data
from jaxgrad import nn, optim
from jaxgrad.nn import mlp

LABELS = {"xavier_normal": "Xavier", "he_normal": "He", "torch_linear": "PyTorch default"}
CHANCE = math.log(10)


@dataclass(frozen=True)
class Config:
    """Every activation with every initializer; initializers, seeds and depths in one call.

    Attributes:
        activations: names.
        trained_activations: those of the networks that are trained.
        initializers: names.
        width: of the layers.
        passed: numbers of layers after which the gradient is kept; the last is the depth.
        seeds: networks whose gradient is measured, a setting.
        factor: what the statement says a layer multiplies by.
        decades: a gradient counts as not shrunk within so many powers of ten.
        lost_decades: it counts as lost beyond so many: below 1e-6 of the last layer's, which is
            about 0.01, Adam's epsilon of 1e-8 hides it.
        depths: of the networks that are trained.
        deepest: depth of more such networks.
        deepest_activations: of those.
        trained: networks trained, a setting.
        steps: of Adam.
        deepest_steps: of the deepest networks.
        batch: digits a step.
        learning_rate: of Adam, divided by the depth; 0.01 at most.
    """

    activations: tuple[str, ...] = ("sigmoid", "tanh", "relu", "gelu", "silu")
    trained_activations: tuple[str, ...] = ("sigmoid", "tanh", "relu", "gelu")
    initializers: tuple[str, ...] = ("xavier_normal", "he_normal", "torch_linear")
    width: int = 64
    passed: tuple[int, ...] = (2, 5, 10, 20, 30, 40, 50, 75, 100, 125, 150, 175, 200)
    seeds: int = 8
    factor: float = 0.9
    decades: float = 1.0
    lost_decades: float = 6.0
    depths: tuple[int, ...] = (2, 10, 30)
    deepest: int = 200
    deepest_activations: tuple[str, ...] = ("tanh", "relu")
    trained: int = 2
    steps: int = 240
    deepest_steps: int = 100
    batch: int = 32
    learning_rate: float = 0.05


# ------------------------------------------------------------------------------------ measurements


def _blocks(config: Config, key: jax.Array, seeds: int, depth: int) -> Any:
    """Square layers, (initializers, seeds, depth, ...)."""
    shape = (config.width, config.width)
    each = [deep.draw(i, key, shape, seeds, depth) for i in config.initializers]
    return deep.stacked(each)


def _gains(activation: str, config: Config) -> frame.Arrays:
    depth = config.passed[-1]
    model = mlp.Config(1, 1, config.width, depth, activation=activation, scan=True)
    keys = jax.random.split(jax.random.key(0))
    layers = {**_blocks(config, keys[0], config.seeds, depth), "norm": {}}
    h, g = jax.random.normal(keys[1], (2, config.seeds, config.width))

    def one(layers: Any, h: jax.Array, g: jax.Array) -> jax.Array:
        gains = log_gains(lambda p, h: mlp.block(p, h, model), layers, h, g)
        return jnp.cumsum(gains[::-1])[np.asarray(config.passed) - 1]

    over_initializers = jax.vmap(jax.vmap(one), in_axes=(0, None, None), out_axes=1)
    widths = [deep.sigmas(i, config.width) for i in config.initializers]
    theory, _ = deep.mean_field(activation, depth, *np.asarray(widths).T)
    down = np.cumsum(np.asarray(theory)[:, ::-1], 1)[:, np.asarray(config.passed) - 1]
    return {"log_gain": frame.compiled(over_initializers)(layers, h, g), "theory": down}


def _train(activation: str, depths: tuple[int, ...], config: Config) -> frame.Arrays:
    phi = nn.activation(activation)
    steps = config.deepest_steps if depths == (config.deepest,) else config.steps
    keys = jax.random.split(jax.random.key(1), 3)
    ends = ((64, config.width), (config.width, 10))
    embed, readout = (
        deep.stacked([deep.draw(i, k, shape, config.trained) for i in config.initializers])
        for k, shape in zip(keys[:2], ends, strict=True)
    )
    blocks = _blocks(config, keys[2], config.trained, max(depths))
    params = {"embed": embed, "blocks": blocks, "readout": readout}
    (x, y), held_back = training.digits(), jax.tree.map(jnp.asarray, real_data.digits().test)

    def logits(params: Any, x: jax.Array, depth: jax.Array) -> jax.Array:
        def layer(h: jax.Array, both: Any) -> tuple[jax.Array, None]:
            block, k = both
            return lax.cond(k < depth, lambda h: phi(nn.linear(block, h)), lambda h: h, h), None

        h = phi(nn.linear(params["embed"], x))
        h, _ = lax.scan(layer, h, (params["blocks"], jnp.arange(max(depths))))
        return nn.linear(params["readout"], h)

    def one(params: Any, depth: jax.Array) -> tuple[jax.Array, jax.Array]:
        def loss(params: Any, key: jax.Array) -> jax.Array:
            images, labels = training.draw(key, x, y, config.batch)
            return training.cross_entropy(logits(params, images, depth), labels)

        rule = optim.adam(jnp.minimum(config.learning_rate / depth, 0.01))
        params, losses = training.train(loss, params, rule, jax.random.key(2), steps)
        right = training.accuracy(logits(params, held_back.x, depth), held_back.y)
        return losses.reshape(10, -1).mean(1), right

    nets = jax.vmap(jax.vmap(one, in_axes=(0, None)), in_axes=(0, None))
    # a depth at a time, so that layers beyond it are skipped, not computed
    each = frame.compiled(lambda params, depths: lax.map(partial(nets, params), depths))
    losses, accuracy = (np.asarray(x) for x in each(params, jnp.asarray(depths)))
    order = (2, 1, 0)  # (depths, initializers, seeds) -> seeds first
    return {"loss": losses.transpose(*order, 3), "accuracy": accuracy.transpose(order)}


def points(config: Config) -> dict:
    gains = {f"gain-{a}": partial(_gains, a, config) for a in config.activations}
    trained = {
        f"train-{a}-{max(depths)}": partial(_train, a, depths, config)
        for a in config.trained_activations
        for depths in groups(config, a)
    }
    return {**gains, **trained}


def groups(config: Config, activation: str) -> list[tuple[int, ...]]:
    """Depths trained in one call each: a deep one would make the others pay for its parameters."""
    deepest = [(config.deepest,)] if activation in config.deepest_activations else []
    return [config.depths, *deepest]
