"""The layers and networks of the experiment on normalization, and what is measured on them."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.atlas import deep, frame, training
from experiments.atlas.measuring import log_gains
from jaxgrad import nn, theory
from jaxgrad.nn.normalization import EPSILON

ORDERS = ("phi(LN(W h))", "LN(phi(W h))")
FORMS = ("sqrt(var + eps)", "std + eps", "std + eps, plain autodiff")


@dataclass(frozen=True)
class Config:
    """One layer, deep stacks without skips, and networks on the digits.

    Attributes:
        factors: alphas by which the weights before the norm are multiplied.
        width: of the one layer.
        seeds: layers and stacks.
        tolerance: relative change that counts as none.
        sigmas: standard deviations of an input to the norm.
        widths: of the norms whose null directions are measured.
        activations: of the deep stacks.
        deep_width: theirs.
        depth: theirs.
        trained_factors: alphas of the networks that are trained.
        trained_depth: their normalized layers.
        trained_width: their width.
        trained: networks a setting.
        steps: of gradient descent.
        batch: digits a step.
        learning_rate: of the network at alpha = 1.
    """

    factors: tuple[float, ...] = (0.001, 0.01, 0.1, 10.0, 100.0)
    width: int = 64
    seeds: int = 8
    tolerance: float = 0.01
    sigmas: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    widths: tuple[int, ...] = (4, 16, 64, 256)
    activations: tuple[str, ...] = ("sigmoid", "tanh", "relu", "gelu", "silu")
    deep_width: int = 128
    depth: int = 50
    trained_factors: tuple[float, ...] = (0.3, 3.0, 10.0)
    trained_depth: int = 3
    trained_width: int = 32
    trained: int = 3
    steps: int = 300
    batch: int = 64
    learning_rate: float = 0.1


# ------------------------------------------------------------------------------------ measurements


def _scale(config: Config) -> frame.Arrays:
    """Of LN(alpha W x): how the output and the weights' gradient change; axes (seeds, factors)."""
    n = config.width

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key)
        w = nn.initializer("lecun_normal").weight(keys[0], (n, n), jnp.float32)
        x, target = jax.random.normal(keys[1], (2, n))

        def loss(w: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = nn.layer_norm({}, x @ w)
            return jnp.sum(jnp.square(y - target)), y

        def at(alpha: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            gradient, y = jax.grad(loss, has_aux=True)(alpha * w)
            cosine = jnp.sum(gradient * w) / jnp.linalg.norm(gradient) / jnp.linalg.norm(w)
            return gradient, y, cosine

        plain, y, _ = at(jnp.ones(()))
        others, ys, cosines = jax.vmap(at)(jnp.asarray(config.factors))
        norms = jnp.linalg.norm(others.reshape(len(others), -1), axis=-1)
        return {
            "output_change": jnp.linalg.norm(ys - y, axis=-1) / jnp.linalg.norm(y),
            "gradient_ratio": norms / jnp.linalg.norm(plain),
            "cosine": cosines,
        }

    return frame.over_seeds(one, config.seeds)


def _naive(x: jax.Array) -> jax.Array:
    """The textbook's formula as one writes it: the square root's slope at zero is infinite."""
    return (x - jnp.mean(x)) / (jnp.std(x) + EPSILON)


def _epsilon(config: Config) -> frame.Arrays:
    """By form and sigma: root mean square of the output; at a constant input: the largest gain."""
    forms = (partial(nn.layer_norm, {}), partial(nn.layer_norm_as_written, {}), _naive)

    def one(key: jax.Array) -> dict[str, jax.Array]:
        x = jax.random.normal(key, (config.width,))
        x = (x - jnp.mean(x)) / jnp.std(x)
        inputs = jnp.asarray(config.sigmas)[:, None] * x
        rms = [jnp.sqrt(jnp.mean(jnp.square(jax.vmap(f)(inputs)), -1)) for f in forms]
        # max |J v| over v is |J|; J of a constant input is a multiple of a projection
        jacobians = [jax.jacrev(f)(jnp.zeros(config.width)) for f in forms]
        gains = [jnp.sqrt(jnp.sum(jnp.square(j)) / (config.width - 1)) for j in jacobians]
        return {"rms": jnp.stack(rms), "constant_gain": jnp.stack(gains)}

    return frame.over_seeds(one, config.seeds)


def _null(config: Config) -> frame.Arrays:
    """By width: what of a random gradient's norm passes, times sigma; and of the two directions."""

    def one(key: jax.Array) -> dict[str, jax.Array]:
        found: dict[str, list] = {"passed": [], "ones": [], "input": []}
        drawn = jax.random.normal(key, (65, max(config.widths)))
        for n in config.widths:
            x, g = drawn[0, :n], drawn[1:, :n]
            sigma = jnp.std(x)
            _, pull = jax.vjp(partial(nn.layer_norm, {}), x)
            (back,) = jax.vmap(pull)(g)
            square = jnp.mean(jnp.square(sigma * back)) / jnp.mean(jnp.square(g))
            found["passed"].append(jnp.sqrt(square))
            for name, v in (("ones", jnp.ones(n)), ("input", x - jnp.mean(x))):
                (back,) = pull(v / jnp.linalg.norm(v))
                found[name].append(sigma * jnp.linalg.norm(back))
        return {name: jnp.stack(values) for name, values in found.items()}

    return frame.over_seeds(one, config.seeds)


def _deep(activation: str, config: Config) -> frame.Arrays:
    """Mean log gain a layer of stacks without skips, by order; axes (seeds, orders)."""
    phi, n = nn.activation(activation), config.deep_width
    keys = jax.random.split(jax.random.key(0))
    layers = deep.draw("lecun_normal", keys[0], (n, n), config.seeds, config.depth)["kernel"]
    h, g = jax.random.normal(keys[1], (2, config.seeds, n))
    norm = partial(nn.layer_norm, {})
    blocks = (lambda w, h: phi(norm(h @ w)), lambda w, h: norm(phi(h @ w)))

    def one(layers: jax.Array, h: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.stack([jnp.mean(log_gains(block, layers, h, g)) for block in blocks])

    chi = (
        theory.norm_then_activation_chi(activation, n),
        theory.activation_then_norm_chi(activation),
    )
    predicted = np.log([float(c) for c in chi]) / 2
    return {"log_gain": frame.compiled(jax.vmap(one))(layers, h, g), "theory": predicted}


def rates(config: Config) -> list[tuple[float, float]]:
    """(alpha, factor of the blocks' rate): ones, then each alpha without and with alpha^2."""
    pairs = [(1.0, 1.0)]
    for alpha in config.trained_factors:
        pairs += [(alpha, 1.0), (alpha, alpha**2)]
    return pairs


def _descent(blocks_rate: jax.Array, rate: float) -> optax.GradientTransformation:
    """Gradient descent with a rate of their own for the blocks; its state sums their squares."""

    def update(grads: Any, state: jax.Array, params: Any = None) -> tuple[Any, jax.Array]:
        del params
        rates = dict.fromkeys(grads, rate) | {"blocks": blocks_rate}
        steps = {k: jax.tree.map(lambda g, k=k: -rates[k] * g, grads[k]) for k in grads}
        return steps, state + jnp.sum(jnp.square(steps["blocks"]))

    return optax.GradientTransformation(lambda _: jnp.zeros(()), update)


def _train(config: Config) -> frame.Arrays:
    n, keys = config.trained_width, jax.random.split(jax.random.key(2), 4)
    count, depth = config.trained, config.trained_depth
    params = {
        "embed": deep.draw("lecun_normal", keys[0], (64, n), count),
        "blocks": deep.draw("lecun_normal", keys[1], (n, n), count, depth)["kernel"],
        "readout": deep.draw("lecun_normal", keys[2], (n, 10), count),
    }
    x, y = training.digits()

    def logits(params: Any, x: jax.Array) -> jax.Array:
        h = nn.linear(params["embed"], x)
        for w in params["blocks"]:
            h = jax.nn.relu(nn.layer_norm({}, h @ w, epsilon=0.0))
        return nn.linear(params["readout"], h)

    def one(params: Any, alpha: jax.Array, factor: jax.Array) -> dict[str, jax.Array]:
        def loss(params: Any, key: jax.Array) -> jax.Array:
            images, labels = training.draw(key, x, y, config.batch)
            return training.cross_entropy(logits(params, images), labels)

        params = {**params, "blocks": alpha * params["blocks"]}
        tx = _descent(factor * config.learning_rate, config.learning_rate)
        before = jnp.sum(jnp.square(params["blocks"]))

        def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, key)
            updates, state = tx.update(grads, state, params)
            return (jax.tree.map(jnp.add, params, updates), state), value

        steps = jax.random.split(keys[3], config.steps)
        (params, squares), losses = jax.lax.scan(step, (params, tx.init(params)), steps)
        after = jnp.sum(jnp.square(params["blocks"]))
        return {
            "loss": losses.reshape(20, -1).mean(1),
            "growth": after / before,
            "pythagoras": (before + squares) / before,
        }

    over_settings = jax.vmap(one, in_axes=(None, 0, 0))
    alphas, factors = jnp.asarray(rates(config)).T
    every = jax.vmap(over_settings, in_axes=(0, None, None))
    return frame.compiled(every)(params, alphas, factors)


def points(config: Config) -> dict:
    return {
        "scale": partial(_scale, config),
        "epsilon": partial(_epsilon, config),
        "null": partial(_null, config),
        **{f"deep-{a}": partial(_deep, a, config) for a in config.activations},
        "train": partial(_train, config),
    }
