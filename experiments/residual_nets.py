"""The networks of the experiment on residual connections, and what is measured on them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.atlas import deep, frame, training
from experiments.atlas.measuring import log_gains
from jaxgrad import data, nn, optim, theory
from jaxgrad.nn import mlp, transformer
from jaxgrad.nn.normalization import norm_of

SKIPS = ("plain", "pre_ln", "post_ln")
STREAMS = ("none", *SKIPS)


@dataclass(frozen=True)
class Config:
    """One block of every rule, a deep transformer, random branches, and trained networks.

    Attributes:
        rules: residual rules whose Jacobian is taken apart.
        rule_width: of those blocks.
        tolerance: of |J - (J_F + I)| relative to |J|, in float32.
        depth: blocks of the transformer, and of the random branches.
        text_width: of the transformer's stream.
        length: characters it reads.
        seeds: transformers a rule.
        kept: blocks between two gradients that are kept.
        scales: root-mean-square gains s of a linear branch, the block being I + s A.
        width: of those blocks.
        branches: networks of them.
        trained_depth: blocks of the networks that are trained.
        trained_width: theirs.
        trained: networks of each.
        steps: of Adam.
        inputs: whose gradients are followed in the trained networks.
    """

    rules: tuple[str, ...] = (
        "plain", "pre_ln", "sandwich", "rezero", "layer_scale", "fixup", "post_ln", "deep_norm",
        "none",
    )  # fmt: skip
    rule_width: int = 16
    tolerance: float = 1e-5
    depth: int = 96
    text_width: int = 32
    length: int = 32
    seeds: int = 4
    kept: int = 4
    scales: tuple[float, ...] = (0.01, 0.1, 0.3, 1.0)
    width: int = 64
    branches: int = 32
    trained_depth: int = 10
    trained_width: int = 32
    trained: int = 4
    steps: int = 400
    inputs: int = 64


def depths_kept(config: Config) -> np.ndarray:
    """Blocks above which a gradient is kept, from the input (0) to the output (depth)."""
    return np.arange(0, config.depth + 1, config.kept)


# ----------------------------------------------------------------------------------- J = J_F + I

Branch = Callable[[jax.Array], jax.Array]


def _branch_of(rule: str, params: Any, branch: Branch, norm: Any) -> Branch:
    """F of `h + F(h)` by rule: all that the rule adds to the stream, or would without its norm."""
    inner = {
        "pre_ln": lambda h: branch(norm.apply(params["norm"], h)),
        "layer_scale": lambda h: params["alpha"] * branch(norm.apply(params["norm"], h)),
        "sandwich": lambda h: norm.apply(
            params["norm_out"], branch(norm.apply(params["norm"], h))
        ),
        "rezero": lambda h: params["alpha"] * branch(h),
        "fixup": lambda h: params["alpha"] * branch(h + params["bias_in"]) + params["bias_out"],
    }  # fmt: skip
    return inner.get(rule, branch)


def shift(config: Config) -> frame.Arrays:
    """|J - (J_F + I)| / |J| by rule, largest elements; scalars of a rule are set to one half."""
    n, norm = config.rule_width, norm_of("layer")

    def one(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 3)
        inner, outer = (nn.weights_init(k, (n, n), "xavier_normal") for k in keys[:2])
        h, errors = jax.random.normal(keys[2], (n,)), []

        def branch(x: jax.Array) -> jax.Array:
            return nn.linear(outer, jax.nn.gelu(nn.linear(inner, x)))

        for rule in config.rules:
            site = nn.Site(config.depth, norm)
            params = nn.residual_init(rule, n, site)
            if "alpha" in params:  # at zero J = I whatever F is
                params["alpha"] = 0.5 * jnp.ones_like(params["alpha"])
            whole = jax.jacrev(lambda h, r=rule, p=params, s=site: nn.residual(r, branch, p, h, s))
            parts = jax.jacrev(_branch_of(rule, params, branch, norm))(h) + jnp.eye(n)
            j = whole(h)
            errors.append(jnp.max(jnp.abs(j - parts)) / jnp.max(jnp.abs(j)))
        return jnp.stack(errors)

    return {"error": frame.over_seeds(one, config.seeds)}


# ----------------------------------------------------------------------------- the deep transformer


def stream(rule: str, config: Config) -> frame.Arrays:
    """Log of the gradient's norm at every kept depth relative to the output's, on English text."""
    ids, vocabulary = training.text()
    model = transformer.Config(
        vocabulary, width=config.text_width, depth=1, max_length=config.length, residual=rule,
        scan=True,
    )  # fmt: skip

    def init(key: jax.Array) -> Any:
        return transformer.init(key, model)

    # not jitted: 96 blocks are as many draws, compiled as one
    keys = jax.random.split(jax.random.key(3), (config.seeds, config.depth))
    drawn = jax.vmap(jax.vmap(init))(keys)
    blocks = jax.tree.map(lambda leaf: leaf[:, :, 0], drawn.pop("blocks"))
    ends = jax.tree.map(lambda leaf: leaf[:, 0], drawn)
    windows = data.text_windows(ids, keys[0, 1], batch_size=config.seeds, length=config.length)

    def one(ends: Any, blocks: Any, window: jax.Array) -> jax.Array:
        h = transformer.embed(ends, window[:-1], model)
        top, _ = jax.lax.scan(lambda h, p: (transformer.block(p, h, model), None), h, blocks)

        def loss(h: jax.Array) -> jax.Array:
            return training.cross_entropy(transformer.readout(ends, h, model), window[1:])

        gains = log_gains(
            lambda p, h: transformer.block(p, h, model), blocks, h, jax.grad(loss)(top)
        )
        below = jnp.cumsum(gains[::-1])[::-1]
        return jnp.append(below, 0.0)[depths_kept(config)]

    return {"log_gradient": frame.compiled(jax.vmap(one))(ends, blocks, windows)}


# ---------------------------------------------------------------------------------- random branches


def branches(config: Config) -> frame.Arrays:
    """By scale: share of blocks that shrink the gradient, and mean log gain; (seeds, scales)."""
    n = config.width
    keys = jax.random.split(jax.random.key(4))
    kernels = deep.draw("lecun_normal", keys[0], (n, n), config.branches, config.depth)["kernel"]
    h, g = jax.random.normal(keys[1], (2, config.branches, n))

    def one(kernels: jax.Array, h: jax.Array, g: jax.Array, s: jax.Array) -> dict[str, jax.Array]:
        gains = log_gains(lambda a, h: h + s * (h @ a), kernels, h, g)
        return {"shrinks": jnp.mean(gains < 0), "square": jnp.mean(jnp.exp(2 * gains))}

    over_scales = jax.vmap(one, in_axes=(None, None, None, 0))
    every = frame.compiled(jax.vmap(over_scales, in_axes=(0, 0, 0, None)))
    found = every(kernels, h, g, jnp.asarray(config.scales))
    law = theory.shrink_probability(n, jnp.asarray(config.scales))
    return {**found, "theory": np.asarray(law)}


# --------------------------------------------------------------------------------- trained networks


def _followed(params: Any, model: mlp.Config, x: jax.Array, loss: Any) -> jax.Array:
    """Log gains by block, (inputs, depth), of the gradient of each input's own loss."""

    def one(x: jax.Array, *rest: Any) -> jax.Array:
        h = nn.linear(params["embed"], x)

        def block(p: Any, h: jax.Array) -> jax.Array:
            return mlp.block(p, h, model)

        top, _ = jax.lax.scan(lambda h, p: (block(p, h), None), h, params["blocks"])

        def of_top(h: jax.Array) -> jax.Array:
            if "norm" in params:
                h = nn.layer_norm(params["norm"], h)
            return loss(nn.linear(params["readout"], h), *rest)

        return log_gains(block, params["blocks"], h, jax.grad(of_top)(top))

    return jax.vmap(one)(*x) if isinstance(x, tuple) else jax.vmap(one)(x)


def _tanh_blocks(key: jax.Array, config: Config) -> Any:
    """Blocks `h + W2 tanh(W1 h)`, the outer kernels small, with embed and readout the identity."""
    n, depth = config.trained_width, config.trained_depth
    keys = jax.random.split(key, 4)
    each = partial(nn.weights_init, shape=(n, n), rule="lecun_normal")
    return {
        "embed": {"kernel": jnp.eye(n), "bias": jnp.zeros(n)},
        "blocks": {
            "inner": jax.vmap(each)(jax.random.split(keys[0], depth)),
            "outer": jax.vmap(partial(each, gain=0.1))(jax.random.split(keys[1], depth)),
            "residual": {},
        },
        "readout": {"kernel": jnp.eye(n), "bias": jnp.zeros(n)},
    }


def fitted(config: Config) -> frame.Arrays:
    """A residual network that learned y = x / 10: its log gains by block, (seeds, depth)."""
    n = config.trained_width
    model = mlp.Config(n, n, n, config.trained_depth, "tanh", residual="plain", scan=True)

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 3)
        start = _tanh_blocks(keys[0], config)

        def output(blocks: Any, x: jax.Array) -> jax.Array:
            return mlp.apply({**start, "blocks": blocks}, x, model)

        def loss(blocks: Any, key: jax.Array) -> jax.Array:
            x = jax.random.normal(key, (64, n))
            return jnp.mean(jnp.square(output(blocks, x) - 0.1 * x))

        blocks, losses = training.train(
            loss, start["blocks"], optim.adam(0.003), keys[1], config.steps
        )
        x = jax.random.normal(keys[2], (config.inputs, n))
        # a random direction of the output: the network is to shrink all by ten
        direction = jax.random.normal(keys[2], (n,))
        gains = _followed({**start, "blocks": blocks}, model, x, lambda y: jnp.sum(y * direction))
        return {"log_gain": jnp.mean(gains, 0), "loss": losses[-1]}

    return frame.over_seeds(one, config.trained)


def digits(config: Config) -> frame.Arrays:
    """A Pre-LN network on the digits: share of blocks that shrink, before and after training."""
    n, (x, y) = config.trained_width, training.digits()
    model = mlp.Config(
        64, 10, n, config.trained_depth, "gelu", "xavier_normal", residual="pre_ln", norm="layer",
        scan=True,
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(5), config.trained)
    params = jax.vmap(lambda key: mlp.init(key, model))(keys)
    held_back = jax.tree.map(jnp.asarray, data.digits().test)
    some = held_back.x[: config.inputs], held_back.y[: config.inputs]

    def one(params: Any, key: jax.Array) -> dict[str, jax.Array]:
        def loss(params: Any, key: jax.Array) -> jax.Array:
            images, labels = training.draw(key, x, y, 64)
            return training.cross_entropy(mlp.apply(params, images, model), labels)

        def followed(params: Any) -> tuple[jax.Array, jax.Array]:
            gains = _followed(params, model, some, training.cross_entropy)
            return jnp.mean(gains < 0), jnp.mean(jnp.sum(gains, 1))

        after, _ = training.train(loss, params, optim.adam(0.003), key, config.steps)
        right = training.accuracy(mlp.apply(after, held_back.x, model), held_back.y)
        (share_0, gain_0), (share_1, gain_1) = followed(params), followed(after)
        return {
            "shrinks": jnp.stack([share_0, share_1]), "accuracy": right,
            "log_gain": jnp.stack([gain_0, gain_1]),
        }  # fmt: skip

    return frame.compiled(jax.vmap(one))(params, keys)


def points(config: Config) -> dict:
    return {
        "shift": partial(shift, config),
        **{f"stream-{r}": partial(stream, r, config) for r in STREAMS},
        "branches": partial(branches, config),
        "fitted": partial(fitted, config),
        "digits": partial(digits, config),
    }
