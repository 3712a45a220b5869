"""Models over time and over layers in plain JAX: transformers, recurrences, scans, remat."""

from functools import partial
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


def stack(layers: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


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


@case("jax", "scan", scopes=4, cuts=4, flags="scan")
def scan_layers(_: Any) -> Parts:
    params = stack([dense(6, 6, seed=k) for k in range(4)])

    def apply(params: dict, x: jax.Array) -> jax.Array:
        return lax.scan(lambda h, p: (jnp.tanh(layer(p, h)), None), x, params)[0]

    return Parts(apply, params, floats(3, 6), apply_batch=apply, loss=mse)


def _scanned_transformer(*, remat: bool) -> Parts:
    params = {
        "blocks": stack([block_params(10 * k) for k in range(3)]),
        "head": dense(D, 3, seed=2),
    }
    block = jax.checkpoint(pre_ln_block) if remat else pre_ln_block

    def apply(params: dict, x: jax.Array) -> jax.Array:
        x, _ = lax.scan(lambda h, p: (block(p, h), None), x, params["blocks"])
        return layer(params["head"], x)

    return Parts(apply, params, floats(3, T, D, seed=4), apply_batch=apply, loss=mse)


@case("jax", "scan", scopes=4, cuts=5, flags="scan")
def scan_transformer(_: Any) -> Parts:
    return _scanned_transformer(remat=False)


@case("jax", "scan", scopes=4, cuts=5, flags="scan remat")
def scan_transformer_remat(_: Any) -> Parts:
    return _scanned_transformer(remat=True)


@case("jax", "scan", scopes=4, cuts=4, flags="scan")
def scan_unrolled_by_two(_: Any) -> Parts:
    """`unroll=2` and `reverse=True`: the layers are used from the last to the first."""
    params = stack([dense(5, 5, seed=k) for k in range(4)])

    def apply(params: dict, x: jax.Array) -> jax.Array:
        step = lambda h, p: (h + jnp.tanh(layer(p, h)), None)  # noqa: E731
        return lax.scan(step, x, params, reverse=True, unroll=2)[0]

    return Parts(apply, params, floats(3, 5), apply_batch=apply, loss=mse)


@case("jax", "scan", scopes=6, cuts=6, flags="scan")
def scan_nested(_: Any) -> Parts:
    """Three stages of two layers: a scan inside a scan."""
    params = stack([stack([dense(4, 4, seed=2 * i + j) for j in range(2)]) for i in range(3)])

    def apply(params: dict, x: jax.Array) -> jax.Array:
        inner = lambda h, p: (jnp.tanh(layer(p, h)), None)  # noqa: E731
        return lax.scan(lambda h, p: lax.scan(inner, h, p), x, params)[0]

    return Parts(apply, params, floats(3, 4), apply_batch=apply, loss=mse)


@case("jax", "scan", scopes=1, cuts=1, flags="scan few-cuts")
def scan_deep_supervision(_: Any) -> Parts:
    """The head reads every layer's output (the scan's ys): no cut between the iterations."""
    params = {
        "layers": stack([dense(4, 4, seed=k) for k in range(3)]),
        "head": dense(12, 3, seed=9),
    }

    def step(h: jax.Array, p: dict) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(layer(p, h))
        return h, h

    def apply(params: dict, x: jax.Array) -> jax.Array:
        _, hs = lax.scan(step, x, params["layers"])
        return layer(params["head"], hs.reshape(-1))

    return Parts(apply, params, floats(3, 4), loss=mse)


@case("jax", "scan", scopes=3, cuts=3, flags="scan")
def fori_loop_layers(_: Any) -> Parts:
    """A counted fori_loop is a scan whose body slices the stacked parameters by the index."""
    params = stack([dense(5, 5, seed=k) for k in range(3)])

    def apply(params: dict, x: jax.Array) -> jax.Array:
        def body(k: jax.Array, h: jax.Array) -> jax.Array:
            p = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, k, keepdims=False), params)
            return jnp.tanh(layer(p, h))

        return lax.fori_loop(0, 3, body, x)

    return Parts(apply, params, floats(3, 5), apply_batch=apply, loss=mse)


@case("jax", "remat", scopes=3, cuts=6, flags="remat")
def checkpoint_layers(_: Any) -> Parts:
    params = [dense(5, 5, seed=k) for k in range(3)]
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def apply(params: list, x: jax.Array) -> jax.Array:
        for p in params:
            x = jax.checkpoint(lambda p, h: jnp.sin(layer(p, h)), policy=policy)(p, x)
        return x

    return Parts(apply, params, floats(3, 5), apply_batch=apply, loss=mse)


def _recurrent() -> dict[str, np.ndarray]:
    return {
        "w": floats(4, 6) / 2,
        "u": floats(6, 6, seed=1) / np.float32(np.sqrt(6)),
        "b": 0.1 * floats(6, seed=2),
    }


@case("jax", "rnn", scopes=T, cuts=T, flags="scan time")
def rnn_h0(_: Any) -> Parts:
    """Elman's network from its initial state to its last: one layer a time step."""
    inputs = floats(T, 4, seed=3)

    def apply(params: dict, h0: jax.Array) -> jax.Array:
        step = lambda h, x: (jnp.tanh(x @ params["w"] + h @ params["u"] + params["b"]), None)  # noqa: E731
        return lax.scan(step, h0, inputs.astype(h0.dtype))[0]

    return Parts(apply, _recurrent(), floats(3, 6, seed=4), apply_batch=apply, loss=mse)


@case("jax", "rnn", scopes=1, cuts=1, flags="scan few-cuts")
def rnn_inputs(_: Any) -> Parts:
    """The same from its inputs: they all live until the last step, so the scan is one layer."""

    def apply(params: dict, xs: jax.Array) -> jax.Array:
        step = lambda h, x: (jnp.tanh(x @ params["w"] + h @ params["u"] + params["b"]), None)  # noqa: E731
        return lax.scan(step, jnp.zeros(6, xs.dtype), xs)[0]

    return Parts(apply, _recurrent(), floats(3, T, 4, seed=3), loss=mse)


def _lstm_step(params: dict, state: tuple, x: jax.Array) -> tuple:
    c, h = state
    i, f, g, o = jnp.split(x @ params["w"] + h @ params["u"] + params["b"], 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return c, jax.nn.sigmoid(o) * jnp.tanh(c)


def _lstm() -> dict[str, np.ndarray]:
    return {"w": floats(3, 16) / 2, "u": floats(4, 16, seed=1) / 2, "b": 0.1 * floats(16, seed=2)}


@case("jax", "lstm", scopes=T, cuts=T, flags="scan time tuple-state pytree-input pytree-output")
def lstm_state(_: Any) -> Parts:
    """Hochreiter and Schmidhuber's cell from (c, h) to (c, h) over the whole sequence."""
    inputs = floats(T, 3, seed=3)

    def apply(params: dict, state: tuple) -> tuple:
        return lax.scan(
            lambda s, x: (_lstm_step(params, s, x), None), state, inputs.astype(state[0].dtype)
        )[0]

    return Parts(
        apply, _lstm(), (floats(3, 4, seed=4), floats(3, 4, seed=5)), apply_batch=apply, loss=mse
    )


@case("jax", "lstm", scopes=2, cuts=2, flags="scan time tuple-state")
def lstm_h0(_: Any) -> Parts:
    """From h0 alone, through the cell's (c, h), to a read-out of the last h."""
    inputs = floats(T, 3, seed=3)
    params = _lstm() | {"head": dense(4, 2, seed=6)}

    def apply(params: dict, h0: jax.Array) -> jax.Array:
        state = (jnp.zeros_like(h0), h0)
        (_, h), _ = lax.scan(
            lambda s, x: (_lstm_step(params, s, x), None), state, inputs.astype(h0.dtype)
        )
        return layer(params["head"], h)

    return Parts(apply, params, floats(3, 4, seed=4), apply_batch=apply, loss=mse)


@case("jax", "gru", scopes=T, cuts=T, flags="scan time")
def gru_h0(_: Any) -> Parts:
    """Cho et al.'s cell: each step is a layer, though inside it the state is used four times."""
    inputs = floats(T, 3, seed=3)
    params = {"w": floats(3, 12) / 2, "u": floats(4, 12, seed=1) / 2, "b": 0.1 * floats(12, seed=2)}

    def step(params: dict, h: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        rx, zx, nx = jnp.split(x @ params["w"] + params["b"], 3, axis=-1)
        rh, zh, nh = jnp.split(h @ params["u"], 3, axis=-1)
        r, z = jax.nn.sigmoid(rx + rh), jax.nn.sigmoid(zx + zh)
        return (1 - z) * jnp.tanh(nx + r * nh) + z * h, None

    def apply(params: dict, h0: jax.Array) -> jax.Array:
        return lax.scan(partial(step, params), h0, inputs.astype(h0.dtype))[0]

    return Parts(apply, params, floats(3, 4, seed=4), apply_batch=apply, loss=mse)


@case("jax", "ssm", scopes=1, cuts=2)
def ssm_associative_scan(_: Any) -> Parts:
    """A diagonal linear recurrence (S4D, LRU) in parallel, and its read-out."""
    params = {"log_a": floats(4), "b": floats(3, 4, seed=1), "c": dense(4, 2, seed=2)}

    def combine(left: tuple, right: tuple) -> tuple:
        return left[0] * right[0], right[0] * left[1] + right[1]

    def apply(params: dict, x: jax.Array) -> jax.Array:
        u = x @ params["b"]
        a = jnp.broadcast_to(jax.nn.sigmoid(params["log_a"]), u.shape)
        return layer(params["c"], lax.associative_scan(combine, (a, u))[1])

    return Parts(apply, params, floats(3, T, 3, seed=3), loss=mse)


CASES = table(globals())
