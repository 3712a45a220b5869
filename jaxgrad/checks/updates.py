"""Assertions about a transformation: where it clips, and whether it equals another one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxgrad.optim.order import clip_order
from jaxgrad.tree import is_inexact_array, leaf_names

_EXPLANATIONS = {
    "after": "the clip comes after the rule's state: exploding gradients enter the moments in full",
    "none": "it does not clip at all",
    "mixed": "some of its state sees clipped gradients and some does not",
}


def assert_clips_before_update(
    tx: Any, params: PyTree, *, extra_args: dict[str, Any] | None = None
) -> None:
    """Asserts that gradients are clipped before they reach the state of the rule.

    Args:
        tx: any optax transformation.
        params: parameters, or ones like them.
        extra_args: further arguments that its ``update`` needs.

    Raises:
        AssertionError: if `clip_order` is ``"after"``, ``"none"`` or ``"mixed"``. A second clip
            after the rule (``"both"``) passes, and so does a clip where order has no meaning
            (``"stateless"``).
    """
    order = clip_order(tx, params, extra_args=extra_args)
    if order in ("before", "both", "stateless"):
        return
    rows = [f"  {name}: {order.leaves[name]} ({order.responses[name]})" for name in order.leaves]
    read = f"\nread from its closures: {' > '.join(order.steps)}" if order.steps else ""
    if order == "none" and any("clip" in step for step in order.steps):
        read += " (a clip whose threshold no gradient of norm 1e-17 to 1e18 reaches)"
    raise AssertionError(
        f"clip order is {str(order)!r}: {_EXPLANATIONS[order]}. Measured, leaf by leaf "
        "(raw: grows with the gradient without end; clipped: stops):\n"
        + "\n".join(rows)
        + read
        + "\nPut the clip first: chain(clip_by_global_norm(1.0), rule)."
    )


def _gradients(params: PyTree, steps: int, key: Any) -> PyTree:
    """Gradients over twelve decades, each leaf and entry at its own scale, some exactly zero."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, max(len(leaves), 1))[: len(leaves)]

    def draw(p: Any, k: Any) -> Any:
        if not is_inexact_array(p):
            return None
        k_size, k_sign, k_zero = jax.random.split(k, 3)
        shape = (steps, *p.shape)
        size = 10.0 ** jax.random.uniform(k_size, p.shape, minval=-10.0, maxval=2.0)
        kind = jnp.promote_types(p.dtype, jnp.float32)
        noise = jax.random.normal(k_sign, shape, kind)
        noise = noise * jax.random.bernoulli(k_zero, 0.95, shape)
        return (size * noise).astype(p.dtype)

    return treedef.unflatten([draw(p, k) for p, k in zip(leaves, keys, strict=True)])


def _moved(update: Any, param: Any) -> Any:
    return param if update is None else (param + update).astype(param.dtype)


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.complex128 if jnp.iscomplexobj(x) else np.float64)


def assert_same_updates(
    tx_a: Any,
    tx_b: Any,
    params: PyTree,
    *,
    steps: int = 50,
    key: Any = None,
    rtol: float | int = 5e-5,
) -> None:
    """Asserts that two transformations make the same updates, step by step.

    Both see the same random gradients, over twelve decades, and the parameters that the first one
    makes. Every entry is compared with the largest update it had.

    Args:
        tx_a: transformation.
        tx_b: transformation.
        params: parameters to start from.
        steps: number of steps.
        key: random key; None for a fixed one.
        rtol: largest relative difference; 0 asks for equal bits. The default passes optax's
            float32 bias correction, which is off by 7e-6.

    Raises:
        AssertionError: naming step, leaf, entry, both values.
    """
    grads = _gradients(params, steps, jax.random.key(0) if key is None else key)

    @jax.jit
    def run(params: PyTree) -> Any:
        def body(carry: Any, g: Any) -> Any:
            p, a, b = carry
            u_a, a = tx_a.update(g, a, p)
            u_b, b = tx_b.update(g, b, p)
            p = jax.tree.map(_moved, u_a, p, is_leaf=lambda leaf: leaf is None)
            return (p, a, b), (u_a, u_b)

        start = (params, tx_a.init(params), tx_b.init(params))
        return jax.lax.scan(body, start, grads, length=steps)[1]

    path_a, path_b = run(params)
    if jax.tree.structure(path_a) != jax.tree.structure(path_b):
        raise AssertionError(
            "updates differ in structure: "
            f"{jax.tree.structure(path_a)} and {jax.tree.structure(path_b)}"
        )
    pairs = zip(
        leaf_names(path_a, root="params"), *map(jax.tree.leaves, (path_a, path_b)), strict=True
    )
    for name, a, b in pairs:
        a, b = _wide(a), _wide(b)  # noqa: PLW2901
        largest = np.maximum(np.abs(a), np.abs(b))
        scale = np.where(np.isfinite(largest), largest, 0).max(axis=0, initial=0)
        with np.errstate(invalid="ignore"):  # inf - inf
            far = ~(np.abs(a - b) <= rtol * scale) & (a != b) & ~(np.isnan(a) & np.isnan(b))
        if not far.any():
            continue
        at = tuple(int(i) for i in np.argwhere(far)[0])
        gap = abs(a[at] - b[at]) / (scale[at[1:]] or 1)
        raise AssertionError(
            f"updates differ at step {at[0] + 1}, leaf {name!r}, entry {at[1:]}: "
            f"{a[at]:.9g} and {b[at]:.9g}, {gap:.2g} of that entry's largest update "
            f"(allowed {rtol:.2g}); {int(far.sum())} of {far.size} values differ in this leaf"
        )
