"""The inverse of a chain's Jacobian as an operator, where its layers can be solved."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxgrad.chain import Chain
from jaxgrad.graph.compat import Tracer
from jaxgrad.graph.factorization import Run
from jaxgrad.jacobian import layer_jacobians
from jaxgrad.spectrum.operator import rescaled, to_rows

# (layer, incoming state, vectors, transposed) -> solutions; states and vectors (examples, n)
Solve = Callable[[int, Array, Array, bool], Array]


def inverse_factors(chain: Chain, run: Run, x: PyTree, solve: Solve | None) -> Any:
    """What the solves read: the incoming states, or the layers' QR factors, stacked.

    Raises:
        ValueError: if a layer is not square, or singular.
    """
    dtype = jnp.promote_types(
        jnp.result_type(*(a.dtype for state in run.states for a in state)), jnp.float32
    )
    layouts = [link.batch_in for link in run.links]
    states = [
        to_rows(state, layout, dtype) for state, layout in zip(run.states, layouts, strict=False)
    ]
    last = [to_rows(run.states[-1], run.links[-1].batch_out, dtype)] if run.links else []
    sizes = [rows.shape[-1] for rows in (*states, *last)]
    for link, before, after in zip(run.links, sizes, sizes[1:], strict=False):
        if before != after:
            raise ValueError(
                f"bottom_singular_values: layer {link.name!r} has {before} inputs and {after} "
                "outputs, and only square layers have inverses. "
                "Use log_singular_values, which takes any shapes."
            )
    if solve is not None or not run.links:
        return states
    matrices = jnp.stack(layer_jacobians(chain, x)).astype(dtype)
    if matrices.ndim == 3:
        matrices = matrices[:, None]
    q, r = jax.jit(jnp.linalg.qr)(matrices)
    _check_regular(run, r)
    return q, r


def _check_regular(run: Run, triangles: Array) -> None:
    if isinstance(triangles, Tracer):
        return  # a singular layer then gives non-finite products, and NaN
    sizes = jnp.abs(jnp.diagonal(triangles, axis1=-2, axis2=-1))
    least = sizes.shape[-1] * jnp.finfo(triangles.dtype).eps * jnp.max(sizes, axis=-1)
    singular = jnp.any(jnp.min(sizes, axis=-1) <= least, axis=-1)
    if bool(jnp.any(singular)):
        name = run.links[int(jnp.argmax(singular))].name
        raise ValueError(
            f"bottom_singular_values: the Jacobian of layer {name!r} is singular to rounding, so "
            "the smallest singular value is 0. Use log_singular_values, which counts the zeros."
        )


def solved_products(solve: Solve | None, layers: int, factors: Any) -> tuple:
    """Products of vectors (count, examples, n) with the inverse, and with its transpose."""

    def through(vectors: Array, transposed: bool) -> tuple[Array, Array]:
        vectors, power = rescaled(vectors)
        if not layers:
            return vectors, power
        if solve is None:
            vectors, shifts = _by_factors(factors, vectors, transposed)
        else:
            vectors, shifts = _by_given(solve, factors, vectors, transposed)
        return vectors, power + jnp.sum(shifts, axis=0)

    return (lambda v: through(v, False)), (lambda v: through(v, True))


def _by_factors(factors: Any, vectors: Array, transposed: bool) -> tuple[Array, Array]:
    return jax.lax.scan(
        lambda v, own: rescaled(_solved(own, v, transposed)),
        vectors,
        factors,
        reverse=not transposed,
    )


def _by_given(solve: Solve, states: Any, vectors: Array, transposed: bool) -> tuple[Array, Array]:
    shifts = []
    layers = range(len(states))
    for k in layers if transposed else reversed(layers):
        solved = jax.vmap(lambda v, k=k: solve(k, states[k], v, transposed))(vectors)
        vectors, shift = rescaled(solved)
        shifts.append(shift)
    return vectors, jnp.stack(shifts)


def _solved(factors: tuple[Array, Array], vectors: Array, transposed: bool) -> Array:
    """`(QR)^-1 v` or `(QR)^-T v` for rows (count, examples, n)."""
    q, r = factors
    columns = jnp.transpose(vectors, (1, 2, 0))
    if transposed:
        columns = jax.scipy.linalg.solve_triangular(r, columns, trans=1)
        columns = jnp.matmul(q, columns, precision="highest")
    else:
        columns = jnp.matmul(jnp.swapaxes(q, -1, -2), columns, precision="highest")
        columns = jax.scipy.linalg.solve_triangular(r, columns)
    return jnp.transpose(columns, (2, 0, 1))
