"""Small models of the diagnosis benchmark: what can go wrong is an argument."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Init = Callable[[Any, tuple[int, int]], Any]


def scaled(gain: float, *, mode: str = "in") -> Init:
    """Normal weights with variance gain / fan."""

    def init(key: Any, shape: tuple[int, int]) -> Any:
        fan = shape[0] if mode == "in" else sum(shape) / 2
        return math.sqrt(gain / fan) * jax.random.normal(key, shape)

    return init


def normal(std: float) -> Init:
    return lambda key, shape: std * jax.random.normal(key, shape)


def uniform(bound: float) -> Init:
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def torch_default(key: Any, shape: tuple[int, int]) -> Any:
    return uniform(1 / math.sqrt(shape[0]))(key, shape)


he, glorot, lecun = scaled(2.0), scaled(1.0, mode="avg"), scaled(1.0)


# ------------------------------------------------------------------------------------------- data


def digits(seed: int, count: int = 128) -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    data = load_digits()
    pick = np.random.default_rng(seed).permutation(len(data.target))[:count]
    x = (data.data[pick] - data.data.mean()) / data.data.std()
    return jnp.asarray(x, jnp.float32), jnp.asarray(data.target[pick], jnp.int32)


def circle(seed: int, count: int = 128) -> tuple[Any, Any]:
    from sklearn.datasets import make_circles

    x, y = make_circles(count, noise=0.1, random_state=seed)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32)


def regression(seed: int, count: int = 128, scale: float = 1.0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 8))
    y = np.sin(x[:, :1]) + 0.5 * x[:, 1:2] * x[:, 2:3] + 0.1 * rng.standard_normal((count, 1))
    return jnp.asarray(x, jnp.float32), jnp.asarray(scale * y, jnp.float32)


def copies(seed: int, count: int = 16, length: int = 16, vocabulary: int = 16) -> Any:
    """Sequences whose second half repeats the first."""
    rng = np.random.default_rng(seed)
    half = rng.integers(0, vocabulary, (count, length // 2))
    return jnp.asarray(np.concatenate([half, half], axis=1), jnp.int32)


def parity(seed: int, count: int = 64, length: int = 12) -> tuple[Any, Any]:
    """Sequences of noise; the class stands in the first two inputs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, length, 4))
    return jnp.asarray(x, jnp.float32), jnp.asarray(x[:, :2, 0].mean(1) > 0, jnp.int32)


# ------------------------------------------------------------------------------------------ models


def mlp_params(
    seed: int,
    widths: Sequence[int],
    init: Init = he,
    *,
    head: Init | None = None,
    bias: float = 0.0,
) -> list[dict[str, Any]]:
    keys = jax.random.split(jax.random.key(seed), len(widths))
    layers = []
    for i, (n, m) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        draw = (head or lecun) if last else init
        layers.append({"w": draw(keys[i], (n, m)), "b": jnp.full((m,), 0.0 if last else bias)})
    return layers


def mlp(params: Any, x: Any, act: Callable = jax.nn.relu) -> Any:
    for layer in params[:-1]:
        x = act(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def adapters(seed: int, base: Any, rank: int = 4) -> list[dict[str, Any]]:
    """Low-rank additions to the weights of a perceptron, zero at first."""
    key = jax.random.key(seed)
    shapes = [layer["w"].shape for layer in base]
    return [{"a": lecun(key, (n, rank)), "b": jnp.zeros((rank, k))} for n, k in shapes]


def adapted(base: Any, additions: Any) -> list[dict[str, Any]]:
    """The perceptron with its additions."""
    pairs = zip(base, additions, strict=True)
    return [{"w": p["w"] + q["a"] @ q["b"], "b": p["b"]} for p, q in pairs]


def distance_loss(root: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """Of a perceptron in which every example also sees its mean distance to all, itself too."""

    def loss(p: Any, b: Any) -> Any:
        x = b[0]
        for i, layer in enumerate(p[:-1]):
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
            if i == 1:
                distance = root(jnp.square(x[:, None] - x[None]).sum(-1))
                x = x + distance.mean(1, keepdims=True)
        return cross_entropy(x @ p[-1]["w"] + p[-1]["b"], b[1])

    return loss


def cross_entropy(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def rnn_params(
    seed: int,
    n_in: int,
    width: int,
    classes: int,
    init: Init = lecun,
    recurrent: Init | None = None,
) -> dict[str, Any]:
    k = jax.random.split(jax.random.key(seed), 3)
    return {
        "cell": {
            "wx": init(k[0], (n_in, width)), "wh": (recurrent or init)(k[1], (width, width)),
            "b": jnp.zeros(width),
        },
        "head": {"w": lecun(k[2], (width, classes)), "b": jnp.zeros(classes)},
    }  # fmt: skip


def rnn(params: Any, xs: Any, act: Callable = jnp.tanh) -> Any:
    cell = params["cell"]

    def step(h: Any, x: Any) -> tuple[Any, None]:
        return act(x @ cell["wx"] + h @ cell["wh"] + cell["b"]), None

    start = jnp.zeros((xs.shape[0], cell["wh"].shape[0]), xs.dtype)
    h, _ = jax.lax.scan(step, start, jnp.swapaxes(xs, 0, 1))
    return h @ params["head"]["w"] + params["head"]["b"]


def lstm_params(seed: int, n_in: int, width: int, classes: int) -> dict[str, Any]:
    k = jax.random.split(jax.random.key(seed), 3)
    bias = jnp.zeros(4 * width).at[width : 2 * width].set(1.0)
    return {
        "lstm": {
            "wx": lecun(k[0], (n_in, 4 * width)), "wh": lecun(k[1], (width, 4 * width)), "b": bias,
        },
        "head": {"w": lecun(k[2], (width, classes)), "b": jnp.zeros(classes)},
    }  # fmt: skip


def lstm(params: Any, xs: Any) -> Any:
    cell = params["lstm"]

    def step(state: Any, x: Any) -> tuple[Any, None]:
        h, c = state
        i, f, g, o = jnp.split(x @ cell["wx"] + h @ cell["wh"] + cell["b"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    start = jnp.zeros((xs.shape[0], cell["wh"].shape[0]), xs.dtype)
    (h, _), _ = jax.lax.scan(step, (start, start), jnp.swapaxes(xs, 0, 1))
    return h @ params["head"]["w"] + params["head"]["b"]


def layer_norm(p: Any, x: Any) -> Any:
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-6) * p["scale"] + p["bias"]


def transformer_params(
    seed: int, depth: int = 2, width: int = 32, vocabulary: int = 16, length: int = 16,
    gain: float = 1.0,
) -> dict[str, Any]:  # fmt: skip
    keys = iter(jax.random.split(jax.random.key(seed), 6 * depth + 3))
    draw = scaled(gain)
    norm = lambda: {"scale": jnp.ones(width), "bias": jnp.zeros(width)}  # noqa: E731
    blocks = [
        {
            "norm1": norm(), "norm2": norm(),
            "attn": {n: draw(next(keys), (width, width)) for n in ("q", "k", "v", "o")},
            "mlp": {"up": draw(next(keys), (width, 2 * width)),
                    "down": draw(next(keys), (2 * width, width))},
        }
        for _ in range(depth)
    ]  # fmt: skip
    return {
        "embed": 0.5 * jax.random.normal(next(keys), (vocabulary, width)),
        "pos": 0.5 * jax.random.normal(next(keys), (length, width)),
        "blocks": blocks, "norm": norm(), "out": lecun(next(keys), (width, vocabulary)),
    }  # fmt: skip


def attention(p: Any, x: Any, *, heads: int = 2, scale: float | None = None) -> Any:
    n, t, d = x.shape
    split = lambda w: (x @ w).reshape(n, t, heads, d // heads).swapaxes(1, 2)  # noqa: E731
    q, k, v = split(p["q"]), split(p["k"]), split(p["v"])
    scores = q @ k.swapaxes(-1, -2) * (scale or (d // heads) ** -0.5)
    mask = jnp.tril(jnp.ones((t, t), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9), axis=-1)
    return (weights @ v).swapaxes(1, 2).reshape(n, t, d) @ p["o"]


def transformer(  # noqa: PLR0913
    params: Any, tokens: Any, *, placement: str = "pre", residual: bool = True, remat: bool = False,
    tied: bool = False, scale: float | None = None,
) -> Any:  # fmt: skip
    x = params["embed"][tokens] + params["pos"][: tokens.shape[1]]

    def block(p: Any, x: Any) -> Any:
        ff = lambda h: jax.nn.gelu(h @ p["mlp"]["up"]) @ p["mlp"]["down"]  # noqa: E731
        if placement == "post":
            x = layer_norm(p["norm1"], x + attention(p["attn"], x, scale=scale))
            return layer_norm(p["norm2"], x + ff(x))
        keep = x if residual else 0.0
        x = keep + attention(p["attn"], layer_norm(p["norm1"], x) if residual else x, scale=scale)
        keep = x if residual else 0.0
        return keep + (ff(layer_norm(p["norm2"], x)) if residual else x)

    block = jax.checkpoint(block) if remat else block
    for p in params["blocks"]:
        x = block(p, x)
    if placement == "pre" and residual:
        x = layer_norm(params["norm"], x)
    return x @ (params["embed"].T if tied else params["out"])


def language_loss(params: Any, tokens: Any, **options: Any) -> Any:
    logits = transformer(params, tokens[:, :-1], **options)
    return cross_entropy(logits, tokens[:, 1:])


def cnn_params(seed: int, init_gain: float = 2.0) -> dict[str, Any]:
    k = jax.random.split(jax.random.key(seed), 3)
    conv = lambda key, n, m: math.sqrt(init_gain / (9 * n)) * jax.random.normal(key, (3, 3, n, m))  # noqa: E731
    return {
        "conv1": {"w": conv(k[0], 1, 8), "b": jnp.zeros(8)},
        "conv2": {"w": conv(k[1], 8, 8), "b": jnp.zeros(8)},
        "head": {"w": lecun(k[2], (8 * 16, 10)), "b": jnp.zeros(10)},
    }


def cnn(params: Any, x: Any) -> Any:
    x = x.reshape(-1, 8, 8, 1)
    for name, stride in (("conv1", 1), ("conv2", 2)):
        p = params[name]
        x = jax.lax.conv_general_dilated(
            x, p["w"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + p["b"])
    return x.reshape(x.shape[0], -1) @ params["head"]["w"] + params["head"]["b"]
