"""Families of random programs that are modules of flax linen, flax NNX and equinox."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Forward = Callable[..., Any]
# Of the drawn facts, the activation's gain, the shape of an input and the number of outputs.
Made = tuple[Forward, Any]


class _ResNet(nn.Module):
    """Residual convolutions with batch normalization, and global average pooling."""

    depth: int
    width: int
    outputs: int
    gain: float
    act: Callable[[Any], Any]
    between: Callable[..., Any]
    key: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        init = nn.initializers.variance_scaling(self.gain, "fan_in", "normal")
        norm = lambda: nn.BatchNorm(use_running_average=False)  # noqa: E731
        h = self.act(norm()(nn.Conv(self.width, (3, 3), (2, 2), use_bias=False)(x[..., None])))
        for i in range(self.depth):
            inner = self.act(norm()(nn.Conv(self.width, (3, 3), kernel_init=init)(h)))
            h = h + norm()(nn.Conv(self.width, (3, 3), kernel_init=init)(inner))
            h = self.between(i, self.act(h), self.key)
        return nn.Dense(self.outputs)(h.mean((1, 2)))


def resnet(facts: dict[str, Any], gain: float, shape: tuple[int, ...], outputs: int) -> Made:
    """In linen, always with the statistics of the batch."""
    width = min(facts["width"], 16)

    def model(act: Any, between: Any, key: Any) -> _ResNet:
        return _ResNet(facts["depth"], width, outputs, gain, act, between, key)

    def forward(params: Any, x: Any, key: Any, act: Any, between: Any) -> Any:
        return model(act, between, key).apply(params, x, mutable=["batch_stats"])[0]

    made = model(jax.nn.relu, lambda _, h, __: h, None)
    variables = made.init(jax.random.key(facts["seed"]), jnp.zeros((2, *shape)))
    return forward, {"params": variables["params"]}


class _Mixer(nnx.Module):
    """Residual blocks of linear layers behind layer norms."""

    def __init__(self, sizes: tuple[int, int, int, int], gain: float, rngs: nnx.Rngs) -> None:
        inputs, width, depth, outputs = sizes
        he = nnx.initializers.variance_scaling(gain, "fan_in", "normal")
        small = nnx.initializers.variance_scaling(1 / depth, "fan_in", "normal")
        self.stem = nnx.Linear(inputs, width, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(depth)])
        self.ups = nnx.List(
            [nnx.Linear(width, 2 * width, kernel_init=he, rngs=rngs) for _ in range(depth)]
        )
        self.downs = nnx.List(
            [nnx.Linear(2 * width, width, kernel_init=small, rngs=rngs) for _ in range(depth)]
        )
        self.head = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, x: Any, key: Any, act: Any, between: Any) -> Any:
        h = self.stem(x)
        for i, (norm, up, down) in enumerate(zip(self.norms, self.ups, self.downs, strict=True)):
            h = between(i, h + down(act(up(norm(h)))), key)
        return self.head(h)


def residual(facts: dict[str, Any], gain: float, shape: tuple[int, ...], outputs: int) -> Made:
    """In NNX."""
    sizes = (int(np.prod(shape)), facts["width"], facts["depth"], outputs)
    graph, state = nnx.split(_Mixer(sizes, gain, nnx.Rngs(facts["seed"])))

    def forward(params: Any, x: Any, key: Any, act: Any, between: Any) -> Any:
        return nnx.merge(graph, params)(x.reshape(len(x), -1), key, act, between)

    return forward, state


def lstm(facts: dict[str, Any], gain: float, shape: tuple[int, ...], outputs: int) -> Made:
    """In equinox, over the rows of an image."""
    import equinox as eqx

    del gain
    keys = jax.random.split(jax.random.key(facts["seed"]))
    cell = eqx.nn.LSTMCell(shape[-1], facts["width"], key=keys[0])
    head = eqx.nn.Linear(facts["width"], outputs, key=keys[1])
    arrays, static = eqx.partition((cell, head), eqx.is_array)

    def forward(params: Any, x: Any, key: Any, act: Any, between: Any) -> Any:
        del act
        cell, head = eqx.combine(params, static)

        def one(rows: Any) -> Any:
            zeros = jnp.zeros(facts["width"])
            return jax.lax.scan(lambda s, row: (cell(row, s), None), (zeros, zeros), rows)[0][0]

        return jax.vmap(head)(between(0, jax.vmap(one)(x), key))

    return forward, arrays
