"""Products kept plain, and orthogonalized only when somebody asks for their modes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgrad.graded import scale
from jaxgrad.graded.product import Graded

_FACTORS = ("left", "mantissa", "exponent", "right", "evidence")
# Rounding errors, relative to the norm, up to which a plain product speaks for itself, in eps.
_SOUND = 100.0
# Within these powers of two a product is left as it stands; beyond, its entries would lose bits.
_COMFORTABLE, _LOWEST = 20, -90


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plain:
    """A product of matrices, multiplied out at extended range.

    Attributes:
        matrix: The product in units of `2**power`.
        power: An exponent for every batch entry.
        noise: Estimated squared norm of the rounding errors, in units of eps and `2**power`.
        sound: Whether the errors are small beside the norm, in every batch entry.
    """

    matrix: Float[Array, "*batch n_out n_in"]
    power: Int[Array, "*batch"]
    noise: Float[Array, "*batch"]
    sound: Bool[Array, ""]

    @staticmethod
    def of(matrix: Float[Array, "*batch n_out n_in"]) -> "Plain":
        """One factor, without rounding."""
        zero = jnp.zeros(matrix.shape[:-2], matrix.dtype)
        sound = _in_range(matrix) & jnp.all(jnp.isfinite(matrix))
        return Plain(matrix, zero.astype(jnp.int32), zero, sound)

    def multiplied(self, matrix: Float[Array, "*batch m n"], left: bool) -> "Plain":
        """`matrix @ self` if `left`, else `self @ matrix`."""
        old = self._rescaled()
        first, second = (matrix, old.matrix) if left else (old.matrix, matrix)
        product = jnp.matmul(first, second, precision="highest")
        # Every sum of n products errs by about eps times the root of its terms' squares; what was
        # wrong before grows by the root mean square singular value.
        columns, rows = jnp.sum(first**2, axis=-2), jnp.sum(second**2, axis=-1)
        fresh = jnp.sum(columns * rows, axis=-1)
        gain = jnp.sum(columns if left else rows, axis=-1) / max(columns.shape[-1], 1)
        noise = gain * old.noise + fresh
        size = jnp.sum(product**2, axis=(-2, -1))
        sound = jnp.all(noise <= _SOUND**2 * size) & jnp.all(jnp.isfinite(size))
        return Plain(product, old.power, noise, self.sound & sound & _in_range(product))

    def _rescaled(self) -> "Plain":
        """Largest entries of order one, where they have moved away from it."""
        shift = scale.largest_exponent(self.matrix)

        def rescale(_):
            matrix = scale.shifted(self.matrix, -shift[..., None, None])
            return matrix, self.power + shift, scale.shifted(self.noise, -2 * shift)

        far = jnp.any(jnp.abs(shift) > _COMFORTABLE)
        same = self.matrix, self.power, self.noise
        matrix, power, noise = jax.lax.cond(far, rescale, lambda _: same, None)
        return Plain(matrix, power, noise, self.sound)


def _in_range(matrix: Array) -> Array:
    """Whether no entry that matters was flushed to zero."""
    return jnp.all(jnp.max(jnp.abs(matrix), axis=(-2, -1), initial=0) > 2.0**_LOWEST)


class Deferred(Graded):
    """A `Graded` whose factors are made when they are first needed.

    Its entries and its norm come from the plain product, as long as that is sound; everything else,
    singular values first of all, from the factors. Through a JAX transformation it becomes a plain
    `Graded`.

    Args:
        plain: The product, multiplied out.
        settle: Makes the factors.
    """

    def __init__(self, plain: Plain, settle: Callable[[], Graded]) -> None:
        # the fields of Graded stay unset: __getattr__ finds them
        object.__setattr__(self, "plain", plain)
        object.__setattr__(self, "settle", settle)

    @cached_property
    def settled(self) -> Graded:
        """The product as factors."""
        return self.settle()

    def __getattr__(self, name: str):
        if name in _FACTORS:
            return getattr(self.settled, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"Deferred(shape={self.shape}, dtype={self.dtype.name})"

    @property
    def shape(self) -> tuple[int, ...]:
        """(batch..., n_out, n_in)."""
        return self.plain.matrix.shape

    @property
    def dtype(self):
        """The floating dtype of the product."""
        return self.plain.matrix.dtype

    @property
    def T(self) -> Graded:
        """The transposed product."""
        flipped = jnp.swapaxes(self.plain.matrix, -1, -2)
        plain = Plain(flipped, self.plain.power, self.plain.noise, self.plain.sound)
        return Deferred(plain, lambda: self.settled.T)

    def _dense(self) -> tuple[Array, Array]:
        if not self.plain.sound:
            return self.settled._dense()
        shift = scale.largest_exponent(self.plain.matrix)
        matrix = scale.shifted(self.plain.matrix, -shift[..., None, None])
        return matrix, self.plain.power + shift


def _flatten(product: Deferred):
    return [getattr(product.settled, name) for name in _FACTORS], None


def _unflatten(_: None, factors: Any) -> Any:
    left, mantissa, exponent, right, evidence = factors
    return Graded(left, mantissa, exponent, right, evidence)


jax.tree_util.register_pytree_node(Deferred, _flatten, _unflatten)
