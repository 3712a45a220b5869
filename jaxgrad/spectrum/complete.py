"""All singular values of a chain's Jacobian, of the whole and by depth."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxgrad.chain import Chain
from jaxgrad.graded import Graded
from jaxgrad.jacobian import jacobian_product, layer_jacobians

_DEFAULT_DEPTHS = 24


def log_singular_values(
    chain: Chain, x: PyTree, *, chunk_size: int | None = None
) -> Float[Array, "*batch count"]:
    """Natural logarithms of all singular values of `J_L ... J_1`, at any depth.

    `jacobian_product(chain, x).spectrum()` has them as pairs of mantissa and integer exponent, with
    a certificate of how far each can be trusted.

    Args:
        chain: the chain.
        x: its input.
        chunk_size: see `layer_jacobians`.

    Returns:
        `min(n_L, n_0)` values, descending, -inf beyond the rank; a leading axis of examples if the
        chain was made with `batch_axis`.
    """
    return jacobian_product(chain, x, chunk_size=chunk_size).log_singular_values()


class LyapunovExponents(NamedTuple):
    """Growth rates of a chain's directions, by depth.

    Attributes:
        depths: numbers of layers, ascending.
        exponents: `log(sigma_k) / depth` of the first `depth` layers' product, natural logarithms a
            layer, (depths, batch..., count), descending in k; -inf beyond the rank.
    """

    depths: np.ndarray
    exponents: Float[Array, "depths *batch count"]


def lyapunov_exponents(
    chain: Chain,
    x: PyTree,
    *,
    depths: Sequence[int] | None = None,
    chunk_size: int | None = None,
) -> LyapunovExponents:
    """The finite-depth Lyapunov exponents `(1/l) log sigma_k(J_l ... J_1)`, for several l.

    These are growth rates of the product's own singular values, exact at every depth; the diagonal
    of a QR recursion differs from them by a few nats over l. As l grows they converge to the
    Lyapunov exponents (V. Oseledets 1968), typically with an error of order 1/l.

    Args:
        chain: the chain; for a recurrent network the chain over time (`time_chain`).
        x: its input.
        depths: after how many layers; None: up to 24 of them, spaced evenly in the logarithm, the
            last one the whole chain.
        chunk_size: see `layer_jacobians`.

    Returns:
        Depths and exponents. Where states differ in size, missing values are -inf.

    Raises:
        ValueError: if the chain is empty, or a depth is not from 1 to its length.
    """
    length = len(chain)
    if length == 0:
        raise ValueError("lyapunov_exponents: expected at least one layer, got an empty chain")
    if depths is None:
        spaced = np.geomspace(1, length, min(_DEFAULT_DEPTHS, length))
        depths = list(np.round(spaced).astype(int))
    wanted = np.unique(np.asarray(depths, int))
    if wanted.size == 0 or wanted[0] < 1 or wanted[-1] > length:
        raise ValueError(
            f"lyapunov_exponents(depths=): expected depths from 1 to {length}, got {list(depths)}"
        )
    matrices = layer_jacobians(chain, x, chunk_size=chunk_size)[: int(wanted[-1])]
    square = {m.shape for m in matrices} == {(*matrices[0].shape[:-1], matrices[0].shape[-1])}
    logs = _scanned(matrices, wanted) if square else _one_by_one(matrices, wanted)
    rates = logs / jnp.asarray(wanted, logs.dtype).reshape(-1, *(1,) * (logs.ndim - 1))
    return LyapunovExponents(wanted, rates)


def _scanned(matrices: Sequence[Array], wanted: np.ndarray) -> Array:
    stack = jnp.stack(matrices)
    flags = np.zeros(len(matrices), bool)
    flags[wanted - 1] = True
    return _logs_by_depth(stack, jnp.asarray(flags))[wanted - 1]


@jax.jit
def _logs_by_depth(stack: Array, flags: Array) -> Array:
    def step(product: Graded, layer: tuple[Array, Array]) -> tuple[Graded, Array]:
        matrix, wanted = layer
        product = product.left_multiply(matrix)
        nothing = jnp.zeros(matrix.shape[:-1], product.dtype)
        return product, jax.lax.cond(
            wanted, lambda p: p.log_singular_values(), lambda _: nothing, product
        )

    start = Graded.identity(stack.shape[-1], stack.shape[1:-2], stack.dtype)
    return jax.lax.scan(step, start, (stack, flags))[1]


def _one_by_one(matrices: Sequence[Array], wanted: np.ndarray) -> Array:
    multiply = jax.jit(Graded.left_multiply)
    values = jax.jit(Graded.log_singular_values)
    first = matrices[0]
    product = Graded.identity(first.shape[-1], first.shape[:-2], first.dtype)
    logs = []
    for depth, matrix in enumerate(matrices, 1):
        product = multiply(product, matrix)
        if depth in wanted:
            logs.append(values(product))
    count = max(entry.shape[-1] for entry in logs)
    padded = [
        jnp.pad(
            entry,
            [(0, 0)] * (entry.ndim - 1) + [(0, count - entry.shape[-1])],
            constant_values=-jnp.inf,
        )
        for entry in logs
    ]
    return jnp.stack(padded)
