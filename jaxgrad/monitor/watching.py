"""What a training run records, as an optax-compatible transformation.

The norm that a log shows is the raw gradient's, or the clipped one's, or the update's: three
numbers that users mistake for each other. Here each has its name.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxgrad.optim.reading import chain_parts, flattened, read_steps
from jaxgrad.statistics import leaf_statistics
from jaxgrad.tree import global_norm, inexact_leaves


class Figures(NamedTuple):
    """The numbers of the last step that was measured; float32 scalars.

    Attributes:
        raw: global norm of the gradient as it came.
        clipped: of the gradient behind the clips that stand first in the chain; `raw` without any.
        update: of what is added to the parameters.
        weight: of the parameters; 0 if the optimizer was not given them.
        alignment: cosine between the update and the negative gradient.
        nonfinite: number of NaN and infinite elements of the gradient.
    """

    raw: Array
    clipped: Array
    update: Array
    weight: Array
    alignment: Array
    nonfinite: Array


class WatchState(NamedTuple):
    """State of `watch`.

    Attributes:
        inner: state of the watched transformation.
        count: steps so far.
        measured: how many of them were measured.
        clipped_steps: in how many of those a clip was active.
        figures: numbers of the last measured one.
    """

    inner: Any
    count: Array
    measured: Array
    clipped_steps: Array
    figures: Figures


def watch(tx: Any, every: int = 1) -> optax.GradientTransformationExtraArgs:
    """Wraps a transformation so that its state says what it does; the updates stay the same.

    Args:
        tx: any optax transformation.
        every: only every so-many-th step is measured, the first one among them.

    Returns:
        A transformation with state `WatchState`.

    Raises:
        ValueError: if `every` is less than one.
    """
    if every < 1:
        raise ValueError(f"watch(tx, every): expected every >= 1, got {every}")
    clips = leading_clips(tx)
    watched = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> WatchState:
        zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        return WatchState(watched.init(params), none, none, none, Figures(*[zero] * 6))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        grads = updates
        updates, inner = watched.update(grads, state.inner, params, **extra)

        def measure() -> tuple[Array, Array, Figures]:
            figures = _figures(grads, _clipped(clips, grads, params), updates, params)
            active = figures.clipped < figures.raw * (1 - 1e-6)
            return state.measured + 1, state.clipped_steps + active.astype(jnp.int32), figures

        def skip() -> tuple[Array, Array, Figures]:
            return state.measured, state.clipped_steps, state.figures

        due = state.count % every == 0
        measured, active, figures = jax.lax.cond(due, measure, skip) if every > 1 else measure()
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, WatchState(inner, count, measured, active, figures)

    return optax.GradientTransformationExtraArgs(init, update)


def leading_clips(tx: Any) -> list[Any]:
    """The clips that stand first in a chain, as far as its closures show them."""
    clips = []
    for part in chain_parts(tx):
        steps = flattened(read_steps(part))
        if not steps or any(step.kind != "clip" for step in steps):
            break
        clips.append(part)
    return clips


def _clipped(clips: list[Any], grads: PyTree, params: PyTree) -> PyTree:
    for clip in clips:  # clips keep no state that matters
        grads, _ = clip.update(grads, clip.init(params if params is not None else grads), params)
    return grads


def _figures(grads: PyTree, clipped: PyTree, updates: PyTree, params: PyTree) -> Figures:
    raw, update = norm(grads), norm(updates)
    cosine = alignment(grads, updates, (raw, update))
    bad = jnp.sum(leaf_statistics(inexact_leaves(grads))[1])
    weight = norm(params) if params is not None else jnp.zeros((), jnp.float32)
    found = (raw, norm(clipped), update, weight, cosine, bad)
    return Figures(*(jnp.asarray(x, jnp.float32) for x in found))


def norm(tree: PyTree) -> Array:
    """The global norm, float32."""
    return global_norm(tree).astype(jnp.float32)


def alignment(grads: PyTree, updates: PyTree, norms: tuple[Array, Array]) -> Array:
    """Cosine between the update and the negative gradient, of these norms; 0 where one is zero."""
    sizes = [jnp.where(n > 0, n, 1.0) for n in norms]
    inner = sum(
        jnp.vdot(g.astype(jnp.float32) / sizes[0], u.astype(jnp.float32) / sizes[1]).real
        for g, u in zip(inexact_leaves(grads), inexact_leaves(updates), strict=True)
    )
    return -jnp.asarray(inner, jnp.float32)
