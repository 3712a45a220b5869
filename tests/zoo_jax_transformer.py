"""Transformers in plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from zoo_base import Parts, case, cross_entropy, dense, floats, mse, table, tokens
from zoo_jax import layer

D, HEADS, T, VOCABULARY = 8, 2, 5, 7


def layer_norm(p: Any, x: jax.Array) -> jax.Array:
    x = x - x.mean(axis=-1, keepdims=True)
    return p["scale"] * x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) + p["bias"]


def attention(p: Any, x: jax.Array) -> jax.Array:
    """Causal multi-head attention, (..., T, D) to the same."""
    split = (*x.shape[:-1], HEADS, D // HEADS)
    q, k, v = (layer(p[name], x).reshape(split) for name in ("query", "key", "value"))
    scores = jnp.einsum("...thd,...shd->...hts", q, k) / np.sqrt(D // HEADS).astype(x.dtype)
    mask = jnp.tril(jnp.ones((x.shape[-2], x.shape[-2]), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(x.dtype).min))
    return layer(p["out"], jnp.einsum("...hts,...shd->...thd", weights, v).reshape(x.shape))


def feed_forward(p: Any, x: jax.Array) -> jax.Array:
    return layer(p["down"], jax.nn.gelu(layer(p["up"], x)))


def pre_ln_block(p: Any, x: jax.Array) -> jax.Array:
    x = x + attention(p["attention"], layer_norm(p["norm1"], x))
    return x + feed_forward(p["mlp"], layer_norm(p["norm2"], x))


def post_ln_block(p: Any, x: jax.Array) -> jax.Array:
    x = layer_norm(p["norm1"], x + attention(p["attention"], x))
    return layer_norm(p["norm2"], x + feed_forward(p["mlp"], x))


def block_params(seed: int = 0) -> dict[str, Any]:
    projections = {
        name: dense(D, D, seed=seed + k) for k, name in enumerate(("query", "key", "value", "out"))
    }
    norm = {"scale": 1 + 0.1 * floats(D, seed=seed), "bias": 0.1 * floats(D, seed=seed + 1)}
    mlp = {"up": dense(D, 12, seed=seed + 5), "down": dense(12, D, seed=seed + 6)}
    return {"attention": projections, "norm1": norm, "norm2": norm, "mlp": mlp}


def language_model(params: dict, ids: jax.Array) -> jax.Array:
    """Token ids (..., T) to logits (..., T, vocabulary), Pre-LN."""
    x = params["embedding"][ids] + params["positions"]
    for p in params["blocks"]:
        x = pre_ln_block(p, x)
    return layer(params["head"], layer_norm(params["norm"], x))


def language_params() -> dict[str, Any]:
    norm = {"scale": np.ones(D, np.float32), "bias": np.zeros(D, np.float32)}
    params = {
        "embedding": floats(VOCABULARY, D),
        "positions": 0.1 * floats(T, D, seed=1),
        "norm": norm,
    }
    return params | {
        "blocks": [block_params(10), block_params(20)],
        "head": dense(D, VOCABULARY, seed=2),
    }


@case("jax", "transformer", scopes=4, cuts=6, flags="integer-input")
def transformer_pre_ln(_: Any) -> Parts:
    return Parts(
        language_model,
        language_params(),
        tokens(3, T),
        apply_batch=language_model,
        loss=cross_entropy,
    )


@case("jax", "transformer", scopes=4, cuts=4)
def transformer_post_ln(_: Any) -> Parts:
    """From embeddings on, so that x is of floats."""
    params = [block_params(10), block_params(20)]

    def apply(params: list, x: jax.Array) -> jax.Array:
        for p in params:
            x = post_ln_block(p, x)
        return x

    return Parts(apply, params, floats(3, T, D, seed=4), apply_batch=apply, loss=mse)


@case("jax", "transformer", scopes=2, cuts=4, flags="integer-input")
def tied_embeddings(_: Any) -> Parts:
    """The embedding matrix is the output layer too: its gradient comes from both ends."""
    params = {"embedding": floats(VOCABULARY, D), "block": block_params(10)}

    def apply(params: dict, ids: jax.Array) -> jax.Array:
        x = jnp.take(params["embedding"], ids, axis=0) * np.float32(np.sqrt(D)).item()
        return pre_ln_block(params["block"], x) @ params["embedding"].T

    return Parts(apply, params, tokens(3, T), apply_batch=apply, loss=cross_entropy)


def _rotary(x: jax.Array) -> jax.Array:
    """Rotary positions (Su et al. 2021), in the half-split form; x is (..., T, heads, d)."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[-3])[:, None, None] * 100.0 ** (-np.arange(half) / half)
    cos, sin = jnp.asarray(np.cos(angles), x.dtype), jnp.asarray(np.sin(angles), x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def _rms_norm(scale: jax.Array, x: jax.Array) -> jax.Array:
    return scale * x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


@case("jax", "transformer", scopes=2, cuts=2)
def transformer_rotary_rms_glu(_: Any) -> Parts:
    """One block after Llama: RMSNorm, rotary attention by einsum, SwiGLU; then a final norm."""
    names = ("wq", "wk", "wv", "wo")
    params = {name: floats(D, D, seed=k) / np.float32(np.sqrt(D)) for k, name in enumerate(names)}
    params |= {
        "gate": floats(D, 12, seed=5) / 3,
        "up": floats(D, 12, seed=6) / 3,
        "down": floats(12, D, seed=7) / 3,
    }
    params |= {
        name: 1 + 0.1 * floats(D, seed=k) for k, name in enumerate(("norm1", "norm2", "norm3"))
    }

    def apply(p: dict, x: jax.Array) -> jax.Array:
        h = _rms_norm(p["norm1"], x)
        q, k, v = (
            (h @ p[name]).reshape(*h.shape[:-1], HEADS, D // HEADS) for name in ("wq", "wk", "wv")
        )
        scores = jnp.einsum("...thd,...shd->...hts", _rotary(q), _rotary(k)) / 2
        mask = jnp.tril(jnp.ones((x.shape[-2],) * 2, bool))
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        x = x + jnp.einsum("...hts,...shd->...thd", weights, v).reshape(x.shape) @ p["wo"]
        h = _rms_norm(p["norm2"], x)
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
        return _rms_norm(p["norm3"], x)

    return Parts(apply, params, floats(3, T, D, seed=4), apply_batch=apply, loss=mse)


CASES = table(globals())
