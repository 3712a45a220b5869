"""What do real layers multiply the gradient by, and does 0.9^50 model them?"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.atlas import drawing, frame
from experiments.atlas.measuring import log_gains
from jaxgrad.nn import mlp


@dataclass(frozen=True)
class Config:
    """The sweep: every activation with every initializer, all seeds in one call.

    Attributes:
        activations: names.
        initializers: names.
        width: of the layers.
        depth: number of layers.
        seeds: networks a point.
        factor: what the statement says a layer multiplies by.
    """

    activations: tuple[str, ...] = ("sigmoid", "tanh", "relu", "gelu", "silu")
    initializers: tuple[str, ...] = ("xavier_normal", "he_normal", "torch_linear")
    width: int = 64
    depth: int = 50
    seeds: int = 16
    factor: float = 0.9


def _measure(activation: str, initializer: str, config: Config) -> frame.Arrays:
    model = mlp.Config(
        1, 1, config.width, config.depth, activation=activation, initializer=initializer, scan=True
    )

    def one(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 3)
        layers = mlp.init(keys[0], model)["blocks"]
        h, g = jax.random.normal(keys[1], (2, config.width))
        return log_gains(lambda p, h: mlp.block(p, h, model), layers, h, g)

    return {"log_gain": frame.over_seeds(one, config.seeds)}


def points(config: Config) -> dict:
    return {
        f"{a}-{i}": partial(_measure, a, i, config)
        for a in config.activations
        for i in config.initializers
    }


def judge_factor(config: Config, data: frame.Data) -> frame.Verdict:
    """Of sigmoid layers: 0.9 lies in the 95 % interval of the mean factor, by initializer."""
    good, words, divergence = {}, [], 0.0
    for name, arrays in data.items():
        if not name.startswith("sigmoid"):
            continue
        mean, low, high = frame.interval(np.mean(arrays["log_gain"], 1))
        words.append(f"{name} {np.exp(mean):.4f} [{np.exp(low):.4f}, {np.exp(high):.4f}]")
        good[name] = bool(low <= np.log(config.factor) <= high)
        divergence = max(divergence, config.depth * abs(float(mean) - np.log(config.factor)))
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def figures(config: Config, data: frame.Data) -> list[Any]:
    figure, axes = drawing.panels(len(config.initializers), width=9.6)
    depth = np.arange(1, config.depth + 1)
    for ax, initializer in zip(axes, config.initializers, strict=True):
        for index, activation in enumerate(config.activations):
            gains = np.asarray(data[f"{activation}-{initializer}"]["log_gain"], np.float64)
            down = np.cumsum(gains[:, ::-1], 1) / np.log(10)
            drawing.line(ax, index, depth, down, activation, markevery=10)
        drawing.theory(ax, depth, depth * np.log10(config.factor), f"{config.factor}^depth")
        drawing.words(ax, initializer, "layers passed", "log10 of the gradient's norm")
    return [figure]


EXPERIMENT = frame.Experiment(
    name="vanishing",
    question="What do real layers multiply the gradient by, and does 0.9^50 model them?",
    claims=(
        frame.Claim(
            key="factor",
            statement="A sigmoid layer multiplies the gradient by about 0.9: after 50, 0.9^50.",
            predicted=f"0.9 a layer, 0.9^50 = {0.9**50:.5f}, 0.9^100 = {0.9**100:.2e}",
            judge=judge_factor,
            intuition="Sigmoid nets do not fade, they are cut off: a few layers are enough.",
        ),
    ),
    presets={
        "tiny": Config(activations=("sigmoid", "relu"), initializers=("he_normal",), depth=20),
        "quick": Config(),
        "full": Config(width=256, depth=200, seeds=64),
    },
    points=points,
    figures=figures,
)
