"""Which cure makes which failing net train, alone and together with the others?"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from experiments.atlas import drawing, frame, training
from jaxgrad import data as real_data
from jaxgrad import nn, optim

NO_CLIP = 1e30
LEARNED = 0.5  # of held-out digits, by every seed; chance is 0.1
HARMED = 0.05  # of accuracy


class Setting(NamedTuple):
    """A net and its rule. All of it is traced: a matrix of nets and cures is one compilation.

    Attributes:
        activation: 0 ReLU, 1 sigmoid, 2 tanh.
        gain: sigma_w; hidden weights have variance sigma_w^2 / fan_in.
        bias: first value of the hidden biases.
        skip: 1 adds a block's input to its output.
        norm: 1 normalizes the pre-activations (LayerNorm).
        raw: 1 feeds pixels from 0 to 16 instead of standardized ones.
        adam: 1 takes Adam instead of gradient descent.
        clip: largest global norm of the gradient.
        rate: of the rule.
    """

    activation: int = 0
    gain: float = 2**0.5
    bias: float = 0.0
    skip: float = 0.0
    norm: int = 0
    raw: int = 0
    adam: int = 0
    clip: float = NO_CLIP
    rate: float = 0.05


HEALTHY = Setting()
FAILING = {
    "sigmoid, Xavier": Setting(activation=1, gain=1.0),
    "ReLU, PyTorch's default": Setting(gain=3**-0.5),
    "ReLU, gain 1.6 x He": Setting(gain=1.6 * 2**0.5),
    "tanh, gain 8": Setting(activation=2, gain=8.0),
    "ReLU, rate x 50": Setting(rate=5.0),
    "ReLU, bias -2": Setting(bias=-2.0),
    "ReLU, raw pixels": Setting(raw=1),
}
NETS = {"healthy": HEALTHY, **FAILING}
VANISHING = ("sigmoid, Xavier", "ReLU, PyTorch's default")
EXPLODING = ("ReLU, gain 1.6 x He", "ReLU, rate x 50", "ReLU, raw pixels")

# sigma_w at which the mean squared singular value of a layer, chi_1, is one without biases:
# He's for ReLU; the edge of chaos of tanh; for the sigmoid, whose slope is 1/4 at most, 103^(1/2).
CRITICAL = (2**0.5, 103**0.5, 1.0)


def _init(s: Setting) -> Setting:
    return s._replace(gain=CRITICAL[s.activation], bias=0.0)


def _together(s: Setting) -> Setting:
    s = _init(s._replace(activation=0))
    return s._replace(skip=1.0, norm=1, clip=1.0, adam=1, rate=3e-3)


CURES = {
    "none": lambda s: s,
    "init": _init,
    "ReLU": lambda s: s._replace(activation=0),
    "skip": lambda s: s._replace(skip=1.0),
    "LayerNorm": lambda s: s._replace(norm=1),
    "clip": lambda s: s._replace(clip=1.0),
    "rate / 10": lambda s: s._replace(rate=s.rate / 10),
    "Adam": lambda s: s._replace(adam=1, rate=3e-3),
    "together": _together,
}
ALONE = tuple(name for name in CURES if name not in ("none", "together"))


@dataclass(frozen=True)
class Config:
    """The matrix; all seeds, nets and cures in one call.

    Attributes:
        nets: by name, the first one healthy.
        cures: names in `CURES`.
        depth: hidden blocks.
        width: of them.
        seeds: runs a cell.
        batch: digits a step.
        steps: of the rule.
    """

    nets: tuple[tuple[str, Setting], ...] = tuple(NETS.items())
    cures: tuple[str, ...] = tuple(CURES)
    depth: int = 10
    width: int = 32
    seeds: int = 4
    batch: int = 32
    steps: int = 250


# ---------------------------------------------------------------------------------------- measuring


def _params(key: Array, s: Setting, config: Config) -> dict[str, Any]:
    keys, width = jax.random.split(key, 3), config.width
    shape = (config.depth, width, width)
    return {
        "embed": {
            "kernel": s.gain * jax.random.normal(keys[0], (64, width)) / 8,
            "bias": jnp.full(width, s.bias),
        },
        "blocks": {
            "kernel": s.gain * jax.random.normal(keys[1], shape) / width**0.5,
            "bias": jnp.full(shape[:2], s.bias),
        },
        "readout": {
            "kernel": jax.random.normal(keys[2], (width, 10)) / width**0.5, "bias": jnp.zeros(10),
        },
    }  # fmt: skip


def _apply(params: Any, x: Array, s: Setting) -> Array:
    def activated(layer: Any, h: Array) -> Array:
        z = nn.linear(layer, h)
        z = jnp.where(s.norm == 1, nn.layer_norm({}, z), z)
        smooth = jnp.where(s.activation == 1, jax.nn.sigmoid(z), jnp.tanh(z))
        return jnp.where(s.activation == 0, jax.nn.relu(z), smooth)

    def block(h: Array, layer: Any) -> tuple[Array, None]:
        return s.skip * h + activated(layer, h), None

    h, _ = lax.scan(block, activated(params["embed"], x), params["blocks"])
    return nn.linear(params["readout"], h)


def _rule(s: Setting) -> optax.GradientTransformation:
    """Clipping, then Adam or gradient descent, by a traced switch."""
    clip, sgd, adam = optim.clip_by_global_norm(s.clip), optim.sgd(s.rate), optim.adam(s.rate)

    def init(params: Any) -> tuple:
        return clip.init(params), sgd.init(params), adam.init(params)

    def update(grads: Any, state: tuple, params: Any = None) -> tuple[Any, tuple]:
        grads, first = clip.update(grads, state[0], params)
        by_sgd, second = sgd.update(grads, state[1], params)
        by_adam, third = adam.update(grads, state[2], params)
        updates = jax.tree.map(lambda a, b: jnp.where(s.adam == 1, a, b), by_adam, by_sgd)
        return updates, (first, second, third)

    return optax.GradientTransformation(init, update)


def _measure(config: Config) -> frame.Arrays:
    x, y = training.digits()
    test = real_data.digits().test
    # the standardized pixels go back to 0 ... 16 by one scale and one shift
    pixels = 16 * real_data.digits(scale="unit").test.x
    scale, shift = (float(v) for v in np.polyfit(test.x.ravel(), pixels.ravel(), 1))

    def run(key: Array, s: Setting) -> Array:
        def seen(x: Array) -> Array:
            return jnp.where(s.raw == 1, scale * x + shift, x)

        # one vector of parameters compiles sooner than a tree
        vector, tree_of = ravel_pytree(_params(key, s, config))

        def loss(vector: Array, key: Array) -> Array:
            x_batch, y_batch = training.draw(key, x, y, config.batch)
            return training.cross_entropy(_apply(tree_of(vector), seen(x_batch), s), y_batch)

        last, _ = training.train(loss, vector, _rule(s), key, config.steps)
        return training.accuracy(_apply(tree_of(last), seen(jnp.asarray(test.x)), s), test.y)

    cells = [CURES[cure](net) for _, net in config.nets for cure in config.cures]
    columns = Setting(*(jnp.asarray(c) for c in zip(*cells, strict=True)))
    found = frame.over_seeds(lambda key: jax.vmap(lambda s: run(key, s))(columns), config.seeds)
    return {"accuracy": found.reshape(config.seeds, len(config.nets), len(config.cures))}


def points(config: Config) -> dict:
    return {"matrix": partial(_measure, config)}


# ---------------------------------------------------------------------------------------- judgments


def cell(data: frame.Data, net: str, cure: str) -> np.ndarray:
    """Accuracy of a net under a cure, one number a seed."""
    row, column = list(NETS).index(net), list(CURES).index(cure)
    return np.asarray(data["matrix"]["accuracy"], np.float64)[:, row, column]


def trains(data: frame.Data, net: str, cure: str) -> bool:
    """Whether every seed learned."""
    return bool(cell(data, net, cure).min() >= LEARNED)


def judge_cure(cure: str, nets: tuple[str, ...], data: frame.Data) -> frame.Verdict:
    """By net that fails untreated: with the cure alone, every seed learns."""
    good, words = {}, []
    for net in nets:
        before, after = cell(data, net, "none").mean(), cell(data, net, cure).mean()
        words.append(f"{net}: {before:.2f} to {after:.2f}")
        if not trains(data, net, "none"):
            good[net] = trains(data, net, cure)
    if not good:
        return frame.Verdict("false", "none of the nets fails untreated; " + "; ".join(words))
    return frame.conclude(good, "; ".join(words))


def judge_panacea(config: Config, data: frame.Data) -> frame.Verdict:
    """By single cure: it makes every failing net train."""
    del config
    failing = [net for net in FAILING if not trains(data, net, "none")]
    counts = {cure: sum(trains(data, net, cure) for net in failing) for cure in ALONE}
    words = ", ".join(f"{cure} {n}" for cure, n in counts.items())
    good = {cure: n == len(failing) for cure, n in counts.items()}
    return frame.conclude(good, f"of {len(failing)} failing nets train with {words}")


def judge_harm(config: Config, data: frame.Data) -> frame.Verdict:
    """By cure: the healthy net's mean accuracy falls by at most 0.05."""
    del config
    base = cell(data, "healthy", "none").mean()
    after = {cure: cell(data, "healthy", cure).mean() for cure in CURES if cure != "none"}
    words = ", ".join(f"{cure} {value:.2f}" for cure, value in after.items())
    good = {cure: bool(value >= base - HARMED) for cure, value in after.items()}
    return frame.conclude(good, f"untreated {base:.2f}; {words}")


# ------------------------------------------------------------------------------------------ figures


def figures(config: Config, data: frame.Data) -> list[Any]:
    figure, axes = drawing.panels(1, width=9.6, height=4.4)
    mean = np.asarray(data["matrix"]["accuracy"]).mean(0)
    image = drawing.grid(axes[0], mean, tuple(NETS), tuple(CURES), limits=(0, 1))
    title = f"held-out accuracy after {config.steps} steps"
    drawing.words(axes[0], title, "cure", "net", legend=False)
    figure.colorbar(image, ax=axes[0])
    return [figure]


def _claim(key: str, statement: str, predicted: str, nets: tuple[str, ...], words: str) -> Any:
    cure = {"init": "init", "relu": "ReLU", "skip": "skip", "layer_norm": "LayerNorm"}.get(key, key)
    return frame.Claim(
        key, statement, predicted, lambda _config, data: judge_cure(cure, nets, data), words
    )  # fmt: skip


CLAIMS = (
    _claim(
        "relu", "ReLU in place of the sigmoid fixes vanishing gradients.",
        "gain a layer from 0.24 to 0.71 with Xavier's weights (sqrt(chi_1))", VANISHING[:1],
        "The activation and the weights' scale belong together: change both or neither.",
    ),
    _claim(
        "skip", "Residual connections fix vanishing gradients.", "a gain of at least about 1",
        VANISHING, "The skip path carries the gradient, and the signal with it.",
    ),
    _claim(
        "layer_norm", "Layer normalization fixes vanishing gradients.",
        "E phi'^2 / E phi^2 a layer: 1 for ReLU, 0.39 for the sigmoid", VANISHING,
        "A norm repairs what is wrong with the scale of a signal, not a slope of 1/4.",
    ),
    _claim(
        "init", "Careful initialization fixes vanishing gradients.",
        "chi_1 = 1: sigma_w^2 = 2 for ReLU, 103 for the sigmoid (Schoenholz et al. 2017)",
        VANISHING,
        "For ReLU the factor of PyTorch's default is sqrt(6) a layer, and nothing else is wrong.",
    ),
    _claim(
        "clip", "Gradient clipping fixes exploding gradients and diverging runs.",
        "a step of at most rate x 1.0", EXPLODING,
        "Clipping bounds the step, not the forward pass: a net whose outputs are huge stays so.",
    ),
    _claim(
        "rate / 10", "A lower learning rate fixes diverging runs.",
        "stable below 2 / curvature", EXPLODING,
        "Where a lower rate is not enough, look at scales: of the weights, of the data.",
    ),
    _claim(
        "Adam", "Adam trains what gradient descent does not.",
        "its step does not depend on the gradient's scale", tuple(FAILING),
        "Adam forgives a gradient that is small everywhere; it cannot use one that is zero.",
    ),
    frame.Claim(
        key="panacea", statement="One of these cures is enough for every failing net.",
        predicted="none: each failure has a cause of its own", judge=judge_panacea,
        intuition="Diagnose first: of all pairs of a failing net and a cure most do nothing.",
    ),
    _claim(
        "together", "All cures together train every failing net.", "all of them", tuple(FAILING),
        "The modern default is all cures at once, which is why failures are rare and puzzling.",
    ),
    frame.Claim(
        key="harmless", statement="The cures do a healthy net no harm.",
        predicted=f"accuracy falls by at most {HARMED}", judge=judge_harm,
    ),
)  # fmt: skip

EXPERIMENT = frame.Experiment(
    name="cures",
    question=__doc__,
    claims=CLAIMS,
    presets={
        "tiny": Config(depth=2, width=8, seeds=2, batch=8, steps=4),
        "quick": Config(),
        "full": Config(depth=24, width=128, seeds=16, batch=128, steps=2000),
    },
    points=points,
    figures=figures,
)
