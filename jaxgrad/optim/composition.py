"""Putting transformations together, and many small arrays into few."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxgrad.optim.arguments import check_nonnegative
from jaxgrad.optim.base import DecayPlan, arithmetic, increment, narrow, rule, zero_count
from jaxgrad.tree import is_inexact_array, map_inexact


def chain(*transformations: Any) -> optax.GradientTransformationExtraArgs:
    """Applies transformations from left to right: a clip goes before the rule that it protects.

    Args:
        *transformations: optax transformations; none at all is the identity.

    Returns:
        An optax transformation whose state is the tuple of their states.
    """
    parts = [optax.with_extra_args_support(tx) for tx in transformations]

    def init(params: PyTree) -> tuple[Any, ...]:
        return tuple(part.init(params) for part in parts)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, tuple[Any, ...]]:
        if len(state) != len(parts):
            raise ValueError(
                f"expected a state of {len(parts)} parts, got {len(state)}; is it another chain's?"
            )
        new_state = []
        for part, inner in zip(parts, state, strict=True):
            updates, new = part.update(updates, inner, params, **extra)
            new_state.append(new)
        return updates, tuple(new_state)

    return optax.GradientTransformationExtraArgs(init, update)


class DecayState(NamedTuple):
    """State of `add_decayed_weights`: ``count``, the number of updates done."""

    count: Any


def add_decayed_weights(
    weight_decay: Any = 0.0, mask: Any = None, *, numerics: str = "exact"
) -> optax.GradientTransformationExtraArgs:
    """Adds ``weight_decay * p``: before a rule this is L2 regularization, after it decoupled decay.

    Args:
        weight_decay: number or schedule.
        mask: leaves that decay: None (all), a tree of bools, or a function of the parameters.
        numerics: ``"exact"`` or ``"optax"``.

    Returns:
        An optax transformation; its update needs ``params``.
    """
    arith = arithmetic(numerics)
    check_nonnegative(weight_decay=weight_decay)
    decay = DecayPlan(weight_decay, mask)

    def update(updates: PyTree, state: DecayState, params: PyTree) -> tuple[PyTree, DecayState]:
        wide = map_inexact(arith.widen, updates)
        decayed = decay(arith, wide, params, state.count)
        return narrow(arith, decayed, updates), DecayState(increment(state.count))

    return rule(lambda _params: DecayState(zero_count()), update)


def compiler_options() -> dict[str, bool]:
    """Options for ``jax.jit(step, compiler_options=...)`` that halve the time of some CPU steps.

    On CPU, XLA copies a moment that is read by one loop and overwritten by another, as in Lion and
    in accumulators; its region analysis sees that this is not needed. Results keep their bits.

    Returns:
        The option on CPU, nothing elsewhere.
    """
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_cpu_copy_insertion_use_region_analysis": True}


def inject_hyperparams(factory: Any, static_args: Any = ()) -> Any:
    """As ``optax.inject_hyperparams``, with hyperparameters in float32 whatever the parameters are.

    optax casts them to the parameters' dtype: in bfloat16 ``b2=0.999`` becomes 1, and Adam NaN.

    Args:
        factory: function that makes a transformation, such as `adam`.
        static_args: names of arguments that stay Python values.

    Returns:
        A function with the factory's signature; hyperparameters are in ``state.hyperparams``.
    """
    dtype = jnp.result_type(float)
    return optax.inject_hyperparams(factory, static_args, hyperparam_dtype=dtype)


class _Slot(NamedTuple):
    """Where a leaf went: a vector's key and the leaf's shape, or a key of None for a leaf kept."""

    key: str | None
    shape: tuple[int, ...]


class Layout(NamedTuple):
    """How `pack` arranged a tree; hashable, so that it can be closed over or static."""

    treedef: Any
    slots: tuple[_Slot, ...]


def pack(params: PyTree, limit: int = 4096, label: Any = None) -> tuple[PyTree, Layout]:
    """Joins small leaves to one vector per dtype: thousands of small arrays cost time each.

    Rules that act on entries (all but Adafactor, Muon, block and unit clips) do the same on
    packed trees, about a hundred times as fast for a thousand leaves of 256 entries.

    Args:
        params: parameters, or gradients of the same structure.
        limit: leaves of at most this many entries are joined; joining big ones is slow.
        label: None, or a function of a leaf whose text keeps leaves apart, for weight decay masks.

    Returns:
        ``(packed, layout)``; ``packed`` is ``{"vectors": {key: vector}, "leaves": [kept, ..]}``.
    """
    leaves, treedef = jax.tree.flatten(params)
    groups: dict[str, list[Any]] = {}
    kept, slots = [], []
    for leaf in leaves:
        if not is_inexact_array(leaf) or leaf.size > limit:
            kept.append(leaf)
            slots.append(_Slot(None, np.shape(leaf)))
            continue
        key = str(leaf.dtype) + (f":{label(leaf)}" if label is not None else "")
        groups.setdefault(key, []).append(jnp.ravel(leaf))
        slots.append(_Slot(key, leaf.shape))
    vectors = {key: jnp.concatenate(parts) for key, parts in groups.items()}
    return {"vectors": vectors, "leaves": kept}, Layout(treedef, tuple(slots))


def unpack(packed: PyTree, layout: Layout) -> PyTree:
    """Takes a packed tree apart again; its derivative is one concatenation a vector.

    Args:
        packed: tree of `pack`, or updates of that structure.
        layout: layout of `pack`.

    Returns:
        The tree as it was.
    """
    pieces = {}
    for key, vector in packed["vectors"].items():
        shapes = [slot.shape for slot in layout.slots if slot.key == key]
        sizes = [int(np.prod(shape)) for shape in shapes]
        parts = jax.lax.split(vector, sizes)
        pieces[key] = iter(part.reshape(s) for part, s in zip(parts, shapes, strict=True))
    kept = iter(packed["leaves"])
    leaves = [next(kept) if slot.key is None else next(pieces[slot.key]) for slot in layout.slots]
    return jax.tree.unflatten(layout.treedef, leaves)


def flat(tx: Any, limit: int = 4096) -> optax.GradientTransformationExtraArgs:
    """Runs an entrywise rule on `pack`-ed gradients and keeps its state packed.

    Gradients and parameters go in and updates come out as trees, which still costs a pass per
    leaf; keep the parameters themselves packed (`pack`, `unpack` in the loss) for the full gain.

    Args:
        tx: an entrywise transformation; not Adafactor, Muon, block or unit clips, nor masks.
        limit: leaves of at most this many entries are joined.

    Returns:
        An optax transformation. Every gradient leaf must be an array.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> Any:
        return inner.init(pack(params, limit)[0])

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        packed, layout = pack(updates, limit)
        flat_params = None if params is None else pack(params, limit)[0]
        new, state = inner.update(packed, state, flat_params, **extra)
        return unpack(new, layout), state

    return optax.GradientTransformationExtraArgs(init, update)
