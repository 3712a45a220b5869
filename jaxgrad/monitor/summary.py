"""A step in numbers: what a recorder keeps of one, computed where the arrays are."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxgrad.monitor.watching import WatchState, alignment, norm
from jaxgrad.statistics import leaf_rms
from jaxgrad.tree import inexact_leaves

# One number a step.
SCALARS: tuple[str, ...] = (
    "loss", "gradient_norm", "clipped_norm", "update_norm", "weight_norm", "alignment",
    "nonfinite",
)  # fmt: skip
# One number a row, or a parameter leaf, of the flow.
ROWS = (
    "activation_rms", "activation_mean", "activation_max", "activation_zero_share",
    "activation_nonfinite", "gradient_rms", "gradient_max", "gradient_nonfinite",
    "gradient_below_float16", "gradient_below_bfloat16", "gradient_reached",
)  # fmt: skip
LEAVES = ("weight_rms", "weight_gradient_rms", "weight_gradient_nonfinite")
# Bins of the exponent histogram: floor(log2 |g|), from float32's smallest subnormal number on.
EXPONENTS = range(-149, 128)
_SAMPLED = 4096  # elements of a leaf that the histogram looks at


def summarize(
    loss: Any, flow: Any, params: PyTree, updates: PyTree, grads: PyTree, state: PyTree
) -> dict[str, Array]:
    """What is kept of a step; all trees but the flow may be None.

    Args:
        loss: the loss.
        flow: the `Flow` of the step.
        params: parameters, before the updates or after them.
        updates: what is added to the parameters.
        grads: raw gradients.
        state: the optimizer's state; a `WatchState` in it gives the norms.

    Returns:
        float32 arrays by name: scalars, rows, leaves, and where `grads` are given the histogram of
        their exponents. What was not given is NaN.
    """
    missing = jnp.full((), jnp.nan, jnp.float32)
    found: dict[str, Array] = dict.fromkeys(SCALARS, missing)
    found["loss"] = jnp.asarray(loss, jnp.float32)
    for name in (*ROWS, *LEAVES):
        found[name] = jnp.asarray(getattr(flow, name), jnp.float32)
    bad = flow.nonfinite + jnp.sum(flow.weight_gradient_nonfinite, -1)
    found["nonfinite"] = jnp.asarray(bad, jnp.float32)
    found |= _watched(state)
    if grads is not None:
        found["gradient_norm"] = norm(grads)
        found["exponents"] = exponents(inexact_leaves(grads))
    if params is not None:
        found["weight_norm"] = norm(params)
    if updates is not None:
        found["update_norm"] = norm(updates)
        if matches(flow, updates):
            found["update_rms"] = leaf_rms(inexact_leaves(updates)).astype(jnp.float32)
        if matches(flow, params, updates):
            found["rounded_away"] = rounded_away(inexact_leaves(params), inexact_leaves(updates))
        if matches(flow, grads, updates):
            norms = found["gradient_norm"], found["update_norm"]
            found["alignment"] = alignment(grads, updates, norms)
    return found


def matches(flow: Any, *trees: PyTree) -> bool:
    """Whether trees have one floating-point leaf for every parameter of the flow."""
    return all(len(inexact_leaves(tree)) == len(flow.parameter_names) for tree in trees)


def rounded_away(values: Sequence[Array], updates: Sequence[Array]) -> Array:
    """Share of every leaf's updates that are not zero and do not change the parameter.

    Args:
        values: parameter leaves.
        updates: what is added to them.

    Returns:
        Shares of the updates that are not zero, (leaves,) float32; 0 where all are zero.
    """
    shares = []
    for value, update in zip(values, updates, strict=True):
        wide = jnp.promote_types(jnp.promote_types(value.dtype, update.dtype), jnp.float32)
        moved, lost = moved_and_lost(value.astype(wide), update.astype(wide), value.dtype)
        shares.append((jnp.sum(lost) / jnp.maximum(jnp.sum(moved), 1)).astype(jnp.float32))
    return jnp.stack(shares) if shares else jnp.zeros(0, jnp.float32)


def moved_and_lost(value: Array, update: Array, dtype: Any) -> tuple[Array, Array]:
    """Where an update is not zero, and where it is and does not change the parameter.

    Args:
        value: the parameter, in a type that holds it and the update.
        update: what is added, in that type.
        dtype: that the parameter is kept in.
    """
    moved = update != 0
    return moved, moved & ((value + update).astype(dtype).astype(value.dtype) == value)


def exponents(leaves: Sequence[Array]) -> Array:
    """How many gradient elements have which power of two: `EXPONENTS`, then the exact zeros.

    At most some thousand elements of a leaf are looked at, at equal distances; each counts for as
    many as it stands for.

    Args:
        leaves: arrays.

    Returns:
        Counts, (len(EXPONENTS) + 1,) float32; NaN and infinity are left out.
    """
    picked, weights = [], []
    for leaf in leaves:
        if leaf.size:
            flat = jnp.abs(jnp.ravel(leaf)).astype(jnp.float32)
            picked.append(flat[:: -(-leaf.size // _SAMPLED)])
            weights.append(np.full(picked[-1].size, leaf.size / picked[-1].size, np.float32))
    if not picked:
        return jnp.zeros(len(EXPONENTS) + 1, jnp.float32)
    # one histogram for all leaves: XLA takes long to compile many
    place = _powers(jnp.concatenate(picked)) - EXPONENTS.start
    count = len(EXPONENTS) + 1
    table = jnp.zeros(count, jnp.float32)
    return table.at[place].add(jnp.asarray(np.concatenate(weights)), mode="drop")


def _powers(x: Array) -> Array:
    """The power of two of each element; one more than the largest for zero, beyond it for inf."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    field, fraction = bits >> 23, bits & 0x7FFFFF
    # a subnormal number is its fraction times 2^-149: read as bits, none of it is flushed to zero
    small = 31 - jax.lax.clz(jnp.maximum(fraction, 1)) - 149
    power = jnp.where(field == 0, small, field - 127)
    power = jnp.where(bits == 0, EXPONENTS.stop, power)
    return jnp.where(field == 255, EXPONENTS.stop + 9, power)


def _watched(state: PyTree) -> dict[str, Array]:
    """The norms of the first `WatchState` in an optimizer's state."""
    held = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, WatchState))
    for part in held:
        if isinstance(part, WatchState):
            seen = part.figures
            return {
                "gradient_norm": seen.raw, "clipped_norm": seen.clipped,
                "update_norm": seen.update, "weight_norm": seen.weight,
                "alignment": seen.alignment,
            }  # fmt: skip
    return {}
