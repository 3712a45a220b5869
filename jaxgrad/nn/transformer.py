"""A transformer, encoder or causal: embed, blocks of attention and feed-forward, readout."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxgrad.nn.activations import activation
from jaxgrad.nn.dense import compute_dtype, linear, stack, through, weights_init
from jaxgrad.nn.normalization import norm_of
from jaxgrad.nn.residual_rules import Site, branch_gains, residual, residual_init, rule_of
from jaxgrad.nn.self_attention import Heads, attention, attention_init

_POSITIONS = ("learned", "rotary", "none")


@dataclass(frozen=True)
class Config:
    """A transformer. Each block has two residual branches, attention and feed-forward.

    Attributes:
        vocabulary: number of tokens.
        n_out: features of an output; None is the vocabulary.
        width: of the stream.
        depth: number of blocks.
        heads: of attention.
        hidden: units of the feed-forward; None is four times the width.
        max_length: longest sequence with learned positions.
        causal: decoder-only (a position sees the past) or encoder.
        positions: "learned", "rotary" or "none".
        qk_norm: whether queries and keys are normalized.
        pool: whether the readout takes the mean over positions (one output a sequence).
        activation: of the feed-forward, a name in `ACTIVATIONS`.
        initializer: a name in `INITIALIZERS`, of all projections; embeddings are N(0, 1 / width).
        norm: a name in `NORMS`.
        residual: a name in `RULES`.
        scan: whether the blocks are scanned or unrolled.
        remat: whether the backward pass recomputes the blocks.
        dtype: of the computation; None is the parameters'. Outputs are float32 at least.
    """

    vocabulary: int
    n_out: int | None = None
    width: int = 64
    depth: int = 4
    heads: int = 4
    hidden: int | None = None
    max_length: int = 128
    causal: bool = True
    positions: str = "learned"
    qk_norm: bool = False
    pool: bool = False
    activation: str = "gelu"
    initializer: str = "xavier_uniform"
    norm: str = "layer"
    residual: str = "pre_ln"
    scan: bool = False
    remat: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.positions not in _POSITIONS:
            raise ValueError(
                f"positions: expected one of {', '.join(_POSITIONS)}, got {self.positions!r}"
            )


def _site(config: Config) -> Site:
    return Site(max(2 * config.depth, 1), norm_of(config.norm))


def _heads(config: Config) -> Heads:
    return Heads(config.heads, config.causal, config.positions == "rotary", config.qk_norm)


def init(key: Array, config: Config) -> dict[str, Any]:
    """Parameters, float32.

    Args:
        key: PRNG key.
        config: the model. `scan` stacks the same draws.

    Returns:
        {"embed": {"tokens", "positions"}, "blocks", "readout"} and, where the stream leaves the
        blocks unnormalized, "norm".
    """
    keys = jax.random.split(key, config.depth + 3)
    scale = config.width**-0.5
    draw = partial(jax.random.normal, dtype=jnp.float32)
    embed = {"tokens": scale * draw(keys[0], (config.vocabulary, config.width))}
    if config.positions == "learned":
        embed["positions"] = scale * draw(keys[1], (config.max_length, config.width))
    blocks = tuple(_init_block(k, config) for k in keys[3:])
    n_out = config.vocabulary if config.n_out is None else config.n_out
    params = {
        "embed": embed,
        "blocks": stack(blocks) if config.scan and blocks else blocks,
        "readout": weights_init(keys[2], (config.width, n_out), config.initializer),
    }
    if not rule_of(config.residual).normalized:
        params["norm"] = norm_of(config.norm).init(config.width)
    return params


def _init_block(key: Array, config: Config) -> dict[str, Any]:
    site, width, rule = _site(config), config.width, config.initializer
    hidden = 4 * width if config.hidden is None else config.hidden
    gains = branch_gains(config.residual, site)
    for_attention, for_up, for_down = jax.random.split(key, 3)
    return {
        "attention": attention_init(for_attention, width, _heads(config), rule, gains),
        "up": weights_init(for_up, (width, hidden), rule, gains.inner),
        "down": weights_init(for_down, (hidden, width), rule, gains.last),
        "residual_attention": residual_init(config.residual, width, site),
        "residual_mlp": residual_init(config.residual, width, site),
    }


def block(
    params: PyTree, h: Float[Array, "*batch time n"], config: Config
) -> Float[Array, "*batch time n"]:
    """One block of the stream: attention, then feed-forward, each joined by the residual rule.

    Args:
        params: one of `init`'s blocks.
        h: the stream.
        config: the model.
    """
    site, phi = _site(config), activation(config.activation)

    def mix(x: Array) -> Array:
        with jax.named_scope("attention"):
            return attention(params["attention"], x, _heads(config))

    def feed_forward(x: Array) -> Array:
        with jax.named_scope("mlp"):
            return linear(params["down"], phi(linear(params["up"], x)))

    h = residual(config.residual, mix, params["residual_attention"], h, site)
    return residual(config.residual, feed_forward, params["residual_mlp"], h, site)


def embed(
    params: PyTree, tokens: Int[Array, "*batch time"], config: Config
) -> Float[Array, "*batch time n"]:
    """The stream before the first block.

    Args:
        params: of `init`.
        tokens: numbers below the vocabulary.
        config: the model.

    Raises:
        ValueError: for sequences longer than the learned positions.
    """
    table = params["embed"]
    h = table["tokens"][tokens]
    if "positions" in table:
        time = tokens.shape[-1]
        if time > len(table["positions"]):
            raise ValueError(
                f"tokens: {time} positions, but only {len(table['positions'])} are learned; raise "
                "max_length or use positions='rotary'"
            )
        h = h + table["positions"][:time]
    return h.astype(compute_dtype(params, config.dtype))


def trunk(
    params: PyTree, h: Float[Array, "*batch time n"], config: Config
) -> Float[Array, "*batch time n"]:
    """All blocks: the stream after the embedding to the stream before the readout."""
    h, _ = through(lambda p, h: (block(p, h, config), None), params["blocks"], h, config.remat)
    return h


def readout(params: PyTree, h: Float[Array, "*batch time n"], config: Config) -> Array:
    """The final norm and projection: (*batch, time, n_out), or (*batch, n_out) with `pool`."""
    if "norm" in params:
        h = norm_of(config.norm).apply(params["norm"], h)
    if config.pool:
        h = jnp.mean(h, axis=-2)
    y = linear(params["readout"], h)
    return y.astype(jnp.promote_types(y.dtype, jnp.float32))


def apply(params: PyTree, tokens: Int[Array, "*batch time"], config: Config) -> Array:
    """The transformer's outputs.

    Args:
        params: of `init`.
        tokens: one sequence or a batch of them.
        config: the model.

    Returns:
        (*batch, time, n_out), or (*batch, n_out) with `pool`; float32 at least.
    """
    with jax.named_scope("embed"):
        h = embed(params, tokens, config)
    h = trunk(params, h, config)
    with jax.named_scope("readout"):
        return readout(params, h, config)
