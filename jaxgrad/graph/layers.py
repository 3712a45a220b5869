"""From cuts to named layers: which links belong together, and what the layer is called.

A link's label is what the layer paths of its operations have in common. Links of one module become
one layer; links that no module claims (an activation, a reshape) go with the layer before them. A
module whose own operations close a residual sum is a block, and takes in the links of its parts;
the whole model is never one layer.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgrad.graph.cuts import Chained, Segment
from jaxgrad.graph.flatten import Iteration
from jaxgrad.graph.ir import Table, Value, is_float_dtype, value_inputs
from jaxgrad.graph.names import Labels
from jaxgrad.graph.paths import Path, beside, common_prefix, unique

_PRODUCTS = {"dot_general", "conv_general_dilated", "gather"}
# A module that closes more residual sums than this is a container of blocks written inline, not a
# block.
_MOST_SUMS_OF_A_BLOCK = 4


@dataclass(frozen=True, eq=False)
class Group:
    """Neighboring segments that form one layer."""

    name: str
    segments: tuple[Segment, ...]
    made_up: bool = False


@dataclass(frozen=True)
class _Link:
    segment: Segment
    path: Path | None  # None: nothing names it
    parts: tuple[Path, ...]  # the layer paths inside it
    leaves: frozenset[str]  # the parameters that it uses
    anonymous: bool  # it uses a weight that nothing names
    elementwise: bool  # it holds no product with a weight: a bias, a scale, an activation
    flat: bool  # its parameters lie at the root of their tree
    iteration: Iteration
    tap: str = ""


def group(
    chained: Chained, labels: Labels, table: Table, layers: str | int, scans: dict[Value, Path]
) -> list[Group]:
    """Merge segments into layers.

    Args:
        chained: the links between all cuts.
        labels: the layer of every operation.
        table: the program's values.
        layers: "cuts" keeps every link; "scopes" makes one layer a module; an integer makes one
            layer a scope of that depth.
        scans: path of the layer that each unrolled scan repeats.

    Returns:
        The layers, with distinct names.
    """
    unnamed = {v for v, a in table.constants.items() if _is_weight(a) and v not in labels.named}
    links = [_link(s, labels, chained.depends.smooth, unnamed) for s in chained.segments]
    if layers == "cuts":
        groups = [_Building([link], _own_path(link), set()) for link in links]
    elif any(link.path is not None for link in links):
        key = _by_module(links) if isinstance(layers, str) else _by_depth(layers)
        groups = _merge(links, key)
    else:
        groups = [_Building([link], None, set()) for link in links]
    return _named(groups, scans)


def _own_path(link: _Link) -> Path | None:
    return None if link.path is None else link.path or beside(link.parts)


def _mixes_elements(name: str) -> bool:
    return name in _PRODUCTS or name.startswith(("reduce_", "cum", "argm", "custom_vjp"))


def _is_weight(array: Any) -> bool:
    return is_float_dtype(getattr(array, "dtype", None)) and np.size(array) > 1


def _link(segment: Segment, labels: Labels, smooth: set[Value], unnamed: set[Value]) -> _Link:
    ops = [op for op in segment.ops if any(v in smooth for v in op.outputs)]
    paths = [labels.path[op] for op in ops if op in labels.path]
    owned = any(paths)  # operations of the whole model's own scope name nothing
    iterations = [op.iteration for op in ops]
    leaves = frozenset().union(*(labels.uses.get(op, ()) for op in ops))
    return _Link(
        segment,
        path=common_prefix(paths) if owned else None,
        parts=tuple(dict.fromkeys(path for path in paths if path)),
        leaves=leaves,
        anonymous=any(v in unnamed for op in ops for v in value_inputs(op)),
        elementwise=not any(op.blocks or _mixes_elements(op.name) for op in ops),
        flat=all("/" not in name and "[" not in name for name in leaves),
        iteration=_common_iteration(iterations) if iterations else (),
        tap=next((labels.taps[v] for v in segment.after if v in labels.taps), ""),
    )


def _common_iteration(iterations: list[Iteration]) -> Iteration:
    first = iterations[0]
    for depth in range(len(first), 0, -1):
        if all(other[:depth] == first[:depth] for other in iterations):
            return first[:depth]
    return ()


def _by_depth(depth: int) -> Callable[[_Link], Path]:
    def key(link: _Link) -> Path:
        path = link.path or ()
        return path[:depth] if path else beside(link.parts)[:1]

    return key


def _by_module(links: Sequence[_Link]) -> Callable[[_Link], Path]:
    """The module that a link belongs to: the outermost block around it, else its own label."""
    sums: dict[Path, int] = {}
    for link in links:
        if link.path and any(len(part) > len(link.path) for part in link.parts):
            sums[link.path] = sums.get(link.path, 0) + 1
    blocks = {path for path, count in sums.items() if count <= _MOST_SUMS_OF_A_BLOCK}

    def key(link: _Link) -> Path:
        path = link.path or ()
        for depth in range(1, len(path) + 1):
            if path[:depth] in blocks:
                return path[:depth]
        return path or beside(link.parts)

    return key


@dataclass(eq=False)
class _Building:
    """A layer under construction."""

    links: list[_Link]
    owner: Path | None
    leaves: set[str]

    def takes(self, link: _Link, path: Path | None) -> bool:
        last = self.links[-1]
        if last.tap or last.iteration != link.iteration:
            return False
        if self.leaves & link.leaves:  # the module is called a second time
            return False
        if link.anonymous and path is None:
            return False
        if path is None or self.owner is None or path == self.owner:
            return True
        if not link.leaves and self.owner[: len(path)] == path:  # an activation of the module
            return True
        # weights and biases in one flat tree: `b` goes with `w`
        return link.elementwise and len(path) == len(self.owner) == 1 and link.flat and last.flat


def _merge(links: Sequence[_Link], key: Callable[[_Link], Path]) -> list[_Building]:
    groups: list[_Building] = []
    for link in links:
        path = key(link) if link.path is not None else None
        if not groups or not groups[-1].takes(link, path):
            groups.append(_Building([], None, set()))
        group = groups[-1]
        group.links.append(link)
        group.owner = group.owner if path is None or group.owner is not None else path
        group.leaves |= link.leaves
    return groups


def _named(groups: list[_Building], scans: dict[Value, Path]) -> list[Group]:
    names, made_up = [], []
    for k, group in enumerate(groups):
        tap = group.links[-1].tap
        text = _text(group.owner or (), group.links[0].iteration, scans)
        names.append(tap or text or _made_up(group.links, k))
        made_up.append(not tap and not text)
    return [
        Group(name, tuple(link.segment for link in group.links), fresh)
        for name, group, fresh in zip(unique(names), groups, made_up, strict=True)
    ]


def _text(path: Path, iteration: Iteration, scans: dict[Value, Path]) -> str:
    parts = list(path)
    for scan, k in iteration:
        prefix = scans.get(scan, ())
        if prefix and tuple(path[: len(prefix)]) == prefix:
            parts[len(prefix) - 1] += f"[{k}]"
        elif parts:
            parts[-1] += f"[{k}]"
        else:
            parts = [f"{'/'.join(prefix) or 'scan'}[{k}]"]
    return "/".join(parts)


def _made_up(links: list[_Link], k: int) -> str:
    ops = [op for link in links for op in link.segment.ops]
    name = ops[-1].name if ops else "identity"
    if ops and ops[-1].eqn is not None and isinstance(ops[-1].eqn.params.get("name"), str):
        name = ops[-1].eqn.params["name"]
    return f"{re.sub(r'[^A-Za-z0-9_]', '_', name)}[{k}]"
