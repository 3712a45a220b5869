"""Models in equinox: modules that are pytrees, written for one example, batched by `jax.vmap`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from zoo_base import Parts, case, cross_entropy, fill, floats, mse, table, tokens

KEY = 0


def made(make: Any) -> Any:
    """The module that `make(key)` builds, its parameters filled in without compiling anything."""
    arrays, static = eqx.partition(eqx.filter_eval_shape(make, jax.random.key(KEY)), _is_shape)
    return eqx.combine(fill(arrays, out_first=True), static)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def call(model: Any, x: Any) -> Any:
    return model(x)


def parts_of(make: Any, xs: Any, *, loss: Any = mse, closed_over: bool = False) -> Parts:
    """The module is the pytree of parameters; `closed_over`: it is f itself too."""
    close = (lambda model: model) if closed_over else None
    return Parts(call, made(make), xs, loss=loss, close=close)


@case("equinox", "mlp", scopes=3, cuts=8)
def mlp(_: Any) -> Parts:
    make = lambda key: eqx.nn.MLP(5, 4, 6, 2, activation=jnp.tanh, key=key)  # noqa: E731
    return parts_of(make, floats(3, 5), closed_over=True)


@case("equinox", "mlp", scopes=3, cuts=5)
def mlp_sequential(_: Any) -> Parts:
    def make(key):
        k1, k2 = jax.random.split(key)
        layers = eqx.nn.Linear(5, 6, key=k1), eqx.nn.Lambda(jax.nn.sigmoid), eqx.nn.LayerNorm(6)
        return eqx.nn.Sequential([*layers, eqx.nn.Linear(6, 3, use_bias=False, key=k2)])

    return parts_of(make, floats(3, 5))


class Custom(eqx.Module):
    """As in equinox's introduction: layers in a list, one bare array, a static function."""

    layers: list
    extra_bias: jax.Array
    activation: Callable = eqx.field(static=True)

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.layers = [eqx.nn.Linear(5 + k, 6 + k, key=key) for k, key in enumerate(keys)]
        self.extra_bias = jnp.ones(8)
        self.activation = jax.nn.relu

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x) + self.extra_bias


@case("equinox", "mlp", scopes=3, cuts=9)
def mlp_custom(_: Any) -> Parts:
    return parts_of(Custom, floats(3, 5))


class CNN(eqx.Module):
    """The CNN of equinox's MNIST example, small; channels first."""

    layers: list

    def __init__(self, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.layers = [
            eqx.nn.Conv2d(1, 3, kernel_size=3, key=k1),
            eqx.nn.MaxPool2d(kernel_size=2, stride=2),
            jax.nn.relu,
            eqx.nn.Conv2d(3, 4, kernel_size=2, key=k2),
            eqx.nn.AvgPool2d(kernel_size=2),
            jnp.ravel,
            eqx.nn.Linear(4, 3, key=k3),
            jax.nn.log_softmax,
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@case("equinox", "cnn", scopes=3, cuts=7)
def cnn(_: Any) -> Parts:
    return parts_of(CNN, floats(3, 1, 8, 8), loss=cross_entropy)


class ResidualBlock(eqx.Module):
    conv1: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    conv2: eqx.nn.Conv2d
    skip: eqx.nn.Conv2d | None

    def __init__(self, n_in, n_out, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.conv1 = eqx.nn.Conv2d(n_in, n_out, 3, padding=1, key=k1)
        self.norm = eqx.nn.GroupNorm(1, n_out)
        self.conv2 = eqx.nn.Conv2d(n_out, n_out, 3, padding=1, key=k2)
        self.skip = eqx.nn.Conv2d(n_in, n_out, 1, key=k3) if n_in != n_out else None

    def __call__(self, x):
        y = self.conv2(jax.nn.relu(self.norm(self.conv1(x))))
        return jax.nn.relu(y + (x if self.skip is None else self.skip(x)))


@case("equinox", "resnet", scopes=3, cuts=5)
def resnet(_: Any) -> Parts:
    def make(key):
        k1, k2, k3 = jax.random.split(key, 3)
        blocks = ResidualBlock(1, 4, k1), ResidualBlock(4, 4, k2)
        pool = eqx.nn.Lambda(lambda x: x.mean(axis=(1, 2)))
        tail = pool, eqx.nn.Linear(4, 3, key=k3)
        return eqx.nn.Sequential([*(eqx.nn.Lambda(block) for block in blocks), *tail])

    return parts_of(make, floats(3, 1, 4, 4), loss=cross_entropy)


class Block(eqx.Module):
    """A Pre-LN block, causal; for one sequence (T, 8)."""

    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.RMSNorm
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self, key, dropout=0.0):
        k1, k2 = jax.random.split(key)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(8), eqx.nn.RMSNorm(8)
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=k1)
        self.mlp = eqx.nn.MLP(8, 8, 12, 1, activation=jax.nn.gelu, key=k2)
        self.dropout = eqx.nn.Dropout(dropout, inference=dropout == 0)

    def __call__(self, x, key=None):
        mask = jnp.tril(jnp.ones((x.shape[0], x.shape[0]), bool))
        y = jax.vmap(self.norm1)(x)
        x = x + self.attention(y, y, y, mask=mask)
        y = jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))
        return x + self.dropout(y, key=key)


class LanguageModel(eqx.Module):
    embedding: eqx.nn.Embedding
    positions: jax.Array
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, k3, *keys = jax.random.split(key, 5)
        self.embedding = eqx.nn.Embedding(7, 8, key=k1)
        self.positions = 0.02 * jax.random.normal(k2, (5, 8))
        self.blocks = [Block(key) for key in keys]
        self.head = eqx.nn.Linear(8, 7, key=k3)

    def __call__(self, ids):
        x = jax.vmap(self.embedding)(ids) + self.positions
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(x)


@case("equinox", "transformer", scopes=3, cuts=4, flags="integer-input")
def transformer(_: Any) -> Parts:
    return parts_of(LanguageModel, tokens(3, 5), loss=cross_entropy)


@case("equinox", "dropout", scopes=2, cuts=2)
def transformer_dropout(_: Any) -> Parts:
    """The key is an argument, as equinox has it; here a fixed one, the same for all examples."""
    blocks = made(lambda key: [Block(k, 0.3) for k in jax.random.split(key, 2)])

    def apply(blocks: list, x: jax.Array) -> jax.Array:
        for block, key in zip(blocks, jax.random.split(jax.random.key(4), 2), strict=True):
            x = block(x, key=key)
        return x

    return Parts(apply, blocks, floats(3, 4, 8), loss=mse)


class Stacked(eqx.Module):
    """Layers made by `filter_vmap` and run by `lax.scan`, as equinox's page of tricks has it."""

    layers: Block
    remat: bool = eqx.field(static=True)

    def __init__(self, key, remat=False):
        self.layers = eqx.filter_vmap(Block)(jax.random.split(key, 3))
        self.remat = remat

    def __call__(self, x):
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def step(x, arrays):
            layer = eqx.combine(arrays, static)
            return (eqx.filter_checkpoint(layer) if self.remat else layer)(x), None

        return jax.lax.scan(step, x, arrays)[0]


@case("equinox", "scan", scopes=3, cuts=3, flags="scan", iterations=3)
def scan_blocks(_: Any) -> Parts:
    return parts_of(Stacked, floats(3, 4, 8))


@case("equinox", "scan", scopes=3, cuts=3, flags="scan remat", iterations=3)
def scan_blocks_remat(_: Any) -> Parts:
    return parts_of(partial(Stacked, remat=True), floats(3, 4, 8))


@case("equinox", "jit", scopes=2, cuts=2)
def filter_jit_inside(_: Any) -> Parts:
    """Every block behind its own `eqx.filter_jit`."""
    blocks = made(lambda key: [Block(k) for k in jax.random.split(key, 2)])

    def apply(blocks: list, x: jax.Array) -> jax.Array:
        for block in blocks:
            x = eqx.filter_jit(block)(x)
        return x

    return Parts(apply, blocks, floats(3, 4, 8), loss=mse)


@case("equinox", "remat", scopes=2, cuts=2, flags="remat")
def checkpoint_blocks(_: Any) -> Parts:
    blocks = made(lambda key: [Block(k) for k in jax.random.split(key, 2)])

    def apply(blocks: list, x: jax.Array) -> jax.Array:
        for block in blocks:
            x = eqx.filter_checkpoint(block)(x)
        return x

    return Parts(apply, blocks, floats(3, 4, 8), loss=mse)


class Recurrent(eqx.Module):
    """A cell scanned over a sequence, and a read-out, as in equinox's example on RNNs."""

    cell: eqx.Module
    head: eqx.nn.Linear

    def __init__(self, cell, key):
        k1, k2 = jax.random.split(key)
        self.cell = cell(3, 6, key=k1)
        self.head = eqx.nn.Linear(6, 2, key=k2)

    def __call__(self, xs, state):
        state, _ = jax.lax.scan(lambda s, x: (self.cell(x, s), None), state, xs)
        return self.head(jax.tree.leaves(state)[0])


@case("equinox", "lstm", scopes=2, cuts=2, flags="scan few-cuts")
def lstm_inputs(_: Any) -> Parts:
    model = made(partial(Recurrent, eqx.nn.LSTMCell))
    zeros = lambda xs: (jnp.zeros(6, xs.dtype),) * 2  # noqa: E731
    return Parts(lambda m, xs: m(xs, zeros(xs)), model, floats(3, 5, 3), loss=mse)


@case("equinox", "lstm", scopes=6, cuts=6, flags="scan time tuple-state pytree-input", iterations=5)
def lstm_state(_: Any) -> Parts:
    model, inputs = made(partial(Recurrent, eqx.nn.LSTMCell)), floats(5, 3)
    state = (floats(3, 6, seed=1), floats(3, 6, seed=2))
    return Parts(lambda m, s: m(jnp.asarray(inputs, s[0].dtype), s), model, state, loss=mse)


@case("equinox", "gru", scopes=6, cuts=6, flags="scan time", iterations=5)
def gru_h0(_: Any) -> Parts:
    model, inputs = made(partial(Recurrent, eqx.nn.GRUCell)), floats(5, 3)
    apply = lambda m, h: m(jnp.asarray(inputs, h.dtype), h)  # noqa: E731
    return Parts(apply, model, floats(3, 6, seed=1), loss=mse)


class UNet(eqx.Module):
    """One-dimensional, channels first, two resolutions."""

    down: eqx.nn.Conv1d
    pool: eqx.nn.AvgPool1d
    middle: eqx.nn.Conv1d
    up: eqx.nn.ConvTranspose1d
    out: eqx.nn.Conv1d

    def __init__(self, key):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        self.down = eqx.nn.Conv1d(2, 4, 3, padding=1, key=k1)
        self.pool = eqx.nn.AvgPool1d(2, 2)
        self.middle = eqx.nn.Conv1d(4, 6, 3, padding=1, key=k2)
        self.up = eqx.nn.ConvTranspose1d(6, 4, 2, 2, key=k3)
        self.out = eqx.nn.Conv1d(8, 2, 3, padding=1, key=k4)

    def __call__(self, x):
        skip = jax.nn.silu(self.down(x))
        y = self.up(jax.nn.silu(self.middle(self.pool(skip))))
        return self.out(jnp.concatenate([y, skip]))


@case("equinox", "unet", scopes=2, cuts=4, flags="few-cuts")
def unet(_: Any) -> Parts:
    return parts_of(UNet, floats(3, 2, 6))


@case("equinox", "norm", scopes=2, cuts=3)
def batch_norm_inference(_: Any) -> Parts:
    """`eqx.nn.BatchNorm` with its state, in inference mode: examples do not meet."""

    def make(key):
        norm = eqx.nn.BatchNorm(6, axis_name="batch", mode="ema", inference=True)
        layers = [eqx.nn.Linear(5, 6, key=key), norm, eqx.nn.Linear(6, 3, key=key)]
        return eqx.nn.Sequential(layers)

    model, state = eqx.nn.make_with_state(make)(jax.random.key(KEY))
    model = eqx.tree_at(lambda m: m.layers[0].bias, model, jnp.ones(6))

    def apply(model: Any, x: jax.Array) -> jax.Array:
        y, _ = model(x, state)
        return y

    return Parts(apply, model, floats(3, 5), loss=mse)


CASES = table(globals())
