"""Training that is one compiled call: a scan over steps, to be vmapped over seeds and settings."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from jaxgrad import data


def digits() -> tuple[Float[Array, "n 64"], Int[Array, " n"]]:
    """The training digits, standardized, and their labels."""
    train = data.digits().train
    return jnp.asarray(train.x), jnp.asarray(train.y)


def text() -> tuple[Int[Array, " n"], int]:
    """The English text as character numbers, and the size of its vocabulary."""
    found = data.english_text()
    return jnp.asarray(found.ids), len(found.vocabulary)


def cross_entropy(logits: Float[Array, "*batch classes"], y: Int[Array, "*batch"]) -> Array:
    """Mean over the batch, in nats."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], -1)
    return -jnp.mean(chosen)


def accuracy(logits: Float[Array, "*batch classes"], y: Int[Array, "*batch"]) -> Array:
    """Share of the examples whose largest logit is that of their class."""
    return jnp.mean(jnp.argmax(logits, -1) == y)


def draw(key: Array, x: Array, y: Array, size: int) -> tuple[Array, Array]:
    """A batch, drawn with replacement: its examples are independent."""
    rows = jax.random.randint(key, (size,), 0, len(y))
    return x[rows], y[rows]


def train(
    loss: Callable[[PyTree, Array], Array],
    params: PyTree,
    tx: optax.GradientTransformation,
    key: Array,
    steps: int,
) -> tuple[PyTree, Float[Array, " steps"]]:
    """Trains in a scan.

    Args:
        loss: (params, key) -> the loss of the batch that it draws by the key.
        params: at first.
        tx: the rule; its learning rate may be traced.
        key: of all batches.
        steps: how many.

    Returns:
        (the last parameters, the loss of every batch before its step).
    """

    def step(carry: tuple[PyTree, Any], key: Array) -> tuple[tuple[PyTree, Any], Array]:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, key)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), losses = lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))
    return params, losses
