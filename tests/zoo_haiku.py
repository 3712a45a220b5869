"""Models in haiku: functions made pure by `hk.transform`, parameters in a dict by module path."""

from collections.abc import Callable
from functools import partial
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from zoo_base import Parts, case, cross_entropy, fill, floats, mse, table, tokens

KEY = 0


def parts_of(
    forward: Callable, xs: Any, *, loss: Any = mse, batched: bool = False, key: Any = None
) -> Parts:
    """`hk.transform`; `batched`: forward wants a batch, an example goes in as a batch of one."""
    model = hk.transform(forward)
    one = jax.tree.map(lambda a: a[:1] if batched else a[0], xs)
    params = fill(jax.eval_shape(model.init, jax.random.PRNGKey(KEY), one))

    def apply(params: Any, x: Any) -> Any:
        return model.apply(params, key, x)

    if not batched:
        return Parts(apply, params, xs, loss=loss)
    single = lambda params, x: apply(params, x[None])[0]  # noqa: E731
    return Parts(single, params, xs, apply_batch=apply, loss=loss)


@case("haiku", "mlp", scopes=3, cuts=8, names=("linear_0", "linear_1", "linear_2"))
def mlp(_: Any) -> Parts:
    def forward(x):
        return hk.nets.MLP([6, 6, 4])(x)

    return parts_of(forward, floats(3, 5))


@case("haiku", "mlp", scopes=2, cuts=5, names=("linear", "linear_1"))
def mlp_sequential(_: Any) -> Parts:
    """`linear` and `linear_1`: haiku numbers from the second on."""

    def forward(x):
        return hk.Sequential([hk.Linear(6), jnp.tanh, hk.Linear(3)])(x)

    return parts_of(forward, floats(3, 5))


@case("haiku", "cnn", scopes=3, cuts=6, names=("conv2_d", "conv2_d_1", "linear"))
def cnn(_: Any) -> Parts:
    def forward(x):
        x = jax.nn.relu(hk.Conv2D(3, 3)(x))
        x = hk.MaxPool(window_shape=(2, 2, 1), strides=(2, 2, 1), padding="VALID")(x)
        x = jax.nn.relu(hk.Conv2D(4, 3)(x))
        x = hk.AvgPool(window_shape=(2, 2, 1), strides=(2, 2, 1), padding="VALID")(x)
        return hk.Linear(3)(hk.Flatten()(x))

    return parts_of(forward, floats(3, 8, 8, 1), loss=cross_entropy, batched=True)


class ResidualBlock(hk.Module):
    def __init__(self, channels, stride, name=None):
        super().__init__(name)
        self.channels, self.stride = channels, stride

    def __call__(self, x, is_training):
        norm = partial(hk.BatchNorm, create_scale=True, create_offset=True, decay_rate=0.9)
        y = hk.Conv2D(self.channels, 3, self.stride, with_bias=False, name="conv_0")(x)
        y = jax.nn.relu(norm(name="norm_0")(y, is_training))
        y = hk.Conv2D(self.channels, 3, with_bias=False, name="conv_1")(y)
        y = norm(name="norm_1")(y, is_training)
        if x.shape != y.shape:
            x = hk.Conv2D(self.channels, 1, self.stride, with_bias=False, name="shortcut")(x)
        return jax.nn.relu(x + y)


def _resnet(*, is_training: bool) -> Parts:
    """`hk.transform_with_state`: the state holds BatchNorm's averages; the new state is dropped."""

    def forward(x, is_training):
        x = ResidualBlock(3, 1, "block_0")(x, is_training)
        x = ResidualBlock(4, 2, "block_1")(x, is_training)
        return hk.Linear(3, name="head")(x.mean(axis=(1, 2)))

    model, xs = hk.transform_with_state(forward), floats(3, 4, 4, 1)
    shapes = jax.eval_shape(partial(model.init, is_training=True), jax.random.PRNGKey(KEY), xs)
    variables = dict(zip(("params", "state"), fill(shapes), strict=True))

    def apply(v: Any, xs: jax.Array) -> jax.Array:
        return model.apply(v["params"], v["state"], None, xs, is_training)[0]

    if is_training:
        return Parts(apply, variables, xs, x=xs, apply_batch=apply, loss=cross_entropy)
    single = lambda v, x: apply(v, x[None])[0]  # noqa: E731
    return Parts(single, variables, xs, apply_batch=apply, loss=cross_entropy)


RESNET_NAMES = ("block_0", "block_1", "head")


@case("haiku", "resnet", scopes=3, cuts=4, names=RESNET_NAMES)
def resnet_inference(_: Any) -> Parts:
    return _resnet(is_training=False)


@case("haiku", "resnet", scopes=3, cuts=4, names=RESNET_NAMES, flags="coupled-batch")
def resnet_train(_: Any) -> Parts:
    return _resnet(is_training=True)


def layer_norm(x):
    return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)


class Block(hk.Module):
    """A Pre-LN or Post-LN block, as in haiku's transformer example."""

    def __init__(self, *, pre_ln=True, dropout=0.0, name=None):
        super().__init__(name)
        self.pre_ln, self.dropout = pre_ln, dropout

    def attend(self, x):
        causal = np.tril(np.ones((1, x.shape[-2], x.shape[-2])))
        w_init = hk.initializers.VarianceScaling()
        return hk.MultiHeadAttention(2, 4, model_size=8, w_init=w_init)(x, x, x, mask=causal)

    def feed_forward(self, x):
        x = hk.Linear(8)(jax.nn.gelu(hk.Linear(12)(x)))
        return hk.dropout(hk.next_rng_key(), self.dropout, x) if self.dropout else x

    def __call__(self, x):
        for branch in (self.attend, self.feed_forward):
            x = x + branch(layer_norm(x)) if self.pre_ln else layer_norm(x + branch(x))
        return x


def _language_model(ids, *, block=Block, layers=2):
    positions = hk.get_parameter("positions", [5, 8], init=hk.initializers.TruncatedNormal(0.02))
    x = hk.Embed(7, 8, name="embed")(ids) + positions
    for k in range(layers):
        x = block(name=f"block_{k}")(x)
    return hk.Linear(7, name="head")(layer_norm(x))


BLOCKS = ("block_0", "block_1")


@case("haiku", "transformer", scopes=4, cuts=6, names=(*BLOCKS, "head"), flags="integer-input")
def transformer_pre_ln(_: Any) -> Parts:
    return parts_of(_language_model, tokens(3, 5), loss=cross_entropy)


@case("haiku", "transformer", scopes=4, cuts=6, names=(*BLOCKS, "head"), flags="integer-input")
def transformer_post_ln(_: Any) -> Parts:
    model = partial(_language_model, block=partial(Block, pre_ln=False))
    return parts_of(model, tokens(3, 5), loss=cross_entropy)


@case("haiku", "dropout", scopes=2, cuts=2, names=BLOCKS)
def dropout_fixed_key(_: Any) -> Parts:
    def forward(x):
        for k in range(2):
            x = Block(dropout=0.3, name=f"block_{k}")(x)
        return x

    return parts_of(forward, floats(3, 4, 8), key=jax.random.PRNGKey(3))


@case("haiku", "remat", scopes=2, cuts=2, names=BLOCKS, flags="remat")
def remat_blocks(_: Any) -> Parts:
    def forward(x):
        for k in range(2):
            x = hk.remat(Block(name=f"block_{k}"))(x)
        return x

    return parts_of(forward, floats(3, 4, 8))


def _stacked(*, remat: bool) -> Parts:
    """`hk.layer_stack`: one module applied three times, by a scan over stacked parameters."""

    def forward(x):
        block = Block(name="block")
        return hk.layer_stack(3)(hk.remat(block) if remat else block)(x)

    return parts_of(forward, floats(3, 4, 8))


@case("haiku", "scan", scopes=3, cuts=3, names=("block",), flags="scan", iterations=3)
def layer_stack(_: Any) -> Parts:
    return _stacked(remat=False)


@case("haiku", "scan", scopes=3, cuts=3, names=("block",), flags="scan remat", iterations=3)
def layer_stack_remat(_: Any) -> Parts:
    return _stacked(remat=True)


def _recurrent(core: Callable, state: Any = None) -> Parts:
    """`hk.dynamic_unroll` over 5 steps: of the inputs, or of the initial state if one is given."""
    inputs = floats(5, 3)

    def from_inputs(xs):
        rnn = core()
        y, _ = hk.dynamic_unroll(
            rnn, xs, jax.tree.map(lambda a: a.astype(xs.dtype), rnn.initial_state(None))
        )
        return hk.Linear(2, name="head")(y[-1])

    def from_state(state):
        x = jnp.asarray(inputs, jax.tree.leaves(state)[0].dtype)
        _, last = hk.dynamic_unroll(core(), x, state)
        return last

    return parts_of(from_inputs, floats(3, 5, 3)) if state is None else parts_of(from_state, state)


@case("haiku", "lstm", scopes=2, cuts=2, names=("head",), flags="scan few-cuts")
def lstm_inputs(_: Any) -> Parts:
    return _recurrent(lambda: hk.LSTM(6))


@case(
    "haiku",
    "lstm",
    scopes=5,
    cuts=5,
    flags="scan time tuple-state pytree-input pytree-output",
    iterations=5,
)
def lstm_state(_: Any) -> Parts:
    return _recurrent(lambda: hk.LSTM(6), hk.LSTMState(floats(3, 6, seed=1), floats(3, 6, seed=2)))


@case("haiku", "gru", scopes=5, cuts=5, flags="scan time", iterations=5)
def gru_h0(_: Any) -> Parts:
    return _recurrent(lambda: hk.GRU(6), floats(3, 6, seed=1))


@case("haiku", "rnn", scopes=5, cuts=5, flags="scan time", iterations=5)
def rnn_h0(_: Any) -> Parts:
    return _recurrent(lambda: hk.VanillaRNN(6), floats(3, 6, seed=1))


@case("haiku", "moe", scopes=2, cuts=2, names=("inp", "head"))
def moe_cond(_: Any) -> Parts:
    """`hk.cond` between two experts, made outside of it so that both have parameters."""

    def forward(x):
        x = jnp.tanh(hk.Linear(4, name="inp")(x))
        small, large = hk.nets.MLP([4], name="small"), hk.nets.MLP([8, 4], name="large")
        if hk.running_init():
            small(x), large(x)
        return hk.Linear(3, name="head")(hk.cond(x.sum() > 0, small, large, x))

    return parts_of(forward, floats(3, 5))


CASES = table(globals())
