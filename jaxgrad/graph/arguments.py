"""A call's arguments: what is traced, what stays as it is, and a name for every leaf."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad import tree


@dataclass(frozen=True, eq=False)
class Arguments:
    """The leaves of a call.

    Attributes:
        treedef: of `(args, kwargs)`.
        leaves: all leaves.
        traced: positions of the leaves that are arrays of the trace.
        wanted: positions of the leaves that the gradient is taken of; a subset of `traced`.
        names: position -> name, for the leaves of the arguments that are differentiated.
    """

    treedef: Any
    leaves: tuple[Any, ...]
    traced: tuple[int, ...]
    wanted: tuple[int, ...]
    names: dict[int, str]

    def call(self, fun: Callable[..., Any], traced: Sequence[Any]) -> Any:
        """`fun` with its traced leaves replaced."""
        leaves = list(self.leaves)
        for position, value in zip(self.traced, traced, strict=True):
            leaves[position] = value
        args, kwargs = jax.tree.unflatten(self.treedef, leaves)
        return fun(*args, **kwargs)


def is_traceable(leaf: Any) -> bool:
    """JAX arrays, tracers and keys included; NumPy arrays and Python numbers stay as they are."""
    return isinstance(leaf, jax.Array)


def split(
    fun: Callable[..., Any], args: tuple, kwargs: dict[str, Any], argnums: Sequence[int]
) -> Arguments:
    """Decide what is traced when `fun(*args, **kwargs)` is differentiated for `argnums`.

    Args:
        fun: the function; only its signature is read here.
        args: positional arguments.
        kwargs: keyword arguments, never differentiated.
        argnums: positions of the differentiated arguments, not negative.

    Raises:
        TypeError: if an argument number does not exist, or nothing in these arguments is a float.
    """
    labels = parameter_labels(fun, len(args))
    for number in argnums:
        if not 0 <= number < len(args):
            raise TypeError(
                f"argnums={tuple(argnums)} needs at least {number + 1} positional arguments, but "
                f"{len(args)} were passed"
            )
    leaves, treedef = jax.tree.flatten((args, kwargs))
    counts = [len(jax.tree.leaves(arg)) for arg in args]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(int)
    wanted, names = [], {}
    for number in argnums:
        part = leaves[starts[number] : starts[number + 1]]
        scalars = _scalars_are_parameters(part)
        prefix = labels[number] if len(argnums) > 1 else ""
        for i, name in enumerate(leaf_labels(args[number], labels[number])):
            position = int(starts[number]) + i
            names[position] = f"{prefix}/{name}" if prefix and name != prefix else name
            if _is_wanted(part[i], scalars):
                wanted.append(position)
                leaves[position] = jnp.asarray(part[i])
    if not wanted:
        found = sorted({type(leaf).__name__ for n in argnums for leaf in jax.tree.leaves(args[n])})
        raise TypeError(
            f"argument {labels[argnums[0]]!r} has no floating-point array to differentiate: its "
            f"leaves are of type {', '.join(found) or '(none, the tree is empty)'}. "
            "Pass parameters as float arrays."
        )
    traced = [i for i, leaf in enumerate(leaves) if is_traceable(leaf)]
    return Arguments(treedef, tuple(leaves), tuple(traced), tuple(wanted), names)


def _scalars_are_parameters(leaves: Sequence[Any]) -> bool:
    """Python floats are parameters, as in `jax.grad`, but not in a module with static fields."""
    return all(
        tree.is_array(leaf) or (isinstance(leaf, float | int) and not isinstance(leaf, bool))
        for leaf in leaves
    )


def _is_wanted(leaf: Any, scalars: bool) -> bool:
    if isinstance(leaf, float | complex) and not isinstance(leaf, np.generic):
        return scalars
    return isinstance(leaf, jax.Array | np.ndarray | np.generic) and jnp.issubdtype(
        leaf.dtype, jnp.inexact
    )


def leaf_labels(arg: Any, root: str) -> list[str]:
    """Names of an argument's leaves; a path that begins with an index gets the argument's name."""
    names = tree.leaf_names(arg, root=root)
    return [f"{root}{name}" if name.startswith("[") else name for name in names]


def parameter_labels(fun: Callable[..., Any], count: int) -> list[str]:
    """The names of a function's positional parameters, `arg0`, ... where it does not tell."""
    try:
        parameters = list(inspect.signature(fun).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds][:count]
    return names + [f"arg{i}" for i in range(len(names), count)]
