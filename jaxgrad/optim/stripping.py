"""Taking the accumulator out of a transformation: what it feeds, in the same wrappers.

An accumulator emits nothing for most of its calls, while the transformation that it holds emits
something for each; so behavior tells an accumulator from a wrapper, and closures are only used to
find and to replace what is held.
"""

import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

import optax

from jaxgrad.optim.reading import chain_parts, closure, is_transformation

_DEEPEST = 8


def without_accumulation(tx: Any, accumulates: Callable[[Any], bool], depth: int = 0) -> Any | None:
    """A transformation with its accumulators replaced by what they feed.

    Args:
        tx: transformation that accumulates.
        accumulates: whether a transformation emits nothing for most of its calls.
        depth: for recursion.

    Returns:
        A transformation without the accumulation, or None if none could be read.
    """
    if depth > _DEEPEST:
        return None
    parts = chain_parts(tx)
    if parts:
        plain = [_plain(part, accumulates, depth) for part in parts]
        known = [part for part in plain if part is not None]
        return optax.chain(*known) if len(known) == len(plain) else None
    held = list(_held(tx))
    plain = [_plain(thing, accumulates, depth) for thing in held]
    if not held or None in plain:
        return None
    if all(new is old for new, old in zip(plain, held, strict=True)):
        # Nothing inside accumulates, so this one does; with two inside, who is fed is unknown.
        return held[0] if len(held) == 1 else None
    for old, new in zip(held, plain, strict=True):
        tx = _with(tx, old, new)
    return tx


def _plain(thing: Any, accumulates: Callable[[Any], bool], depth: int) -> Any | None:
    return without_accumulation(thing, accumulates, depth + 1) if accumulates(thing) else thing


def _contents(thing: Any) -> Iterator[Any]:
    """What a function or an object holds; containers are opened."""
    if isinstance(thing, dict):
        values = list(thing.values())
    elif isinstance(thing, list | tuple) and not is_transformation(thing):
        values = list(thing)
    else:
        yield thing
        return
    for value in values:
        yield from _contents(value)


def _held(tx: Any) -> Iterator[Any]:
    """The transformations inside a transformation, each once."""
    seen: set[int] = {id(tx)}
    for f in (tx.init, tx.update):
        owner = getattr(f, "__self__", None)
        known = [owner] if is_transformation(owner) else []
        known += vars(owner).values() if hasattr(owner, "__dict__") else []
        known += closure(f).values()
        for value in known:
            for thing in _contents(value):
                if not is_transformation(thing) or isinstance(thing, type) or id(thing) in seen:
                    continue
                seen.add(id(thing))
                yield thing


def _with(tx: Any, old: Any, new: Any) -> Any:
    """A copy of a transformation that holds another one instead of ``old``."""
    return optax.GradientTransformationExtraArgs(
        *(_swapped(f, (old, new)) for f in (tx.init, tx.update))
    )


def _swapped(thing: Any, pair: tuple[Any, Any], depth: int = 0) -> Any:
    old, new = pair
    if thing is old:
        return new
    if thing == old.init or thing == old.update:  # noqa: PLR1714 (arrays have no ==)
        return new.init if thing == old.init else new.update
    if depth > _DEEPEST:
        return thing
    if isinstance(thing, dict):
        return {key: _swapped(value, pair, depth + 1) for key, value in thing.items()}
    if isinstance(thing, list | tuple) and not hasattr(thing, "_fields"):
        return type(thing)(_swapped(value, pair, depth + 1) for value in thing)
    if isinstance(thing, types.MethodType):
        owner = copy.copy(thing.__self__)
        for name, value in vars(owner).items():
            setattr(owner, name, _swapped(value, pair, depth + 1))
        return getattr(owner, thing.__name__)
    if isinstance(thing, types.FunctionType) and thing.__closure__:
        return _copied(thing, pair, depth)
    return thing


def _copied(f: Any, pair: tuple[Any, Any], depth: int) -> Any:
    """A copy of a function with other cells in its closure."""
    f = getattr(f, "__wrapped__", f)  # runtime type checkers wrap functions
    cells, changed = [], False
    for cell in f.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:  # an empty cell
            cells.append(cell)
            continue
        swapped = value if callable(value) and value is f else _swapped(value, pair, depth + 1)
        changed |= swapped is not value
        cells.append(types.CellType(swapped))
    if not changed:
        return f
    made = types.FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, tuple(cells))
    made.__kwdefaults__ = f.__kwdefaults__
    made.__qualname__ = f.__qualname__
    return made
