"""What is measured of a tensor: one function a statistic, array in, scalar out.

A tensor is passed over a few times; each pass is arithmetic that ends in one sum or maximum
(`Sums`), and the statistics follow from those. A pass free of comparisons and shared operands is
one that XLA's CPU backend hands to a library of vectorized kernels: nothing to compile, nothing
materialized. On other devices XLA fuses the passes.

Half-precision tensors are accumulated in float32; squares are taken of quotients by the largest
magnitude, so that a root mean square survives from the smallest normal number to the largest (a
plain float32 sum of squares is 0 below 1e-19 and inf above 1e19).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact, Int

FLOAT16_TINY = float(jnp.finfo(jnp.float16).tiny)
BFLOAT16_TINY = float(jnp.finfo(jnp.bfloat16).tiny)
_TINIES = (FLOAT16_TINY, BFLOAT16_TINY)
# A leaf up to this size is cheaper to stack with its likes than to reduce alone.
_SMALL = 2**14
# Up to this many ones add up exactly in float32.
_EXACT = 2**24


def accumulation_dtype(dtype: Any) -> Any:
    """float64 for float64 and complex128, else float32."""
    wide = jnp.dtype(dtype) in (jnp.dtype("float64"), jnp.dtype("complex128"))
    return jnp.dtype("float64" if wide else "float32")


@dataclass(frozen=True)
class Sums:
    """What the passes over a tensor found; over many tensors, a row each.

    Attributes:
        size: number of elements.
        largest: largest magnitude; anything if there is a NaN (compiled maxima may skip it).
        squares: sum of |x * quotient_scale(largest)|^2; finite exactly if all elements are.
        nonzero: number of elements that are not zero; NaN if one of them is NaN.
        nonfinite: number of elements that are NaN or infinite.
        total: sum of the (real parts of the) elements.
        normal_float16: number of elements that reach float16's smallest normal number; NaN if one
            of them is not finite.
        normal_bfloat16: the same for bfloat16.
    """

    size: Any
    largest: Any
    squares: Any
    nonzero: Any
    nonfinite: Any
    total: Any = None
    normal_float16: Any = None
    normal_bfloat16: Any = None


_EVERY = ("largest", "squares", "nonzero", "nonfinite")
# What a tap records of an activation and of a gradient, after a leading 1: "the tap was reached".
ACTIVATION = (*_EVERY, "total")
GRADIENT = (*_EVERY, "normal_float16", "normal_bfloat16")


class _Passes:
    """The passes over one tensor, each made once and only if it is asked for."""

    def __init__(self, x: Array) -> None:
        self.x, self.dtype = x, accumulation_dtype(x.dtype)
        is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
        self.wide = (jnp.abs(x) if is_complex else x).astype(self.dtype)

    @functools.cached_property
    def largest(self) -> Array:
        return jnp.max(jnp.abs(self.wide), initial=0.0)

    @functools.cached_property
    def squares(self) -> Array:
        return jnp.sum(lax.square(self.wide * quotient_scale(self.largest)))

    @functools.cached_property
    def nonzero(self) -> Array:
        return self._count(lax.square(lax.sign(self.wide)))

    @property
    def nonfinite(self) -> Array:
        return self._checked[0]

    @functools.cached_property
    def _checked(self) -> list[Array]:
        """The count, then a scale for each of `_TINIES`: NaN if the count is not zero."""
        zero = jnp.zeros((), self.dtype)
        scales = [_inverse_square(tiny, self.dtype) for tiny in _TINIES]

        def rarely(wide: Array, squares: Array) -> list[Array]:
            def careful(wide: Array) -> list[Array]:
                return [self.count_nonfinite(wide), *(zero + jnp.nan for _ in scales)]

            return lax.cond(squares < jnp.inf, lambda _: [zero, *scales], careful, wide)

        def always(wide: Array, squares: Array) -> list[Array]:
            marked = (jnp.where(squares < jnp.inf, s, jnp.nan) for s in scales)
            return [self.count_nonfinite(wide), *marked]

        if _varies_over_devices(self.squares):
            return always(self.wide, self.squares)
        # elsewhere the count costs nothing beside the other sums, and a branch waits for the host
        return lax.platform_dependent(self.wide, self.squares, cpu=rarely, default=always)

    @functools.cached_property
    def total(self) -> Array:
        return jnp.sum(jnp.real(self.x), dtype=self.dtype)

    @functools.cached_property
    def normal_float16(self) -> Array:
        return self._reaches(0)

    @functools.cached_property
    def normal_bfloat16(self) -> Array:
        def compared(wide: Array) -> Array:
            return self._count(lax.square(lax.sign(wide)) * (jnp.abs(wide) >= BFLOAT16_TINY))

        if self.dtype == jnp.float64:
            return self._reaches(1)
        # 2^-126 is float32's smallest normal number too: the CPU takes what is below for zero
        return lax.platform_dependent(self.wide, cpu=lambda _: self.nonzero, default=compared)

    def _reaches(self, which: int) -> Array:
        # tiny^2 is a power of two: x^2 rounds to a number below it exactly if |x| < tiny. A scale
        # known to the compiler would be kept as an array.
        scale = self._checked[1 + which]
        return self._count(lax.sign(lax.floor(lax.square(self.wide) * scale)))

    def count_nonfinite(self, wide: Array) -> Array:
        """The count itself, to be made in a branch that finite tensors do not take."""
        return self._count((~(jnp.abs(wide) < jnp.inf)).astype(self.dtype))

    def _count(self, ones: Array) -> Array:
        """Sum of zeros and ones, in two levels where a float32 would stop counting."""
        return jnp.sum(jnp.sum(ones, axis=-1) if ones.size > _EXACT else ones)


def sums(x: Inexact[Array, "..."], names: tuple[str, ...]) -> Float[Array, " n"]:
    """`[1, names...]` of `Sums` as one vector; the 1 tells a measured zero from a tap not reached.

    Args:
        x: real or complex tensor of any shape.
        names: attributes of `Sums`, such as `ACTIVATION` or `GRADIENT`.

    Returns:
        A float32 vector (float64 for a float64 tensor).
    """
    passes = _Passes(lax.stop_gradient(x))
    return jnp.stack([jnp.ones((), passes.dtype), *(getattr(passes, name) for name in names)])


def from_table(table: Float[Array, "... n"], sizes: Any, names: tuple[str, ...]) -> Sums:
    """The rows that `sums` returned, with the tensors' sizes, as one `Sums` of columns."""
    columns = {name: table[..., 1 + k] for k, name in enumerate(names)}
    return Sums(size=jnp.asarray(sizes, table.dtype), **columns)


def _sums(x: Any, *names: str) -> Sums:
    """The statistics' argument: what was summed already, or a tensor."""
    if isinstance(x, Sums):
        return x
    passes = _Passes(x)
    found = {f.name: None for f in fields(Sums)} | {n: getattr(passes, n) for n in names}
    return Sums(**found | {"size": jnp.asarray(x.size, passes.dtype)})


def max_abs(x: Inexact[Array, "..."] | Sums) -> Float[Array, "..."]:
    """The largest magnitude; NaN if the tensor holds a NaN, 0 if it is empty."""
    s = _sums(x, "largest", "nonzero")
    return jnp.where(s.nonzero == 0, 0, jnp.where(jnp.isnan(s.nonzero), jnp.nan, s.largest))


def rms(x: Inexact[Array, "..."] | Sums) -> Float[Array, "..."]:
    """Root mean square, `sqrt(mean |x|^2)`, without overflow or underflow of the squares.

    Args:
        x: real or complex tensor of any shape.

    Returns:
        A float32 scalar (float64 for a float64 tensor): inf or NaN if the tensor holds one, 0 if it
        is empty.
    """
    s = _sums(x, "largest", "squares", "nonzero")
    return jnp.where(s.squares < jnp.inf, _root(s.largest, s.squares, _divisor(s)), max_abs(s))


def mean(x: Inexact[Array, "..."] | Sums) -> Float[Array, "..."]:
    """Arithmetic mean of the real parts; 0 if the tensor is empty."""
    s = _sums(x, "total")
    return s.total / _divisor(s)


def zero_share(x: Inexact[Array, "..."] | Sums) -> Float[Array, "..."]:
    """Share of the elements that are exactly zero; NaN if the tensor holds a NaN."""
    s = _sums(x, "nonzero")
    return (s.size - s.nonzero) / _divisor(s)


def nonfinite_count(x: Inexact[Array, "..."] | Sums) -> Int[Array, "..."]:
    """Number of elements that are NaN or infinite."""
    return _sums(x, "nonfinite").nonfinite.astype(jnp.int32)


def below_float16(x: Inexact[Array, "..."] | Sums) -> Float[Array, "..."]:
    """Share of all elements that are not zero and yet below float16's smallest normal, 2^-14.

    NaN if not all elements are finite.
    """
    s = _sums(x, "nonzero", "normal_float16")
    return (s.nonzero - s.normal_float16) / _divisor(s)


def below_bfloat16(x: Inexact[Array, "..."] | Sums) -> Float[Array, "..."]:
    """Share of all elements that are not zero and yet below bfloat16's smallest normal, 2^-126.

    NaN if the tensor holds a NaN. Where the device flushes subnormal numbers to zero, as XLA does
    on the CPU, float32 and bfloat16 tensors have none.
    """
    s = _sums(x, "nonzero", "normal_bfloat16")
    return (s.nonzero - s.normal_bfloat16) / _divisor(s)


def _four(dtype: Any) -> Any:
    """The number just below 4: it stays a normal number, divided by any normal number."""
    return np.nextafter(dtype.type(4), dtype.type(0))


def quotient_scale(largest: Array) -> Array:
    """What squares are taken in units of: 4 / largest."""
    return _four(largest.dtype) / jnp.maximum(largest, jnp.finfo(largest.dtype).tiny)


def _root(largest: Array, squares: Array, size: Any) -> Array:
    root = jnp.sqrt(jnp.where(squares < jnp.inf, squares, 0) / size)
    return jnp.maximum(largest, jnp.finfo(largest.dtype).tiny) * (root / _four(largest.dtype))


def _divisor(s: Sums) -> Array:
    return jnp.maximum(s.size, 1)


def leaf_rms(leaves: Sequence[Inexact[Array, "..."]]) -> Float[Array, " n"]:
    """`rms` of many tensors, in about one pass over each; see `leaf_statistics`."""
    return _by_size(leaves, count=False)[0]


def leaf_statistics(
    leaves: Sequence[Inexact[Array, "..."]],
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """`rms` and `nonfinite_count` of many tensors, in about one pass over each.

    Small leaves of one size are stacked. Of the others the plain sum of squares does, unless it
    leaves the range in which it is exact; then, in a branch, all are measured with care.
    """
    return _by_size(leaves, count=True)


def _by_size(leaves: Sequence[Array], count: bool) -> tuple[Array, Array]:
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        key = () if leaf.size > _SMALL else (leaf.size, accumulation_dtype(leaf.dtype))
        groups.setdefault(key, []).append(i)
    parts = []
    for key, members in groups.items():
        chosen = [leaves[i] for i in members]
        parts.append(_stacked(chosen) if key else _large(chosen, count))
    if not parts:
        return jnp.zeros((0,), jnp.float32), jnp.zeros((0,), jnp.float32)
    dtype = jnp.result_type(*(roots for roots, _ in parts))
    place = np.argsort([i for members in groups.values() for i in members])
    roots, counts = (
        jnp.concatenate([p.astype(dtype) for p in pair])[place] for pair in zip(*parts, strict=True)
    )
    return roots, counts


def _stacked(leaves: list[Array]) -> tuple[Array, Array]:
    """Leaves of one size, a row each."""
    dtype = accumulation_dtype(leaves[0].dtype)
    rows = jnp.stack([jnp.abs(leaf).astype(dtype).ravel() for leaf in leaves])
    largest = jnp.max(rows, axis=1, initial=0.0)
    squares = jnp.sum(lax.square(rows * quotient_scale(largest)[:, None]), axis=1)
    roots, finite = _root(largest, squares, max(rows.shape[1], 1)), squares < jnp.inf
    extremes = jnp.where(jnp.isnan(jnp.sum(rows, axis=1)), jnp.nan, jnp.inf)
    counts = jnp.sum(~(rows < jnp.inf), axis=1, dtype=jnp.int32)
    return jnp.where(finite, roots, extremes), counts


def _large(leaves: list[Array], count: bool) -> tuple[Array, Array]:
    dtype = jnp.result_type(*(accumulation_dtype(leaf.dtype) for leaf in leaves))
    sizes = np.array([leaf.size for leaf in leaves])
    info = jnp.finfo(dtype)

    def plain(leaf: Array) -> Array:
        wide = jnp.abs(leaf).astype(accumulation_dtype(leaf.dtype))
        return jnp.sum(lax.square(wide)).astype(dtype)

    squares = jnp.stack([plain(leaf) for leaf in leaves])
    # below this, squares that were flushed to zero may make up a rounding error of the sum
    lowest = sizes * float(info.tiny / info.eps)
    safe = jnp.all((squares > lowest) & (squares < jnp.inf))

    def quick(_: list[Array], squares: Array) -> tuple[Array, Array]:
        return jnp.sqrt(squares / sizes), jnp.zeros(len(sizes), jnp.int32)

    def careful(leaves: list[Array], plain: Array) -> tuple[Array, Array]:
        passes = [_Passes(leaf) for leaf in leaves]
        largest, squares = (
            jnp.stack([getattr(p, name).astype(dtype) for p in passes])
            for name in ("largest", "squares")
        )
        roots, finite = _root(largest, squares, sizes), squares < jnp.inf
        # squares add up to NaN only if there is one
        roots = jnp.where(finite, roots, jnp.where(jnp.isnan(plain), jnp.nan, jnp.inf))
        counts = [_count_in_slices(p).astype(jnp.int32) for p in passes if count]
        return roots, jnp.stack(counts) if count else jnp.zeros(len(sizes), jnp.int32)

    if _varies_over_devices(squares):
        return careful(leaves, squares)
    return lax.cond(safe, quick, careful, leaves, squares)


def _varies_over_devices(x: Array) -> bool:
    """Whether `x` is one device's part of a `shard_map`, where constants are of another type."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # `vma` in older versions
    return bool(getattr(kind, "vma", None) or getattr(manual, "varying", None))


def _inverse_square(tiny: float, dtype: Any) -> Array:
    square = np.float64(tiny) ** -2
    return jnp.asarray(square if square < jnp.finfo(dtype).max else 0.0, dtype)


def _count_in_slices(passes: _Passes) -> Array:
    """The number of elements that are not finite; the marks of large leaves would take room."""
    if passes.wide.size <= 2**18 or passes.wide.ndim < 2:
        return passes.count_nonfinite(passes.wide)
    return jnp.sum(lax.map(passes.count_nonfinite, passes.wide))
