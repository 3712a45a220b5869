"""Training programs drawn at random, and one fault drawn at random for each.

A program is a family (perceptron, convolutions, GRU, Pre-LN transformer, autoencoder, a residual
net of linen's or of NNX's, an LSTM of equinox's), its data, sizes, activation, optimizer and rate,
all of a random seed, and in ranges in which such programs are used.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import random_modules
from experiments.diagnosis_models import layer_norm

# Activation, and the weight variance times fan_in that suits it.
ACTIVATIONS: dict[str, tuple[Callable[[Any], Any], float]] = {
    "relu": (jax.nn.relu, 2.0), "gelu": (jax.nn.gelu, 2.0), "silu": (jax.nn.silu, 2.3),
    "tanh": (jnp.tanh, 1.0), "elu": (jax.nn.elu, 1.5), "leaky": (jax.nn.leaky_relu, 2.0),
}  # fmt: skip
RULES: dict[str, tuple[Callable[[Any], Any], float]] = {
    "sgd": (optax.sgd, 0.1), "momentum": (lambda r: optax.sgd(r, momentum=0.9), 0.02),
    "adam": (optax.adam, 2e-3), "adamw": (lambda r: optax.adamw(r, weight_decay=1e-2), 2e-3),
    "rmsprop": (optax.rmsprop, 1e-3), "lion": (optax.lion, 3e-4),
    "adagrad": (optax.adagrad, 0.03), "nadam": (optax.nadam, 1e-3),
}  # fmt: skip
FAMILIES = (
    "mlp", "mlp", "mlp", "conv", "gru", "transformer", "autoencoder", "resnet", "residual", "lstm"
)  # fmt: skip
_MODULES: dict[str, Callable[..., Any]] = {
    "resnet": random_modules.resnet, "residual": random_modules.residual,
    "lstm": random_modules.lstm,
}  # fmt: skip
SETS = ("digits", "circle", "cancer", "wine", "diabetes")
BATCHES, LENGTH = 32, 16

Between = Callable[[int, Any, Any], Any]


@dataclass(frozen=True)
class Made:
    """A program in parts, so that a fault can change one of them.

    Attributes:
        facts: what was drawn.
        params: parameters, a pytree.
        forward: of parameters, inputs, a key, the activation and what stands between layers.
        batches: pairs of inputs and targets.
        criterion: of outputs and targets.
        rule: an optax rule, given the rate.
        rate: the learning rate, or a schedule.
    """

    facts: dict[str, Any]
    params: Any
    forward: Callable[..., Any]
    batches: list[tuple[np.ndarray, np.ndarray]]
    criterion: Callable[[Any, Any], Any]
    rule: Callable[[Any], Any]
    rate: Any
    activation: Callable[[Any], Any]
    before: tuple[Any, ...] = ()
    after: tuple[Any, ...] = ()
    around: Callable[[Any], Any] = lambda tx: tx
    between: Between = lambda _, h, __: h
    penalty: Callable[[Any], Any] = lambda _: 0.0
    shown: Callable[[Any], Any] = lambda z: z
    shift: int = 0
    noisy: bool = False
    last: int = 0  # index of the last hidden layer

    def outputs(self, params: Any, x: Any, key: Any = None) -> Any:
        """What the criterion sees; without noise if no key is given."""
        between = self.between if key is not None or not self.noisy else (lambda _, h, __: h)
        return self.shown(self.forward(params, x, key, self.activation, between))

    def loss(self, params: Any, batch: Any, key: Any = None) -> Any:
        """The loss that is trained."""
        return self.criterion(
            self.outputs(params, batch[0], key), batch[1] + self.shift
        ) + self.penalty(params)

    @property
    def optimizer(self) -> Any:
        """The whole optimizer."""
        rate = self.rate
        if self.facts["warmup"]:
            rate = optax.warmup_cosine_decay_schedule(0.0, rate, 20, 2_000)
        parts = [*self.before, self.rule(rate), *self.after]
        return self.around(optax.chain(*parts) if len(parts) > 1 else parts[0])


# -------------------------------------------------------------------------------------------- data


def _table(name: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn import datasets

    if name == "circle":
        points, ring = datasets.make_circles(1_000, noise=0.1, factor=0.5, random_state=1)
        return np.asarray(points, np.float32), np.asarray(ring, np.int32)
    load = {"cancer": "load_breast_cancer"}.get(name, f"load_{name}")
    data: Any = getattr(datasets, load)()
    x = (data.data - data.data.mean(0)) / (data.data.std(0) + 1e-3)
    y: Any = data.target
    y = (y - y.mean()) / y.std() if name == "diabetes" else y
    return x.astype(np.float32), y.astype(np.float32 if name == "diabetes" else np.int32)


def _images() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    return ((data.images / 16 - 0.3) / 0.37).astype(np.float32), data.target.astype(np.int32)


def _text() -> tuple[np.ndarray, np.ndarray]:
    from pydoc_data.topics import topics

    text = " ".join(topics[k] for k in sorted(topics))[:60_000].lower()
    letters = sorted(set(text))
    ids = np.array([letters.index(c) for c in text], np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(ids, LENGTH + 1)
    return windows[:, :-1], windows[:, 1:]


def _cut(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, size: int) -> list[Any]:
    picks = [rng.choice(len(x), size, replace=False) for _ in range(BATCHES)]
    return [(x[i], y[i]) for i in picks]


# ------------------------------------------------------------------------------------------ models


def _weights(rng: np.random.Generator, gain: float, *shape: int) -> np.ndarray:
    draw = rng.standard_normal(shape) * math.sqrt(gain / math.prod(shape[:-1]))
    return draw.astype(np.float32)


def _dense(rng: np.random.Generator, gain: float, n: int, m: int) -> dict[str, np.ndarray]:
    return {"w": _weights(rng, gain, n, m), "b": np.zeros(m, np.float32)}


def _mlp(params: Any, x: Any, key: Any, act: Any, between: Between) -> Any:
    for i, layer in enumerate(params["layers"]):
        x = between(i, act(x @ layer["w"] + layer["b"]), key)
    return x @ params["head"]["w"] + params["head"]["b"]


def _conv(params: Any, x: Any, key: Any, act: Any, between: Between) -> Any:
    x = x[..., None]
    for i, layer in enumerate(params["layers"]):
        strides = (2, 2) if i == 0 else (1, 1)
        x = jax.lax.conv_general_dilated(
            x, layer["w"], strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = between(i, act(x + layer["b"]), key)
    return x.reshape(len(x), -1) @ params["head"]["w"] + params["head"]["b"]


def _gru(params: Any, x: Any, key: Any, act: Any, between: Between) -> Any:
    del act

    def step(h: Any, row: Any) -> tuple[Any, None]:
        into, back = row @ params["in"]["w"] + params["in"]["b"], h @ params["back"]
        (z, r, n), (zh, rh, nh) = jnp.split(into, 3, -1), jnp.split(back, 3, -1)
        z, r = jax.nn.sigmoid(z + zh), jax.nn.sigmoid(r + rh)
        return (1 - z) * jnp.tanh(n + r * nh) + z * h, None

    h = jnp.zeros((len(x), len(params["back"])))
    h, _ = jax.lax.scan(step, h, jnp.swapaxes(x, 0, 1))
    h = between(0, h, key)
    return h @ params["head"]["w"] + params["head"]["b"]


def _transformer(params: Any, x: Any, key: Any, act: Any, between: Between) -> Any:
    h = params["embed"][x] + params["positions"]
    keep = np.tril(np.ones((LENGTH, LENGTH), bool))
    for i, p in enumerate(params["layers"]):
        q, k, v = jnp.split(layer_norm(p["norm1"], h) @ p["qkv"], 3, -1)
        q, k, v = (a.reshape(*a.shape[:-1], 4, -1) for a in (q, k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        share = jax.nn.softmax(jnp.where(keep, scores, -1e9))
        h += jnp.einsum("bhqk,bkhd->bqhd", share, v).reshape(h.shape) @ p["o"]
        inner = act(layer_norm(p["norm2"], h) @ p["up"]["w"] + p["up"]["b"])
        h = between(i, h + inner @ p["down"], key)
    return layer_norm(params["norm"], h) @ params["head"]["w"] + params["head"]["b"]


def _norm(width: int) -> dict[str, np.ndarray]:
    return {"scale": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)}


def _transformer_params(
    rng: np.random.Generator, width: int, depth: int, gain: float, letters: int
) -> dict[str, Any]:
    small = 1 / (2 * depth)
    layers = [
        {
            "norm1": _norm(width), "norm2": _norm(width),
            "qkv": _weights(rng, 1.0, width, 3 * width), "o": _weights(rng, small, width, width),
            "up": _dense(rng, gain, width, 4 * width),
            "down": _weights(rng, small, 4 * width, width),
        }
        for _ in range(depth)
    ]  # fmt: skip
    return {
        "embed": rng.standard_normal((letters, width)).astype(np.float32),
        "positions": 0.1 * rng.standard_normal((LENGTH, width)).astype(np.float32),
        "layers": layers, "norm": _norm(width), "head": _dense(rng, 1.0, width, letters),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------- programs


def _regression(z: Any, y: Any) -> Any:
    return jnp.mean(jnp.square(z.reshape(y.shape) - y))


def _classification(z: Any, y: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()


def draw(seed: int, depth_at_least: int = 1) -> Made:
    """A program; the same for the same seed."""
    rng = np.random.default_rng(seed)
    family = str(rng.choice(FAMILIES))
    facts: dict[str, Any] = {
        "seed": seed, "family": family, "data": str(rng.choice(SETS)),
        "depth": max(int(rng.choice([1, 2, 3, 4, 6, 8])), depth_at_least),
        "width": int(rng.choice([16, 32, 64, 128])), "activation": str(rng.choice([*ACTIVATIONS])),
        "rule": str(rng.choice([*RULES])), "size": int(rng.choice([16, 32, 64])),
        "clip": bool(rng.random() < 0.3), "warmup": bool(rng.random() < 0.3),
        "factor": float(2 ** rng.uniform(-1, 1)),
    }  # fmt: skip
    if family == "autoencoder":
        facts |= {"data": str(rng.choice(["images", "cancer"])), "depth": min(facts["depth"], 4)}
    elif family not in ("mlp", "residual"):
        facts |= {"depth": max(min(facts["depth"], 4), 2), "width": min(facts["width"], 64)}
        facts |= {"data": "text" if family == "transformer" else "images"}
    if family == "transformer" and facts["rule"] in ("sgd", "momentum"):
        facts |= {"rule": "adam"}  # which is what they are trained with
    act, gain = ACTIVATIONS[facts["activation"]]
    rule, rate = RULES[facts["rule"]]
    x, y = {"text": _text, "images": _images}.get(facts["data"], lambda: _table(facts["data"]))()
    if family == "autoencoder":
        x = x.reshape(len(x), -1)
        y = x
    forward, params = _model(rng, facts, gain, (x, y))
    regression = y.dtype == np.float32
    return Made(
        facts, jax.tree.map(jnp.asarray, params), forward, _cut(rng, x, y, facts["size"]),
        _regression if regression else _classification, rule, rate * facts["factor"], act,
        before=(optax.clip_by_global_norm(5.0),) if facts["clip"] else (),
        last=0 if family in ("gru", "lstm") else facts["depth"] - 1,
    )  # fmt: skip


def _model(
    rng: np.random.Generator, facts: dict[str, Any], gain: float, data: tuple[Any, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    x, y = data
    family, width, depth = facts["family"], facts["width"], facts["depth"]
    classes = int(np.prod(y.shape[1:])) if y.dtype == np.float32 else int(y.max()) + 1
    if family in _MODULES:
        return _MODULES[family](facts, gain, x.shape[1:], classes)
    if family == "transformer":
        width = max(width, 32)
        return _transformer, _transformer_params(rng, width, depth, gain, classes)
    if family == "gru":
        turn = np.linalg.qr(rng.standard_normal((width, width)))[0].astype(np.float32)
        return _gru, {
            "in": _dense(rng, 1.0, 8, 3 * width), "back": np.concatenate([turn] * 3, 1),
            "head": _dense(rng, 1.0, width, classes),
        }  # fmt: skip
    if family == "conv":
        sizes = [1, *[min(16, width)] * depth]
        layers = [
            {"w": _weights(rng, gain, 3, 3, n, m), "b": np.zeros(m, np.float32)}
            for n, m in itertools.pairwise(sizes)
        ]
        return _conv, {"layers": layers, "head": _dense(rng, 1.0, 16 * sizes[-1], classes)}
    sizes = [x.shape[1], *[width] * depth]
    layers = [_dense(rng, gain, n, m) for n, m in itertools.pairwise(sizes)]
    return _mlp, {"layers": layers, "head": _dense(rng, 1.0, width, classes)}


def with_matrices(made: Made, change: Callable[[Any], Any]) -> Made:
    """The program with every matrix of its layers changed."""
    params = jax.tree.map(lambda a: change(a) if a.ndim > 1 else a, made.params)
    return replace(made, params=params)
