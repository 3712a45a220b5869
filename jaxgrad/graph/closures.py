"""Names for the arrays that a function closes over: in cells, globals and fields of objects."""

import functools
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxgrad import tree
from jaxgrad.graph.arguments import leaf_labels, parameter_labels

_DEPTH = 4


def name_constants(
    fun: Callable[..., Any], args: tuple, argnum: int, constants: dict[int, Any]
) -> dict[int, str]:
    """Name the constants of a trace by where the function got them.

    Args:
        fun: the traced function.
        args: its arguments; all but `argnum` were held fixed.
        argnum: the argument that was traced.
        constants: value -> array.

    Returns:
        value -> name, for every floating-point constant that was found.
    """
    labels = parameter_labels(fun, len(args))
    sources = list(_closed_over(fun, _DEPTH, set()))
    sources += [(n, a) for i, (n, a) in enumerate(zip(labels, args, strict=True)) if i != argnum]
    named = [
        (label, name, leaf)
        for label, source in sources
        for name, leaf in zip(leaf_labels(source, label), jax.tree.leaves(source), strict=True)
        if tree.is_inexact_array(leaf)
    ]
    owners: dict[str, set[int]] = defaultdict(set)
    for _, name, leaf in named:
        owners[name].add(_identity(leaf))
    found: dict[int, str] = {}
    for label, name, leaf in named:
        ambiguous = len(owners[name]) > 1 and label and name != label
        _ = found.setdefault(_identity(leaf), f"{label}/{name}" if ambiguous else name)
    return {
        value: found[_identity(array)]
        for value, array in constants.items()
        if _identity(array) in found and tree.is_inexact_array(array)
    }


def _identity(array: Any) -> int:
    """Equal for an array and for JAX's own box around the same NumPy data."""
    if isinstance(array, jax.Array):
        return id(array)
    if isinstance(array, np.ndarray) or hasattr(array, "__array__"):
        return -np.asarray(array).__array_interface__["data"][0]
    return id(array)


def _closed_over(fun: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """(variable name, pytree) for everything that the function reads from outside."""
    if fun is None or depth == 0 or id(fun) in seen:
        return
    seen.add(id(fun))
    if isinstance(fun, functools.partial):
        names = parameter_labels(fun.func, len(fun.args))
        yield from zip(names, fun.args, strict=True)
        yield from fun.keywords.items()
        yield from _closed_over(fun.func, depth - 1, seen)
        return
    if inspect.ismethod(fun):
        yield from _of_object(fun.__self__)
    inner = inspect.unwrap(getattr(fun, "__func__", fun))
    if not inspect.isfunction(inner):
        yield from _of_object(fun)
        yield from _closed_over(getattr(fun, "__wrapped__", None), depth - 1, seen)
        return
    variables = _variables(inner)
    for name, value in variables.items():
        if callable(value):
            yield from _of_object(value) if not inspect.isroutine(value) else ()
            yield from _closed_over(value, depth - 1, seen)
        elif _is_plain_object(value):
            yield from _of_object(value)
        else:
            yield name, value


def _is_plain_object(value: Any) -> bool:
    """An object that is no pytree node and no array: its attributes may hold arrays."""
    leaves = jax.tree.leaves(value)
    return (
        len(leaves) == 1
        and leaves[0] is value
        and hasattr(value, "__dict__")
        and not tree.is_array(value)
    )


def _variables(fun: Any) -> dict[str, Any]:
    try:
        found = inspect.getclosurevars(fun)
    except (TypeError, ValueError):  # empty cells of a recursive closure
        return {}
    own_module = sys.modules.get(getattr(fun, "__module__", ""), None)
    library = getattr(own_module, "__name__", "").split(".")[0] in (
        "jax",
        "flax",
        "haiku",
        "equinox",
    )
    defaults = inspect.signature(fun).parameters.values()
    bound = {p.name: p.default for p in defaults if p.default is not inspect.Parameter.empty}
    return bound | dict(found.nonlocals) | ({} if library else dict(found.globals))


def _of_object(value: Any) -> Iterator[tuple[str, Any]]:
    """The arrays of a module: a pytree's leaves (equinox, NNX), else an object's attributes."""
    if isinstance(value, type) or inspect.ismodule(value):
        return
    leaves = jax.tree.leaves(value)
    if not (len(leaves) == 1 and leaves[0] is value):
        yield "", value
        return
    if tree.is_array(value):
        return
    for name, attribute in getattr(value, "__dict__", {}).items():
        if not inspect.isroutine(attribute) and not inspect.ismodule(attribute):
            yield name, attribute
