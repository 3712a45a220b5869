"""Networks of `precision`: gradients cast to half precision, and training in it."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from experiments.atlas import casting, frame, measuring, products, training
from jaxgrad import data as real_data
from jaxgrad import nn, optim
from jaxgrad.nn import mlp


@dataclass(frozen=True)
class Config:
    """The sweep; all seeds, and all loss scales, in one call.

    Attributes:
        nets: (activation, initializer) of the nets whose gradients are cast.
        width: of their layers.
        depth: number of layers.
        seeds: networks a point.
        batch: digits whose mean loss is differentiated.
        scales: binary exponents of the loss scales.
        train_depth: layers of the He ReLU net that is trained.
        train_width: of its layers.
        train_seeds: runs a setting.
        train_scales: binary exponents of the factors of the loss; 2^-18 makes of a mean over 64
            examples one over 16 million, as in training language models.
        steps: of Adam.
        rate: of Adam.
        product: the products of Jacobians.
    """

    nets: tuple[tuple[str, str], ...] = (
        ("sigmoid", "torch_linear"), ("sigmoid", "xavier_normal"), ("relu", "xavier_normal"),
        ("relu", "he_normal"),
    )  # fmt: skip
    width: int = 64
    depth: int = 50
    seeds: int = 6
    batch: int = 64
    scales: tuple[int, ...] = (0, 10, 20)
    train_depth: int = 6
    train_width: int = 32
    train_seeds: int = 3
    train_scales: tuple[int, ...] = (-18, 0, 10)
    steps: int = 150
    rate: float = 3e-3
    product: products.Config = field(default_factory=products.Config)


# ----------------------------------------------------------------------------------------- flushing


def _flushed(activation: str, config: Config) -> frame.Arrays:
    """By seed and initializer: what casting loses of dL/dh, and how large it is."""
    rules = initializers(activation, config)
    model = mlp.Config(64, 10, config.width, config.depth, activation, scan=True)
    digits, scales = training.digits(), 2.0 ** jnp.asarray(config.scales)

    def lost(params: Any, x: jax.Array, y: jax.Array) -> frame.Arrays:
        h = nn.activation(activation)(nn.linear(params["embed"], x))
        h, states = lax.scan(lambda h, p: (mlp.block(p, h, model), h), h, params["blocks"])

        def loss(h: jax.Array) -> jax.Array:
            return training.cross_entropy(nn.linear(params["readout"], h), y)

        g = jax.grad(loss)(h)
        run = jax.vmap(
            lambda s, half: casting.backward(params["blocks"], states, s * g, half, model)
        )
        zero, finite = run(jnp.tile(scales, 2), jnp.repeat(jnp.asarray([True, False]), len(scales)))
        return {
            "log2_rms": casting.exact(params["blocks"], states, g, model),
            "float16_zero": zero[: len(scales)],
            "float16_finite": jnp.min(finite[: len(scales)], 1),
            "bfloat16_zero": zero[len(scales)],
        }

    def one(key: jax.Array, nets: Any) -> frame.Arrays:
        x, y = training.draw(key, *digits, config.batch)
        return jax.vmap(lambda params: lost(params, x, y))(nets)

    models = [replace(model, initializer=rule) for rule in rules]
    out = measuring.over_nets(one, models, config.seeds)
    out = {name: np.round(values, 3) for name, values in out.items()}
    return {
        **out,
        "gain": np.asarray([casting.gain(activation, rule, config.width) for rule in rules]),
    }


def initializers(activation: str, config: Config) -> list[str]:
    """The initializers that an activation is paired with."""
    return [rule for name, rule in config.nets if name == activation]


# ------------------------------------------------------------------------------- training and norms


def _trained(dtype: str, config: Config) -> frame.Arrays:
    """Accuracy on held-out digits after Adam, by loss scale."""
    model = mlp.Config(64, 10, config.train_width, config.train_depth, scan=True, dtype=dtype)
    digits, test = training.digits(), real_data.digits().test
    x_test = jnp.asarray(test.x)

    def one(key: jax.Array, nets: Any) -> frame.Arrays:
        # one vector of parameters compiles sooner than a tree
        params, tree_of = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], nets))
        # epsilon is below all gradients; a step that overflows is skipped
        adam = optim.apply_if_finite(optim.adam(config.rate, eps=1e-20), config.steps)

        def run(scale: jax.Array) -> jax.Array:
            def loss(params: Any, key: jax.Array) -> jax.Array:
                x, y = training.draw(key, *digits, config.batch)
                return scale * training.cross_entropy(mlp.apply(tree_of(params), x, model), y)

            rule = _unscaled(adam, scale)
            end, _ = training.train(loss, params, rule, key, config.steps)
            return training.accuracy(mlp.apply(tree_of(end), x_test, model), test.y)

        return {"accuracy": jax.vmap(run)(2.0 ** jnp.asarray(config.train_scales))}

    return measuring.over_nets(one, [replace(model, dtype=None)], config.train_seeds)


def _unscaled(rule: Any, scale: jax.Array) -> Any:
    """The rule, fed with a gradient divided by the loss scale."""

    def update(grads: jax.Array, state: Any, params: Any = None) -> Any:
        return rule.update(grads / scale, state, params)

    return rule._replace(update=update)


def points(config: Config) -> dict:
    return {
        **{a: partial(_flushed, a, config) for a in dict(config.nets)},
        **{f"train-{d}": partial(_trained, d, config) for d in ("float32", "float16", "bfloat16")},
        "products": partial(products.measure, config.product),
        "norms": casting.norms,
    }
