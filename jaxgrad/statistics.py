"""What is measured of a tensor: one function a statistic, array in, scalar out.

Half-precision tensors are accumulated in float32; squares are taken after a division by the largest
magnitude, so that a root mean square survives from the smallest normal number to the largest (a
plain float32 sum of squares is 0 below 1e-19 and inf above 1e19).

The statistics of one tensor share its passes (`_Passes`). A pass is arithmetic that ends in one
reduction, without comparisons: such a pass XLA's CPU backend hands to a library of vectorized
kernels, at a fraction of the time and with nothing to compile. Comparisons are left to a branch
that a finite tensor never takes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact, Int

FLOAT16_TINY = float(jnp.finfo(jnp.float16).tiny)
BFLOAT16_TINY = float(jnp.finfo(jnp.bfloat16).tiny)
# A leaf up to this size is cheaper to stack with its likes than to reduce alone.
_SMALL = 2**14

Counter = Callable[[Array], Array]


def accumulation_dtype(dtype: Any) -> Any:
    """float64 for float64 and complex128, else float32."""
    wide = jnp.dtype(dtype) in (jnp.dtype("float64"), jnp.dtype("complex128"))
    return jnp.dtype("float64" if wide else "float32")


class _Passes:
    """The reductions of one tensor, each made once.

    Args:
        x: the tensor.
        counters: functions that turn finite magnitudes, by arithmetic, into ones where they count
            and zeros elsewhere; a magnitude of one must count as any number of order one.
    """

    def __init__(self, x: Array, counters: tuple[Counter, ...] = ()) -> None:
        self.x, self.dtype, self.size = x, accumulation_dtype(x.dtype), max(x.size, 1)
        self.magnitudes = jnp.abs(x).astype(self.dtype)
        self.counters = counters

    @functools.cached_property
    def largest(self) -> Array:
        """The largest magnitude; anything if there is a NaN, which compiled maxima may skip."""
        return jnp.max(self.magnitudes, initial=0.0)

    @functools.cached_property
    def unit(self) -> Array:
        """`largest`, or the smallest number that 16 can be divided by."""
        return jnp.maximum(self.largest, 17 / jnp.finfo(self.dtype).max)

    @functools.cached_property
    def squares(self) -> Array:
        """Sum of the squares in units of largest / 16: finite exactly if the tensor is.

        None overflows, and none that counts underflows. (1 / largest would be subnormal, hence
        zero, for the largest numbers.)
        """
        return jnp.sum(lax.square(self.magnitudes * (16 / self.unit)))

    @functools.cached_property
    def rms(self) -> Array:
        root = jnp.sqrt(self.squares / self.size) / 16 * self.unit
        return jnp.where(jnp.isfinite(root), root, self.largest_or_nan)

    @functools.cached_property
    def counts(self) -> Array:
        """[elements that are not finite, those that are NaN or zero if none, *counters]."""
        counters = self.counters

        def quick(size: Array) -> Array:
            zero = jnp.zeros((), jnp.int32)
            return jnp.stack([zero, zero, *(_count(f(size)) for f in counters)])

        def careful(size: Array) -> Array:
            marked = jnp.where(size < jnp.inf, size, -1.0)
            counted = [_count(-lax.min(marked, jnp.zeros((), size.dtype)))]
            counted += [jnp.isnan(jnp.sum(size)).astype(jnp.int32)]
            return jnp.stack([*counted, *(_count(f(jnp.abs(marked))) for f in counters)])

        def sliced(size: Array) -> Array:  # the mark takes room
            return jnp.sum(lax.map(careful, size), axis=0) if size.ndim > 1 else careful(size)

        return lax.cond(jnp.isfinite(self.squares), quick, sliced, self.magnitudes)

    @property
    def largest_or_nan(self) -> Array:
        return jnp.where(self.counts[1] > 0, jnp.nan, self.largest)

    def share(self, counter: Counter) -> Array:
        """The counter's count over the number of elements."""
        count = self.counts[2 + self.counters.index(counter)]
        return count.astype(self.dtype) / self.size


def _count(ones: Array) -> Array:
    """Sum of zeros and ones: in the floats that they are, as long as every partial sum is exact."""
    if ones.size <= 2**24:
        return jnp.sum(ones).astype(jnp.int32)
    return jnp.sum(ones.astype(jnp.int32))


def _is_nonzero(magnitudes: Array) -> Array:
    return lax.square(lax.sign(magnitudes))


def _is_zero(magnitudes: Array) -> Array:
    return 1 - _is_nonzero(magnitudes)


def _is_below_float16(magnitudes: Array) -> Array:
    return _is_nonzero(magnitudes) - _reaches(magnitudes, FLOAT16_TINY)


def _is_below_bfloat16(magnitudes: Array) -> Array:
    def count(magnitudes: Array) -> Array:
        return _is_nonzero(magnitudes) - _reaches(magnitudes, BFLOAT16_TINY)

    if magnitudes.dtype == jnp.float64:
        return count(magnitudes)
    # 2^-126 is float32's smallest normal number too, and on the CPU XLA takes what is below for 0
    return lax.platform_dependent(magnitudes, cpu=jnp.zeros_like, default=count)


def _reaches(magnitudes: Array, tiny: float) -> Array:
    # a power of two times a float is exact, or inf
    return lax.min(lax.floor(magnitudes * (1 / tiny)), jnp.ones((), magnitudes.dtype))


def max_abs(x: Inexact[Array, "..."] | _Passes) -> Float[Array, ""]:
    """The largest magnitude; NaN if the tensor holds a NaN, 0 if it is empty."""
    return _passes(x).largest_or_nan


def rms(x: Inexact[Array, "..."] | _Passes) -> Float[Array, ""]:
    """Root mean square, `sqrt(mean |x|^2)`, without overflow or underflow of the squares.

    Args:
        x: real or complex tensor of any shape.

    Returns:
        A float32 scalar (float64 for a float64 tensor): inf or NaN if the tensor holds one, 0 if it
        is empty.
    """
    return _passes(x).rms


def mean(x: Inexact[Array, "..."] | _Passes) -> Float[Array, ""]:
    """Arithmetic mean; 0 if the tensor is empty."""
    passes = _passes(x)
    return jnp.sum(jnp.real(passes.x), dtype=passes.dtype) / passes.size


def zero_share(x: Inexact[Array, "..."] | _Passes) -> Float[Array, ""]:
    """Share of the elements that are exactly zero."""
    passes = _passes(x, _is_zero)
    return passes.share(_is_zero)


def nonfinite_count(x: Inexact[Array, "..."] | _Passes) -> Int[Array, ""]:
    """Number of elements that are NaN or infinite."""
    return _passes(x).counts[0]


def below_float16(x: Inexact[Array, "..."] | _Passes) -> Float[Array, ""]:
    """Share of all elements that are not zero and yet below float16's smallest normal, 2^-14."""
    return _passes(x, _is_below_float16).share(_is_below_float16)


def below_bfloat16(x: Inexact[Array, "..."] | _Passes) -> Float[Array, ""]:
    """Share of all elements that are not zero and yet below bfloat16's smallest normal, 2^-126.

    Where the device flushes subnormal numbers to zero, as XLA does on the CPU, float32 and bfloat16
    tensors have none.
    """
    return _passes(x, _is_below_bfloat16).share(_is_below_bfloat16)


def _passes(x: Any, *counters: Counter) -> _Passes:
    return x if isinstance(x, _Passes) else _Passes(x, counters)


# What a tap records, in this order, after a leading 1 that says "the tap was reached".
ACTIVATION = (rms, mean, max_abs, zero_share, nonfinite_count)
GRADIENT = (rms, max_abs, nonfinite_count, below_float16, below_bfloat16)
_COUNTERS = {
    zero_share: _is_zero,
    below_float16: _is_below_float16,
    below_bfloat16: _is_below_bfloat16,
}


def record(x: Inexact[Array, "..."], statistics: tuple) -> Float[Array, " n"]:
    """`[1, statistics...]` as one vector; the 1 tells a measured zero from a tap never reached."""
    counters = tuple(_COUNTERS[f] for f in statistics if f in _COUNTERS)
    passes = _Passes(lax.stop_gradient(x), counters)
    ones = jnp.ones((), passes.dtype)
    return jnp.stack([ones, *(f(passes).astype(passes.dtype) for f in statistics)])


def leaf_statistics(
    leaves: Sequence[Inexact[Array, "..."]],
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """`rms` and `nonfinite_count` of many tensors, in about one pass over each.

    Small leaves of one size are stacked. Of the others the plain sum of squares does, unless it
    leaves the range in which it is exact; then, in a branch, all are measured with care.
    """
    order: list[int] = []
    parts: list[tuple[Array, Array]] = []
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        key = ("large",) if leaf.size > _SMALL else (leaf.size, accumulation_dtype(leaf.dtype))
        groups.setdefault(key, []).append(i)
    for key, members in groups.items():
        order += members
        chosen = [leaves[i] for i in members]
        parts.append(_large(chosen) if key == ("large",) else _stacked(chosen))
    if not parts:
        return jnp.zeros((0,), jnp.float32), jnp.zeros((0,), jnp.float32)
    dtype = jnp.result_type(*(roots for roots, _ in parts))
    place = np.argsort(order)
    roots, counts = (
        jnp.concatenate([p.astype(dtype) for p in pair])[place] for pair in zip(*parts, strict=True)
    )
    return roots, counts


def _stacked(leaves: list[Array]) -> tuple[Array, Array]:
    """Leaves of one size, a row each."""
    dtype = accumulation_dtype(leaves[0].dtype)
    rows = jnp.stack([jnp.abs(leaf).astype(dtype).ravel() for leaf in leaves])
    unit = jnp.maximum(jnp.max(rows, axis=1, initial=0), 17 / jnp.finfo(dtype).max)
    squares = jnp.sum(lax.square(rows * (16 / unit)[:, None]), axis=1)
    roots = jnp.sqrt(squares / max(rows.shape[1], 1)) / 16 * unit
    finite = jnp.isfinite(squares)
    extremes = jnp.where(jnp.isnan(jnp.sum(rows, axis=1)), jnp.nan, jnp.inf)
    counts = jnp.sum(~(rows < jnp.inf), axis=1, dtype=jnp.int32)
    return jnp.where(finite, roots, extremes), counts


def _large(leaves: list[Array]) -> tuple[Array, Array]:
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

    def careful(leaves: list[Array], _: Array) -> tuple[Array, Array]:
        found = [_by_rows(leaf) for leaf in leaves]
        roots, counts = (jnp.stack(parts) for parts in zip(*found, strict=True))
        return roots.astype(dtype), counts

    return lax.cond(safe, quick, careful, leaves, squares)


def _by_rows(leaf: Array) -> tuple[Array, Array]:
    """`rms` and `nonfinite_count` of one leaf, in slices: it takes no room."""
    passes = _Passes(leaf)
    size_of, unit = passes.size, passes.unit

    def step(carry: tuple[Array, Array, Array], row: Array) -> tuple[Any, None]:
        squares, total, count = carry
        size = jnp.abs(row).astype(passes.dtype)
        squares += jnp.sum(lax.square(size * (16 / unit)))
        count += jnp.sum(~(size < jnp.inf), dtype=jnp.int32)
        return (squares, total + jnp.sum(size), count), None

    zero = jnp.zeros((), passes.dtype)
    rows = leaf if leaf.ndim > 1 else leaf[None]
    (squares, total, count), _ = lax.scan(step, (zero, zero, jnp.int32(0)), rows)
    root = jnp.sqrt(squares / size_of) / 16 * unit
    return jnp.where(count == 0, root, jnp.where(jnp.isnan(total), jnp.nan, jnp.inf)), count
