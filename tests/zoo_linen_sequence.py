"""Transformers, scans and recurrent networks in flax linen."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from zoo_base import Parts, case, cross_entropy, fill, floats, mse, table, tokens
from zoo_linen import KEY, parts_of


class Block(nn.Module):
    """A transformer block, Pre-LN or Post-LN, as flax's examples write it."""

    pre_ln: bool = True
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        make_norm = partial(nn.LayerNorm, dtype=self.dtype)

        def attend(y):
            mask = nn.make_causal_mask(jnp.ones(y.shape[:-1]), dtype=bool)
            return nn.MultiHeadDotProductAttention(2, dtype=self.dtype)(y, mask=mask)

        def feed_forward(y):
            y = nn.gelu(nn.Dense(12, dtype=self.dtype)(y))
            y = nn.Dense(x.shape[-1], dtype=self.dtype)(y)
            return nn.Dropout(self.dropout, deterministic=self.dropout == 0)(y)

        for branch in (attend, feed_forward):
            x = x + branch(make_norm()(x)) if self.pre_ln else make_norm()(x + branch(x))
        return x


class LanguageModel(nn.Module):
    """Token ids to logits; learned positions; the output layer may be the embedding."""

    layers: int = 2
    pre_ln: bool = True
    tied: bool = False
    dropout: float = 0.0
    dtype: Any = None
    block: Any = Block

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 8, dtype=self.dtype)
        positions = self.param("positions", nn.initializers.normal(0.02), (ids.shape[-1], 8))
        x = embed(ids) + positions.astype(self.dtype or positions.dtype)
        for k in range(self.layers):
            x = self.block(self.pre_ln, self.dropout, self.dtype, name=f"block{k}")(x)
        x = nn.LayerNorm(dtype=self.dtype, name="final_norm")(x)
        return embed.attend(x) if self.tied else nn.Dense(7, dtype=self.dtype, name="head")(x)


BLOCKS = ("block0", "block1")


@case("linen", "transformer", scopes=4, cuts=6, names=(*BLOCKS, "head"), flags="integer-input")
def transformer_pre_ln(_: Any) -> Parts:
    return parts_of(LanguageModel(), tokens(3, 5), loss=cross_entropy)


@case("linen", "transformer", scopes=4, cuts=6, names=(*BLOCKS, "head"), flags="integer-input")
def transformer_post_ln(_: Any) -> Parts:
    return parts_of(LanguageModel(pre_ln=False), tokens(3, 5), loss=cross_entropy)


@case("linen", "transformer", scopes=3, cuts=5, names=BLOCKS, flags="integer-input")
def transformer_tied(_: Any) -> Parts:
    return parts_of(LanguageModel(tied=True), tokens(3, 5), loss=cross_entropy)


@case("linen", "remat", scopes=4, cuts=6, names=(*BLOCKS, "head"), flags="integer-input remat")
def transformer_remat(_: Any) -> Parts:
    return parts_of(LanguageModel(block=nn.remat(Block)), tokens(3, 5), loss=cross_entropy)


@case("linen", "transformer", scopes=4, cuts=6, names=BLOCKS, flags="integer-input")
def transformer_dropout(_: Any) -> Parts:
    """Dropout with a fixed key; the mask is another for every example of a batch."""
    rngs = {"dropout": jax.random.key(3)}
    return parts_of(LanguageModel(dropout=0.3), tokens(3, 5), loss=cross_entropy, rngs=rngs)


@case("linen", "transformer", scopes=4, cuts=6, names=BLOCKS, flags="integer-input low-precision")
def transformer_bfloat16(_: Any) -> Parts:
    """Computes in bfloat16 from float32 parameters."""
    return parts_of(LanguageModel(dtype=jnp.bfloat16), tokens(3, 5), loss=cross_entropy)


@case("linen", "transformer", scopes=2, cuts=2, names=("layers_0", "layers_1"))
def transformer_blocks(_: Any) -> Parts:
    """Two blocks and nothing else, floats to floats; Sequential names them."""
    model = nn.Sequential([Block(), Block()])
    return parts_of(model, floats(3, 4, 8))


class ScannedBlocks(nn.Module):
    """Blocks by `nn.scan`, parameters stacked on axis 0, as flax's guide on it has it."""

    layers: int = 3
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block

        def body(module, carry):
            return module(carry), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = scan(block(name="blocks"), x)
        return nn.Dense(3, name="head")(x)


@case(
    "linen",
    "scan",
    scopes=4,
    cuts=5,
    names=("blocks", "head"),
    flags="scan",
    iterations=3,
)
def scan_blocks(_: Any) -> Parts:
    return parts_of(ScannedBlocks(), floats(3, 4, 8))


@case(
    "linen",
    "scan",
    scopes=4,
    cuts=5,
    names=("blocks", "head"),
    flags="scan remat",
    iterations=3,
)
def scan_blocks_remat(_: Any) -> Parts:
    return parts_of(ScannedBlocks(remat=True), floats(3, 4, 8))


def _recurrent(cell: Any, dtype: Any, *, carry: Any, follow_state: bool) -> Parts:
    """`nn.RNN` over 5 steps: as a function of the inputs, or of the initial carry."""
    rnn = nn.RNN(cell(6, param_dtype=dtype), return_carry=True)
    inputs = floats(5, 3)
    params = fill(jax.eval_shape(rnn.init, jax.random.key(KEY), inputs))

    def from_inputs(params: Any, xs: jax.Array) -> jax.Array:
        return rnn.apply(params, xs)[1]

    def from_carry(params: Any, carry: Any) -> Any:
        some = jax.tree.leaves(carry)[0]
        return rnn.apply(params, jnp.asarray(inputs, some.dtype), initial_carry=carry)[0]

    if follow_state:
        return Parts(from_carry, params, carry, loss=mse)
    return Parts(from_inputs, params, floats(3, 5, 3), apply_batch=from_inputs, loss=mse)


@case("linen", "lstm", scopes=1, cuts=1, flags="scan few-cuts")
def lstm_inputs(dtype: Any) -> Parts:
    return _recurrent(nn.OptimizedLSTMCell, dtype, carry=None, follow_state=False)


@case(
    "linen",
    "lstm",
    scopes=5,
    cuts=5,
    flags="scan time tuple-state pytree-input pytree-output",
    iterations=5,
)
def lstm_state(dtype: Any) -> Parts:
    state = (floats(3, 6, seed=1), floats(3, 6, seed=2))
    return _recurrent(nn.LSTMCell, dtype, carry=state, follow_state=True)


@case("linen", "gru", scopes=5, cuts=5, flags="scan time", iterations=5)
def gru_h0(dtype: Any) -> Parts:
    return _recurrent(nn.GRUCell, dtype, carry=floats(3, 6, seed=1), follow_state=True)


@case("linen", "rnn", scopes=5, cuts=5, flags="scan time", iterations=5)
def rnn_h0(dtype: Any) -> Parts:
    return _recurrent(nn.SimpleCell, dtype, carry=floats(3, 6, seed=1), follow_state=True)


CASES = table(globals())
