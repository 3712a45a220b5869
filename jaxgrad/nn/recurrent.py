"""Recurrent networks: vanilla, GRU and LSTM cells, unrolled or scanned over time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.nn.activations import activation
from jaxgrad.nn.dense import compute_dtype, linear, through, weights_init

State = Any  # the hidden state (..., width); of an LSTM the pair (cell, hidden)


@dataclass(frozen=True)
class Config:
    """A recurrent network of one layer with a readout at every step.

    Attributes:
        n_in: features of an input.
        n_out: of an output.
        width: of the hidden state.
        cell: "vanilla", "gru" or "lstm".
        activation: of the vanilla cell, a name in `ACTIVATIONS`.
        initializer: of the kernels from the inputs and to the outputs.
        recurrent_initializer: of each gate's kernel from the hidden state.
        gain: factor of the recurrent kernels.
        forget_bias: first bias of an LSTM's forget gate (Gers et al. 2000; Jozefowicz et al. 2015).
        scan: whether time is scanned or unrolled.
        remat: whether the backward pass recomputes the steps.
        dtype: of the computation; None is the parameters'. Outputs are float32 at least.
    """

    n_in: int
    n_out: int
    width: int = 64
    cell: str = "lstm"
    activation: str = "tanh"
    initializer: str = "xavier_uniform"
    recurrent_initializer: str = "orthogonal"
    gain: float = 1.0
    forget_bias: float = 1.0
    scan: bool = True
    remat: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {self.cell!r}")


def _vanilla(params: PyTree, h: Array, x: Array, config: Config) -> Array:
    pre = linear(params["input"], x) + linear(params["hidden"], h)
    return activation(config.activation)(pre)


def _gru(params: PyTree, h: Array, x: Array, config: Config) -> Array:
    """Cho et al. 2014 (arXiv 1406.1078), the reset gate after the product, as in cuDNN."""
    del config
    reset_x, update_x, new_x = jnp.split(linear(params["input"], x), 3, -1)
    reset_h, update_h, new_h = jnp.split(linear(params["hidden"], h), 3, -1)
    reset = jax.nn.sigmoid(reset_x + reset_h)
    update = jax.nn.sigmoid(update_x + update_h)
    new = jnp.tanh(new_x + reset * new_h)
    return (1 - update) * new + update * h


def _lstm(params: PyTree, state: tuple[Array, Array], x: Array, config: Config) -> State:
    """Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000."""
    del config
    cell, h = state
    gates = linear(params["input"], x) + linear(params["hidden"], h)
    i, f, g, o = jnp.split(gates, 4, -1)
    cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    return cell, jax.nn.sigmoid(o) * jnp.tanh(cell)


CELLS: dict[str, tuple[int, Callable[..., State]]] = {
    "vanilla": (1, _vanilla),
    "gru": (3, _gru),  # reset, update, new
    "lstm": (4, _lstm),  # input, forget, cell, output
}
"""Number of gates, stacked in PyTorch's order, and (params, state, x, config) -> the next state."""


def init(key: Array, config: Config) -> dict[str, Any]:
    """Parameters, float32.

    Args:
        key: PRNG key.
        config: the model.

    Returns:
        {"cell": {"input": {"kernel": (n_in, gates width), "bias"}, "hidden": {"kernel": (width,
        gates width), "bias"}}, "readout"}.
    """
    gates, _ = CELLS[config.cell]
    for_input, for_hidden, for_readout = jax.random.split(key, 3)

    def many(key: Array, n: int, rule: str, gain: float) -> dict[str, Array]:
        # each gate is a matrix of its own: the fans, and orthogonality, are the gate's
        shape = (n, config.width)
        drawn = [weights_init(k, shape, rule, gain) for k in jax.random.split(key, gates)]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, -1), *drawn)

    cell = {
        "input": many(for_input, config.n_in, config.initializer, 1.0),
        "hidden": many(for_hidden, config.width, config.recurrent_initializer, config.gain),
    }
    if config.cell == "lstm":
        forget = slice(config.width, 2 * config.width)
        cell["hidden"]["bias"] = cell["hidden"]["bias"].at[forget].add(config.forget_bias)
    readout = weights_init(for_readout, (config.width, config.n_out), config.initializer)
    return {"cell": cell, "readout": readout}


def initial_state(config: Config, shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> State:
    """Zeros: (*shape, width), for an LSTM twice."""
    zeros = jnp.zeros((*shape, config.width), dtype)
    return (zeros, zeros) if config.cell == "lstm" else zeros


def step(params: PyTree, state: State, x: Float[Array, "... n_in"], config: Config) -> State:
    """The next state.

    Args:
        params: `init`'s "cell".
        state: of `initial_state` or an earlier step.
        x: this step's input.
        config: the model.
    """
    return CELLS[config.cell][1](params, state, x, config)


def hidden(state: State, config: Config) -> Float[Array, "... width"]:
    """What a state shows to the readout."""
    return state[1] if config.cell == "lstm" else state


def run(
    params: PyTree, state: State, xs: Float[Array, "time ... n_in"], config: Config
) -> tuple[State, Float[Array, "time ... width"]]:
    """The last state and every step's hidden state.

    Args:
        params: `init`'s "cell".
        state: before the first step.
        xs: inputs, time first.
        config: the model.
    """

    def block(x: Array, state: State) -> tuple[State, Array]:
        state = step(params, state, x, config)
        return state, hidden(state, config)

    inputs = xs if config.scan else tuple(xs)
    last, hs = through(block, inputs, state, config.remat, name="step")
    return last, hs if config.scan else jnp.stack(hs)


def apply(
    params: PyTree, xs: Float[Array, "time ... n_in"], config: Config
) -> Float[Array, "time ... n_out"]:
    """Outputs at every step, from a state of zeros.

    Args:
        params: of `init`.
        xs: inputs, time first.
        config: the model.

    Returns:
        Outputs, float32 at least.
    """
    dtype = compute_dtype(params, config.dtype)
    xs = jnp.asarray(xs, dtype)
    state = initial_state(config, xs.shape[1:-1], dtype)
    _, hs = run(params["cell"], state, xs, config)
    with jax.named_scope("readout"):
        y = linear(params["readout"], hs)
        return y.astype(jnp.promote_types(y.dtype, jnp.float32))
