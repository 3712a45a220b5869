"""Models in flax NNX: modules that own their parameters, closed over or split."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from zoo_base import Parts, case, cross_entropy, fill, floats, mse, table, tokens


def made(make: Any, *, stacked: int = 0) -> Any:
    """What `make(rngs)` builds, its parameters filled in without compiling an initializer."""
    return fill(nnx.eval_shape(lambda: make(nnx.Rngs(0))), stacked=stacked)


def merged(graph: Any, state: Any) -> Any:
    """The module again, with new variables: those in `state` belong to an outer trace."""
    return nnx.merge(graph, state, copy=True)


def parts_of(make: Any, xs: Any, *, loss: Any = mse, closed_over: bool = False) -> Parts:
    """By `nnx.split` and `nnx.merge`; or the module itself is f, and the pytree of parameters."""
    model = made(make)
    if closed_over:
        call = lambda model, x: model(x)  # noqa: E731
        return Parts(call, model, xs, apply_batch=call, loss=loss, close=lambda model: model)
    graph, state = nnx.split(model)

    def apply(state: Any, x: Any) -> Any:
        return merged(graph, state)(x)

    return Parts(apply, state, xs, apply_batch=apply, loss=loss)


class MLP(nnx.Module):
    def __init__(self, widths, activation, *, rngs):
        pairs = itertools.pairwise(widths)
        self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in pairs])
        self.activation = activation

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


@case("nnx", "mlp", scopes=3, cuts=8)
def mlp_closed_over(_: Any) -> Parts:
    """f is the module: its arrays are constants of the trace, and nothing names them."""
    make = lambda rngs: MLP((5, 6, 6, 4), nnx.sigmoid, rngs=rngs)  # noqa: E731
    return parts_of(make, floats(3, 5), closed_over=True)


@case("nnx", "mlp", scopes=3, cuts=8)
def mlp_split(_: Any) -> Parts:
    return parts_of(lambda rngs: MLP((5, 6, 6, 4), nnx.relu, rngs=rngs), floats(3, 5))


@case("nnx", "mlp", scopes=2, cuts=5)
def mlp_sequential(_: Any) -> Parts:
    def make(rngs):
        return nnx.Sequential(nnx.Linear(5, 6, rngs=rngs), nnx.tanh, nnx.Linear(6, 3, rngs=rngs))

    return parts_of(make, floats(3, 5))


class CNN(nnx.Module):
    """The CNN of flax's NNX tutorial, small."""

    def __init__(self, *, rngs):
        self.conv1 = nnx.Conv(1, 3, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(3, 4, kernel_size=(3, 3), rngs=rngs)
        self.avg_pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        x = self.avg_pool(nnx.relu(self.conv1(x)))
        x = self.avg_pool(nnx.relu(self.conv2(x)))
        return self.linear(x.reshape(*x.shape[:-3], -1))


@case("nnx", "cnn", scopes=3, cuts=8)
def cnn(_: Any) -> Parts:
    return parts_of(lambda rngs: CNN(rngs=rngs), floats(3, 8, 8, 1), loss=cross_entropy)


class ResidualBlock(nnx.Module):
    def __init__(self, n_in, n_out, strides, *, rngs):
        self.conv1 = nnx.Conv(n_in, n_out, (3, 3), strides, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(n_out, rngs=rngs)
        self.conv2 = nnx.Conv(n_out, n_out, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(n_out, rngs=rngs)
        self.skip = nnx.Conv(n_in, n_out, (1, 1), strides, rngs=rngs) if n_in != n_out else None

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (x if self.skip is None else self.skip(x)))


def _resnet(rngs):
    blocks = ResidualBlock(1, 3, (1, 1), rngs=rngs), ResidualBlock(3, 3, (1, 1), rngs=rngs)
    pool = lambda x: x.mean(axis=(-3, -2))  # noqa: E731
    return nnx.Sequential(*blocks, pool, nnx.Linear(3, 3, rngs=rngs))


@case("nnx", "resnet", scopes=3, cuts=4)
def resnet_inference(_: Any) -> Parts:
    def make(rngs):
        model = _resnet(rngs)
        model.eval()
        return model

    return parts_of(make, floats(3, 5, 5, 1), loss=cross_entropy, closed_over=True)


@case("nnx", "resnet", scopes=3, cuts=4, flags="coupled-batch")
def resnet_train(_: Any) -> Parts:
    """Every call writes new running averages into the module; the merged copy keeps them apart."""
    parts = parts_of(_resnet, floats(3, 5, 5, 1), loss=cross_entropy)
    return Parts(
        parts.apply, parts.params, parts.xs, x=parts.xs, apply_batch=parts.apply, loss=cross_entropy
    )


class Block(nnx.Module):
    """A Pre-LN block with causal attention; the softmax is in float32 whatever the inputs are."""

    def __init__(self, width=8, *, dtype=None, dropout=0.0, rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.norm1 = nnx.LayerNorm(width, **options)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, **options)
        self.norm2 = nnx.LayerNorm(width, **options)
        self.up = nnx.Linear(width, 12, **options)
        self.down = nnx.Linear(12, width, **options)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:-1]))
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norm2(x)))))


class LanguageModel(nnx.Module):
    def __init__(self, *, layers=2, tied=False, block=Block, rngs):
        self.embed = nnx.Embed(7, 8, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (5, 8)))
        self.blocks = nnx.List([block(rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.head = None if tied else nnx.Linear(8, 7, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.embed.attend(x) if self.head is None else self.head(x)


@case("nnx", "transformer", scopes=4, cuts=6, flags="integer-input float32-inside")
def transformer(_: Any) -> Parts:
    return parts_of(lambda rngs: LanguageModel(rngs=rngs), tokens(3, 5), loss=cross_entropy)


@case("nnx", "transformer", scopes=3, cuts=5, flags="integer-input float32-inside")
def transformer_tied(_: Any) -> Parts:
    make = lambda rngs: LanguageModel(tied=True, rngs=rngs)  # noqa: E731
    return parts_of(make, tokens(3, 5), loss=cross_entropy, closed_over=True)


@case("nnx", "transformer", scopes=2, cuts=2, flags="low-precision")
def transformer_blocks_bfloat16(_: Any) -> Parts:
    def make(rngs):
        return nnx.Sequential(*(Block(dtype=jnp.bfloat16, rngs=rngs) for _ in range(2)))

    return parts_of(make, floats(3, 4, 8))


@case("nnx", "dropout", scopes=2, cuts=2, flags="float32-inside")
def dropout_fixed_key(_: Any) -> Parts:
    """The key is in the state: each merged copy draws the same mask, and forgets that it drew."""

    def make(rngs):
        return nnx.Sequential(*(Block(dropout=0.3, rngs=rngs) for _ in range(2)))

    graph, state = nnx.split(made(make))

    def apply(state: Any, x: jax.Array) -> jax.Array:
        return merged(graph, state)(x)

    return Parts(apply, state, floats(3, 4, 8), loss=mse)


class RematBlock(Block):
    @nnx.remat
    def __call__(self, x):
        return super().__call__(x)


@case("nnx", "remat", scopes=2, cuts=2, flags="remat float32-inside")
def remat_blocks(_: Any) -> Parts:
    make = lambda rngs: nnx.Sequential(*(RematBlock(rngs=rngs) for _ in range(2)))  # noqa: E731
    return parts_of(make, floats(3, 4, 8))


class Stacked(nnx.Module):
    """Blocks made by `nnx.vmap` and run by `nnx.scan`, as flax's guide on transforms has it."""

    def __init__(self, block, *, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs):
            return block(rngs=rngs)

        self.blocks = create(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, block):
            return block(x)

        return forward(x, self.blocks)


@case("nnx", "scan", scopes=3, cuts=3, flags="scan float32-inside", iterations=3)
def scan_blocks(_: Any) -> Parts:
    return parts_of(lambda rngs: Stacked(Block, rngs=rngs), floats(3, 4, 8))


@case("nnx", "scan", scopes=3, cuts=3, flags="scan remat float32-inside", iterations=3)
def scan_blocks_remat(_: Any) -> Parts:
    return parts_of(lambda rngs: Stacked(RematBlock, rngs=rngs), floats(3, 4, 8))


@case("nnx", "scan", scopes=3, cuts=3, flags="scan float32-inside", iterations=3)
def scan_stacked_state(_: Any) -> Parts:
    """The stacked state split off once and given to `jax.lax.scan`, a layer's slice at a time."""
    graph, state = nnx.split(made(lambda rngs: Stacked(Block, rngs=rngs).blocks, stacked=1))

    def apply(state: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, s: (merged(graph, s)(h), None), x, state)[0]

    return Parts(apply, state, floats(3, 4, 8), apply_batch=apply, loss=mse)


def _recurrent(cell: Any, dtype: Any, carry: Any = None) -> Parts:
    """`nnx.RNN` over 5 steps: a function of the inputs, or of the initial carry if one is given."""
    make = lambda rngs: nnx.RNN(cell(3, 6, param_dtype=dtype, rngs=rngs), rngs=rngs)  # noqa: E731
    graph, state = nnx.split(made(make))
    inputs = floats(5, 3)

    def from_inputs(state: Any, xs: jax.Array) -> jax.Array:
        return merged(graph, state)(xs)

    def from_carry(state: Any, carry: Any) -> Any:
        x = jnp.asarray(inputs, jax.tree.leaves(carry)[0].dtype)
        return merged(graph, state)(x, initial_carry=carry, return_carry=True)[0]

    if carry is None:
        return Parts(from_inputs, state, floats(3, 5, 3), apply_batch=from_inputs, loss=mse)
    return Parts(from_carry, state, carry, loss=mse)


@case("nnx", "lstm", scopes=1, cuts=1, flags="scan few-cuts")
def lstm_inputs(dtype: Any) -> Parts:
    return _recurrent(nnx.LSTMCell, dtype)


@case(
    "nnx",
    "lstm",
    scopes=5,
    cuts=5,
    flags="scan time tuple-state pytree-input pytree-output",
    iterations=5,
)
def lstm_state(dtype: Any) -> Parts:
    return _recurrent(nnx.OptimizedLSTMCell, dtype, (floats(3, 6, seed=1), floats(3, 6, seed=2)))


@case("nnx", "gru", scopes=5, cuts=5, flags="scan time", iterations=5)
def gru_h0(dtype: Any) -> Parts:
    return _recurrent(nnx.GRUCell, dtype, floats(3, 6, seed=1))


class Mixture(nnx.Module):
    """Top-1 routing between experts in a list; `jax.lax.switch` runs one of them."""

    def __init__(self, *, rngs):
        self.router = nnx.Linear(5, 3, rngs=rngs)
        self.experts = nnx.List([MLP((5, 8, 5), nnx.relu, rngs=rngs) for _ in range(3)])
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        gates = nnx.softmax(self.router(x))
        winner = jnp.argmax(gates)
        y = jax.lax.switch(winner, [lambda x, e=e: e(x) for e in self.experts], x)
        return self.head(x + gates[winner] * y)


@case("nnx", "moe", scopes=2, cuts=2)
def moe_switch(_: Any) -> Parts:
    graph, state = nnx.split(made(lambda rngs: Mixture(rngs=rngs)))
    return Parts(lambda s, x: merged(graph, s)(x), state, floats(3, 5), loss=mse)


CASES = table(globals())
