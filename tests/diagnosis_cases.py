"""A small classifier, its data and its verdict, for tests of the diagnosis."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgrad as jg

WIDTH, CLASSES = 8, 4


def data(
    size: int = 32, count: int = 6, seed: int = 0, scale: float = 1.0, noise: float = 0.0
) -> list[Any]:
    """Batches of inputs and the class of the largest of four linear functions of them."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((WIDTH, CLASSES))
    xs = [rng.standard_normal((size, WIDTH)).astype(np.float32) for _ in range(count)]
    scores = [x @ w + noise * rng.standard_normal((size, CLASSES)) for x in xs]
    return [
        (x * np.float32(scale), np.argmax(s, 1).astype(np.int32))
        for x, s in zip(xs, scores, strict=True)
    ]


def dense(
    sizes: tuple[int, ...] = (WIDTH, 16, CLASSES), gain: float = 2.0, seed: int = 1
) -> list[Any]:
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (m, n)) * math.sqrt(gain / m), "b": jnp.zeros(n)}
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def net(layers: Any, x: Any) -> Any:
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def cross_entropy(layers: Any, batch: Any) -> Any:
    logits = net(layers, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def examined(loss: Any, params: Any, batches: Any, tx: Any = None, **more: Any) -> jg.Report:
    tx = optax.adam(1e-2) if tx is None else tx
    report = jg.diagnose(loss, params, batches[0], optimizer=tx, batches=batches, **more)
    assert not report.notes, report.notes
    return report


def primary(*args: Any, **more: Any) -> str | None:
    report = examined(*args, **more)
    return None if report.primary is None else report.primary.code
