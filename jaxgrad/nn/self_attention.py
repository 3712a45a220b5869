"""Multi-head attention through `jax.nn.dot_product_attention`, and rotary positions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.nn.dense import linear, weights_init
from jaxgrad.nn.initializers import Initializer
from jaxgrad.nn.normalization import rms_norm
from jaxgrad.nn.residual_rules import Gains

ROTARY_BASE = 10_000.0


class Heads(NamedTuple):
    """How attention is done.

    Attributes:
        count: number of heads; it divides the width.
        causal: whether a position sees itself and the past only.
        rotary: whether queries and keys are turned by their position.
        qk_norm: whether queries and keys are RMS-normalized per head, each with a scale of its own
            (Henry et al. 2020, arXiv 2010.04245; Dehghani et al. 2023, 2302.05442).
    """

    count: int
    causal: bool
    rotary: bool = False
    qk_norm: bool = False


def rotary(x: Float[Array, "... time heads n"], base: float = ROTARY_BASE) -> Array:
    """Turns pair i of features by the angle `t base^(-2 i / n)` at position t.

    Su et al. 2021 (RoFormer, arXiv 2104.09864): norms stay, and the product of a query at s and a
    key at t depends on s - t only. Feature i is paired with i + n / 2, as in GPT-NeoX and LLaMA.

    Args:
        x: queries or keys; n even.
        base: of the wavelengths, which go from 2 pi to 2 pi base.

    Returns:
        The turned x, of its dtype; angles are computed in float32 at least.

    Raises:
        ValueError: for an odd n.
    """
    time, n = x.shape[-3], x.shape[-1]
    if n % 2:
        raise ValueError(f"rotary positions pair features: expected an even head size, got {n}")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    frequencies = base ** (-jnp.arange(0, n, 2, dtype=wide) / n)
    angles = jnp.arange(time, dtype=wide)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def attention_init(
    key: Array, width: int, heads: Heads, rule: str | Initializer, gains: Gains
) -> dict[str, Any]:
    """Four projections (width, width) and, with qk_norm, two scales (width / heads,).

    Args:
        key: PRNG key.
        width: features of the stream.
        heads: how attention is done.
        rule: initializer of the kernels.
        gains: of the residual rule: inner for the value, last for the output projection.

    Raises:
        ValueError: where the heads do not divide the width.
    """
    if width % heads.count:
        raise ValueError(f"heads: expected a divisor of the width {width}, got {heads.count}")
    factors = {"query": 1.0, "key": 1.0, "value": gains.inner, "out": gains.last}
    keys = jax.random.split(key, len(factors))
    params: dict[str, Any] = {
        name: weights_init(k, (width, width), rule, factor)
        for k, (name, factor) in zip(keys, factors.items(), strict=True)
    }
    if heads.qk_norm:
        size = width // heads.count
        params["query_norm"] = {"scale": jnp.ones(size, jnp.float32)}
        params["key_norm"] = {"scale": jnp.ones(size, jnp.float32)}
    return params


def attention(
    params: PyTree, x: Float[Array, "*batch time width"], heads: Heads
) -> Float[Array, "*batch time width"]:
    """Self-attention.

    Args:
        params: of `attention_init`.
        x: one sequence or a batch of them.
        heads: how attention is done.
    """

    def project(name: str) -> Array:
        y = linear(params[name], x)
        return y.reshape(*y.shape[:-1], heads.count, -1)

    query, key, value = project("query"), project("key"), project("value")
    if heads.qk_norm:
        query = rms_norm(params["query_norm"], query)
        key = rms_norm(params["key_norm"], key)
    if heads.rotary:
        query, key = rotary(query), rotary(key)
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=heads.causal)
    return linear(params["out"], mixed.reshape(x.shape))
