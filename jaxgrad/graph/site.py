"""Sites, and the rows of a table that they give: one an iteration of the loops around them.

A site in nested loops may run very often (an adaptive solver's stages in its attempts in its
steps). Beyond a limit the iterations of whole loops share a row: first of the loops that run one
and the same layer again (over time, a solver's steps), the innermost first; of loops over layers,
whose weights differ from iteration to iteration, only then. A loop that is alone keeps its rows.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxgrad.graph.ir import Value
from jaxgrad.graph.paths import Path, unique

# Rows of one site in nested loops.
MOST_ROWS = 128


class Loop(NamedTuple):
    """A scan around a site.

    Attributes:
        depth: how many calls are around the scan.
        path: path of the scan's layer.
        length: number of iterations.
        backward: whether it runs from the last entry to the first.
        stacked: whether its iterations have parameters of their own.
    """

    depth: int
    path: Path
    length: int
    backward: bool
    stacked: bool


@dataclass(frozen=True)
class Site:
    """One tap.

    Attributes:
        value: the tensor.
        path: the layer's path.
        order: position in the program, one number a level of nesting.
        scans: the scans around it, outermost first.
        shape: shape of one iteration's tensor.
        dtype: its dtype, as a string.
        parameters: names of the parameter leaves of the layer.
        inside_derivative: whether the tensor belongs to the forward pass of an inner derivative.
    """

    value: Value
    path: Path
    order: tuple[int, ...]
    scans: tuple[Loop, ...]
    shape: tuple[int, ...]
    dtype: str
    parameters: tuple[str, ...] = ()
    inside_derivative: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of the scans around the site."""
        return tuple(loop.length for loop in self.scans)


def shared_loops(site: Site, most: int = MOST_ROWS) -> tuple[int, ...]:
    """Which of a site's loops have all iterations in one row, so that at most `most` are left."""
    shared: set[int] = set()
    order = [i for stacked in (False, True) for i in reversed(range(len(site.scans)))
             if site.scans[i].stacked == stacked]  # fmt: skip
    for i in order:
        kept = [loop.length for k, loop in enumerate(site.scans) if k not in shared]
        if math.prod(kept) <= most or len(kept) < 2:
            break
        shared.add(i)
    return tuple(sorted(shared))


@dataclass(frozen=True)
class Rows:
    """The rows that sites give, in forward order.

    Attributes:
        names: the rows' names.
        index: for each row its place among the rows of all sites, concatenated.
        site: for each row the number of its site.
        shared: for each site the loops whose iterations share a row, see `shared_loops`.
    """

    names: tuple[str, ...]
    index: np.ndarray
    site: np.ndarray
    shared: tuple[tuple[int, ...], ...]


def plan_rows(sites: Sequence[Site], most: int = MOST_ROWS) -> Rows:
    """One row an iteration of the loops that are not shared.

    Args:
        sites: the sites.
        most: how many rows a site in nested loops may have.
    """
    entries, shared, offset = [], [], 0
    for number, site in enumerate(sites):
        together = shared_loops(site, most)
        shared.append(together)
        kept = tuple(1 if i in together else n for i, n in enumerate(site.lengths))
        for flat, step in enumerate(np.ndindex(kept)):
            name = _row_name(site, step, together)
            entries.append((_forward_key(site, step), name, offset + flat, number))
        offset += math.prod(kept)
    entries.sort(key=lambda entry: entry[0])
    names = unique([name for _, name, _, _ in entries])
    index, numbers = (np.array([entry[k] for entry in entries], dtype=int) for k in (2, 3))
    return Rows(tuple(names), index, numbers, tuple(shared))


def rows(sites: list[Site]) -> tuple[list[str], np.ndarray]:
    """The rows that the sites give if no two iterations share one, in forward order.

    Args:
        sites: the sites, each with `prod(site.lengths)` iterations.

    Returns:
        The rows' names, and for each row its index into the iterations of all sites, concatenated.
    """
    planned = plan_rows(sites, sys.maxsize)
    return list(planned.names), planned.index


def summaries(sites: Sequence[Site], planned: Rows) -> tuple[str, ...]:
    """A sentence for every layer some of whose iterations share a row."""
    found = []
    for site, together in zip(sites, planned.shared, strict=True):
        if together:
            lengths = " x ".join(str(site.lengths[i]) for i in together)
            everything = range(len(site.scans))
            name = _row_name(site, (0,) * len(site.scans), everything)
            found.append(f"{name}: a row holds {lengths} iterations of the loops around it")
    return tuple(dict.fromkeys(found))


def _forward_key(site: Site, index: tuple[int, ...]) -> tuple[int, ...]:
    steps = {}
    for loop, k in zip(site.scans, index, strict=True):
        steps[loop.depth] = loop.length - 1 - k if loop.backward else k
    key: list[int] = []
    for depth, position in enumerate(site.order):
        key += [position, steps.get(depth, 0)]
    return (*key, sys.maxsize)  # what a call returns comes after what is inside it


def _row_name(site: Site, index: tuple[int, ...], together: Sequence[int]) -> str:
    parts = list(site.path)
    for i, (loop, k) in enumerate(zip(site.scans, index, strict=True)):
        if i not in together:
            inside = loop.path and site.path[: len(loop.path)] == loop.path
            parts[len(loop.path) - 1 if inside else -1] += f"[{k}]"
    return "/".join(parts)
