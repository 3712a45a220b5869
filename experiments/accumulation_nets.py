"""Accumulation of gradients, right and in every wrong way, on digits and on text."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.atlas import frame, training
from jaxgrad import data, nn, optim
from jaxgrad.nn import mlp

KINDS = ("no norm", "LayerNorm", "BatchNorm")
RULES = ("SGD", "momentum", "SGD behind a clip at 1", "Adam")


@dataclass(frozen=True)
class Config:
    """Small nets on digits, and a next-character model on text.

    Attributes:
        width: of all nets.
        batch: digits of the large batch.
        counts: numbers of micro-batches N that it is split into.
        seeds: nets.
        draws: gradients over which the noise is measured.
        micro: digits of a micro-batch, for the noise, the rules and the memory.
        steps: real steps of the rules' training.
        rate: its learning rate.
        longest: characters of the longest paragraph kept; the others keep their length.
        tolerance: relative distance that counts as equal, in float32.
    """

    width: int = 64
    batch: int = 128
    counts: tuple[int, ...] = (2, 8, 32)
    seeds: int = 8
    draws: int = 400
    micro: int = 16
    steps: int = 20
    rate: float = 0.02
    longest: int = 64
    tolerance: float = 1e-5


def _net(kind: str, config: Config) -> tuple[Any, Any]:
    """(init, loss of a batch) of a perceptron on digits."""
    residual, norm = ("pre_ln", "layer") if kind == "LayerNorm" else ("none", "none")
    model = mlp.Config(64, 10, config.width, 2, norm=norm, residual=residual, scan=True)

    def logits(params: Any, x: jax.Array) -> jax.Array:
        if kind != "BatchNorm":
            return mlp.apply(params, x, model)
        scale, state = nn.batch_norm_init(config.width)
        h = nn.linear(params["embed"], x)
        h, _ = nn.batch_norm_training(scale, state, h)
        return nn.linear(params["readout"], jax.nn.relu(h))

    def loss(params: Any, batch: Any) -> jax.Array:
        return training.cross_entropy(logits(params, batch[0]), batch[1])

    return partial(mlp.init, config=model), loss


def accumulated(loss: Any, params: Any, micros: Any, *, mean: bool = True) -> Any:
    """The gradient that `optim.accumulate` hands to its rule; micros have a leading axis of N."""
    count = len(jax.tree.leaves(micros)[0])
    tx = optim.accumulate(optim.sgd(1.0), count, mean=mean)

    def one(state: Any, micro: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(loss)(params, micro), state, params)
        return state, updates

    _, updates = lax.scan(one, tx.init(params), micros)
    return jax.tree.map(lambda u: -u[-1], updates)


def looped(loss: Any, params: Any, micros: Any, erase: Any, divide: Any) -> Any:
    """The loop of a training script: zero (at every micro-batch if `erase`), add, and step."""
    count = len(jax.tree.leaves(micros)[0])
    kept, factor = jnp.where(erase, 0.0, 1.0), jnp.where(divide, 1 / count, 1.0)

    def one(total: Any, micro: Any) -> tuple[Any, None]:
        g = jax.grad(loss)(params, micro)
        return jax.tree.map(lambda t, g: kept * t + factor * g, total, g), None

    return lax.scan(one, jax.tree.map(jnp.zeros_like, params), micros)[0]


def distance(a: Any, b: Any) -> jax.Array:
    """`|a - b| / |b|` of two trees."""
    return optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / optax.tree.norm(b)


def _split(batch: Any, count: int) -> Any:
    return jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), batch)


def _equal(config: Config) -> frame.Arrays:
    x, y = training.digits()

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys, rows = jax.random.split(key), []
        batch = training.draw(keys[0], x, y, config.batch)
        for kind in KINDS:
            init, loss = _net(kind, config)
            params = init(keys[1])
            whole = jax.grad(loss)(params, batch)
            rows.append([
                distance(accumulated(loss, params, _split(batch, n)), whole) for n in config.counts
            ])  # fmt: skip
        return {"distance": jnp.array(rows)}

    return frame.over_seeds(one, config.seeds)


def _erased(config: Config) -> frame.Arrays:
    x, y = training.digits()
    init, loss = _net("no norm", config)

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key)
        params = init(keys[0])
        full = jax.grad(loss)(params, (x, y))

        def noise(key: jax.Array, n: int) -> list[jax.Array]:
            micros = _split(training.draw(key, x, y, n * config.micro), n)
            last = jax.grad(loss)(params, jax.tree.map(lambda a: a[-1], micros))
            found = jax.vmap(lambda erase, divide: looped(loss, params, micros, erase, divide))(
                jnp.array([False, True, True]), jnp.array([True, False, True])
            )
            right, bare, divided = (jax.tree.map(lambda a, k=k: a[k], found) for k in range(3))
            gaps = [
                optax.tree.norm(jax.tree.map(jnp.subtract, g, full)) ** 2 for g in (right, bare)
            ]
            return [*gaps, distance(bare, last), distance(divided, last)]

        draws = jax.random.split(keys[1], config.draws)
        found = [lax.map(partial(noise, n=n), draws, batch_size=50) for n in config.counts[:2]]
        means = jnp.array([[jnp.mean(column) for column in rows] for rows in found])
        return {"variance_ratio": means[:, 1] / means[:, 0], "bare": means[:, 2],
                "divided": means[:, 3]}  # fmt: skip

    return frame.over_seeds(one, config.seeds)


def _rule(name: str, rate: float) -> Any:
    return {
        "SGD": lambda: optim.sgd(rate),
        "momentum": lambda: optim.momentum(rate),
        "SGD behind a clip at 1": lambda: optim.chain(
            optim.clip_by_global_norm(1.0), optim.sgd(rate)
        ),
        "Adam": lambda: optim.adam(rate / 10),
    }[name]()


def _summed(config: Config) -> frame.Arrays:
    """Distances of a training by sums from one by means, and from means at N times the rate."""
    x, y = training.digits()
    init, loss = _net("no norm", config)
    n = config.counts[1]

    def trained(tx: Any, params: Any, key: jax.Array) -> Any:
        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            g = jax.grad(loss)(params, training.draw(key, x, y, config.micro))
            updates, state = tx.update(g, state, params)
            return (jax.tree.map(jnp.add, params, updates), state), None

        keys = jax.random.split(key, n * config.steps)
        (last, _), _ = lax.scan(step, (params, tx.init(params)), keys)
        return jax.tree.map(jnp.subtract, last, params)

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key)
        params = init(keys[0])
        rows = []
        for name in RULES:
            sums = trained(
                optim.accumulate(_rule(name, config.rate), n, mean=False), params, keys[1]
            )
            both = jax.vmap(
                lambda rate, name=name: trained(
                    optim.accumulate(_rule(name, rate), n), params, keys[1]
                )
            )(config.rate * jnp.array([1.0, n]))
            means, faster = (jax.tree.map(lambda a, k=k: a[k], both) for k in range(2))
            rows.append([distance(sums, faster), distance(sums, means)])
        return {"distance": jnp.array(rows)}

    return frame.over_seeds(one, config.seeds)


def _uneven(config: Config) -> frame.Arrays:
    """A next-character model on paragraphs of their own lengths, one a micro-batch."""
    ids, vocabulary = training.text()
    n, longest = config.counts[1], config.longest
    newline = int(data.english_text().encode("\n")[0])
    breaks = np.flatnonzero((np.asarray(ids)[:-1] == newline) & (np.asarray(ids)[1:] == newline))
    breaks = breaks[breaks < len(ids) - longest - 4]
    starts = jnp.asarray(breaks[:-1] + 2)
    lengths = jnp.clip(jnp.asarray(np.diff(breaks) - 2), 4, longest)

    def loss(params: Any, micro: Any) -> jax.Array:
        windows, length = micro
        h = jnp.tanh(params["embed"][windows[:-1]])
        logits = jax.nn.log_softmax(nn.linear(params["out"], h))
        chosen = jnp.take_along_axis(logits, windows[1:, None], -1)[:, 0]
        return -jnp.sum(jnp.where(jnp.arange(longest) < length, chosen, 0)) / length

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 3)
        out = nn.weights_init(keys[1], (config.width, vocabulary), "lecun_normal")
        params = {"embed": jax.random.normal(keys[0], (vocabulary, config.width)), "out": out}
        rows = jax.random.randint(keys[2], (n,), 0, len(starts))
        windows = ids[starts[rows][:, None] + jnp.arange(longest + 1)]

        def whole(params: Any, length: jax.Array) -> jax.Array:
            means = jax.vmap(lambda w, m: loss(params, (w, m)))(windows, length)
            return jnp.sum(means * length) / jnp.sum(length)

        def weighted(length: jax.Array) -> Any:
            tx = optim.accumulate(optim.sgd(1.0), n, weights="tokens")
            state = tx.init(params)

            def add(state: Any, micro: Any) -> tuple[Any, Any]:
                g = jax.grad(loss)(params, micro)
                updates, state = tx.update(g, state, params, tokens=micro[1])
                return state, updates

            _, updates = lax.scan(add, state, (windows, length))
            return jax.tree.map(lambda u: -u[-1], updates)

        same, own = jnp.full(n, longest), lengths[rows]
        plain = [
            distance(accumulated(loss, params, (windows, m)), jax.grad(whole)(params, m))
            for m in (same, own)
        ]
        right = distance(weighted(own), jax.grad(whole)(params, own))
        return {"equal": plain[0], "uneven": plain[1], "weighted": right,
                "spread": jnp.std(own) / jnp.mean(own)}  # fmt: skip

    return frame.over_seeds(one, 4 * config.seeds)


def _memory(config: Config) -> frame.Arrays:
    """Bytes that XLA sets aside for a step: one micro-batch, N of them accumulated, all at once."""
    init, loss = _net("no norm", config)
    params = jax.eval_shape(init, jax.random.key(0))

    def needed(step: Callable[..., Any], n: int) -> int:
        shapes = (n, 8 * config.micro)
        micros = (
            jax.ShapeDtypeStruct((*shapes, 64), jnp.float32),
            jax.ShapeDtypeStruct(shapes, jnp.int32),
        )
        return jax.jit(step).lower(params, micros).compile().memory_analysis().temp_size_in_bytes

    def at_once(params: Any, micros: Any) -> Any:
        return jax.grad(loss)(params, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), micros))

    rows = [
        [needed(at_once, 1), needed(partial(looped, loss, erase=False, divide=True), n),
         needed(at_once, n)]
        for n in config.counts
    ]  # fmt: skip
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return {"bytes": np.array(rows), "parameters": np.array(size)}


def points(config: Config) -> dict:
    measures = {
        "equal": _equal, "erased": _erased, "summed": _summed, "uneven": _uneven, "memory": _memory,
    }  # fmt: skip
    return {name: partial(measure, config) for name, measure in measures.items()}
