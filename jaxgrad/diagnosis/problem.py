"""The user's loss as a function of lists of arrays."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxgrad.graph import arguments
from jaxgrad.tree import is_array, is_inexact_array, replace_inexact

MAX_BATCHES = 16
# Of tiny batches more are used: 16 batches of one example would be learned by heart.
FEW, _EXAMPLES, _MOST_BATCHES, _MOST_BYTES = 8, 256, 160, 2**26


@dataclass(frozen=True, eq=False)
class Problem:
    """A loss, its parameters and its data, taken to pieces.

    Attributes:
        loss: ``loss(params, batch[, key])``.
        has_aux: whether it returns ``(loss, aux)``.
        treedef: of the parameters.
        leaves: all leaves of the parameters.
        wanted: positions of the floating-point leaves.
        names: their names.
        trainable: whether each of them is trained.
        batch: the batch, arrays of JAX throughout.
        batches: batches of the same shapes, at least one.
        key: random key, or None where the loss takes none.
    """

    loss: Callable[..., Any]
    has_aux: bool
    treedef: Any
    leaves: tuple[Any, ...]
    wanted: tuple[int, ...]
    names: tuple[str, ...]
    trainable: tuple[bool, ...]
    batch: PyTree
    batches: tuple[PyTree, ...]
    key: Any
    root: str = "params"
    batch_root: str = "batch"

    @property
    def values(self) -> list[Array]:
        """The floating-point parameters."""
        return [self.leaves[i] for i in self.wanted]

    def params(self, values: Sequence[Any]) -> PyTree:
        """The parameters with new floating-point leaves."""
        return replace_inexact(jax.tree.unflatten(self.treedef, self.leaves), values)

    def tree(self, values: Sequence[Any]) -> PyTree:
        """What an optimizer sees: floating-point leaves, None in the place of all others."""
        whole = jax.tree.unflatten(self.treedef, self.leaves)
        return replace_inexact(whole, values, keep=False)

    def flat(self, tree: PyTree) -> list[Any]:
        """The inverse of `tree`."""
        leaves = self.treedef.flatten_up_to(tree)
        return [leaves[i] for i in self.wanted]

    def value(self, values: Sequence[Any], batch: PyTree, key: Any = None) -> Array:
        """The loss."""
        extra = () if self.key is None else (self.key if key is None else key,)
        result = self.loss(self.params(values), batch, *extra)
        return result[0] if self.has_aux else result


def make_problem(  # noqa: PLR0913 (the arguments of `diagnose`)
    loss: Callable[..., Any],
    params: PyTree,
    batch: PyTree,
    *,
    batches: Iterable[PyTree] | None,
    has_aux: bool,
    key: Any,
    trainable: Any,
) -> Problem:
    """Takes the arguments of `diagnose` to pieces.

    Raises:
        TypeError: if the parameters hold no floating-point array, or the loss is no real scalar.
    """
    labels = arguments.parameter_labels(loss, 3)
    leaves, treedef = jax.tree.flatten(params)
    only_numbers = all(is_array(x) or isinstance(x, float) for x in leaves)
    leaves = [_as_array(x, only_numbers) for x in leaves]
    wanted = tuple(i for i, leaf in enumerate(leaves) if is_inexact_array(leaf))
    if not wanted:
        raise TypeError(
            "diagnose(loss, params, batch): params has no floating-point array to train; its "
            f"leaves are of type {sorted({type(x).__name__ for x in leaves}) or 'none'}"
        )
    every_name = arguments.leaf_labels(params, labels[0])
    names = tuple(every_name[i] for i in wanted)
    batch = jax.tree.map(_to_device, batch)
    key = key if key is not None else (jax.random.key(0) if _wants_key(loss) else None)
    problem = Problem(
        loss, has_aux, treedef, tuple(leaves), wanted, names,
        _trainable(trainable, params, wanted, every_name),
        batch, _alike(batch, batches), key, labels[0], labels[1],
    )  # fmt: skip
    _check_scalar(problem)
    return problem


def arrays_of(batch: PyTree) -> list[Array]:
    """What of a batch a compiled program takes as arguments, in the order of its leaves."""
    return [x for x in jax.tree.leaves(batch) if isinstance(x, jax.Array)]


def _as_array(leaf: Any, numbers: bool) -> Any:
    if isinstance(leaf, np.ndarray | np.generic) or (isinstance(leaf, float) and numbers):
        return jnp.asarray(leaf)
    if isinstance(leaf, jax.Array) and leaf.weak_type:
        # as after the first update; else all that is measured before and after compiles twice
        return jax.lax.convert_element_type(leaf, leaf.dtype)
    return leaf


def _to_device(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf


def _wants_key(loss: Callable[..., Any]) -> bool:
    """Whether the loss cannot be called without a third argument."""
    try:
        parameters = list(inspect.signature(loss).parameters.values())
    except (TypeError, ValueError):
        return False
    needed = [
        p
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(needed) == 3


def _trainable(
    trainable: Any, params: PyTree, wanted: tuple[int, ...], names: list[str]
) -> tuple[bool, ...]:
    """The mask as one flag a floating-point leaf; a prefix tree of flags, or a function of names.

    Raises:
        ValueError: if the mask does not fit the parameters.
    """
    if trainable is None:
        return (True,) * len(wanted)
    # a module of flags may be callable, too
    listed = jax.tree.leaves(trainable)
    flags_given = bool(listed) and all(isinstance(x, bool | np.bool_) for x in listed)
    if callable(trainable) and not flags_given:
        return tuple(bool(trainable(names[i])) for i in wanted)
    try:
        flags = jax.tree.broadcast(trainable, params)
    except ValueError as error:
        raise ValueError(
            "trainable: expected a pytree of bool with the structure of params or a prefix of it, "
            f"or a function of a leaf's name: {error}"
        ) from error
    listed = jax.tree.leaves(flags)
    return tuple(bool(listed[i]) for i in wanted)


def _alike(batch: PyTree, batches: Iterable[PyTree] | None) -> tuple[PyTree, ...]:
    """The first batches that have the shapes of `batch`; `batch` itself where there is none."""
    shape = _signature(batch)
    found = []
    for other in islice(iter(batches if batches is not None else ()), _wanted_batches(batch)):
        moved = jax.tree.map(_to_device, other)
        if _signature(moved) == shape:
            found.append(moved)
    return tuple(found) or (batch,)


def _wanted_batches(batch: PyTree) -> int:
    """How many batches are used: `MAX_BATCHES`, or more where each holds next to nothing."""
    arrays = [x for x in jax.tree.leaves(batch) if getattr(x, "ndim", 0)]
    examples = count_examples(batch) or MAX_BATCHES
    size = max(sum(x.size * jnp.dtype(x.dtype).itemsize for x in arrays if not _is_key(x)), 1)
    most = min(_EXAMPLES // max(examples, 1), _MOST_BATCHES, _MOST_BYTES // size)
    return max(MAX_BATCHES, most)


def count_examples(batch: PyTree) -> int | None:
    """The length of the leading axis that all arrays of a batch share; None if they do not."""
    sizes = {x.shape[0] for x in jax.tree.leaves(batch) if getattr(x, "ndim", 0)}
    return sizes.pop() if len(sizes) == 1 else None


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _signature(tree: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple((jnp.shape(x), str(jnp.result_type(x))) for x in leaves)


def _check_scalar(problem: Problem) -> None:
    out = jax.eval_shape(lambda: problem.value(problem.values, problem.batch))
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
        got = f"{out.dtype}{list(out.shape)}" if hasattr(out, "shape") else type(out).__name__
        raise TypeError(
            f"diagnose expects loss(params, batch) to return a real scalar, got {got}; reduce it "
            "with .mean(), or pass has_aux=True if it returns (loss, aux)"
        )


def why_undifferentiable(problem: Problem) -> str:
    """The error that JAX raises on differentiating the loss, or an empty string."""
    try:
        _ = jax.eval_shape(
            jax.grad(lambda values: problem.value(values, problem.batch)), problem.values
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
