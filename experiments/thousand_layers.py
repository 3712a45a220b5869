"""Does a gradient cross 1,000 layers, and do nets of 1,000 layers train?"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from experiments.atlas import drawing, frame, measuring, training
from jaxgrad import data as real_data
from jaxgrad import optim, theory
from jaxgrad.nn import mlp

KEPT = float(np.log(10))  # nats by which a gradient may change on its way
LEARNED = 0.3  # of held-out digits after a few steps, by every seed: three times chance


class Net(NamedTuple):
    """A recipe for depth.

    Attributes:
        activation, initializer, norm, residual: names, as in `mlp.Config`.
        scheme: whether it was made for great depth.
    """

    activation: str
    initializer: str
    norm: str
    residual: str
    scheme: bool


NETS = {
    "He ReLU": Net("relu", "he_normal", "none", "none", False),
    "Post-LN": Net("relu", "xavier_normal", "layer", "post_ln", False),
    "Pre-LN": Net("relu", "xavier_normal", "layer", "pre_ln", False),
    "orthogonal tanh": Net("tanh", "orthogonal", "none", "none", True),
    "DeepNorm": Net("relu", "xavier_normal", "layer", "deep_norm", True),
    "ReZero": Net("relu", "he_normal", "none", "rezero", True),
}


@dataclass(frozen=True)
class Config:
    """The nets; all seeds and learning rates of one in one call.

    Attributes:
        nets: recipes by name.
        depth: blocks.
        width: of the stream; below 20 the forward pass of He ReLU leaves float32, at 1,000 layers.
        seeds: runs a net.
        batch: digits a step.
        steps: of Adam.
        rates: of Adam; a net is judged at its best one.
        clip: largest global norm of the gradient.
    """

    nets: tuple[tuple[str, Net], ...] = tuple(NETS.items())
    depth: int = 1000
    width: int = 24
    seeds: int = 3
    batch: int = 16
    steps: int = 50
    rates: tuple[float, ...] = (2e-4, 1e-3)
    clip: float = 1.0


def shown(depth: int) -> np.ndarray:
    """Numbers of layers passed that are kept: evenly spaced in the logarithm, the last included."""
    return np.unique(np.geomspace(1, depth, 24).round().astype(int))


# ---------------------------------------------------------------------------------------- measuring


def _measure(net: Net, config: Config) -> frame.Arrays:
    """Ln of the gradient's norm by layers passed, and accuracy and loss by learning rate."""
    model = mlp.Config(
        64, 10, config.width, config.depth, net.activation, net.initializer, norm=net.norm,
        residual=net.residual, scan=True,
    )  # fmt: skip
    (x, y), test = training.digits(), real_data.digits().test
    x_test, every = jnp.asarray(test.x), max(1, config.steps // 25)

    def one(key: jax.Array, nets: Any) -> frame.Arrays:
        params = jax.tree.map(lambda leaf: leaf[0], nets)
        h, g = jax.random.normal(key, (2, config.width))
        gains = measuring.log_gains(lambda p, h: mlp.block(p, h, model), params["blocks"], h, g)

        # one vector of parameters compiles sooner than a tree
        vector, tree_of = ravel_pytree(params)

        def loss(vector: jax.Array, key: jax.Array) -> jax.Array:
            x_batch, y_batch = training.draw(key, x, y, config.batch)
            return training.cross_entropy(mlp.apply(tree_of(vector), x_batch, model), y_batch)

        def run(rate: jax.Array) -> tuple[jax.Array, jax.Array]:
            rule = optim.chain(optim.clip_by_global_norm(config.clip), optim.adam(rate))
            last, losses = training.train(loss, vector, rule, key, config.steps)
            return training.accuracy(mlp.apply(tree_of(last), x_test, model), test.y), losses[
                ::every
            ]

        accuracy, losses = jax.vmap(run)(jnp.asarray(config.rates))
        passed = jnp.cumsum(gains[::-1])[shown(config.depth) - 1]
        return {"log_gain": passed, "accuracy": accuracy, "loss": losses}

    return measuring.over_nets(one, [model], config.seeds)


def points(config: Config) -> dict:
    return {name: partial(_measure, net, config) for name, net in config.nets}


# ---------------------------------------------------------------------------------------- judgments


def predicted(name: str, passed: np.ndarray, width: int) -> np.ndarray:
    """Ln of the gradient's norm after some layers from the output, of nets of 1,000 layers.

    He ReLU: the exact mean at this width. Orthogonal tanh: q_l ~ 1/(2l), so that the factors
    1 - q_l multiply to l^(-1/2) towards the input. Pre-LN: sqrt(q_L / q_l), q_l = 1 + l/2.
    Post-LN, DeepNorm and ReZero: one, in wide nets.
    """
    passed = np.asarray(passed, float)
    depth = passed[-1]
    left = depth - passed  # layers below
    if name == "He ReLU":
        return passed * float(theory.log_gain((width,)).mean) / 2
    if name == "orthogonal tanh":
        return -0.5 * np.log((depth + 1) / (left + 1))
    if name == "Pre-LN":
        return 0.5 * np.log((1 + depth / 2) / (1 + left / 2))
    return np.zeros_like(passed)


def _ends(config: Config, data: frame.Data, name: str) -> np.ndarray:
    del config
    return np.asarray(data[name]["log_gain"], np.float64)[:, -1]


def judge_flow(config: Config, data: frame.Data) -> frame.Verdict:
    """By net: the norm changes by at most a factor of 10 over all layers, in the mean of ln."""
    good, words, divergence, passed = {}, [], 0.0, shown(config.depth)
    for name, _ in config.nets:
        ends = _ends(config, data, name)
        # a gradient that is exactly zero lies below all of float32
        mean, low, high = frame.interval(np.where(np.isfinite(ends), ends, np.log(1e-45)))
        theory_end = float(predicted(name, passed, config.width)[-1])
        good[name] = bool(abs(mean) <= KEPT)
        divergence = max(divergence, abs(float(mean) - theory_end))
        words.append(
            f"{name}: e^{mean:.1f} [e^{low:.1f}, e^{high:.1f}], predicted e^{theory_end:.1f}"
        )
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def judge_he(config: Config, data: frame.Data) -> frame.Verdict:
    """By depth: the typical norm is within a factor of 2; z against the exact law is said."""
    passed = shown(config.depth)
    gains, law = np.asarray(data["He ReLU"]["log_gain"], float), theory.log_gain((config.width,))
    mean_law, variance = float(law.mean) / 2, float(law.variance) / 4
    good, words = {}, []
    for target in (10, 100, config.depth):
        k = int(np.argmin(np.abs(passed - target)))
        depth, mean = int(passed[k]), float(gains[:, k].mean())
        z = (mean - depth * mean_law) / np.sqrt(depth * variance / len(gains))
        good[f"{depth} layers"] = abs(mean) <= np.log(2)
        words.append(f"{depth} layers: e^{mean:.2f}, law e^{depth * mean_law:.2f} (z = {z:.1f})")
    divergence = float(abs(gains[:, -1].mean()))
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def learned(data: frame.Data, name: str) -> tuple[bool, float, int]:
    """(whether every seed learns at the best rate, the mean accuracy there, which rate)."""
    accuracy = np.asarray(data[name]["accuracy"], np.float64)
    best = int(np.argmax(accuracy.mean(0)))
    return bool(accuracy[:, best].min() >= LEARNED), float(accuracy[:, best].mean()), best


def _words(config: Config, data: frame.Data, names: list[str]) -> str:
    found = {name: learned(data, name) for name in names}
    return "; ".join(
        f"{name}: accuracy {mean:.2f} at rate {config.rates[best]:g}"
        for name, (_, mean, best) in found.items()
    )


def judge_schemes(config: Config, data: frame.Data) -> frame.Verdict:
    """By scheme: every seed learns at the best rate."""
    names = [name for name, net in config.nets if net.scheme]
    good = {name: learned(data, name)[0] for name in names}
    return frame.conclude(good, _words(config, data, names))


def judge_others(config: Config, data: frame.Data) -> frame.Verdict:
    """By other net: not every seed learns, at any rate."""
    names = [name for name, net in config.nets if not net.scheme]
    good = {name: not learned(data, name)[0] for name in names}
    return frame.conclude(good, _words(config, data, names))


def judge_flow_trains(config: Config, data: frame.Data) -> frame.Verdict:
    """By net: it learns exactly if its gradient changes by at most a factor of 10."""
    good, words = {}, []
    for name, _ in config.nets:
        flows = bool(abs(_ends(config, data, name).mean()) <= KEPT)
        trains = learned(data, name)[0]
        good[name] = flows == trains
        words.append(
            f"{name}: {'kept' if flows else 'not kept'}, {'' if trains else 'not '}learned"
        )
    return frame.conclude(good, "; ".join(words))


# ------------------------------------------------------------------------------------------ figures


def figures(config: Config, data: frame.Data) -> list[Any]:
    figure, axes = drawing.panels(2, width=9.6, height=4.0)
    passed = shown(config.depth)
    for index, (name, _) in enumerate(config.nets):
        drawing.line(axes[0], index, passed, data[name]["log_gain"], name, markevery=4)
        label = "theory" if index == 0 else ""
        drawing.theory(axes[0], passed, predicted(name, passed, config.width), label)
        losses = np.asarray(data[name]["loss"])[:, learned(data, name)[2]]
        steps = np.linspace(0, config.steps - 1, losses.shape[1])
        drawing.line(axes[1], index, steps, np.minimum(losses, 5), name, markevery=5)
    drawing.words(axes[0], "gradient on its way down", "layers passed", "ln norm, relative")
    axes[0].set_xscale("log")
    axes[0].set_yscale("symlog", linthresh=1)
    drawing.words(axes[1], f"training {config.depth} layers", "step", "loss", legend=False)
    return [figure]


CLAIMS = (
    frame.Claim(
        key="flow",
        statement="Initialized well, a gradient crosses 1,000 layers.",
        predicted="factor 1 for ReZero and DeepNorm, L^(-1/2) for orthogonal tanh, (1 + L/2)^(1/2) "
        "for Pre-LN, e^(L m / 2) for He ReLU: m of Hanin and Nica 2019",
        judge=judge_flow,
        intuition="Width matters at depth: what theory keeps constant in wide nets drifts by about "
        "L / n nats in narrow ones.",
    ),
    frame.Claim(
        key="he",
        statement="He initialization keeps the gradient's norm, at any depth.",
        predicted="the mean of the square, not the typical norm: e^(-5 L / (4 n)) to first order",
        judge=judge_he,
        intuition="The mean that He keeps is made by rare nets; yours has the median.",
    ),
    frame.Claim(
        key="schemes",
        statement="DeepNorm, ReZero and orthogonal weights train 1,000 layers.",
        predicted="all three (Wang et al. 2022; Bachlechner et al. 2020; Xiao et al. 2018)",
        judge=judge_schemes,
    ),
    frame.Claim(
        key="others",
        statement="Without such a scheme 1,000 layers do not train.",
        predicted="neither He ReLU nor Post-LN nor Pre-LN",
        judge=judge_others,
        intuition="Pre-LN trains because its late blocks hardly count: a thousand layers of it are "
        "not a thousand layers deep.",
    ),
    frame.Claim(
        key="flow_trains",
        statement="A net trains if and only if its gradient crosses its layers.",
        predicted="kept within a factor of 10 at the start, and learned: the same nets",
        judge=judge_flow_trains,
    ),
)

EXPERIMENT = frame.Experiment(
    name="thousand_layers",
    question=__doc__,
    claims=CLAIMS,
    presets={
        "tiny": Config(
            nets=(("He ReLU", NETS["He ReLU"]), ("ReZero", NETS["ReZero"])), depth=100, width=16,
            batch=8, steps=4, rates=(1e-3,), seeds=4,
        ),
        "quick": Config(),
        "full": Config(width=128, seeds=8, batch=128, steps=1000, rates=(1e-4, 1e-3, 1e-2)),
    },
    points=points,
    figures=figures,
)  # fmt: skip
