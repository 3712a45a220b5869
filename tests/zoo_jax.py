"""Feed-forward models in plain JAX: perceptrons, convolutions, residual networks, routing."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from zoo_base import Case, Parts, case, cross_entropy, dense, floats, mse, table


def layer(p: Any, h: jax.Array) -> jax.Array:
    """A dense layer, with or without bias."""
    y = h @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


def layers(*widths: int, **options: Any) -> list[dict[str, np.ndarray]]:
    """Parameters of dense layers, of these widths."""
    pairs = itertools.pairwise(widths)
    return [dense(i, o, seed=k, **options) for k, (i, o) in enumerate(pairs)]


def mlp(params: list, x: jax.Array, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Dense layers with an activation between them."""
    for p in params[:-1]:
        x = activation(layer(p, x))
    return layer(params[-1], x)


def _mlp_case(
    name: str, widths: tuple[int, ...], activation: Any, *, bias: bool = True, gain: float = 1.0
) -> Case:
    def parts(_: Any) -> Parts:
        pairs = itertools.pairwise(widths)
        params = [dense(i, o, bias=bias, gain=gain, seed=k) for k, (i, o) in enumerate(pairs)]
        apply = partial(mlp, activation=activation)
        # the same code takes one example or a batch of them
        return Parts(apply, params, floats(3, widths[0], seed=7), apply_batch=apply, loss=mse)

    depth = len(widths) - 1
    cuts = depth * (2 + bias) - 1
    return Case(f"jax_{name}", "jax", "mlp", parts, scopes=depth, cuts=cuts)


mlp_sigmoid = _mlp_case("mlp_sigmoid", (5, 6, 6, 4), jax.nn.sigmoid)
mlp_tanh_no_bias = _mlp_case("mlp_tanh_no_bias", (5, 8, 8, 4), jnp.tanh, bias=False)
mlp_relu = _mlp_case("mlp_relu", (5, 8, 8, 8, 4), jax.nn.relu, gain=1.4)
mlp_gelu_widening = _mlp_case(
    "mlp_gelu_widening", (4, 6, 8, 12), partial(jax.nn.gelu, approximate=False)
)
mlp_sigmoid_50 = _mlp_case("mlp_sigmoid_50", (6,) * 51, jax.nn.sigmoid)
mlp_bottleneck = _mlp_case("mlp_bottleneck", (8, 2, 8, 6), jnp.tanh)


@case("jax", "linear", scopes=6, cuts=6)
def deep_linear_orthogonal(_: Any) -> Parts:
    """Every singular value of the whole is 0.5**6: a closed form."""
    params = [
        np.linalg.qr(floats(5, 5, seed=k).astype(np.float64))[0].astype(np.float32) * 0.5
        for k in range(6)
    ]

    def apply(params: list, x: jax.Array) -> jax.Array:
        for w in params:
            x = x @ w
        return x

    return Parts(apply, params, floats(3, 5), apply_batch=apply, loss=mse)


@case("jax", "linear", scopes=1, cuts=1)
def linear(_: Any) -> Parts:
    return Parts(lambda w, x: w @ x, floats(3, 4), floats(3, 4, seed=1), loss=mse)


@case("jax", "identity", scopes=0, cuts=0, flags="no-loss")
def identity(_: Any) -> Parts:
    """No equation at all: h_0 is the output."""
    return Parts(lambda _, x: x, None, floats(3, 4))


@case("jax", "mlp", scopes=3, cuts=8, names=("encoder", "hidden", "head"))
def mlp_named_scopes(_: Any) -> Parts:
    params = {"encoder": dense(5, 6), "hidden": dense(6, 6, seed=1), "head": dense(6, 4, seed=2)}

    def apply(params: dict, x: jax.Array) -> jax.Array:
        with jax.named_scope("encoder"):
            x = jnp.tanh(layer(params["encoder"], x))
        with jax.named_scope("hidden"):
            x = jnp.tanh(layer(params["hidden"], x))
        with jax.named_scope("head"):
            return layer(params["head"], x)

    return Parts(apply, params, floats(3, 5), apply_batch=apply, loss=mse)


@case("jax", "mlp", scopes=3, cuts=8, flags="zero-jacobian")
def mlp_dead_relu(_: Any) -> Parts:
    """The bias of the middle layer switches every unit of it off."""
    params = [dense(5, 6), dense(6, 6, seed=1), dense(6, 4, seed=2)]
    params[1]["bias"] = np.full(6, -100, np.float32)
    apply = partial(mlp, activation=jax.nn.relu)
    return Parts(apply, params, floats(3, 5), apply_batch=apply, loss=mse)


def _conv(x: jax.Array, w: jax.Array, stride: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _pool(x: jax.Array, *, average: bool) -> jax.Array:
    window = {"window_dimensions": (1, 2, 2, 1), "window_strides": (1, 2, 2, 1), "padding": "VALID"}
    return (
        lax.reduce_window(x, 0.0, lax.add, **window) / 4
        if average
        else lax.reduce_window(x, -jnp.inf, lax.max, **window)
    )


def _kernel(size: int, n_in: int, n_out: int, seed: int = 0) -> np.ndarray:
    return floats(size, size, n_in, n_out, seed=seed) / np.float32(np.sqrt(size * size * n_in))


@case("jax", "cnn", scopes=3, cuts=8)
def cnn(_: Any) -> Parts:
    params = {
        "conv1": _kernel(3, 1, 3),
        "conv2": _kernel(3, 3, 3, seed=1),
        "head": dense(12, 4, seed=2),
    }

    def apply_batch(params: dict, x: jax.Array) -> jax.Array:
        x = _pool(jax.nn.relu(_conv(x, params["conv1"])), average=False)
        x = _pool(jnp.tanh(_conv(x, params["conv2"])), average=True)
        return layer(params["head"], x.reshape(x.shape[0], -1))

    def apply(params: dict, x: jax.Array) -> jax.Array:
        return apply_batch(params, x[None])[0]

    return Parts(apply, params, floats(3, 8, 8, 1), apply_batch=apply_batch, loss=cross_entropy)


@case("jax", "resnet", scopes=3, cuts=4)
def resnet(_: Any) -> Parts:
    """Two residual blocks; the second halves the image and projects its skip."""
    block1 = {"conv1": _kernel(3, 3, 3, seed=1), "conv2": _kernel(3, 3, 3, seed=2)}
    block2 = {
        "conv1": _kernel(3, 3, 4, seed=3),
        "conv2": _kernel(3, 4, 4, seed=4),
        "skip": _kernel(1, 3, 4, seed=5),
    }
    params = {"stem": _kernel(3, 1, 3), "blocks": [block1, block2], "head": dense(4, 3, seed=6)}

    def block(p: dict, x: jax.Array) -> jax.Array:
        stride = 2 if "skip" in p else 1
        y = _conv(jax.nn.relu(_conv(x, p["conv1"], stride)), p["conv2"])
        skip = _conv(x, p["skip"], stride) if "skip" in p else x
        return jax.nn.relu(y + skip)

    def apply_batch(params: dict, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(_conv(x, params["stem"]))
        for p in params["blocks"]:
            x = block(p, x)
        return layer(params["head"], x.mean(axis=(1, 2)))

    def apply(params: dict, x: jax.Array) -> jax.Array:
        return apply_batch(params, x[None])[0]

    return Parts(apply, params, floats(3, 6, 6, 1), apply_batch=apply_batch, loss=cross_entropy)


@case("jax", "residual", scopes=3, cuts=3)
def residual_zero_init(_: Any) -> Parts:
    """The last layer of every block is zero: each block is the identity, and its Jacobian is I."""
    params = [
        {"up": dense(5, 8, seed=k), "down": dense(8, 5, gain=0.0, bias=False)} for k in range(3)
    ]

    def apply(params: list, x: jax.Array) -> jax.Array:
        for p in params:
            x = x + layer(p["down"], jax.nn.relu(layer(p["up"], x)))
        return x

    return Parts(apply, params, floats(3, 5), apply_batch=apply, loss=mse)


@case("jax", "unet", scopes=1, cuts=1, flags="few-cuts")
def unet(_: Any) -> Parts:
    """In one dimension; the skip from before the first pooling lives until the last layer."""
    params = {"down1": dense(2, 4), "down2": dense(4, 6, seed=1), "middle": dense(6, 6, seed=2)}
    params |= {"up2": dense(12, 4, seed=3), "up1": dense(8, 4, seed=4), "head": dense(4, 2, seed=5)}

    def halve(h: jax.Array) -> jax.Array:
        return h.reshape(h.shape[0] // 2, 2, -1).mean(axis=1)

    def double(h: jax.Array) -> jax.Array:
        return jnp.repeat(h, 2, axis=0)

    def apply(params: dict, x: jax.Array) -> jax.Array:
        d1 = jax.nn.gelu(layer(params["down1"], x))
        d2 = jax.nn.gelu(layer(params["down2"], halve(d1)))
        m = jax.nn.gelu(layer(params["middle"], halve(d2)))
        u2 = jax.nn.gelu(layer(params["up2"], jnp.concatenate([double(m), d2], axis=-1)))
        u1 = jax.nn.gelu(layer(params["up1"], jnp.concatenate([double(u2), d1], axis=-1)))
        return layer(params["head"], u1)

    return Parts(apply, params, floats(3, 4, 2), loss=mse)


@case("jax", "densenet", scopes=1, cuts=1, flags="few-cuts")
def densenet(_: Any) -> Parts:
    """Every layer reads the features of all before it."""
    params = [dense(4, 3), dense(7, 3, seed=1), dense(10, 3, seed=2), dense(13, 2, seed=3)]

    def apply(params: list, x: jax.Array) -> jax.Array:
        features = [x]
        for p in params[:-1]:
            features.append(jnp.tanh(layer(p, jnp.concatenate(features, axis=-1))))
        return layer(params[-1], jnp.concatenate(features, axis=-1))

    return Parts(apply, params, floats(3, 4), apply_batch=apply, loss=mse)


def _experts() -> dict[str, Any]:
    experts = {"up": floats(3, 4, 8, seed=1) / 2, "down": floats(3, 8, 4, seed=2) / 3}
    return {
        "inp": dense(4, 4),
        "router": dense(4, 3, seed=3),
        "experts": experts,
        "head": dense(4, 3, seed=4),
    }


@case("jax", "moe", scopes=3, cuts=3)
def moe_cond(_: Any) -> Parts:
    """A gate, a boolean, decides between a small and a large expert."""
    params = {
        "inp": dense(4, 4),
        "gate": floats(4, seed=3),
        "small": dense(4, 4, seed=1),
        "head": dense(4, 3, seed=4),
    }
    params["large"] = [dense(4, 8, seed=2), dense(8, 4, seed=3)]

    def apply(params: dict, x: jax.Array) -> jax.Array:
        h = jnp.tanh(layer(params["inp"], x))
        h = lax.cond(
            h @ params["gate"] > 0,
            lambda h: jnp.tanh(layer(params["small"], h)),
            lambda h: mlp(params["large"], h, jnp.tanh),
            h,
        )
        return layer(params["head"], h)

    return Parts(apply, params, floats(3, 4, seed=5), loss=mse)


@case("jax", "moe", scopes=3, cuts=4)
def moe_switch(_: Any) -> Parts:
    def apply(params: dict, x: jax.Array) -> jax.Array:
        h = jnp.tanh(layer(params["inp"], x))
        winner = jnp.argmax(layer(params["router"], h))
        w = params["experts"]
        branches = [lambda h, k=k: jnp.tanh(h @ w["up"][k]) @ w["down"][k] for k in range(3)]
        return layer(params["head"], h + lax.switch(winner, branches, h))

    return Parts(apply, _experts(), floats(3, 4, seed=5), loss=mse)


@case("jax", "moe", scopes=3, cuts=4)
def moe_argmax(_: Any) -> Parts:
    """Top-1 routing as in the Switch Transformer: softmax gate, one_hot dispatch, einsum."""

    def apply(params: dict, x: jax.Array) -> jax.Array:
        h = jnp.tanh(layer(params["inp"], x))
        gates = jax.nn.softmax(layer(params["router"], h))
        mask = jax.nn.one_hot(jnp.argmax(gates, axis=-1), 3, dtype=h.dtype)
        hidden = jax.nn.relu(jnp.einsum("...d,edf->...ef", h, params["experts"]["up"]))
        outputs = jnp.einsum("...ef,efd->...ed", hidden, params["experts"]["down"])
        h = h + jnp.einsum("...e,...ed->...d", mask * gates, outputs)
        h = jnp.where(jnp.sum(gates > 0.2, axis=-1, keepdims=True) > 1, h, 2 * h)
        return layer(params["head"], h)

    return Parts(apply, _experts(), floats(3, 4, seed=5), apply_batch=apply, loss=mse)


@case("jax", "norm", scopes=2, cuts=2, flags="coupled-batch")
def batch_norm_train(_: Any) -> Parts:
    """Statistics over the batch couple its examples; as one input it is a chain as any other."""
    params = [dense(4, 5, seed=k) | {"scale": 1 + 0.1 * floats(5)} for k in range(1)] + [
        dense(5, 3, seed=2)
    ]

    def apply(params: list, x: jax.Array) -> jax.Array:
        h = x @ params[0]["kernel"]
        h = (h - h.mean(axis=0)) * lax.rsqrt(h.var(axis=0) + 1e-5)
        return layer(params[1], jnp.tanh(h * params[0]["scale"] + params[0]["bias"]))

    xs = floats(4, 4, seed=3)
    return Parts(apply, params, xs, x=xs, apply_batch=apply, loss=mse)


@case("jax", "norm", scopes=2, cuts=4)
def weight_norm(_: Any) -> Parts:
    """Salimans and Kingma's: w = g v / |v|; the parameters' own path is no part of the chain."""
    params = [
        {"v": floats(4, 6), "g": 1 + 0.1 * floats(6)},
        {"v": floats(6, 3, seed=1), "g": 1 + 0.1 * floats(3)},
    ]

    def apply(params: list, x: jax.Array) -> jax.Array:
        for p in params:
            x = jnp.tanh(x @ (p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0)))
        return x

    return Parts(apply, params, floats(3, 4), apply_batch=apply, loss=mse)


@case("jax", "autoencoder", scopes=4, cuts=10)
def autoencoder_tied_weights(_: Any) -> Parts:
    """The decoder uses the encoder's kernels, transposed: one parameter, two layers."""
    params = [dense(6, 4), dense(4, 3, seed=1)]

    def apply(params: list, x: jax.Array) -> jax.Array:
        for p in params:
            x = jax.nn.softplus(layer(p, x))
        for p in reversed(params):
            x = jnp.tanh(x) @ p["kernel"].T
        return x

    return Parts(apply, params, floats(3, 6), apply_batch=apply, loss=mse)


CASES = table(globals())
