"""Pytrees of arrays: names for their leaves, and norms that neither overflow nor underflow.

A leaf's name is its path as a reader would write it, ``block_0/mlp/kernel`` or
``layers[0]/weight``. A leaf carries a gradient only if it is an inexact array; `None`, integers,
keys and ``float0`` cotangents are passed by everywhere in this library.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

# Leaves of at most this many elements are joined before they are reduced: XLA's compile time is
# superlinear in the number of reductions, and a joined copy of big leaves would cost bandwidth.
_SMALL = 4096
# Big leaves are reduced in groups with a fence between them, for the same reason.
_GROUP = 64


def _key_text(key: Any) -> tuple[str, bool]:
    """The text of one path entry, and whether it is an index (which takes no separator)."""
    if isinstance(key, jax.tree_util.GetAttrKey):
        return key.name, False
    inner = key.idx if isinstance(key, jax.tree_util.SequenceKey) else getattr(key, "key", None)
    if inner is None:
        return str(key).strip("."), False
    if isinstance(inner, int) and not isinstance(inner, bool):
        return f"[{inner}]", True
    return str(inner), False


def path_name(path: tuple[Any, ...]) -> str:
    """Writes a key path of ``jax.tree_util`` as a name.

    Args:
        path: key path, as ``jax.tree_util.tree_flatten_with_path`` gives it.

    Returns:
        For example ``"layers[0]/weight"``; ``""`` for the root. A last ``value`` attribute, the
        box around an NNX variable, is dropped.
    """
    last = path[-1] if path else None
    boxed = getattr(last, "name", "") in ("value", "raw_value")
    if boxed and len(path) > 1:
        path = path[:-1]
    name = ""
    for key in path:
        text, is_index = _key_text(key)
        name += text if is_index or not name else f"/{text}"
    return name


def leaf_names(
    tree: PyTree, *, root: str = "", is_leaf: Callable[[Any], bool] | None = None
) -> tuple[str, ...]:
    """Names the leaves of a pytree, in the order of ``jax.tree.leaves``.

    Args:
        tree: any pytree: dicts, lists, named tuples, dataclasses, NNX states, equinox modules.
        root: the name of a tree that is itself one leaf.
        is_leaf: as in ``jax.tree.leaves``.

    Returns:
        One distinct name a leaf. Should two paths read the same (``{"a/b": ..}`` beside
        ``{"a": {"b": ..}}``) those leaves get JAX's own unambiguous path.
    """
    paths = [p for p, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]]
    names = [path_name(path) or root for path in paths]
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    return tuple(
        name if seen[name] == 1 else jax.tree_util.keystr(path)
        for name, path in zip(names, paths, strict=True)
    )


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array (of JAX or NumPy, or the shape and dtype of one)."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def is_inexact_array(leaf: Any) -> bool:
    """Whether a leaf is an array of floating-point or complex numbers.

    Args:
        leaf: anything. Python numbers, ``None``, keys and ``float0`` arrays are not.

    Returns:
        True if a gradient can flow into the leaf.
    """
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def map_inexact(f: Callable[..., Any], tree: PyTree, *rest: PyTree, keep: int = 0) -> PyTree:
    """Maps ``f`` over the leaves of ``tree`` that carry a gradient; the others are passed by.

    Args:
        f: function of one leaf of ``tree`` and the matching leaves of ``rest``.
        tree: pytree whose leaves decide: where one is not an inexact array (``None`` included),
            ``f`` is not called.
        *rest: pytrees with the structure of ``tree`` or deeper.
        keep: which of ``(tree, *rest)`` supplies the result where ``f`` is not called.

    Returns:
        A pytree with the structure of ``tree``.

    Raises:
        ValueError: if the structures or the shapes of matching arrays differ; it names the leaf.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda leaf: leaf is None)
    columns = [leaves, *(_flatten_up_to(treedef, leaves, other) for other in rest)]
    out = []
    for i, row in enumerate(zip(*columns, strict=True)):
        if not is_inexact_array(row[0]):
            out.append(row[keep])
            continue
        for other in row[1:]:
            if getattr(other, "shape", row[0].shape) != row[0].shape or other is None:
                name = leaf_names(tree, root="(root)", is_leaf=lambda leaf: leaf is None)[i]
                got = getattr(other, "shape", other)
                raise ValueError(
                    f"leaf {name!r}: expected arrays of one shape, got {row[0].shape} and {got}; "
                    "pass gradients, state and parameters of the same model"
                )
        out.append(f(*row))
    return jax.tree.unflatten(treedef, out)


def _flatten_up_to(treedef: Any, leaves: list[Any], other: PyTree) -> list[Any]:
    try:
        return treedef.flatten_up_to(other)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"expected a pytree with the structure of the gradients ({len(leaves)} leaves), "
            f"got one that differs: {error}"
        ) from None


def _working_dtype(leaves: tuple[Any, ...]) -> Any:
    doubles = (jnp.float64, jnp.complex128)
    return jnp.float64 if any(leaf.dtype in doubles for leaf in leaves) else jnp.float32


def _real_parts(leaf: Any, dtype: Any) -> Float[Array, " n"]:
    """A leaf as one real vector in the working dtype; re and im of a complex one side by side."""
    flat = jnp.ravel(leaf)
    if jnp.iscomplexobj(flat):
        flat = jnp.concatenate([jnp.real(flat), jnp.imag(flat)])
    return flat.astype(dtype)


def _blocks(leaves: tuple[Any, ...], dtype: Any) -> list[Float[Array, " n"]]:
    """The leaves as few vectors: the small ones joined, the big ones as they are."""
    small = [_real_parts(leaf, dtype) for leaf in leaves if leaf.size <= _SMALL]
    # A fused concatenate of thousands of inputs is slow; joining in two levels is not.
    rows = [jnp.concatenate(small[i : i + 256]) for i in range(0, len(small), 256)]
    joined = [jnp.concatenate(rows)] if len(rows) > 1 else rows
    return joined + [_real_parts(leaf, dtype) for leaf in leaves if leaf.size > _SMALL]


def _reduce_blocks(f: Callable[[Array], Array], blocks: list[Array]) -> Float[Array, " blocks"]:
    """One scalar a block. Fences keep XLA from fusing thousands of reductions into one loop."""
    parts = [
        jnp.stack([f(block) for block in blocks[i : i + _GROUP]])
        for i in range(0, len(blocks), _GROUP)
    ]
    if len(parts) == 1:
        return parts[0]
    return jnp.concatenate(jax.lax.optimization_barrier(parts))


def _scaled_norm(leaves: tuple[Any, ...]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """``(scale, relative)``, whose product is the norm; the scale is a power of two.

    One pass over the data where the sum of squares is far from both ends of the range, so that
    neither it has overflowed nor a square that matters has underflowed; else a second pass over
    the leaves divided by the power of two next to their largest entry.
    """
    dtype = _working_dtype(leaves)
    limits = jnp.finfo(dtype)
    one = jnp.ones((), dtype)
    blocks = [block for block in _blocks(leaves, dtype) if block.size]
    if not blocks:
        return one, jnp.zeros((), dtype)
    plain = jnp.sum(_reduce_blocks(lambda x: jnp.sum(x * x), blocks))

    def rescaled() -> tuple[Array, Array]:
        largest = jnp.max(_reduce_blocks(lambda x: jnp.max(jnp.abs(x)), blocks))
        usable = jnp.isfinite(largest) & (largest > 0)
        _, exponent = jnp.frexp(jnp.where(usable, largest, one))
        # Both the scale and its inverse stay normal numbers.
        exponent = jnp.clip(exponent, limits.minexp, -limits.minexp)
        scale = jnp.where(usable, jnp.ldexp(one, exponent), one)
        inverse = one / scale
        squares = _reduce_blocks(lambda x: jnp.sum((x * inverse) ** 2), blocks)
        return scale, jnp.sqrt(jnp.sum(squares))

    # Squares below the smallest normal number are flushed; 2**66 of them stay under this bound's
    # rounding error.
    lowest = math.ldexp(1.0, int(limits.minexp) // 2 + 3)
    safe = (plain >= lowest) & (plain <= limits.max)
    return jax.lax.cond(safe, lambda: (one, jnp.sqrt(plain)), rescaled)


def _inner(leaves: tuple[Any, ...], tangents: tuple[Any, ...], factors: tuple[Array, Array]):
    """``Re <leaves * factor, tangents>``: the directional derivative of a norm."""
    dtype = factors[0].dtype
    total = jnp.zeros((), dtype)
    for x, dx in zip(leaves, tangents, strict=True):
        unit = _real_parts(x, dtype) * factors[0] * factors[1]
        total = total + jnp.sum(unit * _real_parts(dx, dtype))
    return total


@jax.custom_jvp
def _norm(leaves: tuple[Any, ...]) -> Float[Array, ""]:
    scale, relative = _scaled_norm(leaves)
    return scale * relative


@_norm.defjvp
def _norm_jvp(primals, tangents):
    (leaves,), (directions,) = primals, tangents
    scale, relative = _scaled_norm(leaves)
    inverse = jnp.where(relative > 0, 1 / jnp.where(relative > 0, relative, 1), 0)
    return scale * relative, _inner(leaves, directions, (1 / scale, inverse))


@jax.custom_jvp
def _norm_and_scale(leaves: tuple[Any, ...]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    return _scaled_norm(leaves)


@_norm_and_scale.defjvp
def _norm_and_scale_jvp(primals, tangents):
    (leaves,), (directions,) = primals, tangents
    scale, relative = _scaled_norm(leaves)
    inverse = jnp.where(relative > 0, 1 / jnp.where(relative > 0, relative, 1), 0)
    slope = _inner(leaves, directions, (1 / scale, inverse)) / scale
    return (scale, relative), (jnp.zeros_like(scale), slope)


def inexact_leaves(tree: PyTree) -> tuple[Any, ...]:
    """The leaves of a pytree that are inexact arrays, in the order of ``jax.tree.leaves``."""
    return tuple(leaf for leaf in jax.tree.leaves(tree) if is_inexact_array(leaf))


def replace_inexact(tree: PyTree, values: Sequence[Any], *, keep: bool = True) -> PyTree:
    """The inverse of `inexact_leaves`: a tree with other values for its inexact leaves.

    Args:
        tree: gives the structure, and the leaves that are no inexact arrays.
        values: one for every inexact leaf, in order.
        keep: whether the other leaves (an equinox module's functions, integer tables, keys) stay;
            without it they become None, as optimizers see them.

    Raises:
        ValueError: for another number of values.
    """
    leaves, treedef = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if is_inexact_array(leaf)]
    filled = list(leaves) if keep else [None] * len(leaves)
    for place, value in zip(places, values, strict=True):
        filled[place] = value
    return jax.tree.unflatten(treedef, filled)


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """The Euclidean norm of all inexact leaves of a pytree together.

    Accumulated in float32 (float64 if any leaf is double precision) with a power-of-two scale:
    entries of 1e30 or 1e-30 and half-precision leaves give the right norm. Its gradient at zero
    is zero. Leaves that are ``None``, integer, ``float0`` or no arrays are passed by.

    Args:
        tree: any pytree of arrays; complex leaves count by their modulus.

    Returns:
        Scalar, float32 or float64; 0 for an empty tree, NaN if any entry is NaN, else inf if any
        entry is infinite.
    """
    return _norm(inexact_leaves(tree))


def scaled_norm(tree: PyTree) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`global_norm` as a product ``scale * relative``, for norms beyond the dtype's own range.

    Args:
        tree: any pytree of arrays.

    Returns:
        ``(scale, relative)``, scalars; ``scale`` is a power of two (1 in the ordinary range) that
        has no gradient, ``relative`` is then well inside the range unless the norm is 0, inf or
        NaN.
    """
    return _norm_and_scale(inexact_leaves(tree))


def count_parameters(tree: PyTree) -> int:
    """Number of entries in all inexact leaves."""
    return sum(leaf.size for leaf in inexact_leaves(tree))
