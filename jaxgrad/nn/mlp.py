"""A deep multilayer perceptron: embed, equal blocks, readout."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.nn.activations import activation
from jaxgrad.nn.dense import compute_dtype, linear, stack, through, weights_init
from jaxgrad.nn.normalization import norm_of
from jaxgrad.nn.residual_rules import Site, branch_gains, residual, residual_init, rule_of


@dataclass(frozen=True)
class Config:
    """A perceptron.

    Without a residual rule ("none") a block is `phi(N(W h + b))`, and so is the embedding. With
    one, the branch is `W2 phi(W1 h + b1) + b2`, the rule places the norms, and the embedding is
    linear.

    Attributes:
        n_in: features of an input.
        n_out: of an output.
        width: of the stream.
        depth: number of blocks.
        activation: a name in `ACTIVATIONS`.
        initializer: a name in `INITIALIZERS`, of all kernels.
        gain: factor of the blocks' kernels.
        norm: a name in `NORMS`.
        residual: a name in `RULES`.
        scan: whether the blocks are scanned (one compilation) or unrolled.
        remat: whether the backward pass recomputes the blocks.
        dtype: of the computation; None is the parameters'. Outputs are float32 at least.
    """

    n_in: int
    n_out: int
    width: int = 64
    depth: int = 8
    activation: str = "relu"
    initializer: str = "he_normal"
    gain: float = 1.0
    norm: str = "none"
    residual: str = "none"
    scan: bool = False
    remat: bool = False
    dtype: str | None = None


def _site(config: Config) -> Site:
    return Site(max(config.depth, 1), norm_of(config.norm))


def init(key: Array, config: Config) -> dict[str, Any]:
    """Parameters, float32.

    Args:
        key: PRNG key.
        config: the model. `scan` stacks the same draws.

    Returns:
        {"embed", "blocks": a tuple of trees or a stacked tree, "readout"} and, where the stream
        needs one, "norm".
    """
    keys = jax.random.split(key, config.depth + 2)
    rule, norm = rule_of(config.residual), norm_of(config.norm)
    blocks = tuple(_init_block(k, config) for k in keys[2:])
    params = {
        "embed": weights_init(keys[0], (config.n_in, config.width), config.initializer),
        "blocks": stack(blocks) if config.scan and blocks else blocks,
        "readout": weights_init(keys[1], (config.width, config.n_out), config.initializer),
    }
    if config.residual == "none":
        params["embed"]["norm"] = norm.init(config.width)
    elif not rule.normalized:
        params["norm"] = norm.init(config.width)
    return params


def _init_block(key: Array, config: Config) -> dict[str, Any]:
    shape, rule = (config.width, config.width), config.initializer
    if config.residual == "none":
        layer = weights_init(key, shape, rule, config.gain)
        return {**layer, "norm": norm_of(config.norm).init(config.width)}
    inner, last = branch_gains(config.residual, _site(config))
    first, second = jax.random.split(key)
    return {
        "inner": weights_init(first, shape, rule, config.gain * inner),
        "outer": weights_init(second, shape, rule, config.gain * last),
        "residual": residual_init(config.residual, config.width, _site(config)),
    }


def _activated(params: PyTree, h: Array, config: Config) -> Array:
    normalized = norm_of(config.norm).apply(params["norm"], linear(params, h))
    return activation(config.activation)(normalized)


def block(params: PyTree, h: Float[Array, "... n"], config: Config) -> Float[Array, "... n"]:
    """One block of the stream.

    Args:
        params: one of `init`'s blocks.
        h: the stream.
        config: the model.
    """
    if config.residual == "none":
        return _activated(params, h, config)
    phi = activation(config.activation)

    def branch(x: Array) -> Array:
        return linear(params["outer"], phi(linear(params["inner"], x)))

    return residual(config.residual, branch, params["residual"], h, _site(config))


def apply(params: PyTree, x: Float[Array, "... n_in"], config: Config) -> Float[Array, "... n_out"]:
    """The perceptron's outputs.

    Args:
        params: of `init`.
        x: inputs.
        config: the model.

    Returns:
        Outputs, float32 at least.
    """
    h = jnp.asarray(x, compute_dtype(params, config.dtype))
    with jax.named_scope("embed"):
        plain = config.residual != "none"
        h = linear(params["embed"], h) if plain else _activated(params["embed"], h, config)
    h, _ = through(lambda p, h: (block(p, h, config), None), params["blocks"], h, config.remat)
    with jax.named_scope("readout"):
        if "norm" in params:
            h = norm_of(config.norm).apply(params["norm"], h)
        y = linear(params["readout"], h)
        return y.astype(jnp.promote_types(y.dtype, jnp.float32))
