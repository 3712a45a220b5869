"""Which units die or saturate, when, and do they come back?"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array

from experiments.atlas import births, drawing, frame, masked, training
from experiments.atlas.masked import Setting
from jaxgrad import nn, optim

# A unit is off where its slope is below this share of the activation's largest, and dead where it
# is off for every training example.
OFF = 0.05
CLAIMED = 0.4  # dead, of CS231n
NONE = 0.01  # a share that counts as none


@dataclass(frozen=True)
class Config:
    """The sweep around one setting, one factor at a time; all seeds and settings in one call.

    Attributes:
        activations: one point each.
        rates: learning rates.
        depths: hidden layers.
        widths: units.
        biases: first biases.
        momenta: of the rule.
        seeds: runs a setting.
        examples: digits trained on, and looked at.
        batch: digits a step.
        steps: of the rule.
        every: steps between two looks, a divisor of the steps.
        birth: the nets that are looked at before training.
    """

    activations: tuple[str, ...] = ("relu", "leaky_relu", "tanh")
    rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    depths: tuple[int, ...] = (2, 8)
    widths: tuple[int, ...] = (4,)
    biases: tuple[float, ...] = (-1.0, 0.1, 1.0)
    momenta: tuple[float, ...] = (0.9,)
    seeds: int = 16
    examples: int = 400
    batch: int = 64
    steps: int = 160
    every: int = 20
    birth: births.Config = births.Config()  # noqa: RUF009 (frozen)


def settings(config: Config) -> tuple[Setting, ...]:
    """The base first, then the others, those that differ in the rate before all else."""
    base = Setting()
    lists = {
        "rate": config.rates, "depth": config.depths, "width": config.widths,
        "bias": config.biases, "momentum": config.momenta,
    }  # fmt: skip
    varied = [base._replace(**{name: v}) for name, values in lists.items() for v in values]
    return base, *(s for s in varied if s != base)


def rows(config: Config, activation: str) -> tuple[Setting, ...]:
    """The settings of an activation: all for ReLU, the learning rates for the others."""
    every = settings(config)
    return every if activation == "relu" else tuple(s for s in every if s == Setting(s.rate))


def at(config: Config, **changes: Any) -> int:
    """The row of the base with changes."""
    return settings(config).index(Setting()._replace(**changes))


# ---------------------------------------------------------------------------------------- measuring


def _slopes(phi: Any, z: Array) -> Array:
    """|phi'(z)| as a share of its largest value; zero where z is not finite."""
    slope = jnp.abs(jax.jvp(phi, (z,), (jnp.ones_like(z),))[1])
    return jnp.where(jnp.isfinite(z), slope, 0)


def _run(key: Array, setting: Setting, activation: str, config: Config) -> frame.Arrays:
    """A run: dead shares by look and layer, and what became of dead units."""
    phi, shape = nn.activation(activation), _largest(config)
    x, y = (a[: config.examples] for a in training.digits())
    rule = optim.sgd(setting.rate, setting.momentum)

    def loss(params: Any, key: Array) -> Array:
        examples = training.draw(key, x, y, config.batch)
        return training.cross_entropy(
            masked.forward(params, examples[0], setting, phi)[0], examples[1]
        )

    def step(carry: tuple, key: Array) -> tuple[tuple, None]:
        params, state = carry
        updates, state = rule.update(jax.grad(loss)(params, key), state, params)
        return (optax.apply_updates(params, updates), state), None

    def look(params: Any) -> tuple[Array, Array]:
        off = _slopes(phi, masked.forward(params, x, setting, phi)[1]) < OFF
        return jnp.all(off, 1), jnp.mean(off, 1)

    def stretch(carry: tuple, keys: Array) -> tuple[tuple, Any]:
        carry, _ = lax.scan(step, carry, keys)
        return carry, look(carry[0])

    first = masked.init(key, setting, shape)
    keys = jax.random.split(key, (config.steps // config.every, config.every))
    (last, _), watched = lax.scan(stretch, (first, rule.init(first)), keys)
    dead, off = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), look(first), watched)
    exists = (jnp.arange(shape[0]) < setting.depth)[:, None]
    exists = exists & (jnp.arange(shape[1]) < setting.width)
    dead = dead & exists
    units = jnp.sum(exists)

    def first_and_rest(counted: Array) -> Array:
        """How many in the first layer, and in the deeper ones, over all looks."""
        layers = jnp.sum(counted, (0, 2))
        return jnp.stack([layers[0], jnp.sum(layers[1:])])

    return {
        "dead": jnp.sum(dead, (1, 2)) / units,
        "off": jnp.sum(off[-1] * exists) / units,
        "died": first_and_rest(dead[:-1]),
        "revived": first_and_rest(dead[:-1] & ~dead[1:]),
        "accuracy": training.accuracy(masked.forward(last, x, setting, phi)[0], y),
    }


def _largest(config: Config) -> tuple[int, int]:
    every = settings(config)
    return max(s.depth for s in every), max(s.width for s in every)


def _measure(activation: str, config: Config) -> frame.Arrays:
    columns = Setting(*(jnp.asarray(c) for c in zip(*rows(config, activation), strict=True)))

    def one(key: Array) -> frame.Arrays:
        return jax.vmap(lambda s: _run(key, s, activation, config))(columns)

    return {k: np.round(v, 4) for k, v in frame.over_seeds(one, config.seeds).items()}


def points(config: Config) -> dict:
    return {
        **{a: partial(_measure, a, config) for a in config.activations},
        "born": partial(births.measure_nets, config.birth),
        "birth": partial(births.measure_units, config.birth),
    }


# ---------------------------------------------------------------------------------------- judgments


def _final(data: frame.Data, activation: str, row: int) -> np.ndarray:
    """Dead shares at the end, one a seed."""
    return np.asarray(data[activation]["dead"], np.float64)[:, row, -1]


def judge_rate(config: Config, data: frame.Data) -> frame.Verdict:
    """By learning rate: the mean dead share after training is at least 40 %."""
    good, words = {}, []
    for rate in config.rates:
        row = at(config, rate=rate)
        mean, low, high = frame.interval(_final(data, "relu", row))
        score = float(np.mean(data["relu"]["accuracy"][:, row]))
        good[f"rate {rate:g}"] = bool(mean >= CLAIMED)
        words.append(f"{rate:g}: {mean:.0%} [{low:.0%}, {high:.0%}] dead, accuracy {score:.2f}")
    return frame.conclude(good, "; ".join(words))


def judge_forever(config: Config, data: frame.Data) -> frame.Verdict:
    """By place and rule: of the dead units of all looks and seeds, none lives at the next look."""
    slow = [i for i, s in enumerate(settings(config)) if s.momentum == 0]
    fast = [i for i, s in enumerate(settings(config)) if s.momentum > 0]
    cases = {
        "first layer, gradient descent": (slow, 0),
        "deeper layers, gradient descent": (slow, 1),
        "first layer, momentum": (fast, 0),
        "deeper layers, momentum": (fast, 1),
    }
    good, words = {}, []
    for name, (rows, place) in cases.items():
        died, back = (
            int(np.asarray(data["relu"][what])[:, rows, place].sum())
            for what in ("died", "revived")
        )
        words.append(f"{name}: {back} of {died} came back")
        if died:
            good[name] = back == 0
    return frame.conclude(good, "; ".join(words))


def judge_bias(config: Config, data: frame.Data) -> frame.Verdict:
    """By bias above zero: fewer die than with none, the interval of the paired difference says."""
    base, good, words = _final(data, "relu", 0), {}, []
    words.append(f"bias 0: {base.mean():.1%} dead")
    for bias in config.biases:
        row = at(config, bias=bias)
        mean, low, high = frame.interval(_final(data, "relu", row) - base)
        words.append(f"{bias:g}: {mean:+.1%} [{low:+.1%}, {high:+.1%}]")
        if bias > 0:
            good[f"bias {bias:g}"] = bool(high < 0)
    return frame.conclude(good, "; ".join(words))


def judge_shape(config: Config, data: frame.Data) -> frame.Verdict:
    """Deepest against shallowest, narrowest against widest: the paired difference is above zero."""
    base = Setting()
    depths, widths = (*config.depths, base.depth), (*config.widths, base.width)
    ends = {
        "depth": (at(config, depth=max(depths)), at(config, depth=min(depths))),
        "narrowness": (at(config, width=min(widths)), at(config, width=max(widths))),
    }
    good, words = {}, []
    for name, rows in ends.items():
        more, less = (_final(data, "relu", row) for row in rows)
        _, low, high = frame.interval(more - less)
        good[name] = bool(low > 0)
        words.append(f"{name}: {less.mean():.1%} to {more.mean():.1%} dead, difference "
                     f"[{low:+.1%}, {high:+.1%}]")  # fmt: skip
    return frame.conclude(good, "; ".join(words))


def judge_others(config: Config, data: frame.Data) -> frame.Verdict:
    """By activation and rate: at most 1 % of the units end with slopes below 5 % everywhere."""
    good, words = {}, []
    for name in config.activations:
        if name == "relu":
            continue
        shares = []
        for rate in config.rates:
            row = at(config, rate=rate)
            mean = float(_final(data, name, row).mean())
            off = float(np.mean(data[name]["off"][:, row]))
            good[f"{name} at rate {rate:g}"] = mean <= NONE
            shares.append(f"{rate:g}: {mean:.0%} ({off:.0%})")
        words.append(f"{name}, dead (off): " + ", ".join(shares))
    return frame.conclude(good, "; ".join(words))


# ------------------------------------------------------------------------------------------ figures


def figures(config: Config, data: frame.Data) -> list[Any]:
    first, axes = drawing.panels(2, width=9.6, height=3.8)
    steps = np.arange(0, config.steps + 1, config.every)
    for index, rate in enumerate(config.rates):
        dead = np.asarray(data["relu"]["dead"])[:, at(config, rate=rate)]
        drawing.line(axes[0], index, steps, dead, f"rate {rate:g}")
    drawing.words(axes[0], "ReLU units dead on all digits", "step", "share of units")
    for index, name in enumerate(config.activations):
        ends = np.stack([_final(data, name, at(config, rate=r)) for r in config.rates], 1)
        drawing.line(axes[1], index, config.rates, ends, name.replace("_", " "))
    drawing.words(axes[1], "dead at the end, by activation", "learning rate", "share of units")
    axes[1].set_xscale("log")
    return [first, births.figure(config.birth, data["birth"], data["born"])]


CLAIMS = (
    frame.Claim(
        key="rate",
        statement="With too high a learning rate, as much as 40 % of a ReLU net's units die.",
        predicted="40 % (Stanford's CS231n)",
        judge=judge_rate,
        intuition="Look whether the net still learns: units die in numbers where the rate is "
        "above what the loss allows anyway.",
    ),
    frame.Claim(
        key="forever",
        statement="A dead unit never comes back.",
        predicted="none of the first layer under gradient descent: its inputs are the data and its "
        "gradient is zero, an identity; deeper ones see moving inputs",
        judge=judge_forever,
        intuition="Only the first layer's dead units are lost for good. Momentum, and the layers "
        "below, revive others.",
    ),
    frame.Claim(
        key="birth",
        statement="At initialization a ReLU unit is off for half the examples, and none is dead.",
        predicted="dead: the share of draws of the layer's Gaussian process that are negative for "
        "all examples, which goes to 1/2 (Cho and Saul 2009)",
        judge=lambda config, data: births.judge_units(config.birth, data["birth"]),
        intuition="In a deep ReLU net all inputs look alike, so a unit is on for all or for none: "
        "dead units at depth 30 are a sign of collapsed correlations, not of training.",
    ),
    frame.Claim(
        key="born_dead",
        statement="A narrow deep ReLU net is born dead with probability 1 - (1 - 2^-n)^L.",
        predicted="1 - (1 - 2^-n)^L for one input (Lu et al. 2019; Hanin and Nica 2019)",
        judge=lambda config, data: births.judge_nets(config.birth, data["born"]),
        intuition="Bottlenecks of two or three units need biases or another activation.",
    ),
    frame.Claim(
        key="bias",
        statement="A small positive bias keeps ReLU units alive.",
        predicted="fewer dead units than with bias 0 (Goodfellow et al. 2016, section 6.3.1: 0.1)",
        judge=judge_bias,
        intuition="A bias does not protect from a step that is too large; a large bias makes a net "
        "unstable at a rate that was fine without it.",
    ),
    frame.Claim(
        key="shape",
        statement="Deeper and narrower ReLU nets have more dead units.",
        predicted="the share grows with depth and falls with width",
        judge=judge_shape,
    ),
    frame.Claim(
        key="others",
        statement="Leaky ReLU and tanh units do not die.",
        predicted="no unit whose slope is below 5 % of the largest for all examples",
        judge=judge_others,
        intuition="A leaky unit that is negative everywhere has 1 % of the gradient: it comes back "
        "a hundred times more slowly. A tanh unit dies by saturation.",
    ),
)

EXPERIMENT = frame.Experiment(
    name="dead_units",
    question=__doc__,
    claims=CLAIMS,
    presets={
        "tiny": Config(
            activations=("relu", "leaky_relu"), rates=(0.1, 3.0), depths=(2,), widths=(4,),
            biases=(0.1,), seeds=2, examples=50, batch=16, steps=20, every=10,
            birth=births.Config(
                width=32, depth=8, seeds=4, examples=30, narrow=(2, 4), narrow_depth=8, nets=500,
                draws=1000,
            ),
        ),
        "quick": Config(),
        "full": Config(
            rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0), depths=(2, 8, 32), widths=(4, 8, 16, 128),
            seeds=32, examples=1400, steps=2000, every=100,
            birth=births.Config(width=512, depth=100, seeds=64, examples=1000, nets=100_000),
        ),
    },
    points=points,
    figures=figures,
)  # fmt: skip
