"""Which of a chain's directions a gradient takes, and what its norm therefore says.

The gradient at depth l is `P_l^T g`, with `P_l = dh_L/dh_l` and `g = dL/dh_L`. Its norm is
`|g| sqrt(sum_i sigma_i^2 cos_i^2)`, `cos_i` being the cosine of g with the i-th left singular
vector of `P_l`. So the norm alone misleads: if g lies along the first one the norm looks healthy
while every other direction may be dead, and if it lies across, the norm vanishes although the chain
would carry others.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.chain import Chain
from jaxgrad.graded import scale
from jaxgrad.jacobian import layer_jacobians
from jaxgrad.spectrum.operator import to_rows

Scaled = tuple[Array, Array]  # an array, and the powers of two that it lacks

_RESOLVED = 100.0  # in eps of the largest value: below, a plain SVD knows no singular vector


class GradientAlignment(NamedTuple):
    """What becomes of a gradient on its way back; entry l belongs to the state h_l, l = 0 ... L.

    Attributes:
        log_gradient_norms: natural log of `|dL/dh_l|`, (L + 1, batch...).
        log_typical_norms: of the root mean square of `|P_l^T u|` over all directions u of g's
            length, `|g| |P_l|_F / sqrt(n_L)`: a gradient that has no preference.
        cosines: with the first k left singular vectors of `P_l`, in [0, 1], (L + 1, batch..., k);
            NaN where the singular value is too small, beside the first, for its vector to be known,
            or where there is none.
        log_singular_values: natural logs of the first k singular values of `P_l`, NaN likewise.
    """

    log_gradient_norms: Float[Array, "states *batch"]
    log_typical_norms: Float[Array, "states *batch"]
    cosines: Float[Array, "states *batch k"]
    log_singular_values: Float[Array, "states *batch k"]


def gradient_alignment(
    chain: Chain, x: PyTree, gradient: PyTree, *, k: int = 1, chunk_size: int | None = None
) -> GradientAlignment:
    """How a gradient lies to the singular directions of the layers that it passes.

    The norms are predicted from the products of Jacobians and equal those that
    `value_and_grad_flow` measures, at any depth.

    Args:
        chain: the chain.
        x: its input.
        gradient: dL/dh_L, like the last state; one for every example with `batch_axis`.
        k: how many singular directions, at most n_L.
        chunk_size: see `layer_jacobians`.

    Returns:
        Norms, cosines and singular values for every state.

    Raises:
        ValueError: if the gradient does not fit the last state, or k is out of range.
    """
    run = chain.run(x)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(gradient)]
    shapes, expected = [a.shape for a in leaves], [a.shape for a in run.states[-1]]
    if shapes != expected:
        raise ValueError(
            f"gradient_alignment(gradient=): expected shapes {expected}, as the last state has, "
            f"got {shapes}"
        )
    matrices = layer_jacobians(chain, x, chunk_size=chunk_size)
    states = [a for state in run.states for a in state]
    dtype = jnp.promote_types(jnp.result_type(*states, *leaves), jnp.float32)
    layout = run.links[-1].batch_out if run.links else None
    rows = to_rows(leaves, layout, dtype)
    n = rows.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"gradient_alignment(k=): expected 1 to {n} directions, got {k}")
    start, power = _split(rows)
    vector, low = start, power
    product = jnp.broadcast_to(jnp.eye(n, dtype=dtype), (*rows.shape[:-1], n, n))
    shift = jnp.zeros_like(power)
    found = [_measured((product, shift), (start, power), (vector, low), k)]
    for jacobian in reversed(matrices):
        matrix = jacobian.astype(dtype).reshape(-1, *jacobian.shape[-2:])
        product, shift, vector, low = _extended((product, shift), (vector, low), matrix)
        found.append(_measured((product, shift), (start, power), (vector, low), k))
    joined = jax.tree.map(lambda *entries: jnp.stack(entries), *found[::-1])
    return joined if layout is not None else jax.tree.map(lambda a: a[:, 0], joined)


def _split(rows: Array) -> tuple[Array, Array]:
    power = scale.largest_exponent(rows[..., None])
    return scale.shifted(rows, -power[..., None]), power


@jax.jit
def _extended(product: Scaled, vector: Scaled, matrix: Array) -> tuple[Array, Array, Array, Array]:
    """`P J` and `g J`. The vector goes by itself: in `g P` a stronger direction would drown it."""
    inner = scale.largest_exponent(matrix)
    matrix = scale.shifted(matrix, -inner[..., None, None])
    dense = jnp.matmul(product[0], matrix, precision="highest")
    outer = scale.largest_exponent(dense)
    passed, low = _split(jnp.einsum("em,emn->en", vector[0], matrix, precision="highest"))
    dense = scale.shifted(dense, -outer[..., None, None])
    return dense, product[1] + inner + outer, passed, vector[1] + inner + low


@functools.partial(jax.jit, static_argnums=3)
def _measured(scaled: Scaled, start: Scaled, passed: Scaled, k: int) -> GradientAlignment:
    (product, shift), (g, power) = scaled, start
    finite = jnp.all(jnp.isfinite(product), axis=(-2, -1))
    bad = ~finite[..., None]
    vectors, values, _ = jnp.linalg.svd(jnp.where(bad[..., None], 0, product), full_matrices=False)
    length = jnp.sqrt(jnp.sum(g**2, axis=-1))
    norms = scale.split(jnp.sqrt(jnp.sum(passed[0] ** 2, axis=-1)), passed[1])
    frobenius = jnp.sqrt(jnp.sum(product**2, axis=(-2, -1)) / product.shape[-2])
    typical = scale.split(frobenius * length, shift + power)
    along = jnp.abs(jnp.einsum("em,emn->en", g, vectors, precision="highest"))
    cosines = jnp.minimum(along / jnp.where(length == 0, jnp.nan, length)[:, None], 1)
    eps = jnp.finfo(values.dtype).eps
    known = (values > _RESOLVED * eps * values[:, :1]) & ~bad
    logs = scale.log_of(*scale.split(values, shift[:, None]))
    missing = ((0, 0), (0, max(0, k - values.shape[-1])))
    cosines, logs = (
        jnp.pad(jnp.where(known, a, jnp.nan)[:, :k], missing, constant_values=jnp.nan)
        for a in (cosines, logs)
    )
    return GradientAlignment(scale.log_of(*norms), scale.log_of(*typical), cosines, logs)
