"""Singular values of a whole chain's Jacobian."""

from jaxtyping import Array, Float, PyTree

from jaxgrad.chain import Chain
from jaxgrad.jacobian import jacobian_product


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
