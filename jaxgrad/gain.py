"""What a layer of a chain does to a signal: the mean squared singular value of its Jacobian."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxgrad.graph import structure
from jaxgrad.graph.program import Program, State

# Jacobians of at most this many rows an example are measured exactly.
_EXACT = 256


class Measured(NamedTuple):
    """Of one layer at one factor of its weights.

    Attributes:
        gain: mean squared singular value, `||J||_F^2 / n_out`.
        variance: of the pre-activation.
        mean_square: of the pre-activation.
        finite: 1 if the output and the gain are finite.
    """

    gain: float
    variance: float
    mean_square: float
    finite: float


class Spec(NamedTuple):
    """What a measurement is compiled for.

    Attributes:
        own: positions of the program's constants that are scaled.
        has_preactivation: whether the program returns one after the state.
        probes: number of random vectors.
    """

    own: tuple[int, ...]
    has_preactivation: bool
    probes: int


@functools.partial(jax.jit, static_argnums=0)
def run(program: Program, constants: State, sides: State, state: State) -> tuple[State, State]:
    """The program, compiled."""
    return program.run(constants, sides, state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def measure(  # noqa: PLR0913, PLR0917
    program: Program, spec: Spec, constants: State, sides: State, state: State, factor: Array,
    key: Array,
) -> Array:  # fmt: skip
    """`Measured` of a layer whose own weights are multiplied by `factor`, as one vector."""
    values = list(constants)
    for position in spec.own:
        values[position] = values[position] * factor.astype(values[position].dtype)

    def layer(*state: Array) -> tuple[State, Array]:
        after, _ = program.run(tuple(values), sides, state)
        if spec.has_preactivation:
            return after[:-1], after[-1]
        return after, after[-1]

    if not structure.directions(program)[1]:  # no reverse mode: a while_loop
        out, push, preact = jax.linearize(layer, *state, has_aux=True)
        gain = _mean_square_of(lambda t: push(*t), state, key, spec.probes)
        gain = gain * _size(state) / _size(out)
    else:
        out, pull, preact = jax.vjp(layer, *state, has_aux=True)
        gain = _mean_square_of(pull, out, key, spec.probes)
    preact = preact.astype(jnp.promote_types(preact.dtype, jnp.float32))
    square = jnp.mean(preact**2)
    finite = functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(a)) for a in out])
    finite = finite & jnp.isfinite(gain)
    return jnp.stack([gain, jnp.var(preact), square, finite.astype(gain.dtype)])


def _size(state: State) -> int:
    return sum(a.size for a in state)


def _mean_square_of(
    linear: Callable[[State], State], like: State, key: Array, probes: int
) -> Array:
    """`||A||_F^2` over the number of elements of `like`, for a linear map A from `like`.

    Exactly if that has few elements; or, where the first axis counts independent examples, if an
    example has: each probe is a basis vector with a random sign an example, so that what couples
    examples averages out. Else from random signs (Hutchinson).
    """
    sizes = [a.size for a in like]
    total = sum(sizes)
    first = {a.shape[0] if a.ndim else 1 for a in like}
    rows = total // next(iter(first)) if len(first) == 1 else total

    def probe(i: Array) -> Array:
        signs = jax.random.rademacher(jax.random.fold_in(key, i), (total,), jnp.float32)
        if total <= _EXACT:
            return jax.nn.one_hot(i, total)
        if rows <= _EXACT and len(like) == 1:
            return signs * jnp.tile(jax.nn.one_hot(i % rows, rows), total // rows)
        return signs

    count = probes
    if total <= _EXACT:
        count = total
    elif rows <= _EXACT and len(like) == 1:
        count = rows * -(-probes // rows)
    places = np.cumsum(sizes)[:-1]

    def squares(i: Array) -> Array:
        vector = probe(i)
        parts = jnp.split(vector, places) if len(like) > 1 else [vector]
        cast = [p.reshape(a.shape).astype(a.dtype) for p, a in zip(parts, like, strict=True)]
        result = linear(tuple(cast))
        wide = [jnp.promote_types(r.dtype, jnp.float32) for r in result]
        norms = [jnp.sum(r.astype(t) ** 2) for r, t in zip(result, wide, strict=True)]
        return jnp.stack([sum(norms), jnp.sum(vector**2)])

    found = jnp.sum(jax.lax.map(squares, jnp.arange(count), batch_size=min(count, 64)), axis=0)
    return found[0] / found[1]
