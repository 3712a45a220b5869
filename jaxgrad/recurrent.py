"""Recurrent networks through time: the same chain, its layers being the steps.

A cell is a function `cell(params, carry, x_t) -> carry`; the carry is any pytree, `(h, c)` for an
LSTM. With respect to the first carry the network is a chain whose inputs are held fixed, so all
that is said of chains holds for it: `jg.lyapunov_exponents(time_chain(cell, params, xs), carry)` is
its Lyapunov spectrum. What is particular to time is here: gradients at every step of a loss that
reads every step, and what truncating the backward pass does to the gradient of the parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxgrad.chain import Chain
from jaxgrad.graded import scale

Cell = Callable[[Any, Any, Any], Any]
Loss = Callable[[Any], Array]


def time_chain(cell: Cell, params: PyTree, xs: PyTree) -> Chain:
    """The network as a chain over time, from the first carry to the last.

    Args:
        cell: `cell(params, carry, x_t) -> carry`.
        params: its parameters, the same at all steps.
        xs: inputs, arrays with a leading axis of time.

    Returns:
        A chain of one layer a step, `steps[0]`, `steps[1]`, ..., compiled once.

    Raises:
        ValueError: if the inputs have no common leading axis, or it is empty.
    """
    _check_steps(xs)
    return Chain.scanned(lambda x, carry: cell(params, carry, x), xs, name="steps")


class GradientProfile(NamedTuple):
    """A loss's gradient with respect to the carry, by time; entry t belongs to h_t, t = 0 ... T.

    Attributes:
        log_norms: natural logarithm of `|dL/dh_t|`, through all later steps, (T + 1,).
        log_direct_norms: of the loss's own reading of h_t, without later steps; -inf where it does
            not read it, as at t = 0.
    """

    log_norms: Float[Array, " steps"]
    log_direct_norms: Float[Array, " steps"]


def gradient_profile(
    cell: Cell, params: PyTree, carry: PyTree, xs: PyTree, loss: Loss
) -> GradientProfile:
    """How much of a loss's gradient reaches each step.

    The gradients are carried at extended range: a profile over 10,000 steps does not underflow.

    Args:
        cell: `cell(params, carry, x_t) -> carry`.
        params: its parameters.
        carry: the first carry, h_0.
        xs: inputs, arrays with a leading axis of T steps.
        loss: from the carries h_1 ... h_T, stacked along a leading axis, to a scalar. A loss of the
            last step alone is `lambda hs: f(jax.tree.map(lambda h: h[-1], hs))`.

    Returns:
        The norms.

    Raises:
        TypeError: if the carry holds integers.
    """
    _check_steps(xs)
    integers = [a.dtype.name for a in map(jnp.asarray, jax.tree.leaves(carry))]
    integers = [name for name in integers if not jnp.issubdtype(name, jnp.floating)]
    if integers:
        raise TypeError(
            f"gradient_profile(carry=): expected floating-point arrays, got {integers[0]}; give "
            "counters to the cell through xs"
        )
    before, carries = _run(cell, params, carry, xs)
    direct = jax.grad(loss)(carries)
    none = jax.tree.map(lambda a: jnp.zeros_like(a[:1]), direct)
    added = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), none, direct)
    vectors, powers = _rescaled(jax.vmap(_flat)(added))

    def back(g: tuple[Array, Array], step: Any) -> tuple[tuple[Array, Array], tuple]:
        """From the gradient at h_t to the one at h_{t-1}: `J_t^T g + d_{t-1}`."""
        h, x, *own = step
        _, pull = jax.vjp(lambda h: _flat(cell(params, h, x)), h)
        passed, shift = _rescaled(_flat(pull(g[0].astype(_flat(h).dtype))[0])[None])
        g = _sum_of_pairs((passed[0], shift[0] + g[1]), tuple(own))
        return g, _size_of_pair(*g)

    last = vectors[-1], powers[-1]
    _, sizes = jax.lax.scan(back, last, (before, xs, vectors[:-1], powers[:-1]), reverse=True)
    direct_sizes = jax.vmap(_size_of_pair)(vectors, powers)
    norms = jax.tree.map(lambda a, b: jnp.concatenate([a, b[-1:]]), sizes, direct_sizes)
    return GradientProfile(scale.log_of(*norms), scale.log_of(*direct_sizes))


def _check_steps(xs: PyTree) -> None:
    if any(np.shape(leaf)[:1] == (0,) for leaf in jax.tree.leaves(xs)):
        raise ValueError("xs: expected at least one step, got none")


def _run(cell: Cell, params: PyTree, carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
    """The carries before and after every step, stacked."""
    carry = jax.tree.map(jnp.asarray, carry)
    _, after = jax.lax.scan(lambda h, x: (cell(params, h, x),) * 2, carry, xs)
    before = jax.tree.map(lambda h, hs: jnp.concatenate([h[None], hs[:-1]]), carry, after)
    return before, after


def _rescaled(rows: Array) -> tuple[Array, Array]:
    """Largest entries in [1/2, 1), and the powers of two taken out of each row."""
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    powers = scale.largest_exponent(rows[:, None])
    return scale.shifted(rows, -powers[:, None]), powers


def _sum_of_pairs(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """The sum of two vectors, each in units of its own power of two."""
    lowest = jnp.iinfo(jnp.int32).min // 4
    present = jnp.stack([jnp.any(a[0] != 0), jnp.any(b[0] != 0)])
    top = jnp.max(jnp.where(present, jnp.stack([a[1], b[1]]), lowest))
    top = jnp.where(jnp.any(present), top, 0)
    return scale.shifted(a[0], a[1] - top) + scale.shifted(b[0], b[1] - top), top


def _size_of_pair(vector: Array, power: Array) -> tuple[Array, Array]:
    return scale.split(jnp.sqrt(jnp.sum(vector**2)), power)


class TruncationBias(NamedTuple):
    """What truncation does to the gradient of the parameters, a row for every horizon.

    Attributes:
        horizons: through how many steps gradients flow.
        relative_error: `|g_k - g| / |g|`, g being the full gradient.
        cosine: of the angle between `g_k` and `g`.
        norm_ratio: `|g_k| / |g|`.
    """

    horizons: np.ndarray
    relative_error: Float[Array, " horizons"]
    cosine: Float[Array, " horizons"]
    norm_ratio: Float[Array, " horizons"]


def truncation_bias(  # noqa: PLR0913 - a network, its loss, and what is asked
    cell: Cell,
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    loss: Loss,
    horizons: Sequence[int],
    *,
    method: str = "window",
) -> TruncationBias:
    """The bias of truncated backpropagation through time (R. Williams, J. Peng 1990).

    Args:
        cell: `cell(params, carry, x_t) -> carry`.
        params: its parameters.
        carry: the first carry.
        xs: inputs, arrays with a leading axis of T steps.
        loss: from the stacked carries h_1 ... h_T to a scalar.
        horizons: numbers of steps.
        method: "window": what the loss reads at step t is followed through the last k steps, t
            itself included; "chunks": the sequence is cut into pieces of k steps, and no gradient
            passes from one to the piece before, as training loops do it.

    Returns:
        Errors and cosines against the full gradient; all of the parameters' leaves count as one
        vector.

    Raises:
        ValueError: for a horizon below one, or an unknown method.
    """
    steps = jax.tree.leaves(xs)[0].shape[0]
    wanted = np.asarray(horizons, int)
    if wanted.size == 0 or wanted.min() < 1:
        raise ValueError(
            f"truncation_bias(horizons=): expected numbers of steps from 1 on, got {list(horizons)}"
        )
    if method not in ("window", "chunks"):
        raise ValueError(f"truncation_bias(method=): expected 'window' or 'chunks', got {method!r}")
    network = _Network(cell, params, carry, xs, loss)
    full = _flat(network.chunked(jnp.int32(steps)))
    if method == "chunks":
        truncated = jax.lax.map(
            lambda k: _flat(network.chunked(k)), jnp.asarray(np.minimum(wanted, steps), jnp.int32)
        )
    else:
        truncated = network.windowed(np.minimum(wanted, steps))
    return TruncationBias(wanted, *_compared(truncated, full))


class _Network(NamedTuple):
    cell: Cell
    params: PyTree
    carry: PyTree
    xs: PyTree
    loss: Loss

    def chunked(self, k: Array) -> PyTree:
        """The gradient of the parameters, cut every k steps; k may be traced."""

        def objective(params: PyTree) -> Array:
            def step(carry: PyTree, xs: Any) -> tuple[PyTree, PyTree]:
                t, x = xs
                held = jax.tree.map(jax.lax.stop_gradient, carry)
                cut = t % k == 0
                carry = jax.tree.map(lambda a, b: jnp.where(cut, a, b), held, carry)
                carry = self.cell(params, carry, x)
                return carry, carry

            steps = jnp.arange(jax.tree.leaves(self.xs)[0].shape[0])
            return self.loss(jax.lax.scan(step, self.carry, (steps, self.xs))[1])

        return jax.grad(objective)(self.params)

    def windowed(self, horizons: np.ndarray) -> Array:
        """The same with a window that ends at every reading of the loss, (horizons, parameters).

        With d_t the loss's own gradient at h_t, what k steps see is `g_t^1 = d_t`,
        `g_t^k = d_t + J_{t+1}^T g_{t+1}^{k-1}`: one more parallel step back for every k.
        """
        before, carries = _run(self.cell, self.params, self.carry, self.xs)
        direct = jax.grad(self.loss)(carries)

        def back(adjoint: PyTree) -> tuple[PyTree, PyTree]:
            """Gradients of the parameters, and of the carries before, from those of the carries."""

            def one(h: PyTree, x: Any, g: PyTree) -> tuple[PyTree, PyTree]:
                return jax.vjp(lambda p, h: self.cell(p, h, x), self.params, h)[1](g)

            of_params, of_before = jax.vmap(one)(before, self.xs, adjoint)
            return jax.tree.map(lambda a: jnp.sum(a, axis=0), of_params), of_before

        def longer(adjoint: PyTree, _: None) -> tuple[PyTree, Array]:
            of_params, of_before = back(adjoint)
            arrived = jax.tree.map(
                lambda a: jnp.concatenate([a[1:], jnp.zeros_like(a[:1])]), of_before
            )
            return jax.tree.map(jnp.add, direct, arrived), _flat(of_params)

        _, gradients = jax.lax.scan(longer, direct, None, length=int(horizons.max()))
        return gradients[horizons - 1]


def _flat(tree: PyTree) -> Array:
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _compared(truncated: Array, full: Array) -> tuple[Array, Array, Array]:
    """Relative error, cosine and ratio of norms, free of overflow and underflow."""
    size = jnp.max(jnp.abs(full))
    full = full / size
    truncated = truncated / size
    length = jnp.sqrt(jnp.sum(full**2))
    lengths = jnp.sqrt(jnp.sum(truncated**2, axis=-1))
    error = jnp.sqrt(jnp.sum((truncated - full) ** 2, axis=-1)) / length
    cosine = jnp.matmul(truncated, full, precision="highest") / (lengths * length)
    return error, cosine, lengths / length
