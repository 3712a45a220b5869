"""The transformer of `jaxgrad.nn` in flax linen and in flax NNX, with the same weights.

Written as flax users write it, with flax's own attention, norm and embedding modules, and converted
from the pure parameters: three independent forms of one function. They cover Pre-LN blocks with
LayerNorm, exact GELU and learned positions, causal or not.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jaxtyping import Array, Int, PyTree

from jaxgrad.nn import transformer

EPSILON = 1e-5


def _check(config: transformer.Config) -> None:
    wanted = {
        "residual": "pre_ln", "norm": "layer", "positions": "learned", "activation": "gelu",
        "qk_norm": False, "pool": False, "scan": False,
    }  # fmt: skip
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"config.{name}: the flax forms are written for {value!r}, got "
                f"{getattr(config, name)!r}"
            )


def _hidden(config: transformer.Config) -> int:
    return 4 * config.width if config.hidden is None else config.hidden


def _n_out(config: transformer.Config) -> int:
    return config.vocabulary if config.n_out is None else config.n_out


def _attention_weights(params: PyTree, heads: int) -> PyTree:
    """Projections (width, width) as flax has them: (width, heads, n) in, (heads, n, width) out."""
    width = len(params["out"]["kernel"])
    split = (heads, width // heads)
    weights = {
        name: {
            "kernel": params[name]["kernel"].reshape(width, *split),
            "bias": params[name]["bias"].reshape(split),
        }
        for name in ("query", "key", "value")
    }
    out = params["out"]
    weights["out"] = {"kernel": out["kernel"].reshape(*split, width), "bias": out["bias"]}
    return weights


# -------------------------------------------------------------------------------------------- linen


class LinenBlock(linen.Module):
    """A Pre-LN block.

    Attributes:
        config: of the pure transformer.
    """

    config: transformer.Config

    @linen.compact
    def __call__(self, h: Array) -> Array:
        """(batch, time, width) to the same."""
        config = self.config
        norm = {"epsilon": EPSILON, "use_fast_variance": False}
        mask = linen.make_causal_mask(h[..., 0]) if config.causal else None
        x = linen.LayerNorm(name="norm_attention", **norm)(h)
        h = h + linen.MultiHeadDotProductAttention(config.heads, name="attention")(x, mask=mask)
        x = linen.LayerNorm(name="norm_mlp", **norm)(h)
        x = linen.Dense(_hidden(config), name="up")(x)
        return h + linen.Dense(config.width, name="down")(linen.gelu(x, approximate=False))


class LinenTransformer(linen.Module):
    """The transformer in flax linen.

    Attributes:
        config: of the pure transformer.
    """

    config: transformer.Config

    @linen.compact
    def __call__(self, tokens: Int[Array, "batch time"]) -> Array:
        """Logits (batch, time, n_out)."""
        config = self.config
        h = linen.Embed(config.vocabulary, config.width, name="tokens")(tokens)
        positions = linen.Embed(config.max_length, config.width, name="positions")
        h = h + positions(jnp.arange(tokens.shape[-1]))
        for k in range(config.depth):
            h = LinenBlock(config, name=f"block{k}")(h)
        h = linen.LayerNorm(epsilon=EPSILON, use_fast_variance=False, name="norm")(h)
        return linen.Dense(_n_out(config), name="readout")(h)


def to_linen(params: PyTree, config: transformer.Config) -> tuple[LinenTransformer, PyTree]:
    """The module and its variables, from the pure parameters.

    Raises:
        ValueError: for a configuration that the module does not have.
    """
    _check(config)
    weights: dict[str, Any] = {
        "tokens": {"embedding": params["embed"]["tokens"]},
        "positions": {"embedding": params["embed"]["positions"]},
        "norm": params["norm"],
        "readout": params["readout"],
    }
    for k, block in enumerate(params["blocks"]):
        weights[f"block{k}"] = {
            "norm_attention": block["residual_attention"]["norm"],
            "attention": _attention_weights(block["attention"], config.heads),
            "norm_mlp": block["residual_mlp"]["norm"],
            "up": block["up"],
            "down": block["down"],
        }
    return LinenTransformer(config), {"params": weights}


# ---------------------------------------------------------------------------------------------- NNX


class NNXBlock(nnx.Module):
    """A Pre-LN block."""

    def __init__(self, config: transformer.Config, rngs: nnx.Rngs):
        width, hidden = config.width, _hidden(config)
        norm = {"epsilon": EPSILON, "use_fast_variance": False, "rngs": rngs}
        self.causal = config.causal
        self.norm_attention = nnx.LayerNorm(width, **norm)
        self.attention = nnx.MultiHeadAttention(config.heads, width, decode=False, rngs=rngs)
        self.norm_mlp = nnx.LayerNorm(width, **norm)
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, h: Array) -> Array:
        """(batch, time, width) to the same."""
        mask = nnx.make_causal_mask(h[..., 0]) if self.causal else None
        h = h + self.attention(self.norm_attention(h), mask=mask)
        return h + self.down(jax.nn.gelu(self.up(self.norm_mlp(h)), approximate=False))


class NNXTransformer(nnx.Module):
    """The transformer in flax NNX."""

    def __init__(self, config: transformer.Config, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.positions = nnx.Embed(config.max_length, config.width, rngs=rngs)
        self.depth = config.depth
        for k in range(config.depth):
            setattr(self, f"block{k}", NNXBlock(config, rngs))
        self.norm = nnx.LayerNorm(config.width, epsilon=EPSILON, use_fast_variance=False, rngs=rngs)
        self.readout = nnx.Linear(config.width, _n_out(config), rngs=rngs)

    def __call__(self, tokens: Int[Array, "batch time"]) -> Array:
        """Logits (batch, time, n_out)."""
        h = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        for k in range(self.depth):
            h = getattr(self, f"block{k}")(h)
        return self.readout(self.norm(h))


def to_nnx(params: PyTree, config: transformer.Config) -> NNXTransformer:
    """The module with the pure parameters.

    Raises:
        ValueError: for a configuration that the module does not have.
    """
    _, variables = to_linen(params, config)
    model = NNXTransformer(config, nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(state, variables["params"])  # the two have the same tree
    nnx.update(model, state)
    return model
