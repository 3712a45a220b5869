"""What does width do to gradients, to a step, and to the best learning rate?"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments.atlas import drawing, frame, scaled, training

WAYS = ("standard", "muP")
LABELS = {
    "output_change": "change of the output", "hidden_change": "change of a hidden unit",
    "gradient_hidden": "hidden weights", "gradient_readout": "readout weights",
}  # fmt: skip
FLAT = 0.15  # a slope in log-log that counts as none
CAP = 2 * float(np.log(10))  # nats: twice chance; runs that diverged count as this


@dataclass(frozen=True)
class Config:
    """The sweep; all seeds, both parametrizations and all rates of a width in one call.

    Attributes:
        widths: of the nets that are trained.
        wide: widths at which one step is looked at.
        base: the width at which both parametrizations are one net.
        hidden: hidden-to-hidden layers.
        rates: binary exponents of Adam's learning rates.
        look: binary exponent of the rate of the one step.
        seeds: runs a setting.
        batch: digits a step.
        steps: of Adam.
        examples: digits whose loss is compared.
    """

    widths: tuple[int, ...] = (16, 64, 256)
    wide: tuple[int, ...] = (32, 128, 512)
    base: int = 16
    hidden: int = 2
    rates: tuple[float, ...] = (-13, -11.5, -10, -8.5, -7, -5.5, -4, -2.5)
    look: float = -11
    seeds: int = 4
    batch: int = 64
    steps: int = 80
    examples: int = 512


# ---------------------------------------------------------------------------------------- measuring


def _trained(width: int, config: Config) -> frame.Arrays:
    """Loss after training, (seeds, parametrizations, rates)."""
    x, y = training.digits()
    ways, rates = scaled.parametrizations(width, config.base), 2.0 ** jnp.asarray(config.rates)

    def run(key: Array, way: scaled.Parametrization, rate: Array) -> Array:
        def loss(params: Any, key: Array) -> Array:
            x_batch, y_batch = training.draw(key, x, y, config.batch)
            return training.cross_entropy(scaled.forward(params, x_batch, width)[0], y_batch)

        params = scaled.init(key, width, width, config.hidden, way)
        last, _ = training.train(loss, params, scaled.adam(rate, way), key, config.steps)
        shown = slice(config.examples)
        return training.cross_entropy(scaled.forward(last, x[shown], width)[0], y[shown])

    def one(key: Array) -> Array:
        return jax.vmap(lambda way: jax.vmap(lambda rate: run(key, way, rate))(rates))(ways)

    return {"loss": frame.over_seeds(one, config.seeds)}


def _stepped(config: Config) -> frame.Arrays:
    """Root mean squares at the start and after one step, (seeds, widths, parametrizations)."""
    (x, y), size = training.digits(), max(config.wide)

    def run(key: Array, width: Array, way: scaled.Parametrization) -> frame.Arrays:
        params = scaled.init(key, size, width, config.hidden, way)
        x_batch, y_batch = training.draw(key, x, y, config.batch)

        def loss(params: Any) -> Array:
            return training.cross_entropy(scaled.forward(params, x_batch, width)[0], y_batch)

        grads, rule = jax.grad(loss)(params), scaled.adam(2.0**config.look, way)
        updates, _ = rule.update(grads, rule.init(params), params)
        stepped = optax.apply_updates(params, updates)
        (before, z), (after, moved) = (scaled.forward(p, x_batch, width) for p in (params, stepped))
        # what lies beyond the width is zero, and not counted
        found = {
            "output": (before, 10 * config.batch),
            "output_change": (after - before, 10 * config.batch),
            "hidden_change": (moved - z, width * config.batch),
            "gradient_embed": (grads["embed"], 64 * width),
            "gradient_hidden": (grads["hidden"], config.hidden * width**2),
            "gradient_readout": (grads["readout"], 10 * width),
        }
        return {name: jnp.sqrt(jnp.sum(a**2) / count) for name, (a, count) in found.items()}

    def one(key: Array) -> frame.Arrays:
        return jax.vmap(lambda n, ways: jax.vmap(lambda way: run(key, n, way))(ways))(widths, ways)

    widths = jnp.asarray(config.wide, jnp.float32)
    ways = jax.tree.map(
        lambda *rows: jnp.stack(rows),
        *(scaled.parametrizations(n, config.base) for n in config.wide),
    )
    return frame.over_seeds(one, config.seeds)


def points(config: Config) -> dict:
    return {
        **{f"train-{n}": partial(_trained, n, config) for n in config.widths},
        "step": partial(_stepped, config),
    }


# ---------------------------------------------------------------------------------------- judgments


def slopes(config: Config, data: frame.Data, what: str, way: int) -> np.ndarray:
    """Exponents of width: least squares of ln rms on ln width, one number a seed."""
    logs = np.log(np.asarray(data["step"][what], np.float64)[:, :, way])
    x = np.log(np.asarray(config.wide, float))
    return (logs - logs.mean(1, keepdims=True)) @ (x - x.mean()) / np.sum((x - x.mean()) ** 2)


def _losses(config: Config, data: frame.Data, way: int) -> np.ndarray:
    """(seeds, widths, rates), with runs that diverged at the cap."""
    found = np.stack([np.asarray(data[f"train-{n}"]["loss"])[:, way] for n in config.widths], 1)
    return np.minimum(np.nan_to_num(found.astype(np.float64), nan=CAP, posinf=CAP), CAP)


def best_rates(config: Config, data: frame.Data, way: int) -> np.ndarray:
    """(seeds, widths): binary exponent of the best rate, by a parabola of ln loss at the lowest."""
    logs, rates = np.log(_losses(config, data, way)), np.asarray(config.rates)
    best = np.empty(logs.shape[:2])
    for place in np.ndindex(*best.shape):
        k = int(np.clip(np.argmin(logs[place]), 1, len(rates) - 2))
        low, middle, high = logs[place][k - 1 : k + 2]
        bend = low - 2 * middle + high
        shift = 0.5 * (low - high) / bend if bend > 0 else np.argmin(logs[place]) - k
        best[place] = rates[k] + np.clip(shift, -1, 1) * (rates[k + 1] - rates[k])
    return best


def judge_transfer(config: Config, data: frame.Data) -> frame.Verdict:
    """By parametrization: from narrowest to widest it moves by at most one step of the grid.

    Both ends of the interval of the mean over the seeds must lie within that step.
    """
    good, words = {}, []
    octaves, grid = np.log2(config.widths[-1] / config.widths[0]), np.diff(config.rates).max()
    for way, name in enumerate(WAYS):
        best = best_rates(config, data, way)
        mean, low, high = frame.interval(best[:, -1] - best[:, 0])
        good[name] = bool(max(abs(low), abs(high)) <= grid)
        at = ", ".join(
            f"n={n}: 2^{b:.1f}" for n, b in zip(config.widths, best.mean(0), strict=True)
        )
        words.append(f"{name}: {at}; moved by {mean:.1f} [{low:.1f}, {high:.1f}] octaves")
    measured = "; ".join(words) + f"; width grew by {octaves:.0f} octaves"
    return frame.conclude(good, measured)


def judge_step(config: Config, data: frame.Data) -> frame.Verdict:
    """By parametrization: outputs and hidden units change with slopes of at most 0.15."""
    good, words, divergence = {}, [], 0.0
    span = np.log(config.wide[-1] / config.wide[0])
    for way, name in enumerate(WAYS):
        found = {w: slopes(config, data, f"{w}_change", way) for w in ("output", "hidden")}
        good[name] = all(abs(s.mean()) <= FLAT for s in found.values())
        divergence = max(divergence, *(abs(float(s.mean())) * span for s in found.values()))
        for what, s in found.items():
            mean, low, high = frame.interval(s)
            words.append(f"{name}, {what} change ~ n^{mean:.2f} [{low:.2f}, {high:.2f}]")
    return frame.conclude(good, "; ".join(words), divergence=divergence)


PREDICTED = {
    "output": (0.0, -0.5), "gradient_embed": (-0.5, -1.0), "gradient_hidden": (-0.5, -1.0),
    "gradient_readout": (0.0, 0.0),
}  # fmt: skip


def judge_gradient(config: Config, data: frame.Data) -> frame.Verdict:
    """By quantity and parametrization: the slope is predicted to 0.15."""
    good, words = {}, []
    for what, expected in PREDICTED.items():
        for way, name in enumerate(WAYS):
            mean = float(slopes(config, data, what, way).mean())
            label = f"{what.replace('_', ' of ')}, {name}"
            good[label] = abs(mean - expected[way]) <= FLAT
            words.append(f"{label}: n^{mean:.2f} (predicted {expected[way]:g})")
    return frame.conclude(good, "; ".join(words))


def judge_wider(config: Config, data: frame.Data) -> frame.Verdict:
    """By parametrization: at the narrowest net's best rate of the grid the widest has less loss.

    The interval of the paired difference of ln loss lies below zero.
    """
    good, words = {}, []
    for way, name in enumerate(WAYS):
        losses = _losses(config, data, way)
        rate = int(np.argmin(losses[:, 0].mean(0)))
        mean, low, high = frame.interval(np.log(losses[:, -1, rate] / losses[:, 0, rate]))
        good[name] = bool(high < 0)
        words.append(
            f"{name} at 2^{config.rates[rate]:g}: loss x {np.exp(mean):.2f} "
            f"[{np.exp(low):.2f}, {np.exp(high):.2f}]"
        )
    return frame.conclude(good, "; ".join(words))


# ------------------------------------------------------------------------------------------ figures


def figures(config: Config, data: frame.Data) -> list[Any]:
    first, axes = drawing.panels(2, width=9.6, height=3.8)
    for way, ax in enumerate(axes):
        losses = _losses(config, data, way)
        for index, n in enumerate(config.widths):
            drawing.line(ax, index, config.rates, np.log(losses[:, index]), f"width {n}")
        drawing.words(ax, WAYS[way], "log2 learning rate", "ln loss")
    low, high = (f(ax.get_ylim()[i] for ax in axes) for i, f in enumerate((min, max)))
    for ax in axes:
        ax.set_ylim(low, high)
    second, axes = drawing.panels(2, width=9.6, height=3.8)
    for ax, shown in zip(
        axes, (("output_change", "hidden_change"), ("gradient_hidden", "gradient_readout")),
        strict=True,
    ):  # fmt: skip
        for k, what in enumerate(shown):
            for way, name in enumerate(WAYS):
                values = np.asarray(data["step"][what])[:, :, way]
                label = f"{LABELS[what]}, {name}"
                drawing.line(ax, 2 * k + way, config.wide, np.log2(values), label)
        ax.set_xscale("log", base=2)
    drawing.words(axes[0], "one step of Adam", "width", "log2 root mean square")
    drawing.words(axes[1], "gradients at the start", "width", "log2 root mean square")
    return [first, second]


CLAIMS = (
    frame.Claim(
        key="transfer",
        statement="The best learning rate of a narrow net is that of a wide one.",
        predicted="standard: it falls as 1 / n; muP: it stays (Yang et al. 2022)",
        judge=judge_transfer,
        intuition="In the standard parametrization a rate is tuned for one width only.",
    ),
    frame.Claim(
        key="step",
        statement="A step of Adam changes a net by an amount that does not depend on its width.",
        predicted="output change ~ n^1 standard, n^0 in muP: n steps of one sign add up",
        judge=judge_step,
        intuition="Check coordinates, not losses: one step at three widths shows a wrong scale.",
    ),
    frame.Claim(
        key="gradient",
        statement="Gradients shrink with width: as n^(-1/2) in the standard parametrization, as "
        "1/n in muP, below the readout.",
        predicted="g = W_out^T delta: entries of W_out are n^(-1/2) or 1/n",
        judge=judge_gradient,
        intuition="A gradient that is 8 times smaller in a net 64 times as wide is healthy.",
    ),
    frame.Claim(
        key="wider",
        statement="Wider is better at the same learning rate.",
        predicted="in muP, not in the standard parametrization (Yang et al. 2022, figure 1)",
        judge=judge_wider,
    ),
)

EXPERIMENT = frame.Experiment(
    name="width",
    question=__doc__,
    claims=CLAIMS,
    presets={
        "tiny": Config(
            widths=(8, 16), wide=(16, 32, 64), base=8, rates=(-9, -7, -5), seeds=2, batch=16,
            steps=6, examples=50,
        ),
        "quick": Config(),
        "full": Config(
            widths=(64, 256, 1024, 4096), wide=(64, 256, 1024, 4096, 8192), base=64,
            rates=tuple(float(r) for r in range(-16, -1)), seeds=8, steps=1000, examples=1400,
        ),
    },
    points=points,
    figures=figures,
)  # fmt: skip
