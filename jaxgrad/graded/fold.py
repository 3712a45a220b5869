"""Products of many layers: one at a time, or several between two orthogonalizations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxgrad.graded.product import Graded, Pending

# The relative rounding error that one run may make: a fiftieth of what the certificate vouches for,
# since it multiplies by ten, and errors of 25 runs add up to five times one.
_BUDGET = {"float32": 2e-5, "float64": 2e-12}
_FIRST_RUN, _LONGEST_RUN = 4, 32


def graded_product(
    matrices: Float[ArrayLike, "..."] | Sequence[Float[ArrayLike, "..."]],
) -> Graded:
    """The product `matrices[-1] @ ... @ matrices[0]`.

    A stacked array is multiplied in runs of plain products. A run ends when the measured rounding
    errors demand it, and one that went too far is taken back and repeated in shorter runs; the
    batch shares the runs.

    Args:
        matrices: (length, batch..., n, n), or a list of matrices (batch..., n_out, n_in) whose
            sizes fit together, the first layer first. A list is orthogonalized at every layer.

    Returns:
        The product; the identity for a stack of length zero.

    Raises:
        ValueError: For an empty list (its size is unknown), or sizes that do not fit.
    """
    if isinstance(matrices, Sequence):
        return _product_of_list(matrices)
    matrices = _stack(matrices)
    start = _start(matrices)
    return multiplied_by_stack(start, matrices)


def graded_products(
    matrices: Float[ArrayLike, "..."] | Sequence[Float[ArrayLike, "..."]],
    direction: str = "backward",
):
    """All partial products in one sweep, length + 1 of them.

    Args:
        matrices: As in `graded_product`.
        direction: "forward": entry k is `matrices[k-1] @ ... @ matrices[0]`, entry 0 the identity.
            "backward": entry k is `matrices[-1] @ ... @ matrices[k]`, the last one the identity.

    Returns:
        For a stack one `Graded` whose leading axis has size length + 1; for a list a tuple.
    """
    if direction not in ("forward", "backward"):
        raise ValueError(f'direction must be "forward" or "backward", got {direction!r}.')
    if isinstance(matrices, Sequence):
        return _products_of_list(matrices, direction)
    if direction == "backward":
        flipped = jnp.swapaxes(_stack(matrices)[::-1], -1, -2)
        return jax.tree.map(lambda leaf: leaf[::-1], graded_products(flipped, "forward")).T
    matrices = _stack(matrices)
    start = _start(matrices)

    def step(product, matrix):
        product = product.left_multiply(matrix)
        return product, product

    _, products = jax.lax.scan(step, start, matrices)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), start, products)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Run:
    """Where the product stands, and what the runs so far have taught."""

    product: Graded
    position: Array
    length: Array  # of the next run
    growth: Array  # natural log of what one more layer in a run multiplies its rounding errors by


def multiplied_by_stack(product: Graded, matrices: Float[Array, "length *batch n n"]) -> Graded:
    """`matrices[-1] @ ... @ matrices[0] @ product`, in runs as long as rounding allows."""
    total = matrices.shape[0]
    if total == 0:
        return product
    room = math.log(_BUDGET[product.dtype.name] / float(jnp.finfo(product.dtype).eps))

    def advance(run: _Run) -> _Run:
        length = jnp.minimum(run.length, total - run.position)

        def matrix(index):
            return jax.lax.dynamic_index_in_dim(matrices, run.position + index, keepdims=False)

        def push(index, pending):
            return pending.pushed(matrix(index), first=False)

        pending = Pending.of(run.product).pushed(matrix(0))
        pending = jax.lax.fori_loop(1, length, push, pending)
        product, loss = pending.settled(repair=length == 1)
        used = jnp.log(jnp.maximum(jnp.max(loss) * math.exp(room) / _BUDGET[product.dtype.name], 1))
        accepted = (length == 1) | (used <= room)
        # Errors grow geometrically within a run. What was seen is forgotten slowly, lest a run
        # that is bound to fail be tried at every layer.
        growth = jnp.maximum(jnp.minimum(used, 2 * room) / length, 0.95 * run.growth)
        longest = jnp.clip(0.9 * room / jnp.maximum(growth, 1e-3), 1, _LONGEST_RUN)
        longest = jnp.minimum(longest.astype(jnp.int32), 4 * length)
        longest = jnp.where(accepted, longest, jnp.minimum(longest, jnp.maximum(length // 2, 1)))
        product = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), product, run.product)
        return _Run(product, run.position + jnp.where(accepted, length, 0), longest, growth)

    start = _Run(product, jnp.int32(0), jnp.int32(_FIRST_RUN), jnp.zeros((), product.dtype))
    return jax.lax.while_loop(lambda run: run.position < total, advance, start).product


def _product_of_list(matrices: Sequence) -> Graded:
    *_, last = _products_of_list(matrices, "forward")
    return last


def _products_of_list(matrices: Sequence, direction: str) -> tuple[Graded, ...]:
    if not matrices:
        raise ValueError(
            "an empty list has no size to make an identity of: use Graded.identity(n)."
        )
    matrices = [jnp.asarray(matrix) for matrix in matrices]
    if direction == "backward":
        flipped = [jnp.swapaxes(matrix, -1, -2) for matrix in reversed(matrices)]
        return tuple(product.T for product in reversed(_products_of_list(flipped, "forward")))
    batch = jnp.broadcast_shapes(*(matrix.shape[:-2] for matrix in matrices))
    dtype = jnp.result_type(jnp.float32, *matrices)
    products = [Graded.identity(matrices[0].shape[-1], batch, dtype)]
    for index, matrix in enumerate(matrices):
        if matrix.shape[-1] != products[-1].shape[-2]:
            raise ValueError(
                f"layer {index} has {matrix.shape[-1]} inputs, its predecessor gives "
                f"{products[-1].shape[-2]} outputs (the first layer comes first)."
            )
        products.append(products[-1].left_multiply(matrix))
    return tuple(products)


def _stack(matrices: ArrayLike) -> Array:
    matrices = jnp.asarray(matrices)
    if matrices.ndim < 3 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(
            "a stack of square matrices (length, batch..., n, n) is needed, got the shape "
            f"{matrices.shape}; pass rectangular layers as a list."
        )
    return matrices.astype(jnp.promote_types(matrices.dtype, jnp.float32))


def _start(matrices) -> Graded:
    return Graded.identity(matrices.shape[-1], matrices.shape[1:-2], matrices.dtype)
