"""Paths of layers: read off the names of parameter leaves, compared, and made distinct."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

Path = tuple[str, ...]

_MOST_JOINED = 6  # more modules that share a layer are not all told in its name
# The collection in which flax keeps its parameters: no module of the model.
_COLLECTIONS = ("params", "param", "batch_stats", "state")


def module_of(leaf: str) -> Path:
    """The path of the module that owns a leaf: `"block/mlp/kernel"` -> `("block", "mlp")`.

    A leaf at the root is its own module. Flax's collection `params` is no module.
    """
    parts = tuple(leaf.split("/"))
    if len(parts) > 1 and parts[0] in _COLLECTIONS:
        parts = parts[1:]
    parts = tuple(part for part in parts if part != "~")
    if len(parts) == 1:  # `[0][1]`, a list of tuples: the owner is `[0]`
        indices = re.findall(r"\[[^\]]*\]", parts[0])
        head = parts[0][: parts[0].find("[")] if indices else parts[0]
        return (head + "".join(indices[:-1]),) if len(indices) > 1 else parts
    last = parts[-1]
    if (
        last.endswith("]") and "[" in last and not last.startswith("[")
    ):  # block/w[0]: a list of leaves
        return (*parts[:-1], last[: last.find("[")])
    return parts[:-1]


def common_prefix(paths: Iterable[Path]) -> Path:
    """The longest path that all paths begin with."""
    paths = list(paths)
    if not paths:
        return ()
    shortest = min(paths, key=len)
    for i, part in enumerate(shortest):
        if any(path[i] != part for path in paths):
            return shortest[:i]
    return shortest


def beside(paths: Iterable[Path]) -> Path:
    """A label for what several modules share: their outermost names side by side."""
    heads = list(dict.fromkeys(path[0] for path in paths if path))
    if len(heads) > _MOST_JOINED:
        heads = [*heads[:2], f"{len(heads) - 3} more", heads[-1]]
    return ("+".join(heads),) if heads else ()


def unique(names: Sequence[str]) -> list[str]:
    """Number repeated names, in order: `x, x` becomes `x, x#2`."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return result
