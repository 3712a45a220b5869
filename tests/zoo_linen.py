"""Models in flax linen, as its users write them: `nn.compact`, `model.init`, `model.apply`."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from zoo_base import Parts, case, cross_entropy, fill, floats, mse, table

KEY = 0


def parts_of(model: nn.Module, xs: Any, *, loss: Any = mse, **kwargs: Any) -> Parts:
    """The module takes a batch or one example alike; `kwargs` go to every call but `init`'s."""
    keys = {"params": jax.random.key(KEY), "dropout": jax.random.key(KEY)}
    init = partial(model.init, **{k: v for k, v in kwargs.items() if k != "rngs"})
    shapes = jax.eval_shape(init, keys, jax.tree.map(lambda a: a[0], xs))
    apply = partial(model.apply, **kwargs)
    return Parts(apply, fill(shapes), xs, apply_batch=apply, loss=loss)


class MLP(nn.Module):
    widths: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array] = nn.sigmoid

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


@case("linen", "mlp", scopes=3, cuts=8, names=("Dense_0", "Dense_1", "Dense_2"))
def mlp_sigmoid(_: Any) -> Parts:
    return parts_of(MLP((6, 6, 4)), floats(3, 5))


@case("linen", "mlp", scopes=3, cuts=8, names=("layers_0", "layers_4"))
def mlp_relu_sequential(_: Any) -> Parts:
    """`nn.Sequential` numbers every entry: layers_0, layers_2, layers_4 have parameters."""
    model = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(6), nn.relu, nn.Dense(3)])
    return parts_of(model, floats(3, 5))


class Autoencoder(nn.Module):
    """With `setup`, and methods that call submodules."""

    def setup(self):
        self.encoder = MLP((6, 2), nn.tanh)
        self.decoder = MLP((6, 5), nn.tanh)

    def encode(self, x):
        return self.encoder(x)

    def __call__(self, x):
        return self.decoder(self.encode(x))


@case("linen", "autoencoder", scopes=2, cuts=10, names=("encoder", "decoder"))
def autoencoder_setup(_: Any) -> Parts:
    return parts_of(Autoencoder(), floats(3, 5))


class CNN(nn.Module):
    """The CNN of flax's MNIST example, small."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape((*x.shape[:-3], -1))
        return nn.Dense(3)(x)


@case("linen", "cnn", scopes=3, cuts=8, names=("Conv_0", "Conv_1", "Dense_0"))
def cnn(_: Any) -> Parts:
    return parts_of(CNN(), floats(3, 8, 8, 1), loss=cross_entropy)


class ResidualBlock(nn.Module):
    """As in flax's ImageNet example."""

    features: int
    strides: tuple[int, int]
    train: bool

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=not self.train, momentum=0.9)
        y = nn.relu(norm()(nn.Conv(self.features, (3, 3), self.strides, use_bias=False)(x)))
        y = norm()(nn.Conv(self.features, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), self.strides, use_bias=False, name="conv_proj")(x)
            x = norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(3, (3, 3), use_bias=False, name="conv_init")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn_init")(x))
        x = ResidualBlock(3, (1, 1), train)(x)
        x = ResidualBlock(4, (2, 2), train)(x)
        return nn.Dense(3)(jnp.mean(x, axis=(-3, -2)))


RESNET_NAMES = ("conv_init", "ResidualBlock_0", "ResidualBlock_1", "Dense_0")


@case("linen", "resnet", scopes=4, cuts=6, names=RESNET_NAMES)
def resnet_inference(_: Any) -> Parts:
    return parts_of(ResNet(), floats(3, 6, 6, 1), loss=cross_entropy, train=False)


@case("linen", "resnet", scopes=4, cuts=5, names=RESNET_NAMES, flags="coupled-batch")
def resnet_train(_: Any) -> Parts:
    """BatchNorm over the batch; the new running averages are an output that is dropped here."""
    model, xs = ResNet(), floats(3, 6, 6, 1)
    variables = fill(jax.eval_shape(partial(model.init, train=True), jax.random.key(KEY), xs))

    def apply(variables: Any, xs: jax.Array) -> jax.Array:
        logits, _ = model.apply(variables, xs, train=True, mutable=["batch_stats"])
        return logits

    return Parts(apply, variables, xs, x=xs, apply_batch=apply, loss=cross_entropy)


class UNet(nn.Module):
    """One-dimensional, with two long skips."""

    @nn.compact
    def __call__(self, x):
        skips = []
        for width in (4, 6):
            x = nn.swish(nn.Conv(width, (3,))(x))
            skips.append(x)
            x = nn.avg_pool(x, (2,), strides=(2,))
        x = nn.swish(nn.Conv(6, (3,))(x))
        for width, skip in zip((6, 4), reversed(skips), strict=True):
            x = jnp.concatenate([nn.ConvTranspose(width, (2,), strides=(2,))(x), skip], axis=-1)
            x = nn.swish(nn.GroupNorm(2)(nn.Conv(width, (3,))(x)))
        return nn.Conv(2, (1,), name="head")(x)


@case("linen", "unet", scopes=2, cuts=3, names=("head",), flags="few-cuts")
def unet(_: Any) -> Parts:
    """GroupNorm takes the first axis for the batch's: one example goes in as a batch of one."""
    parts = parts_of(UNet(), floats(3, 8, 2))

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return UNet().apply(params, x[None])[0]

    return dataclasses.replace(parts, apply=apply)


class SoftMixture(nn.Module):
    """Experts by `nn.vmap`, each with its own parameters; a top-1 gate."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(6, name="inp")(x))
        gates = nn.softmax(nn.Dense(3, name="router")(x))
        mask = jax.nn.one_hot(jnp.argmax(gates, -1), 3, dtype=x.dtype)
        split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        experts = nn.vmap(MLP, in_axes=None, out_axes=-1, axis_size=3, **split)
        y = experts((8, 6), nn.relu, name="experts")(x)
        return nn.Dense(2, name="head")(x + jnp.einsum("...de,...e->...d", y, mask * gates))


@case("linen", "moe", scopes=3, cuts=4, names=("inp", "head"))
def moe_argmax(_: Any) -> Parts:
    return parts_of(SoftMixture(), floats(3, 5))


class Gated(nn.Module):
    """RMSNorm, GEGLU and weight normalization in a residual block."""

    @nn.compact
    def __call__(self, x):
        h = nn.RMSNorm()(x)
        h = nn.gelu(nn.Dense(8, name="gate")(h)) * nn.Dense(8, name="up")(h)
        return x + nn.WeightNorm(nn.Dense(x.shape[-1], name="down"))(h)


@case("linen", "glu", scopes=2, cuts=2, names=("layers_0", "layers_1"))
def glu_rms_norm_weight_norm(_: Any) -> Parts:
    return parts_of(nn.Sequential([Gated(), Gated()]), floats(3, 6))


@case("linen", "mlp", scopes=3, cuts=8, names=("Dense_0",))
def bound_module(_: Any) -> Parts:
    """`model.bind`: f is a module that holds its variables, and such a module cannot be hashed."""
    parts = parts_of(MLP((6, 6, 4), nn.tanh), floats(3, 5))
    return Parts(parts.apply, parts.params, parts.xs, loss=mse, close=MLP((6, 6, 4), nn.tanh).bind)


CASES = table(globals())
