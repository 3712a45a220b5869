"""Products of matrices kept at extended range: `Graded`.

A product of layer Jacobians leaves the range of float32 after some hundred layers. Here the range
lives in an integer exponent, which never rounds and never overflows.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Graded:
    """A matrix product, `mantissa * 2**exponent`, one exponent a batch entry."""

    mantissa: Float[Array, "*batch n_out n_in"]
    exponent: Int[Array, "*batch"]

    @staticmethod
    def identity(n: int, batch_shape: tuple[int, ...] = (), dtype=jnp.float32) -> "Graded":
        """The identity, the empty product."""
        return Graded.from_dense(jnp.broadcast_to(jnp.eye(n, dtype=dtype), (*batch_shape, n, n)))

    @staticmethod
    def from_dense(matrix: Float[Array, "*batch n_out n_in"]) -> "Graded":
        """A graded product of one factor."""
        matrix = jnp.asarray(matrix)
        return _normalize(matrix, jnp.zeros(matrix.shape[:-2], jnp.int32))

    @property
    def shape(self) -> tuple[int, ...]:
        """(batch..., n_out, n_in)."""
        return self.mantissa.shape

    @property
    def dtype(self):
        """The floating dtype of the factors."""
        return self.mantissa.dtype

    @property
    def T(self) -> "Graded":
        """The transposed product."""
        return Graded(jnp.swapaxes(self.mantissa, -1, -2), self.exponent)

    def left_multiply(self, matrix) -> "Graded":
        """`matrix @ self`: one more layer at the output end."""
        return Graded.from_dense(matrix) @ self

    def right_multiply(self, matrix) -> "Graded":
        """`self @ matrix`: one more layer at the input end."""
        return self @ Graded.from_dense(matrix)

    def __matmul__(self, other: "Graded") -> "Graded":
        product = jnp.matmul(self.mantissa, other.mantissa, precision="highest")
        return _normalize(product, self.exponent + other.exponent)

    def to_dense(self) -> Float[Array, "*batch n_out n_in"]:
        """The matrix itself; entries beyond the dtype's range become 0 or inf."""
        return jnp.ldexp(self.mantissa, self.exponent[..., None, None])

    def log_norm(self) -> Float[Array, "*batch"]:
        """Natural logarithm of the Frobenius norm; -inf for a zero matrix."""
        squares = jnp.sum(self.mantissa**2, axis=(-2, -1))
        return 0.5 * jnp.log(squares) + self.exponent * jnp.log(jnp.asarray(2, self.dtype))

    def log_singular_values(self) -> Float[Array, "*batch rank"]:
        """Natural logarithms of all singular values, descending; -inf beyond the rank."""
        if 0 in self.shape[-2:]:
            return jnp.zeros((*self.shape[:-2], 0), self.dtype)
        values = jnp.log(jnp.linalg.svd(self.mantissa, compute_uv=False))
        return values + (self.exponent * jnp.log(jnp.asarray(2, self.dtype)))[..., None]

    @property
    def rank(self) -> Int[Array, "*batch"]:
        """The number of singular values above zero."""
        return jnp.sum(self.log_singular_values() > -jnp.inf, axis=-1)

    def log_abs_det(self) -> Float[Array, "*batch"]:
        """Natural logarithm of the absolute determinant of a square product."""
        if self.shape[-1] != self.shape[-2]:
            raise ValueError(f"log_abs_det needs a square product, not shape {self.shape}.")
        return jnp.sum(self.log_singular_values(), axis=-1)


def _normalize(mantissa, exponent) -> Graded:
    largest = jnp.max(jnp.abs(mantissa), axis=(-2, -1), initial=0)
    _, shift = jnp.frexp(largest)
    shift = jnp.where(jnp.isfinite(largest), shift, 0)
    mantissa = jnp.where(jnp.isfinite(largest)[..., None, None], mantissa, jnp.nan)
    return Graded(jnp.ldexp(mantissa, -shift[..., None, None]), exponent + shift)
