"""Recurrent cells over hundreds of steps: their gradients, their exponents, a task of memory."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxgrad as jg
from experiments.atlas import frame, training
from jaxgrad import nn, optim
from jaxgrad.nn import recurrent


@dataclass(frozen=True)
class Config:
    """Cells at first, over a long sequence of noise; cells that must remember their first input.

    Attributes:
        steps: T, length of the sequence.
        width: of the hidden state.
        noise: variance that the inputs give a pre-activation of the vanilla cell.
        gaussian: gains sigma_w of Gaussian recurrent matrices.
        orthogonal: gains of orthogonal ones: their largest singular value.
        seeds: cells.
        exponents_width: of the states whose Lyapunov spectrum is taken (of both LSTM states
            together).
        exponents_steps: length of their sequence.
        exponents_seeds: how many.
        memory: length of the task's sequence.
        batch: sequences a step of training.
        training: steps of Adam.
        rate: its learning rate.
        hidden: width of the cells that are trained.
        runs: trainings a cell.
    """

    steps: int = 500
    width: int = 64
    noise: float = 0.05
    gaussian: tuple[float, ...] = (0.8, 1.0, 1.327, 1.6)
    orthogonal: tuple[float, ...] = (0.9, 1.0, 1.1, 1.5)
    seeds: int = 8
    exponents_width: int = 24
    exponents_steps: int = 500
    exponents_seeds: int = 3
    memory: int = 80
    batch: int = 32
    training: int = 150
    rate: float = 0.01
    hidden: int = 24
    runs: int = 3


def horizon_bias(steps: int) -> float:
    """The gate's bias whose sigmoid is kept for about `steps` steps: ln(steps - 1)."""
    return float(np.log(steps - 1))


def biases(steps: int) -> dict[str, tuple[str, float]]:
    """{name: (cell, bias of the gate that keeps)} of the gated cells."""
    long = horizon_bias(steps)
    return {
        "GRU": ("gru", 0.0),
        f"GRU, update bias {long:.1f}": ("gru", long),
        "LSTM, forget bias 0": ("lstm", 0.0),
        "LSTM, forget bias 1": ("lstm", 1.0),
        f"LSTM, forget bias {long:.1f}": ("lstm", long),
    }


def _model(cell: str, width: int, n_in: int = 16) -> recurrent.Config:
    return recurrent.Config(n_in, 2, width, cell=cell, forget_bias=0.0)


def gated(params: Any, width: int, bias: Any) -> Any:
    """The cell's parameters with the bias added to the gate that keeps the state."""
    keeps = slice(width, 2 * width)  # forget of an LSTM, update of a GRU
    hidden = params["hidden"]
    return {**params, "hidden": {**hidden, "bias": hidden["bias"].at[keeps].add(bias)}}


def _profile(params: Any, model: recurrent.Config, xs: jax.Array, r: jax.Array) -> jax.Array:
    """Ln |dL/dh_t| over that at the last step, every 20th t from the last one back."""

    def loss(states: Any) -> jax.Array:
        return jnp.vdot(r, recurrent.hidden(jax.tree.map(lambda h: h[-1], states), model))

    found = jg.recurrent.gradient_profile(
        lambda p, h, x: recurrent.step(p, h, x, model), params,
        recurrent.initial_state(model), xs, loss,
    )  # fmt: skip
    logs = found.log_norms[::-1]
    return (logs - logs[0])[:: max(len(xs) // 25, 1)]


def _vanilla(config: Config) -> frame.Arrays:
    model = _model("vanilla", config.width)
    gaussian, orthogonal = jnp.array(config.gaussian), jnp.array(config.orthogonal)

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 5)
        params = recurrent.init(keys[0], model)["cell"]
        kernel = (
            jax.random.normal(keys[1], (model.n_in, config.width))
            * (config.noise / model.n_in) ** 0.5
        )
        params = {**params, "input": {**params["input"], "kernel": kernel}}
        n = config.width
        normal = jax.random.normal(keys[2], (n, n)) / n**0.5
        xs = jax.random.normal(keys[3], (config.steps, model.n_in))
        r = jax.random.normal(keys[4], (n,))

        def at(gain: jax.Array, matrix: jax.Array) -> jax.Array:
            hidden = {**params["hidden"], "kernel": gain * matrix}
            return _profile({**params, "hidden": hidden}, model, xs, r)

        turn = params["hidden"]["kernel"]
        return {
            "gaussian": jax.vmap(lambda g: at(g, normal))(gaussian),
            "orthogonal": jax.vmap(lambda g: at(g, turn))(orthogonal),
        }

    return frame.over_seeds(one, config.seeds)


def _gated(cell: str, config: Config) -> frame.Arrays:
    model = _model(cell, config.width)
    bias = jnp.array([b for c, b in biases(config.steps).values() if c == cell])

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 3)
        params = recurrent.init(keys[0], model)["cell"]
        xs = jax.random.normal(keys[1], (config.steps, model.n_in))
        r = jax.random.normal(keys[2], (config.width,))
        return {
            "log_gradient": jax.vmap(
                lambda b: _profile(gated(params, config.width, b), model, xs, r)
            )(bias)
        }

    return frame.over_seeds(one, config.seeds)


EXPONENTS = {"vanilla": ("vanilla", 0.0), "GRU": ("gru", 0.0), "LSTM": ("lstm", 1.0)}
"""Cells whose Lyapunov spectrum is taken, with the bias of the gate that keeps."""


def _exponents(config: Config) -> frame.Arrays:
    """Finite-time Lyapunov exponents, exact from the graded product of all Jacobians."""
    steps, n = config.exponents_steps, config.exponents_width

    def jacobians(key: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
        cell, bias = EXPONENTS[name]
        width = n // 2 if cell == "lstm" else n
        model = _model(cell, width)
        keys = jax.random.split(key, 2)
        params = recurrent.init(keys[0], model)["cell"]
        if cell != "vanilla":
            params = gated(params, width, bias)
        xs = jax.random.normal(keys[1], (steps, model.n_in))
        if cell == "vanilla":
            xs = xs * config.noise**0.5

        def flat_step(h: jax.Array, x: jax.Array) -> jax.Array:
            state = tuple(jnp.split(h, 2)) if cell == "lstm" else h
            state = recurrent.step(params, state, x, model)
            return jnp.concatenate(state) if cell == "lstm" else state

        def both(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return flat_step(h, x), jax.jacfwd(flat_step)(h, x)

        return lax.scan(both, jnp.zeros(n), xs)[1]

    def one(key: jax.Array) -> dict[str, jax.Array]:
        stacks = jnp.stack([jacobians(key, name) for name in EXPONENTS])
        g = jax.random.normal(jax.random.fold_in(key, 1), (n,))

        def back(stack: jax.Array) -> jax.Array:
            def pull(g: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
                g = g @ j
                size = jnp.linalg.norm(g)
                return g / size, jnp.log(size)

            return jnp.sum(lax.scan(pull, g / jnp.linalg.norm(g), stack, reverse=True)[1])

        return {"stacks": stacks, "rate": jax.vmap(back)(stacks) / steps}

    found = frame.over_seeds(one, config.exponents_seeds)
    stacks = jnp.moveaxis(jnp.asarray(found["stacks"]), 2, 0)  # time, seeds, cells, n, n
    logs = jg.graded_product(stacks.reshape(steps, -1, n, n)).log_singular_values()
    exponents = np.asarray(logs, float).reshape(config.exponents_seeds, len(EXPONENTS), n) / steps
    _, determinant = np.linalg.slogdet(np.asarray(stacks, float))
    return {
        "exponents": exponents,
        "rate": found["rate"],
        "log_determinant": determinant.sum(0) / steps,
    }


# Recurrent matrices of the vanilla cells that are trained; PyTorch's is uniform in +-1 / sqrt(n).
TASKS = ("vanilla, PyTorch's default", "vanilla, Gaussian", "vanilla, orthogonal")


def _first_gradient(params: Any, model: recurrent.Config, xs: jax.Array) -> jax.Array:
    """Ln of |dL/dh| at the first step over the last, of the readout's difference."""
    readout = params["readout"]["kernel"]
    return _profile(params["cell"], model, xs, readout[:, 1] - readout[:, 0])[-1]


def _task(cell: str, config: Config) -> frame.Arrays:
    """Recall the sign of the first input after `memory` steps of noise."""
    model = _model(cell, config.hidden, 2)
    settings = [b for c, b in biases(config.memory).values() if c == cell] or [0, 1, 2]

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key)
        y = jax.random.bernoulli(keys[0], shape=(config.batch,)).astype(jnp.int32)
        noise = 0.3 * jax.random.normal(keys[1], (config.memory, config.batch))
        sign = jnp.zeros((config.memory, config.batch)).at[0].set(2.0 * y - 1)
        return jnp.stack([noise, sign], -1), y

    def logits(params: Any, xs: jax.Array) -> jax.Array:
        state = recurrent.initial_state(model, (config.batch,))
        state, _ = recurrent.run(params["cell"], state, xs, model)
        return nn.linear(params["readout"], recurrent.hidden(state, model))

    def loss(params: Any, key: jax.Array) -> jax.Array:
        xs, y = draw(key)
        return training.cross_entropy(logits(params, xs), y)

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 4)
        params = recurrent.init(keys[0], model)
        n = config.hidden
        normal = jax.random.normal(keys[1], (n, n)) / n**0.5
        uniform = nn.initializer("torch_linear").weight(keys[1], (n, n), jnp.float32)
        matrices = jnp.stack([uniform, normal, params["cell"]["hidden"]["kernel"][:, :n]])

        def at(setting: jax.Array) -> tuple[jax.Array, jax.Array]:
            cell_params = params["cell"]
            if cell == "vanilla":  # the setting chooses the recurrent matrix
                hidden = cell_params["hidden"]
                hidden = {**hidden, "kernel": matrices[setting]}
                start = {**params, "cell": {**cell_params, "hidden": hidden}}
            else:
                start = {**params, "cell": gated(cell_params, n, setting)}
            xs, _ = draw(keys[2])
            survives = _first_gradient(start, model, xs[:, 0])
            tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adam(config.rate))
            _, losses = training.train(loss, start, tx, keys[3], config.training)
            return survives, jnp.mean(losses[-config.training // 10 :])

        survives, final = jax.vmap(at)(jnp.array(settings))
        return {"log_gradient": survives, "loss": final}

    return frame.over_seeds(one, config.runs)


def points(config: Config) -> dict:
    return {
        "vanilla": partial(_vanilla, config),
        "gru": partial(_gated, "gru", config),
        "lstm": partial(_gated, "lstm", config),
        "exponents": partial(_exponents, config),
        **{f"task-{cell}": partial(_task, cell, config) for cell in ("vanilla", "gru", "lstm")},
    }
