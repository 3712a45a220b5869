"""Models over time and over stacked layers in plain JAX: recurrences, scans, remat."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from zoo_base import Parts, case, dense, floats, mse, table
from zoo_jax import layer
from zoo_jax_transformer import D, T, block_params, pre_ln_block


def stack(layers: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


@case("jax", "scan", scopes=4, cuts=4, flags="scan", iterations=4)
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


@case("jax", "scan", scopes=4, cuts=5, flags="scan", iterations=3)
def scan_transformer(_: Any) -> Parts:
    return _scanned_transformer(remat=False)


@case("jax", "scan", scopes=4, cuts=5, flags="scan remat", iterations=3)
def scan_transformer_remat(_: Any) -> Parts:
    return _scanned_transformer(remat=True)


@case("jax", "scan", scopes=4, cuts=4, flags="scan", iterations=4)
def scan_unrolled_by_two(_: Any) -> Parts:
    """`unroll=2` and `reverse=True`: the layers are used from the last to the first."""
    params = stack([dense(5, 5, seed=k) for k in range(4)])

    def apply(params: dict, x: jax.Array) -> jax.Array:
        step = lambda h, p: (h + jnp.tanh(layer(p, h)), None)  # noqa: E731
        return lax.scan(step, x, params, reverse=True, unroll=2)[0]

    return Parts(apply, params, floats(3, 5), apply_batch=apply, loss=mse)


@case("jax", "scan", scopes=6, cuts=6, flags="scan", iterations=6)
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


@case("jax", "scan", scopes=3, cuts=3, flags="scan", iterations=3)
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


@case("jax", "rnn", scopes=T, cuts=T, flags="scan time", iterations=T)
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


@case(
    "jax",
    "lstm",
    scopes=T,
    cuts=T,
    flags="scan time tuple-state pytree-input pytree-output",
    iterations=T,
)
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


@case("jax", "lstm", scopes=2, cuts=2, flags="scan time tuple-state", iterations=T)
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


@case("jax", "gru", scopes=T, cuts=T, flags="scan time", iterations=T)
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
