"""The networks of the experiment on exploding gradients, and what is measured on them."""

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
from jaxgrad import nn, optim, tree

# Layers whose gradient keeps its size at gain one: activation, initializer.
KINDS = {
    "linear, orthogonal": ("identity", "orthogonal"),
    "linear, Gaussian": ("identity", "lecun_normal"),
    "ReLU, He": ("relu", "he_normal"),
    "tanh, orthogonal": ("tanh", "orthogonal"),
}
RULES = ("SGD", "SGD, clipped at 1", "Adam")


@dataclass(frozen=True)
class Config:
    """Networks at several gains, all of a kind in one call.

    Attributes:
        gains: factors of weights that keep the mean square at one.
        width: of the layers.
        passed: numbers of layers after which the gradient is kept; the last is the depth.
        seeds: networks a kind.
        tolerance: of the factor a layer, relative.
        dtypes: whose range is run through.
        range_gains: gains of those layers.
        range_depth: how many there are.
        range_width: their width.
        range_seeds: networks of them.
        trained_gains: of ReLU networks that are trained on the digits.
        trained_depth: their depth.
        trained: networks a setting.
        steps: of training.
        batch: digits a step.
        learning_rate: of SGD; a tenth of it is Adam's.
    """

    gains: tuple[float, ...] = (1.0, 1.05, 1.1, 1.2)
    width: int = 64
    passed: tuple[int, ...] = (1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
    seeds: int = 8
    tolerance: float = 0.005
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32")
    range_gains: tuple[float, ...] = (1.1, 1.5, 2.0, 4.0)
    range_depth: int = 1000
    range_width: int = 16
    range_seeds: int = 4
    trained_gains: tuple[float, ...] = (0.9, 1.0, 1.1, 1.2, 1.5, 2.0)
    trained_depth: int = 20
    trained: int = 3
    steps: int = 300
    batch: int = 32
    learning_rate: float = 0.02


# ------------------------------------------------------------------------------------ measurements


def _gain(kind: str, config: Config) -> frame.Arrays:
    phi, initializer = KINDS[kind]
    act, depth = nn.activation(phi), config.passed[-1]
    keys = jax.random.split(jax.random.key(0))
    shape = (config.width, config.width)
    kernels = deep.draw(initializer, keys[0], shape, config.seeds, depth)["kernel"]
    h, g = jax.random.normal(keys[1], (2, config.seeds, config.width))

    def one(kernels: jax.Array, h: jax.Array, g: jax.Array, gain: jax.Array) -> jax.Array:
        gains = log_gains(lambda w, h: act(h @ (gain * w)), kernels, h, g)
        return jnp.cumsum(gains[::-1])[np.asarray(config.passed) - 1]

    over_gains = jax.vmap(one, in_axes=(None, None, None, 0))
    every = frame.compiled(jax.vmap(over_gains, in_axes=(0, 0, 0, None)))
    measured = every(kernels, h, g, jnp.asarray(config.gains))
    sigma_w = deep.sigmas(initializer, config.width)[0] * np.asarray(config.gains)
    field, _ = deep.mean_field(phi, depth, sigma_w, 0 * sigma_w)
    down = np.cumsum(np.asarray(field)[:, ::-1], 1)[:, np.asarray(config.passed) - 1]
    return {"log_gain": measured, "mean_field": down}


def _range(dtype: str, config: Config) -> frame.Arrays:
    """At how many layers an element, and the norm by plain squares, leave the type's range.

    Where they never do: depth + 1.
    """
    n, depth = config.range_width, config.range_depth
    kernels = deep.draw("orthogonal", jax.random.key(0), (n, n), config.range_seeds, depth)
    g = jax.random.normal(jax.random.key(1), (config.range_seeds, n))
    g = (g / jnp.linalg.norm(g, axis=-1, keepdims=True)).astype(dtype)

    def one(kernels: jax.Array, g: jax.Array, gain: jax.Array) -> dict[str, jax.Array]:
        def layer(g: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
            g = (gain * kernel).astype(dtype) @ g
            # the square is rounded to the type, as where it is stored
            squares = lax.optimization_barrier(g * g)
            plain = jnp.sqrt(jnp.sum(squares))
            return g, (jnp.isfinite(g).all(), jnp.isfinite(plain), tree.global_norm(g))

        _, (elements, plain, scaled) = lax.scan(layer, g, kernels)
        alive = {"element": elements, "plain_norm": plain, "scaled_norm": jnp.isfinite(scaled)}
        return {key: 1 + jnp.sum(jnp.cumprod(kept)) for key, kept in alive.items()}

    over_gains = jax.vmap(one, in_axes=(None, None, 0))
    every = frame.compiled(jax.vmap(over_gains, in_axes=(0, 0, None)))
    return every(kernels["kernel"], g, jnp.asarray(config.range_gains))


def _rule(name: str, rate: float) -> Any:
    if name == "Adam":
        return optim.adam(rate / 10)
    clip = [optim.clip_by_global_norm(1.0)] if "clipped" in name else []
    return optim.chain(*clip, optim.sgd(rate))


def _train(rule: str, config: Config) -> frame.Arrays:
    n, depth = config.width, config.trained_depth
    keys = jax.random.split(jax.random.key(2), 4)
    embed, readout = (
        deep.draw("he_normal", k, shape, config.trained)
        for k, shape in zip(keys, ((64, n), (n, 10)), strict=False)
    )
    blocks = deep.draw("he_normal", keys[2], (n, n), config.trained, depth)
    (x, y), held_back = training.digits(), jax.tree.map(jnp.asarray, real_data.digits().test)

    def logits(params: Any, x: jax.Array) -> jax.Array:
        def layer(h: jax.Array, block: Any) -> tuple[jax.Array, None]:
            return jax.nn.relu(nn.linear(block, h)), None

        h, _ = lax.scan(layer, nn.linear(params["embed"], x), params["blocks"])
        return nn.linear(params["readout"], h)

    def one(params: Any, gain: jax.Array) -> tuple[jax.Array, ...]:
        def loss(params: Any, key: jax.Array) -> jax.Array:
            images, labels = training.draw(key, x, y, config.batch)
            return training.cross_entropy(logits(params, images), labels)

        blocks = {**params["blocks"], "kernel": gain * params["blocks"]["kernel"]}
        params = {**params, "blocks": blocks}
        first = tree.global_norm(jax.grad(loss)(params, keys[3]))
        tx = _rule(rule, config.learning_rate)
        params, losses = training.train(loss, params, tx, keys[3], config.steps)
        right = training.accuracy(logits(params, held_back.x), held_back.y)
        return losses.reshape(10, -1).mean(1), right, first

    over_gains = jax.vmap(one, in_axes=(None, 0))
    every = frame.compiled(jax.vmap(over_gains, in_axes=(0, None)))
    params = {"embed": embed, "blocks": blocks, "readout": readout}
    losses, accuracy, norm = every(params, jnp.asarray(config.trained_gains))
    return {"loss": losses, "accuracy": accuracy, "first_norm": norm}


def points(config: Config) -> dict:
    return {
        **{f"gain-{k}": partial(_gain, k, config) for k in KINDS},
        **{f"range-{d}": partial(_range, d, config) for d in config.dtypes},
        **{f"train-{r}": partial(_train, r, config) for r in RULES},
    }
