"""Reading a transformation: which steps a chain is made of, where its closures show it.

optax builds transformations from closures: ``chain``'s ``update`` holds the tuple of its parts'
updates, and every part's qualified name says which factory made it. This finds the order of
steps where behavior cannot (a sign hides a clip that follows it). It is a second witness only:
whatever it cannot read it leaves out.
"""

import dis
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import optax

# Rules that clip their own update by design.
_INTENTIONAL = ("adafactor", "scale_by_factored_rms", "scale_by_adopt", "scale_by_sophia")
# Steps that keep something of the gradients between calls.
_STATEFUL = (
    *("scale_by_", "trace", "ema", "adafactor", "adamw", "sgd", "lion", "rmsprop", "adagrad"),
    *("muon", "momentum", "nesterov", "schedule_free", "adam", "novograd", "yogi", "lamb"),
    *("prodigy", "dadapt", "mechanize", "momo", "cocob", "dog", "dowg", "acprop", "lbfgs"),
)
_STATELESS = (
    *("scale_by_learning_rate", "scale_by_schedule", "scale_by_param_block", "scale_by_trust"),
    *("scale_by_sign", "scale_by_shape"),
)


class Step(NamedTuple):
    """One step of a transformation: the factory's name, and what kind of step it is."""

    name: str
    kind: str  # "clip", "state", "own_clip" (a rule with a clip by design), "parallel" or "other"
    branches: tuple[tuple["Step", ...], ...] = ()


def _kind(name: str) -> str:
    if any(word in name for word in _INTENTIONAL):
        return "own_clip"
    if "clip" in name.lower():
        return "clip"
    if any(name.startswith(word) for word in _STATELESS):
        return "other"
    return "state" if any(name.startswith(word) for word in _STATEFUL) else "other"


def _children(thing: Any) -> Iterator[Any]:
    """What a function, a partial, a transformation or a wrapper object holds, in order."""
    if isinstance(thing, functools.partial):
        yield thing.func
        yield from thing.args
        yield from thing.keywords.values()
    elif isinstance(thing, types.MethodType):
        yield thing.__func__
        yield thing.__self__
    elif isinstance(thing, types.FunctionType):
        for cell in thing.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # an empty cell
                continue
    elif isinstance(thing, tuple | list):
        yield from thing
    elif type(thing).__name__ in ("MultiSteps",):
        yield from vars(thing).values()


def _factory_steps(factory: Any) -> Iterator[Step]:
    """The factories that a factory calls, in the order of its bytecode."""
    if not isinstance(factory, types.FunctionType):
        return
    own = _kind(factory.__qualname__)
    if own != "other":
        yield Step(factory.__qualname__, own)
        return
    cells = zip(factory.__code__.co_freevars, factory.__closure__ or (), strict=True)
    known = {**factory.__globals__, **{name: cell.cell_contents for name, cell in cells}}
    for instruction in dis.get_instructions(factory):
        if not instruction.opname.startswith("LOAD_") or not isinstance(instruction.argval, str):
            continue
        name = getattr(known.get(instruction.argval), "__qualname__", instruction.argval)
        if _kind(name) != "other":
            yield Step(name, _kind(name))


def _own_step(thing: Any) -> Step | None:
    """The step that an update function is, judged by the factory in its qualified name."""
    if not isinstance(thing, types.FunctionType) or ".<locals>." not in thing.__qualname__:
        return None
    factory, inner = thing.__qualname__.split(".<locals>.")[0], thing.__qualname__.split(".")[-1]
    if not inner.startswith("update"):
        return None
    step = Step(factory, _kind(factory))
    return None if step.kind == "other" else step


def _is_transformation(thing: Any) -> bool:
    return isinstance(thing, tuple) and hasattr(thing, "init") and hasattr(thing, "update")


def is_transformation(thing: Any) -> bool:
    """Whether a thing has `init` and `update`, such as optax's named tuple or `MultiSteps`."""
    return callable(getattr(thing, "init", None)) and callable(getattr(thing, "update", None))


def closure(f: Any) -> dict[str, Any]:
    """What a function closes over, by name; a method's function is looked into.

    Args:
        f: anything; what closes over nothing gives an empty dict.
    """
    f = inspect.unwrap(getattr(f, "__func__", f))  # runtime type checkers wrap functions
    cells = getattr(f, "__closure__", None) or ()
    names = getattr(getattr(f, "__code__", None), "co_freevars", ())
    known = {}
    for name, cell in zip(names, cells, strict=False):
        try:
            known[name] = cell.cell_contents
        except ValueError:  # an empty cell
            continue
    return known


def chain_parts(tx: Any) -> list[Any]:
    """The transformations that a chain of optax's or jaxgrad's is made of, in order.

    Args:
        tx: transformation.

    Returns:
        Transformations; empty if it is no chain that can be read.
    """
    held = closure(tx.init) | closure(tx.update)
    if "init_fns" in held and "update_fns" in held:
        pairs = zip(held["init_fns"], held["update_fns"], strict=True)
        return [optax.GradientTransformationExtraArgs(*pair) for pair in pairs]
    parts = held.get("parts")
    if isinstance(parts, list) and all(is_transformation(part) for part in parts):
        return parts
    return []


def read_steps(tx: Any) -> tuple[Step, ...]:
    """The clips and the stateful rules inside a transformation, in the order they are applied.

    Args:
        tx: transformation, or an object with ``init`` and ``update`` such as ``MultiSteps``.

    Returns:
        Steps; empty where nothing could be read.
    """
    seen: set[int] = set()

    def walk(thing: Any, depth: int) -> tuple[Step, ...]:
        if depth > 40 or id(thing) in seen:
            return ()
        if isinstance(thing, types.FunctionType | types.MethodType | functools.partial):
            seen.add(id(thing))
            thing = inspect.unwrap(thing)  # runtime type checkers wrap functions
        own = _own_step(thing)
        if own is not None:
            return (own,)
        if getattr(thing, "__qualname__", "").startswith("inject_hyperparams."):
            cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
            return tuple(_factory_steps(dict(cells)["inner_factory"].cell_contents))
        if _is_transformation(thing):
            return walk(thing.update, depth + 1)
        if isinstance(thing, dict):  # labels of a partition: side by side, in no order
            found = tuple(branch for v in thing.values() if (branch := walk(v, depth + 1)))
            return (Step("partition", "parallel", found),) if found else ()
        return tuple(step for child in _children(thing) for step in walk(child, depth + 1))

    return walk(getattr(tx, "update", tx), 0)


def flattened(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps with those of parallel branches in place.

    Args:
        steps: of `read_steps`.

    Returns:
        Steps without branches.
    """
    return tuple(
        inner
        for step in steps
        for inner in ([i for b in step.branches for i in flattened(b)] or [step])
    )


def clip_follows_a_rule(steps: tuple[Step, ...]) -> bool:
    """Whether some clip, a rule's own by design aside, stands after a stateful rule.

    Args:
        steps: of `read_steps`.

    Returns:
        True if so.
    """
    state_seen, before = False, ""
    for step in steps:
        kinds = {inner.kind for inner in flattened((step,))}
        if any(clip_follows_a_rule(branch) for branch in step.branches):
            return True
        if "clip" in kinds and state_seen and before != "scale_by_factored_rms":
            return True
        state_seen, before = state_seen or bool(kinds & {"state", "own_clip"}), step.name
    return False


def clip_precedes_the_rules(steps: tuple[Step, ...]) -> bool:
    """Whether a clip stands before the first stateful rule.

    Args:
        steps: of `read_steps`.

    Returns:
        True if so, in every branch where there are several.
    """
    for step in steps:
        if step.branches:
            return all(clip_precedes_the_rules(branch) for branch in step.branches)
        if step.kind in ("clip", "state", "own_clip"):
            return step.kind == "clip"
    return False
