"""The update rules on digits and on text, at many learning rates in one compiled call."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from experiments.atlas import frame, training
from jaxgrad import data, optim
from jaxgrad.nn import mlp, transformer

RULES = ("SGD", "momentum", "Adam", "AdamW", "Lion")
TASKS = ("digits", "text")


@dataclass(frozen=True)
class Config:
    """A perceptron on digits and a character transformer, trained by every rule at every rate.

    Attributes:
        decades: first and last learning rate of the sweep, by powers of ten, for SGD and momentum;
            Adam's are a hundred times smaller, Lion's a thousand.
        rates: how many, evenly spaced in the logarithm.
        seeds: trainings a cell.
        width: of the perceptron.
        depth: its blocks.
        steps: on digits.
        batch: digits a step.
        stream: width of the transformer.
        blocks: its depth.
        text_steps: on text.
        windows: of text a step.
        window: characters the model reads.
        wide: width of the transformer whose memory is measured.
        tokens: positions it is trained on in one step, for each measurement.
        scales: factors of the gradient, for the invariance of Adam's step.
    """

    decades: tuple[float, float] = (-2.5, 1.5)
    rates: int = 9
    seeds: int = 3
    width: int = 32
    depth: int = 3
    steps: int = 150
    batch: int = 32
    stream: int = 24
    blocks: int = 2
    text_steps: int = 120
    windows: int = 8
    window: int = 24
    wide: int = 128
    tokens: tuple[int, ...] = (64, 1024)
    scales: tuple[float, ...] = (1e-4, 1e-2, 1.0, 1e2, 1e4)


def rates(config: Config) -> np.ndarray:
    """Learning rates, (rules, rates)."""
    base = 10 ** np.linspace(*config.decades, config.rates)
    factors = {"SGD": 1.0, "momentum": 0.1, "Adam": 0.01, "AdamW": 0.01, "Lion": 0.001}
    return np.array([factors[rule] * base for rule in RULES])


def rule(name: str, rate: Any) -> Any:
    """The transformation; its learning rate may be traced."""
    return {
        "SGD": optim.sgd,
        "momentum": optim.momentum,
        "Adam": optim.adam,
        "AdamW": partial(optim.adamw, weight_decay=0.01),
        "Lion": partial(optim.lion, weight_decay=0.0),
    }[name](rate)


def _slope(gradient: jax.Array, update: jax.Array) -> jax.Array:
    """Slope of ln RMS update over ln RMS gradient among the weights, from sums of squares."""
    x, y = jnp.log(gradient), jnp.log(update)
    here = jnp.isfinite(x) & jnp.isfinite(y)  # a weight without gradient has no logarithm
    n = jnp.maximum(jnp.sum(here), 1)
    x, y = (jnp.where(here, a, 0) for a in (x, y))
    x, y = (jnp.where(here, a - jnp.sum(a) / n, 0) for a in (x, y))
    return jnp.sum(x * y) / jnp.sum(x * x)


def _sweep(init: Any, loss: Any, steps: int, config: Config) -> frame.Arrays:
    """All rules at all rates from one start: one gradient is compiled, and five updates.

    Parameters are one vector: an operation a leaf would take longer to compile than to run.
    """
    table = jnp.asarray(rates(config), jnp.float32)

    def update(name: str, rate: jax.Array, state: Any, params: Any, g: Any) -> tuple[Any, Any]:
        return rule(name, rate).update(g, state, params)

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key)
        first, tree = ravel_pytree(init(keys[0]))

        def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            params, states, seen = carry
            gradient = jax.value_and_grad(lambda v: loss(tree(v), key))
            value, g = jax.vmap(jax.vmap(gradient))(params)
            made = [
                jax.vmap(partial(update, name))(table[i], states[i], params[i], g[i])
                for i, name in enumerate(RULES)
            ]
            updates = jnp.stack([u for u, _ in made])
            seen = seen[0] + g**2, seen[1] + updates**2
            return (params + updates, [state for _, state in made], seen), value

        params = jnp.broadcast_to(first, (*table.shape, *first.shape))
        states = [
            jax.vmap(lambda rate, n=name: rule(n, rate).init(first))(row)
            for name, row in zip(RULES, table, strict=True)
        ]
        zeros = jnp.zeros_like(params)
        batches = jax.random.split(keys[1], steps)
        (_, _, seen), losses = lax.scan(step, (params, states, (zeros, zeros)), batches)
        return {
            "loss": jnp.mean(losses[-steps // 10 :], 0),
            "slope": jax.vmap(jax.vmap(_slope))(*seen),
            "start": losses[0, 0, 0],
        }

    return frame.over_seeds(one, config.seeds)


def _digits(config: Config) -> frame.Arrays:
    x, y = training.digits()
    model = mlp.Config(64, 10, config.width, config.depth, scan=True)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        some, labels = training.draw(key, x, y, config.batch)
        return training.cross_entropy(mlp.apply(params, some, model), labels)

    return _sweep(partial(mlp.init, config=model), loss, config.steps, config)


def _language(width: int, blocks: int, window: int) -> tuple[transformer.Config, Any, Any]:
    ids, vocabulary = training.text()
    model = transformer.Config(
        vocabulary, width=width, depth=blocks, heads=4, max_length=window, scan=True
    )

    def loss(params: Any, windows: jax.Array) -> jax.Array:
        return training.cross_entropy(
            transformer.apply(params, windows[:, :-1], model), windows[:, 1:]
        )

    return model, ids, loss


def _text(config: Config) -> frame.Arrays:
    model, ids, loss = _language(config.stream, config.blocks, config.window)

    def of_batch(params: Any, key: jax.Array) -> jax.Array:
        windows = data.text_windows(ids, key, batch_size=config.windows, length=config.window)
        return loss(params, windows)

    return _sweep(partial(transformer.init, config=model), of_batch, config.text_steps, config)


def _memory(config: Config) -> frame.Arrays:
    """Bytes of a training step by Adam and by Lion: (rules, tokens, [weights, state, rest])."""
    window = 32
    model, _, loss = _language(config.wide, config.blocks, window)
    params = jax.eval_shape(partial(transformer.init, config=model), jax.random.key(0))

    def size(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    def measured(name: str, tokens: int) -> list[int]:
        tx = rule(name, 1e-3)
        state = jax.eval_shape(tx.init, params)

        def step(params: Any, state: Any, windows: jax.Array) -> Any:
            updates, state = tx.update(jax.grad(loss)(params, windows), state, params)
            return jax.tree.map(jnp.add, params, updates), state

        windows = jax.ShapeDtypeStruct((tokens // window, window + 1), jnp.int32)
        made = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, windows).compile()
        return [size(params), size(state), made.memory_analysis().temp_size_in_bytes]

    rows = [[measured(name, tokens) for tokens in config.tokens] for name in ("Adam", "Lion")]
    return {"bytes": np.array(rows)}


def _scale(config: Config) -> frame.Arrays:
    """RMS of the tenth update, for real gradients of digits multiplied by factors."""
    x, y = training.digits()
    model = mlp.Config(64, 10, config.width, config.depth, scan=True)
    scales = jnp.array(config.scales, jnp.float32)

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key)
        params = mlp.init(keys[0], model)

        def gradient(key: jax.Array) -> Any:
            some, labels = training.draw(key, x, y, config.batch)
            return jax.grad(lambda p: training.cross_entropy(mlp.apply(p, some, model), labels))(
                params
            )

        stream = jax.vmap(gradient)(jax.random.split(keys[1], 10))

        def size(name: str, factor: jax.Array) -> jax.Array:
            tx = rule(name, 1.0)

            def step(state: Any, g: Any) -> tuple[Any, jax.Array]:
                g = jax.tree.map(lambda a: factor * a, g)
                updates, state = tx.update(g, state, params)
                flat = jnp.concatenate([u.ravel() for u in jax.tree.leaves(updates)])
                return state, jnp.sqrt(jnp.mean(flat**2))

            return lax.scan(step, tx.init(params), stream)[1][-1]

        return {
            "update": jnp.stack(
                [jax.vmap(partial(size, n))(scales) for n in ("SGD", "Adam", "Lion")]
            )
        }

    return frame.over_seeds(one, config.seeds)


def points(config: Config) -> dict:
    measures = {"digits": _digits, "text": _text, "memory": _memory, "scale": _scale}
    return {name: partial(measure, config) for name, measure in measures.items()}
