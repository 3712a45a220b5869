"""The nets of the edge of chaos: random ones over the plane, trained ones, and their spectra."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.atlas import frame, training
from experiments.atlas.measuring import log_gains
from jaxgrad import nn, optim, theory

# The correlation of two inputs is compared after these layers.
FROM, SPAN = 7, 12


@dataclass(frozen=True)
class Config:
    """Random tanh nets over the plane of initializations; the same, trained on digits; spectra.

    Attributes:
        biases: variances sigma_b^2 of the plane.
        ratios: sigma_w of the plane, over the critical one for each bias.
        width: of the random nets.
        depth: of the random nets.
        seeds: random nets a cell.
        trained: variances sigma_w^2 of the nets that are trained, at sigma_b^2 = `bias`; the
            critical one is trained beside them, with Gaussian and with orthogonal weights.
        bias: see `trained`.
        depths: of the nets that are trained.
        hidden: their width.
        steps: of gradient descent with momentum 0.9.
        batch: digits a step.
        rate: learning rate.
        runs: nets trained a cell.
        spectrum_width: of the nets whose singular values are taken.
        spectrum_depth: of the same.
        spectrum_seeds: of the same.
        small_q: the mean square q* of the nearly linear tanh net.
    """

    biases: tuple[float, ...] = (0.01, 0.05, 0.2)
    ratios: tuple[float, ...] = (0.6, 0.8, 0.95, 1.05, 1.25, 1.6)
    width: int = 256
    depth: int = 48
    seeds: int = 12
    trained: tuple[float, ...] = (0.8, 1.2, 2.5, 4.0)
    bias: float = 0.05
    depths: tuple[int, ...] = (8, 20, 48)
    hidden: int = 64
    steps: int = 300
    batch: int = 64
    rate: float = 0.003
    runs: int = 3
    spectrum_width: int = 192
    spectrum_depth: int = 16
    spectrum_seeds: int = 6
    small_q: float = 0.01


@cache
def critical(bias: float) -> tuple[float, float]:
    """(sigma_w, q*) on the critical line."""
    sigma_w, q = theory.edge_of_chaos("tanh", bias**0.5)
    return float(sigma_w), float(q)


def cells(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """(sigma_w, sigma_b) of the plane's cells, each (biases, ratios)."""
    lines = np.array([critical(b)[0] for b in config.biases])
    sigma_b = np.sqrt(np.array(config.biases))[:, None] * np.ones(len(config.ratios))
    return lines[:, None] * np.array(config.ratios), sigma_b


def _plane(config: Config) -> frame.Arrays:
    sigma_w, sigma_b = cells(config)
    field = theory.mean_field("tanh", sigma_w, sigma_b)
    settings = tuple(jnp.asarray(a).ravel() for a in (sigma_w, sigma_b, field.q))
    n, depth = config.width, config.depth

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 3)
        weights = jax.random.normal(keys[0], (depth, n, n)) / n**0.5
        biases = jax.random.normal(keys[1], (depth, n))
        a, b, g = jax.random.normal(keys[2], (3, n))

        def cell(w: jax.Array, s: jax.Array, q: jax.Array) -> dict[str, jax.Array]:
            def block(layer: Any, h: jax.Array) -> jax.Array:
                return w * jnp.tanh(h) @ layer[0] + s * layer[1]

            def both(hs: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
                hs = block(layer, hs)
                unit = hs / jnp.linalg.norm(hs, axis=1, keepdims=True)
                return hs, jnp.sum(jnp.square(unit[0] - unit[1])) / 2  # 1 - c without cancelling

            first = jnp.sqrt(q) * jnp.stack([a, 0.6 * a + 0.8 * b])
            last, apart = lax.scan(both, first, (weights, biases))
            gains = log_gains(block, (weights, biases), first[0], g)
            return {
                "q": jnp.mean(jnp.square(last[0])),
                "log_gain": 2 * jnp.sum(gains),
                "log_apart": jnp.log(apart[jnp.array([FROM, FROM + SPAN])]),
                "c": 1 - apart[-1],
            }

        return jax.vmap(cell)(*settings)

    return frame.over_seeds(one, config.seeds)


def trained_settings(config: Config) -> list[tuple[str, float]]:
    """(weights, sigma_w) of the columns that are trained, by sigma_w; orthogonal last."""
    edge = critical(config.bias)[0]
    gaussian = sorted([*np.sqrt(config.trained), edge])
    return [*(("gaussian", float(s)) for s in gaussian), ("orthogonal", edge)]


def _trained(depth: int, config: Config) -> frame.Arrays:
    x, y = training.digits()
    n, settings = config.hidden, trained_settings(config)
    sigma = jnp.array([s for _, s in settings])
    straight = jnp.array([kind == "orthogonal" for kind, _ in settings])
    tx = optim.momentum(config.rate)

    def logits(params: Any, x: jax.Array) -> jax.Array:
        h = x @ params["embed"] + params["bias"]
        h, _ = lax.scan(lambda h, p: (jnp.tanh(h) @ p[0] + p[1], None), h, params["layers"])
        return jnp.tanh(h) @ params["readout"]

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 7)
        rotations = jax.vmap(lambda k: nn.initializers.orthogonal_weight(k, (n, n)))(
            jax.random.split(keys[0], depth)
        )
        normal = jax.random.normal(keys[1], (depth, n, n)) / n**0.5
        ends = jax.random.normal(keys[2], (64, n)) / 8, jax.random.normal(keys[3], (n, 10)) / n**0.5
        biases = config.bias**0.5 * jax.random.normal(keys[4], (depth + 1, n))

        def cell(s: jax.Array, orthogonal: jax.Array) -> dict[str, jax.Array]:
            kernels = s * jnp.where(orthogonal, rotations, normal)
            params = {
                "embed": s * ends[0], "bias": biases[0], "layers": (kernels, biases[1:]),
                "readout": ends[1],
            }  # fmt: skip

            def loss(params: Any, key: jax.Array) -> jax.Array:
                some, labels = training.draw(key, x, y, config.batch)
                return training.cross_entropy(logits(params, some), labels)

            params, losses = training.train(loss, params, tx, keys[5], config.steps)
            tail = jnp.mean(losses[-config.steps // 10 :])
            return {"accuracy": training.accuracy(logits(params, x), y), "loss": tail}

        return jax.vmap(cell)(sigma, straight)

    return frame.over_seeds(one, config.runs)


def kinds(config: Config) -> dict[str, tuple[str, float, float]]:
    """{name: (activation, q*, sigma_w)} of the spectra, all at chi_1 = 1."""
    small = float(theory.slope_moment("tanh", config.small_q, 2))
    half = float(theory.slope_moment("tanh", 0.5, 2))
    return {
        "linear": ("linear", 1.0, 1.0),
        f"tanh q*={config.small_q}": ("tanh", config.small_q, small**-0.5),
        "tanh q*=0.5": ("tanh", 0.5, half**-0.5),
        "ReLU": ("relu", 1.0, 2.0**0.5),
    }


def _spectra(config: Config) -> frame.Arrays:
    n, depth = config.spectrum_width, config.spectrum_depth
    nets = kinds(config)
    # the biases that hold q at its fixed point; ReLU's and the identity's need none
    biases = {
        name: max(q - float(theory.variance_map(phi, q, sigma_w)), 0.0) ** 0.5
        for name, (phi, q, sigma_w) in nets.items()
    }

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 3)
        normal = jax.random.normal(keys[0], (depth, n, n)) / n**0.5
        rotations = jax.vmap(lambda k: nn.initializers.orthogonal_weight(k, (n, n)))(
            jax.random.split(keys[1], depth)
        )

        def product(weights: jax.Array, name: str) -> jax.Array:
            phi, (_, q, sigma_w) = theory.activation(nets[name][0]), nets[name]

            def layer(carry: Any, both: Any) -> tuple[Any, None]:
                h, j = carry
                w, z = both
                j = sigma_w * (phi.derivative(h)[:, None] * j).T @ w  # (J h)^T
                h = sigma_w * phi.function(h) @ w + biases[name] * z
                return (h, j.T), None

            z = jax.random.normal(keys[2], (depth + 1, n))
            (_, j), _ = lax.scan(layer, (q**0.5 * z[0], jnp.eye(n)), (weights, z[1:]))
            return j

        products = [product(w, name) for name in nets for w in (normal, rotations)]
        s = jnp.linalg.svd(jnp.stack(products), compute_uv=False)
        s = s.reshape(len(nets), 2, n)
        mean = jnp.mean(s**2, -1)
        spread = jnp.mean(s**4, -1) / mean**2 - 1
        some = jnp.round(jnp.linspace(0, n - 1, 24)).astype(int)
        return {"spread": spread, "largest": s[..., 0], "values": s[..., some]}

    return frame.over_seeds(one, config.spectrum_seeds)


def points(config: Config) -> dict:
    return {
        "plane": partial(_plane, config),
        **{f"depth={d}": partial(_trained, d, config) for d in config.depths},
        "spectra": partial(_spectra, config),
    }
