"""What is measured of all leaves at a step of a training, in a few reductions.

Reductions of every leaf by itself would take most of the time that a short training takes to
compile. Leaves of one dtype are laid out as rows of one matrix instead, none of them shared.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxgrad.monitor.summary import moved_and_lost

# The reciprocal of a larger unit is subnormal, which XLA takes for zero on a CPU.
_LARGEST = 2.0**125
_WIDTH = 128


def step_figures(
    values: Sequence[Array], grads: Sequence[Array], updates: Sequence[Array]
) -> dict[str, Array]:
    """Sizes of parameters, gradients and updates, and what of the updates is lost.

    Nothing overflows or underflows on the way: every leaf is measured in units of its largest
    element.

    Args:
        values: parameters, at least one.
        grads: their gradients.
        updates: what is added to them.

    Returns:
        ``weight_rms``, ``gradient_rms``, ``update_rms`` and ``rounded_away`` (share of the nonzero
        updates that do not change the parameter), (leaves,) each; ``gradient_norm``,
        ``update_norm``, ``alignment`` (cosine between update and negative gradient), and whether
        all gradients are ``finite``.
    """
    groups: dict[np.dtype, list[int]] = {}
    for i, value in enumerate(values):
        groups.setdefault(np.dtype(value.dtype), []).append(i)
    # JAX's gradient of a complex parameter is the conjugate of the direction of ascent
    ascent = [g.conj() for g in grads]
    tables = [
        _table(*([_real(x[i]) for i in members] for x in (values, ascent, updates)))
        for members in groups.values()
    ]
    order = np.argsort(np.concatenate(list(groups.values())))
    found = {key: jnp.concatenate([t[key] for t in tables])[order] for key in tables[0]}
    sizes = np.asarray([max(_real(v).size, 1) for v in values], np.float32)
    gradient, update = (_norm(found[f"{k}_unit"], found[f"{k}_square"]) for k in ("grad", "update"))
    dots = found["dot"] * _over(found["grad_unit"], gradient) * _over(found["update_unit"], update)
    return {
        **{
            f"{name}_rms": jnp.sqrt(found[f"{key}_square"] / sizes) * found[f"{key}_unit"]
            for name, key in (("weight", "value"), ("gradient", "grad"), ("update", "update"))
        },
        "rounded_away": found["lost"] / jnp.maximum(found["moved"], 1),
        "gradient_norm": gradient, "update_norm": update, "alignment": -jnp.sum(dots),
        # a compiled maximum may skip a NaN; a sum of squares of quotients does not, nor overflows
        "finite": jnp.all(jnp.isfinite(found["grad_unit"]) & jnp.isfinite(found["grad_square"])),
    }  # fmt: skip


def _real(x: Array) -> Array:
    return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x


def _table(values: list[Array], grads: list[Array], updates: list[Array]) -> dict[str, Array]:
    """By leaf: largest element, sum of squares in units of it, and counts of updates; one dtype."""
    dtype = values[0].dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    rows = [-(-x.size // _WIDTH) for x in values]
    leaf = np.repeat(np.arange(len(values)), rows)

    def packed(leaves: list[Array]) -> Array:
        flat = [jnp.pad(x.astype(wide).ravel(), (0, -x.size % _WIDTH)) for x in leaves]
        return jnp.concatenate(flat).reshape(-1, _WIDTH)

    def by_leaf(reduce: str, of_rows: Array) -> Array:
        combine = getattr(jax.ops, f"segment_{reduce}")
        return combine(of_rows, leaf, num_segments=len(values), indices_are_sorted=True)

    found, scaled = {}, {}
    matrices = {"value": packed(values), "grad": packed(grads), "update": packed(updates)}
    for key, matrix in matrices.items():
        # a leaf without elements has no rows, and the maximum of none is -inf
        unit = jnp.maximum(by_leaf("max", jnp.max(jnp.abs(matrix), axis=1)), 0.0)
        safe = jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1.0)
        safe = jnp.minimum(safe, _LARGEST)
        scaled[key] = matrix / safe[leaf][:, None]
        found[f"{key}_unit"] = safe
        found[f"{key}_square"] = by_leaf("sum", jnp.sum(jnp.square(scaled[key]), axis=1))
        if key == "grad":
            found["grad_unit"] = jnp.where(jnp.isfinite(unit), safe, unit)
    moved, lost = moved_and_lost(matrices["value"], matrices["update"], dtype)
    sums = {"dot": scaled["grad"] * scaled["update"], "moved": moved, "lost": lost}
    found |= {key: by_leaf("sum", jnp.sum(x, axis=1, dtype=wide)) for key, x in sums.items()}
    return {key: x.astype(jnp.float32) for key, x in found.items()}


def _norm(unit: Array, square: Array) -> Array:
    largest = jnp.max(unit)
    return largest * jnp.sqrt(jnp.sum(square * jnp.square(unit / largest)))


def _over(unit: Array, norm: Array) -> Array:
    return unit / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)
