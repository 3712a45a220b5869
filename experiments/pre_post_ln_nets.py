"""Pre-LN and Post-LN nets: their gradients at first, and how they train."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

import jaxgrad as jg
from experiments.atlas import deep, frame, training
from experiments.atlas.measuring import log_gains
from jaxgrad import nn, optim
from jaxgrad.nn import mlp, transformer

NORMS = ("pre", "post")


@dataclass(frozen=True)
class Config:
    """Feed-forward nets and transformers at first; transformers trained on digits and on text.

    Attributes:
        width: of the nets whose gradients are taken, d.
        depth: blocks of the feed-forward nets.
        seeds: feed-forward nets and transformers whose gradients are taken.
        tokens: positions of the transformers whose gradients are taken.
        blocks: their depth.
        stream: width of the transformers that are trained.
        depths: of the transformers that are trained on digits, a token a row of pixels.
        rates: peak learning rates of Adam on digits.
        text_rates: on text.
        warm: steps of linear warm-up, beside none.
        steps: of training.
        batch: digits, or windows of text, a step.
        window: characters the model reads.
        runs: trainings a cell.
        stable_runs: nets on digits whose largest stable rate is found.
        stable_depth: their blocks.
        stable_steps: of gradient descent on one batch.
        factors: rates of that descent, over the one predicted.
    """

    width: int = 128
    depth: int = 48
    seeds: int = 16
    tokens: int = 32
    blocks: int = 24
    stream: int = 16
    depths: tuple[int, ...] = (2, 12)
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    text_rates: tuple[float, ...] = (0.003, 0.01)
    warm: int = 75
    steps: int = 150
    batch: int = 16
    window: int = 16
    runs: int = 3
    stable_runs: int = 3
    stable_depth: int = 4
    stable_steps: int = 30
    factors: tuple[float, ...] = (0.5, 0.7, 0.9, 1.1, 1.4, 2.0, 4.0, 8.0, 16.0, 32.0)


def _drawn(init: Any, seeds: int) -> tuple[Any, jax.Array]:
    """(parameters, further keys) of all seeds.

    Drawn before the rest is compiled: random numbers take XLA for CPU longer to compile, inside a
    large program, than to draw.
    """
    keys = jax.vmap(jax.random.split)(jax.random.split(jax.random.key(0), seeds))
    return jax.vmap(init)(keys[:, 0]), keys[:, 1]


def kept(depth: int) -> np.ndarray:
    """The layers whose numbers are kept, from 1 on: about evenly spaced in the logarithm."""
    return np.unique(np.round(np.geomspace(1, depth, 10)).astype(int))


def _feed_forward(config: Config) -> frame.Arrays:
    """Gradients of Xavier ReLU blocks, read by a random vector of unit entries."""
    layers = kept(config.depth) - 1

    def model_of(norm: str) -> mlp.Config:
        return mlp.Config(
            1, 1, config.width, 1, "relu", "xavier_normal", norm="layer",
            residual=f"{norm}_ln", scan=True,
        )  # fmt: skip

    def init(key: jax.Array) -> Any:  # both rules have the same parameters
        keys = jax.random.split(key)
        blocks = deep.blocks(
            lambda k: mlp.init(k, model_of("pre"))["blocks"], keys[0], config.depth
        )
        return blocks, jax.random.normal(keys[1], (2, config.width))

    def one(blocks: Any, ends: jax.Array, norm: str) -> dict[str, jax.Array]:
        model, (x, r) = model_of(norm), ends

        def read(h: jax.Array) -> jax.Array:
            return jnp.vdot(r, nn.layer_norm({}, h) if norm == "pre" else h)

        def step(h: jax.Array, params: Any) -> tuple[jax.Array, Any]:
            def cut(kernel: jax.Array) -> jax.Array:  # the net that ends with this block
                outer = {**params["outer"], "kernel": kernel}
                return read(mlp.block({**params, "outer": outer}, h, model))

            size = jnp.linalg.norm(jax.grad(cut)(params["outer"]["kernel"]))
            h = mlp.block(params, h, model)
            return h, (size, jnp.mean(jnp.square(h)))

        def whole(blocks: Any, x: jax.Array) -> jax.Array:
            return read(lax.scan(lambda h, p: (mlp.block(p, h, model), None), x, blocks)[0])

        first = nn.layer_norm({}, x)
        _, (last, q) = lax.scan(step, first, blocks)
        kernels = jax.grad(whole)(blocks, first)["outer"]["kernel"]
        top = lax.scan(lambda h, p: (mlp.block(p, h, model), None), first, blocks)[0]
        gains = log_gains(lambda p, h: mlp.block(p, h, model), blocks, first, jax.grad(read)(top))
        profile = jnp.linalg.norm(kernels, axis=(1, 2))
        return {"last": last[layers], "q": q[layers], "profile": profile[layers],
                "log_gain": jnp.sum(gains)}  # fmt: skip

    def both(drawn: Any) -> dict[str, jax.Array]:
        found = {norm: one(*drawn, norm) for norm in NORMS}
        return {f"{norm}_{k}": v for norm, values in found.items() for k, v in values.items()}

    return frame.mapped(both, _drawn(init, config.seeds)[0])


def _model(norm: str, depth: int, config: Config, **changes: Any) -> transformer.Config:
    hidden = 2 * config.stream
    options = {"vocabulary": 1, "n_out": 10, "heads": 2, "hidden": hidden, "causal": False,
               "pool": True, **changes}  # fmt: skip
    return transformer.Config(
        width=config.stream, depth=depth, residual=f"{norm}_ln", scan=True, **options
    )


def _blocks(key: jax.Array, model: transformer.Config, depth: int) -> Any:
    one = dataclasses.replace(model, depth=1)
    return deep.blocks(lambda k: transformer.init(k, one)["blocks"], key, depth)


def _net(key: jax.Array, model: transformer.Config) -> dict[str, Any]:
    keys = jax.random.split(key)
    params = transformer.init(keys[0], dataclasses.replace(model, depth=1))
    return {**params, "blocks": _blocks(keys[1], model, model.depth)}


def _attention(config: Config) -> frame.Arrays:
    """Ln of the gradient at every block of a transformer, over that at the last."""

    def model_of(norm: str) -> transformer.Config:
        return transformer.Config(
            1, width=config.width, depth=1, heads=2, hidden=config.width, causal=False,
            positions="none", activation="relu", initializer="xavier_normal",
            residual=f"{norm}_ln", scan=True,
        )  # fmt: skip

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key)
        ends = jax.random.normal(keys[1], (2, config.tokens, config.width))
        return _blocks(keys[0], model_of("pre"), config.blocks), ends

    def one(blocks: Any, ends: jax.Array, norm: str) -> jax.Array:
        model = model_of(norm)
        gains = log_gains(lambda p, h: transformer.block(p, h, model), blocks, *ends)
        return jnp.cumsum(gains[::-1])[::-1]

    def both(drawn: Any) -> dict[str, jax.Array]:
        return {norm: one(*drawn, norm) for norm in NORMS}

    return frame.mapped(both, _drawn(init, config.seeds)[0])


def digit_net(norm: str, depth: int, config: Config) -> tuple[Any, Any]:
    """(init, logits) of a transformer that reads a digit row by row."""
    model = _model(norm, depth, config)

    def init(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, 3)
        params = _net(keys[0], model)
        params["embed"] = nn.weights_init(keys[1], (8, config.stream), "xavier_uniform")
        params["places"] = jax.random.normal(keys[2], (8, config.stream)) / config.stream**0.5
        return params

    def logits(params: Any, x: jax.Array) -> jax.Array:
        h = nn.linear(params["embed"], x.reshape(-1, 8, 8)) + params["places"]
        return transformer.readout(params, transformer.trunk(params, h, model), model)

    return init, logits


def schedule(peak: jax.Array, warm: jax.Array) -> Any:
    """Linear warm-up to the peak; with warm = 1 there is none."""
    return lambda count: peak * jnp.minimum(1.0, (count + 1) / warm)


def _grid(init: Any, loss: Any, peaks: tuple[float, ...], config: Config) -> frame.Arrays:
    """Losses at the end of Adam, over seeds, peak rates, and without and with warm-up."""
    rates, warm = jnp.array(peaks), jnp.array([1.0, config.warm])

    def one(params: Any, key: jax.Array) -> dict[str, jax.Array]:
        # one vector: a leaf each would take longer to compile than to run
        vector, tree = ravel_pytree(params)

        def cell(rate: jax.Array, warm: jax.Array) -> jax.Array:
            tx = optim.adam(schedule(rate, warm))
            _, losses = training.train(
                lambda v, key: loss(tree(v), key), vector, tx, key, config.steps
            )
            return jnp.mean(losses[-config.steps // 10 :])

        return {"loss": jax.vmap(jax.vmap(cell, (None, 0)), (0, None))(rates, warm)}

    return frame.mapped(one, *_drawn(init, config.runs))


def _digits(norm: str, depth: int, config: Config) -> frame.Arrays:
    x, y = training.digits()
    init, logits = digit_net(norm, depth, config)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        some, labels = training.draw(key, x, y, config.batch)
        return training.cross_entropy(logits(params, some), labels)

    return _grid(init, loss, config.rates, config)


def _text(norm: str, config: Config) -> frame.Arrays:
    ids, vocabulary = training.text()
    model = _model(norm, config.depths[-1], config, vocabulary=vocabulary, n_out=None,
                   causal=True, pool=False, max_length=config.window)  # fmt: skip

    def loss(params: Any, key: jax.Array) -> jax.Array:
        windows = jg.data.text_windows(ids, key, batch_size=config.batch, length=config.window)
        logits = transformer.apply(params, windows[:, :-1], model)
        return training.cross_entropy(logits, windows[:, 1:])

    return _grid(partial(_net, model=model), loss, config.text_rates, config)


def entropy(counts: Any) -> float:
    """Of the marginal distribution of labels, in nats: the best loss that ignores the input."""
    p = np.asarray(counts, float)
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum())


def _labels(config: Config) -> frame.Arrays:
    del config
    return {
        "digits": np.bincount(np.asarray(training.digits()[1])),
        "text": np.bincount(np.asarray(training.text()[0])),
    }


def _stability(norm: str, config: Config) -> frame.Arrays:
    """The largest rate of gradient descent on one batch: predicted by the Hessian, and found."""
    x, y = training.digits()
    batch = (x[:64], y[:64])
    init, logits = digit_net(norm, config.stable_depth, config)
    factors = jnp.array(config.factors)

    def loss(params: Any, batch: Any) -> jax.Array:
        return training.cross_entropy(logits(params, batch[0]), batch[1])

    def descent(params: Any, rate: jax.Array) -> jax.Array:
        vector, tree = ravel_pytree(params)
        _, losses = training.train(
            lambda v, _: loss(tree(v), batch), vector, optim.sgd(rate), jax.random.key(0),
            config.stable_steps,
        )  # fmt: skip
        return jnp.stack([losses[0], jnp.max(losses), losses[-1]])

    keys = jax.random.split(jax.random.key(0), config.stable_runs)
    nets = jax.vmap(init)(keys)
    ones = [jax.tree.map(lambda a, k=k: a[k], nets) for k in range(config.stable_runs)]
    predicted = np.array([
        jg.max_stable_learning_rate(loss, p, batch, optim.sgd, iterations=32, tolerance=0.01)
        for p in ones
    ])  # fmt: skip
    run = frame.compiled(jax.vmap(jax.vmap(descent, (None, 0)), (0, 0)))
    losses = run(nets, jnp.asarray(predicted, jnp.float32)[:, None] * factors)
    return {"predicted": predicted, "losses": np.asarray(losses)}


def points(config: Config) -> dict:
    return {
        "labels": partial(_labels, config),
        "feed_forward": partial(_feed_forward, config),
        "attention": partial(_attention, config),
        **{
            f"digits-{norm}-{depth}": partial(_digits, norm, depth, config)
            for norm in NORMS
            for depth in config.depths
        },
        **{f"text-{norm}": partial(_text, norm, config) for norm in NORMS},
        **{f"stability-{norm}": partial(_stability, norm, config) for norm in NORMS},
    }
