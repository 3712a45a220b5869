"""Dead before the first step: units on all digits, and whole nets."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from experiments.atlas import drawing, frame, training


@dataclass(frozen=True)
class Config:
    """He ReLU nets at initialization, without biases.

    Attributes:
        width: of the nets whose units are counted.
        depth: their layers.
        seeds: nets.
        examples: digits for which a dead unit is off.
        narrow: widths of the nets that may be dead as a whole.
        narrow_depth: their layers.
        nets: how many of each width.
        draws: Gaussian units by which theory's share is integrated.
    """

    width: int = 64
    depth: int = 32
    seeds: int = 16
    examples: int = 200
    narrow: tuple[int, ...] = (2, 3, 4, 6, 8)
    narrow_depth: int = 24
    nets: int = 2000
    draws: int = 3000


def measure_units(config: Config) -> frame.Arrays:
    """Share of each layer's units that no digit turns on: measured (seeds, depth), predicted."""
    x = training.digits()[0][: config.examples]

    def one(key: Array) -> frame.Arrays:
        first, rest = jax.random.split(key)
        z = x @ jax.random.normal(first, (x.shape[1], config.width))
        shape = (config.depth - 1, config.width, config.width)
        kernels = jnp.sqrt(2 / config.width) * jax.random.normal(rest, shape)

        def layer(z: Array, kernel: Array) -> tuple[Array, Array]:
            return jax.nn.relu(z) @ kernel, z

        last, before = lax.scan(layer, z, kernels)
        every = jnp.concatenate([before, last[None]])
        return {"dead": jnp.mean(jnp.all(every <= 0, 1), 1), "off": jnp.mean(every <= 0, (1, 2))}

    out = frame.over_seeds(one, config.seeds)
    out = {name: np.round(values, 4) for name, values in out.items()}
    return {**out, "predicted": dead_share(np.asarray(x, np.float64), config)}


def dead_share(x: np.ndarray, config: Config) -> np.ndarray:
    """Share of dead units by layer in the limit of width.

    A layer's units are independent draws of a Gaussian process, whose covariance follows the
    arc-cosine kernel (Cho and Saul 2009, equation 6); the share of draws that are negative for all
    examples is counted.
    """
    covariance, shares = x @ x.T, []
    normal = np.random.default_rng(0).standard_normal((config.draws, len(x)))
    for _ in range(config.depth):
        values, vectors = np.linalg.eigh(covariance)
        draws = (normal * np.sqrt(np.maximum(values, 0))) @ vectors.T
        shares.append(np.mean(np.all(draws <= 0, 1)))
        norms = np.sqrt(np.diag(covariance))
        cosine = np.clip(covariance / np.outer(norms, norms), -1, 1)
        kernel = np.sqrt(1 - cosine**2) + (np.pi - np.arccos(cosine)) * cosine
        covariance = np.outer(norms, norms) * kernel / np.pi
    return np.asarray(shares)


def measure_nets(config: Config) -> frame.Arrays:
    """By width, how many nets have a layer without any unit that is on for one input."""
    largest = max(config.narrow)

    def one(key: Array, width: Array) -> Array:
        exists = jnp.arange(largest) < width
        first, rest = jax.random.split(key)

        def layer(h: Array, key: Array) -> tuple[Array, None]:
            h = exists * jax.nn.relu(h @ jax.random.normal(key, (largest, largest)))
            return h / jnp.maximum(jnp.linalg.norm(h), 1e-30), None

        start = exists * jax.random.normal(first, (largest,))
        h, _ = lax.scan(layer, start, jax.random.split(rest, config.narrow_depth))
        return jnp.all(h == 0)

    widths = jnp.asarray(config.narrow)
    dead = frame.over_seeds(lambda key: jax.vmap(lambda w: one(key, w))(widths), config.nets)
    return {"dead": dead.sum(0), "nets": np.asarray([config.nets])}


def law(config: Config) -> np.ndarray:
    """1 - (1 - 2^-n)^L, by width."""
    return 1 - (1 - 0.5 ** np.asarray(config.narrow)) ** config.narrow_depth


def judge_nets(config: Config, arrays: frame.Arrays) -> frame.Verdict:
    """By width: |z| < 4 of the number of dead nets against the law."""
    good, words, divergence = {}, [], 0.0
    count = int(arrays["nets"][0])
    for width, dead, p in zip(config.narrow, arrays["dead"], law(config), strict=True):
        z = (dead - count * p) / np.sqrt(count * p * (1 - p))
        good[f"width {width}"] = bool(abs(z) < 4)
        divergence = max(divergence, abs(float(np.log(max(dead, 0.5) / (count * p)))))
        words.append(f"width {width}: {dead / count:.3f}, predicted {p:.3f} (z = {z:.1f})")
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def looked_at(config: Config) -> list[int]:
    """Layers that are judged: powers of two."""
    return [2**k for k in range(config.depth.bit_length()) if 2**k <= config.depth]


def judge_units(config: Config, arrays: frame.Arrays) -> frame.Verdict:
    """By layer: at most 1 % of its units are dead."""
    good, words, divergence = {}, [], 0.0
    for layer in looked_at(config):
        mean, low, high = frame.interval(np.asarray(arrays["dead"])[:, layer - 1])
        predicted = float(arrays["predicted"][layer - 1])
        good[f"layer {layer}"] = bool(mean <= 0.01)
        words.append(
            f"layer {layer}: {mean:.1%} [{low:.1%}, {high:.1%}] dead, wide limit {predicted:.1%}"
        )
        if predicted > 0.05 and mean > 0:
            divergence = max(divergence, abs(float(np.log(mean / predicted))))
    off = float(np.mean(arrays["off"]))
    words.append(f"off for an example: {off:.1%}")
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def figure(config: Config, units: frame.Arrays, nets: frame.Arrays) -> Any:
    """Dead units by layer, dead nets by width, both with theory."""
    picture, axes = drawing.panels(2, width=9.6, height=3.8)
    layers = np.arange(1, config.depth + 1)
    drawing.line(axes[0], 0, layers, units["dead"], "measured", markevery=3)
    drawing.theory(axes[0], layers, units["predicted"], "Gaussian process")
    drawing.words(axes[0], "dead before the first step", "layer", "share of units")
    count = int(nets["nets"][0])
    drawing.theory(axes[1], config.narrow, law(config), "1 - (1 - 2^-n)^L")
    axes[1].plot(
        config.narrow, nets["dead"] / count, "o", color=drawing.COLORS[0], label="measured"
    )
    drawing.words(axes[1], f"whole nets, {config.narrow_depth} layers", "width", "share dead")
    return picture
