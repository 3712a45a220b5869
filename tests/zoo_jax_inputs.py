"""Plain JAX models whose input or output is no vector: scalars, trees, several arguments."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from zoo_base import Parts, case, dense, floats, mse, table
from zoo_jax import layer, layers, mlp


@case("jax", "scalar", scopes=2, cuts=6)
def scalar_output(_: Any) -> Parts:
    """A loss, or an energy: the last h has shape ()."""
    apply = lambda params, x: jnp.sum(mlp(params, x, jnp.tanh) ** 2, axis=-1)  # noqa: E731
    return Parts(apply, layers(5, 6, 4), floats(3, 5), apply_batch=apply, loss=mse)


@case("jax", "scalar", scopes=1, cuts=3)
def scalar_input(_: Any) -> Parts:
    """x of shape (), through Fourier features to a scalar, as a PINN has it."""
    params = [{"kernel": floats(1, 6), "bias": floats(6, seed=1)}, dense(6, 1, seed=2)]
    apply = lambda params, t: mlp(params, t[None], jnp.sin)[0]  # noqa: E731
    return Parts(apply, params, floats(3), loss=mse)


@case("jax", "scalar", scopes=3, cuts=3, flags="no-loss")
def scalar_iteration(_: Any) -> Parts:
    """The logistic map: dx_n/dx_0 is the product of r (1 - 2 x_k)."""

    def apply(r: jax.Array, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = r * x * (1 - x)
        return x

    return Parts(apply, np.float32(3.7), np.array([0.2, 0.5, 0.7], np.float32), apply_batch=apply)


@case("jax", "pytree", scopes=2, cuts=2, flags="pytree-input")
def dict_input(_: Any) -> Parts:
    """Image and text features in a dictionary, one of the leaves of integers."""
    params = {"image": dense(4, 6), "table": floats(5, 6, seed=1), "head": dense(6, 3, seed=2)}

    def apply(params: dict, x: dict) -> jax.Array:
        h = layer(params["image"], x["image"]) + params["table"][x["label"]] + x["text"]
        return layer(params["head"], jnp.tanh(h))

    labels = np.array([0, 2, 4], np.int32)
    xs = {"image": floats(3, 4), "text": floats(3, 6, seed=1), "label": labels}
    return Parts(apply, params, xs, apply_batch=apply, loss=mse)


@case("jax", "pytree", scopes=1, cuts=2, flags="pytree-output")
def pytree_output(_: Any) -> Parts:
    """Two heads: mean and log variance."""
    params = {"body": dense(5, 6), "mean": dense(6, 2, seed=1), "log_var": dense(6, 2, seed=2)}

    def apply(params: dict, x: jax.Array) -> dict[str, jax.Array]:
        h = jnp.tanh(layer(params["body"], x))
        return {name: layer(params[name], h) for name in ("mean", "log_var")}

    return Parts(apply, params, floats(3, 5), apply_batch=apply, loss=mse)


@case("jax", "several inputs", scopes=2, cuts=3, flags="no-loss several-inputs", argnum=1)
def two_inputs(_: Any) -> Parts:
    """Cross-attention: f(query, memory), followed along the memory."""
    params = {"key": dense(4, 4), "value": dense(4, 4, seed=1), "head": dense(4, 3, seed=2)}

    def apply(params: dict, query: jax.Array, memory: jax.Array) -> jax.Array:
        memory = jnp.tanh(memory)
        weights = jax.nn.softmax(query @ layer(params["key"], memory).T)
        return layer(params["head"], weights @ layer(params["value"], memory))

    return Parts(apply, params, x=(floats(3, 4, seed=5), floats(5, 4, seed=6)))


@case("jax", "several inputs", scopes=2, cuts=5, flags="no-loss several-inputs", argnum=2)
def conditioned_on_integers(_: Any) -> Parts:
    """f(class id, time, x), as a diffusion model's denoiser; x is the last argument."""
    params = {"class": floats(4, 6), "layers": layers(5, 6, 5)}

    def apply(params: dict, label: jax.Array, t: jax.Array, x: jax.Array) -> jax.Array:
        condition = params["class"][label] + jnp.sin(t)
        h = jax.nn.silu(layer(params["layers"][0], x) + condition)
        return layer(params["layers"][1], h)

    return Parts(apply, params, x=(np.int32(2), np.float32(0.3), floats(5, seed=6)))


@case("jax", "empty", scopes=1, cuts=1, flags="no-loss empty zero-jacobian")
def zero_size(_: Any) -> Parts:
    """No point in the cloud: x is (0, 4), its pooled features are zeros."""
    apply = lambda p, x: jnp.tanh(layer(p, x)).sum(axis=0)  # noqa: E731
    return Parts(apply, dense(4, 3), x=floats(0, 4))


@case("jax", "pooling", scopes=1, cuts=2)
def top_k_pooling(_: Any) -> Parts:
    """The three largest of a set's features, sorted: the route depends on the values."""
    apply = lambda p, x: lax.top_k(layer(p, x).reshape(-1), 3)[0] * 2.0  # noqa: E731
    return Parts(apply, dense(4, 3), floats(3, 5, 4), loss=mse)


@case("jax", "ode", scopes=4, cuts=4, flags="scan", iterations=4)
def neural_ode_rk4(_: Any) -> Parts:
    """Four steps of Runge-Kutta; each step reads its state five times, and is one layer."""
    params = layers(4, 6, 4)

    def apply(params: list, x: jax.Array) -> jax.Array:
        field, h = partial(mlp, params, activation=jnp.tanh), 0.25

        def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            k1 = field(x)
            k2 = field(x + h / 2 * k1)
            k3 = field(x + h / 2 * k2)
            k4 = field(x + h * k3)
            return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

        return lax.scan(step, x, length=4)[0]

    return Parts(apply, params, floats(3, 4, seed=7), apply_batch=apply, loss=mse)


CASES = table(globals())
