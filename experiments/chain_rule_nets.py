"""Networks of `chain_rule`: small ones with dense Jacobians, and deep stacks for the weights."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxgrad as jg
from experiments.atlas import deep, frame
from jaxgrad import nn
from jaxgrad.nn import mlp, recurrent, resnet, transformer

ARCHITECTURES = {
    "MLP": ("mlp", {"residual": "none"}),
    "MLP, Pre-LN": ("mlp", {"residual": "pre_ln", "norm": "layer"}),
    "MLP, Post-LN": ("mlp", {"residual": "post_ln", "norm": "layer"}),
    "ResNet": ("resnet", {}),
    "encoder": ("transformer", {"causal": False, "residual": "post_ln"}),
    "causal transformer": ("transformer", {"causal": True, "positions": "rotary"}),
    "vanilla RNN": ("recurrent", {"cell": "vanilla"}),
    "GRU": ("recurrent", {"cell": "gru"}),
    "LSTM": ("recurrent", {"cell": "lstm"}),
}
CELLS = ("vanilla", "gru", "lstm")


@dataclass(frozen=True)
class Config:
    """The architectures, small enough for dense Jacobians, and deep stacks for the weights.

    Attributes:
        architectures: names in `ARCHITECTURES`.
        width: of the streams.
        depth: blocks or time steps.
        seeds: networks an architecture.
        tolerance: of max |product - whole| / max |whole|, in float32.
        steps: of the recurrent networks whose hidden Jacobians are multiplied.
        activations: of the stacks whose first and last weights are compared.
        stack_width: theirs.
        stack_depth: theirs.
        stacks: of each.
    """

    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    width: int = 8
    depth: int = 3
    seeds: int = 2
    tolerance: float = 1e-5
    steps: int = 20
    activations: tuple[str, ...] = ("sigmoid", "tanh", "relu", "gelu")
    stack_width: int = 64
    stack_depth: int = 20
    stacks: int = 8


def _function(name: str, config: Config) -> tuple[Any, Any]:
    """(key -> (parameters, x), (parameters, x) -> an array): one example."""
    (kind, options), width, depth = ARCHITECTURES[name], config.width, config.depth
    draw = jax.random.normal
    if kind == "mlp":
        model = mlp.Config(width, width, width, depth, "gelu", **options)
        return (
            lambda key: (mlp.init(key, model), draw(key, (width,))),
            lambda params, x: mlp.apply(params, x, model),
        )
    if kind == "resnet":
        images = resnet.Config(1, 4, (4, 4), 1, norm="layer")
        return (
            lambda key: (resnet.init(key, images)[0], draw(key, (1, 6, 6, 1))),
            lambda params, x: resnet.apply(params, x, images),
        )
    if kind == "transformer":
        text = transformer.Config(5, width=width, depth=depth, heads=2, **options)
        return (
            lambda key: (transformer.init(key, text), draw(key, (4, width))),
            lambda params, h: transformer.trunk(params, h, text),
        )
    time = recurrent.Config(3, 2, width, **options)

    def from_first(params: Any, h: jax.Array) -> jax.Array:
        cell, xs = params
        state = (jnp.zeros_like(h), h) if time.cell == "lstm" else h
        return recurrent.hidden(recurrent.run(cell, state, xs, time)[0], time)

    def start(key: jax.Array) -> tuple[Any, jax.Array]:
        return (recurrent.init(key, time)["cell"], draw(key, (depth, 3))), jnp.zeros(width)

    return start, from_first


def _chain(name: str, config: Config) -> frame.Arrays:
    """The product against `jacrev` of the whole, and spectral norms."""
    found: dict[str, list] = {"error": [], "layers": [], "log_norm": [], "log_norms": []}
    start, f = _function(name, config)
    jacobian = frame.compiled(jax.jacrev(lambda params, x: jnp.ravel(f(params, x)), argnums=1))
    for key in jax.random.split(jax.random.key(0), config.seeds):
        params, x = start(key)
        chain = jg.factorize(partial(f, params), x)
        matrices = [np.asarray(j, np.float64) for j in jg.layer_jacobians(chain, x)]
        product = matrices[0]
        for j in matrices[1:]:
            product = j @ product
        whole = np.asarray(jacobian(params, x)).reshape(product.shape)
        found["error"].append(np.abs(product - whole).max() / np.abs(whole).max())
        found["layers"].append(len(chain))
        found["log_norm"].append(np.log(np.linalg.norm(product, 2)))
        found["log_norms"].append(sum(np.log(np.linalg.norm(j, 2)) for j in matrices))
    return {key: np.asarray(values) for key, values in found.items()}


def _hidden_error(cell: str, key: jax.Array, inputs: tuple, config: Config) -> jax.Array:
    """|product of dh_t / dh_(t-1) - dh_T / dh_0| / |dh_T / dh_0| of one network."""
    (xs, start), width = inputs, config.width
    model = recurrent.Config(3, 2, width, cell=cell)
    params = recurrent.init(key, model)["cell"]

    def state_of(h: jax.Array, memory: Any) -> Any:
        return (memory, h) if cell == "lstm" else h

    def step(carry: Any, x: jax.Array) -> tuple[Any, None]:
        state, product = carry
        h, memory = recurrent.hidden(state, model), state[0] if cell == "lstm" else None

        def through_h(h: jax.Array) -> jax.Array:
            after = recurrent.step(params, state_of(h, memory), x, model)
            return recurrent.hidden(after, model)

        product = jax.jacfwd(through_h)(h) @ product
        return (recurrent.step(params, state, x, model), product), None

    def last(h: jax.Array) -> jax.Array:
        state = state_of(h, jnp.zeros(width))
        return recurrent.hidden(recurrent.run(params, state, xs, model)[0], model)

    begin = (state_of(start, jnp.zeros(width)), jnp.eye(width))
    (_, product), _ = lax.scan(step, begin, xs)
    whole = jax.jacrev(last)(start)
    return jnp.linalg.norm(product - whole) / jnp.linalg.norm(whole)


def _hidden(config: Config) -> frame.Arrays:
    """The errors of `_hidden_error`, (seeds, cells)."""

    def one(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 3)
        xs = jax.random.normal(keys[1], (config.steps, 3))
        start = jax.random.normal(keys[2], (config.width,))
        return jnp.stack([_hidden_error(cell, keys[0], (xs, start), config) for cell in CELLS])

    return {"error": frame.over_seeds(one, config.stacks)}


def _compared(name: str, kernels: jax.Array, x: jax.Array, direction: jax.Array) -> tuple:
    """(ratio, gain, formula) of one stack of an activation; see `_weights`."""
    phi = nn.activation(name)

    def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = phi(h @ w)
        return h, h

    def loss(kernels: jax.Array, x: jax.Array) -> jax.Array:
        return lax.scan(layer, x, kernels)[0] @ direction

    weights = jax.grad(loss)(kernels, x)
    first, _ = layer(x, kernels[0])
    below = jax.grad(loss, argnums=1)(kernels[1:], first)
    slopes = jax.vmap(jax.grad(phi))(x @ kernels[0])
    formula = jnp.outer(x, slopes * below)
    norms = jnp.linalg.norm(weights, axis=(1, 2))
    largest = jnp.max(jnp.abs(formula - weights[0])) / jnp.max(jnp.abs(weights[0]))
    gain = jnp.log(jnp.linalg.norm(below) / jnp.linalg.norm(direction))
    return jnp.log(norms[0] / norms[-1]), gain, largest


def _weights(config: Config) -> frame.Arrays:
    """Of bias-free Xavier stacks, by activation: (seeds, activations) logs.

    "ratio": norm of the first weights' gradient over the last's. "gain": of the gradient at the
    first layer's output over that at the last's. "formula": largest relative difference between
    the first weights' gradient and x (phi'(z_1) * J_2^T ... J_L^T g)^T.
    """
    n, keys = config.stack_width, jax.random.split(jax.random.key(1))
    shape = (config.stacks, config.stack_depth)
    kernels = deep.draw("xavier_normal", keys[0], (n, n), *shape)["kernel"]
    x, direction = jax.random.normal(keys[1], (2, config.stacks, n))

    def one(*stack: jax.Array) -> dict[str, jax.Array]:
        columns = zip(*(_compared(name, *stack) for name in config.activations), strict=True)
        return dict(zip(("ratio", "gain", "formula"), map(jnp.stack, columns), strict=True))

    return frame.compiled(jax.vmap(one))(kernels, x, direction)


def points(config: Config) -> dict:
    chains = {f"chain-{a}": partial(_chain, a, config) for a in config.architectures}
    return {**chains, "hidden": partial(_hidden, config), "weights": partial(_weights, config)}
