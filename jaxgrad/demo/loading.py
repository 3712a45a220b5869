"""A user's own file as a task: `FILE.py:LOSS`, with `PARAMS`, `BATCH`, `OPTIMIZER` beside the loss.

Whatever is wrong with it is said in one line, as a `UsageError`.
"""

import difflib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from jaxgrad.demo.models import Task


class UsageError(Exception):
    """Something that the caller of a command must change; one line says what."""


def load_task(target: str, *, steps: int, learning_rate: float) -> Task:
    """Reads a task from a file.

    Args:
        target: `FILE.py:LOSS`. The file defines `LOSS(params, batch)` under that name, and
            `PARAMS` and `BATCH`: values, or functions without arguments that make them. A `BATCH`
            function is called anew for every step. It may define `OPTIMIZER`, an optax
            transformation.
        steps: of the optimizer; 0 measures the initialization only.
        learning_rate: Adam's, where the file has no optimizer.

    Returns:
        The task, tried out: the loss gives a scalar for these parameters and this batch.

    Raises:
        UsageError: what is wrong with the target, the file, or what it defines.
    """
    path, loss_name = _split(target)
    module = _import(path)
    loss: Any = _member(module, loss_name, path)
    kind = type(loss).__name__
    if not callable(loss):
        raise UsageError(
            f"{path}: {loss_name} is of type {kind}; expected a function (params, batch) -> scalar."
        )
    params = _made(_member(module, "PARAMS", path), "PARAMS", path)
    source = _member(module, "BATCH", path)
    function: Callable[..., Any] = loss
    _try_out(function, params, _made(source, "BATCH", path), f"{path}:{loss_name}")

    optimizer = getattr(module, "OPTIMIZER", None)
    if optimizer is not None:
        optimizer = _made(optimizer, "OPTIMIZER", path)
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise UsageError(
                f"{path}: OPTIMIZER is of type {type(optimizer).__name__}; expected an optax "
                "transformation, with init and update."
            )

    def batches() -> Iterator[Any]:
        while True:
            yield _made(source, "BATCH", path)

    return Task(
        name=f"{path.stem}-{loss_name}",
        title=f"{path.name}: {loss_name}",
        description=_summary(function) or f"The loss {loss_name} of {path.name}, unedited.",
        loss=function, params=params, batches=batches, learning_rate=learning_rate, steps=steps,
        optimizer=optimizer,
    )  # fmt: skip


def _split(target: str) -> tuple[Path, str]:
    file, colon, name = target.rpartition(":")
    if not colon or not file or not name:
        raise UsageError(f"expected FILE.py:LOSS, for example model.py:loss_fn; got {target!r}.")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"no file {file!r}; expected FILE.py:LOSS with a Python file.")
    if path.suffix != ".py":
        raise UsageError(f"{file!r} is no Python file; expected FILE.py:LOSS.")
    return path, name


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_jaxgrad_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be imported as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while they are made
    sys.path.insert(0, str(path.resolve().parent))  # as `python FILE.py` does: its neighbors import
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{path} fails when imported: {_said(error)}") from error
    return module


def _member(module: ModuleType, name: str, path: Path) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    public = [n for n in vars(module) if not n.startswith("_")]
    near = difflib.get_close_matches(name.lower(), [n.lower() for n in public], n=1, cutoff=0.6)
    guess = next((n for n in public if near and n.lower() == near[0]), None)
    hint = f" Perhaps you meant {guess}." if guess else ""
    if name in ("PARAMS", "BATCH"):
        what = "a value, or a function without arguments that makes it"
        raise UsageError(f"{path} does not define {name}; expected {what}.{hint}")
    raise UsageError(f"{path} does not define {name!r}, which was to be the loss.{hint}")


def _made(value: Any, name: str, path: Path) -> Any:
    # an equinox module is callable and a pytree: it is a value, not a function that makes one
    if not callable(value) or not jax.tree_util.all_leaves([value]):
        return value
    try:
        return value()
    except Exception as error:
        raise UsageError(f"{path}: {name}() fails: {_said(error)}") from error


def _try_out(loss: Callable[..., Any], params: Any, batch: Any, target: str) -> None:
    for name, tree in (("PARAMS", params), ("BATCH", batch)):
        if not jax.tree.leaves(tree):
            raise UsageError(f"{target}: {name} holds no arrays.")
    try:
        value = loss(params, batch)
    except Exception as error:
        raise UsageError(f"{target} fails on PARAMS and BATCH: {_said(error)}") from error
    shape = getattr(value, "shape", None)
    if isinstance(value, tuple):
        raise UsageError(f"{target} returns a tuple; expected the loss alone, a scalar.")
    if shape != () and not isinstance(value, float):
        got = f"shape {shape}" if shape is not None else type(value).__name__
        raise UsageError(f"{target} returns {got}; expected a scalar: take .mean() or .sum().")


def _summary(function: Any) -> str:
    return (getattr(function, "__doc__", None) or "").strip().split("\n")[0]


def _said(error: BaseException) -> str:
    """An exception in one line."""
    first = next((line for line in str(error).strip().splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:400]
