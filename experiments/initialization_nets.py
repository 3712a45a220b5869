"""The networks of the experiment on initializers, and what is measured on them."""

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.atlas import deep, frame, training
from jaxgrad import data as real_data
from jaxgrad import nn, optim, theory

LABELS = {
    "xavier_normal": "Xavier", "he_normal": "He", "lecun_normal": "LeCun",
    "torch_linear": "PyTorch default", "orthogonal": "orthogonal",
}  # fmt: skip
CHANCE = math.log(10)


@dataclass(frozen=True)
class Config:
    """Square layers for signal and gradient, other shapes for variances, digits for training.

    Attributes:
        activations: names.
        initializers: names.
        width: of the layers.
        kept: layers after which statistics are kept; the last is the depth.
        seeds: networks a setting.
        inputs: whose statistics are averaged.
        shapes: (fan_in, fan_out) of the layers whose variances are compared.
        trained_depth: of ReLU networks trained on the digits (He et al. 2015 have 30).
        trained_initializers: theirs.
        trained: networks a setting.
        steps: of SGD with momentum.
        batch: digits a step.
        learning_rates: tried for each; the best counts.
    """

    activations: tuple[str, ...] = ("sigmoid", "tanh", "relu", "gelu", "silu", "selu")
    initializers: tuple[str, ...] = (
        "xavier_normal", "he_normal", "lecun_normal", "torch_linear", "orthogonal",
    )  # fmt: skip
    width: int = 128
    kept: tuple[int, ...] = (1, 5, 10, 20, 35, 50)
    seeds: int = 6
    inputs: int = 16
    shapes: tuple[tuple[int, int], ...] = ((784, 256), (256, 256), (256, 1024), (1024, 256))
    trained_depth: int = 30
    trained_initializers: tuple[str, ...] = ("xavier_normal", "he_normal", "torch_linear")
    trained: int = 3
    steps: int = 300
    batch: int = 32
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03)


# ------------------------------------------------------------------------------------ measurements


@lru_cache(maxsize=1)
def _layers(config: Config) -> Any:
    """Square layers, (seeds, initializers, depth, ...): the same for every activation."""
    key, shape = jax.random.key(0), (config.width, config.width)
    axes = (config.seeds, config.kept[-1])
    return deep.stacked([deep.draw(i, key, shape, *axes) for i in config.initializers], axis=1)


def _signal(activation: str, config: Config) -> frame.Arrays:
    """Mean square and variance of activations, and log gradient, after so many layers.

    Data axes: (seeds, initializers, kept). Theory axes: (initializers, kept).
    """
    phi, depth, at = nn.activation(activation), config.kept[-1], np.asarray(config.kept) - 1
    h, g = jax.random.normal(jax.random.key(1), (2, config.seeds, config.inputs, config.width))

    def one(layers: Any, h: jax.Array, g: jax.Array) -> dict[str, jax.Array]:
        def forward(h: jax.Array, layer: Any) -> tuple[jax.Array, tuple]:
            z = nn.linear(layer, h)
            h = phi(z)
            spread = jnp.mean(jnp.square(h - jnp.mean(h, -1, keepdims=True)))
            return h, (z, jnp.mean(jnp.square(h)), spread)

        def backward(g: jax.Array, both: Any) -> tuple[jax.Array, jax.Array]:
            layer, z = both
            g = (g * jax.vmap(jax.vmap(jax.grad(phi)))(z)) @ layer["kernel"].T
            norms = jnp.linalg.norm(g, axis=-1)
            return g / norms[:, None], jnp.mean(jnp.log(norms))

        _, (z, square, spread) = lax.scan(forward, h, layers)
        g = g / jnp.linalg.norm(g, axis=-1, keepdims=True)
        _, gains = lax.scan(backward, g, (layers, z), reverse=True)
        down = jnp.cumsum(gains[::-1])
        return {"square": square[at], "variance": spread[at], "log_gain": down[at]}

    over_initializers = jax.vmap(one, in_axes=(0, None, None))
    measured = frame.compiled(jax.vmap(over_initializers))(_layers(config), h, g)
    sigma_w, sigma_b = np.asarray([deep.sigmas(i, config.width) for i in config.initializers]).T
    field, q = deep.mean_field(activation, depth, sigma_w, sigma_b)
    square = (np.asarray(q)[:, 1:] - sigma_b[:, None] ** 2) / sigma_w[:, None] ** 2
    last = theory.variance_map(activation, q[:, -1], 1.0)
    return {
        **measured,
        "theory_square": np.concatenate([square, np.asarray(last)[:, None]], 1)[:, at],
        "theory_log_gain": np.cumsum(np.asarray(field)[:, ::-1], 1)[:, at],
    }


def _variances(config: Config) -> frame.Arrays:
    """Of kernels: fan_in x variance, by shape; axes (2 seeds, initializers, shapes).

    And what a ReLU layer of each shape makes of a gradient's squared norm: (seeds, shapes).
    """
    keys = jax.random.split(jax.random.key(1), 3)
    rules = ("xavier_normal", "he_normal", "torch_linear")
    scaled = np.zeros((2, len(rules), len(config.shapes)))
    kept = np.zeros((2, len(config.shapes)))
    for k, shape in enumerate(config.shapes):
        for j, rule in enumerate(rules):
            kernel = deep.draw(rule, keys[0], shape, 2)["kernel"]
            scaled[:, j, k] = shape[0] * np.var(np.asarray(kernel, np.float64), axis=(1, 2))
            if rule == "he_normal":
                x = np.asarray(jax.random.normal(keys[1], (2, 256, shape[0])), np.float64)
                g = np.asarray(jax.random.normal(keys[2], (2, 256, shape[1])), np.float64)
                wide = np.asarray(kernel, np.float64)
                back = (g * (x @ wide > 0)) @ wide.transpose(0, 2, 1)
                kept[:, k] = np.mean((back**2).sum(-1), -1) / np.mean((g**2).sum(-1), -1)
    return {"fan_in_variance": scaled, "he_backward": kept}


def _train(config: Config) -> frame.Arrays:
    n, depth = config.width // 2, config.trained_depth
    keys = jax.random.split(jax.random.key(2), 4)
    params = {
        name: deep.stacked(
            [deep.draw(i, k, shape, config.trained, *axes) for i in config.trained_initializers]
        )
        for name, k, shape, axes in (
            ("embed", keys[0], (64, n), ()), ("blocks", keys[1], (n, n), (depth,)),
            ("readout", keys[2], (n, 10), ()),
        )
    }  # fmt: skip
    (x, y), held_back = training.digits(), jax.tree.map(jnp.asarray, real_data.digits().test)

    def logits(params: Any, x: jax.Array) -> jax.Array:
        def layer(h: jax.Array, block: Any) -> tuple[jax.Array, None]:
            return jax.nn.relu(nn.linear(block, h)), None

        h, _ = lax.scan(layer, jax.nn.relu(nn.linear(params["embed"], x)), params["blocks"])
        return nn.linear(params["readout"], h)

    def one(params: Any, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        def loss(params: Any, key: jax.Array) -> jax.Array:
            images, labels = training.draw(key, x, y, config.batch)
            return training.cross_entropy(logits(params, images), labels)

        tx = optim.chain(optim.clip_by_global_norm(1.0), optim.momentum(rate))
        params, losses = training.train(loss, params, tx, keys[3], config.steps)
        right = training.accuracy(logits(params, held_back.x), held_back.y)
        return losses.reshape(10, -1).mean(1), right

    over_rates = jax.vmap(one, in_axes=(None, 0))
    every = frame.compiled(jax.vmap(jax.vmap(over_rates, (0, None)), (0, None)))
    losses, accuracy = every(params, jnp.asarray(config.learning_rates))
    return {"loss": np.swapaxes(losses, 0, 1), "accuracy": np.swapaxes(accuracy, 0, 1)}


def points(config: Config) -> dict:
    signals = {f"signal-{a}": partial(_signal, a, config) for a in config.activations}
    return {**signals, "variances": partial(_variances, config), "train": partial(_train, config)}
