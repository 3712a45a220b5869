"""Where taps go and what they are called.

A site is a tensor that leaves a layer: a value made under a scope and read outside it, the last
value that uses a module's parameters, the sum that closes a residual branch, what a scan carries to
its next iteration, or a value that the user named. A site inside a scan gives a row an iteration.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from jaxgrad.graph.ir import Block, Lit, Op, Table, Value, is_real_dtype, reach, value_inputs, walk
from jaxgrad.graph.names import Labels, Path, common_prefix, unique


@dataclass(frozen=True)
class Site:
    """One tap.

    Attributes:
        value: the tensor.
        path: the layer's path.
        order: position in the program, one number a level of nesting.
        scans: for every scan around it, outermost first: (depth, path of the scan's layer, length,
            reversed).
        shape: shape of one iteration's tensor.
        dtype: its dtype, as a string.
        parameters: names of the parameter leaves of the layer.
    """

    value: Value
    path: Path
    order: tuple[int, ...]
    scans: tuple[tuple[int, Path, int, bool], ...]
    shape: tuple[int, ...]
    dtype: str
    parameters: tuple[str, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of the scans around the site."""
        return tuple(length for _, _, length, _ in self.scans)


@dataclass(eq=False)
class _Planner:
    table: Table
    labels: Labels
    found: dict[Value, Site]

    def leaves_of(self, path: Path) -> tuple[str, ...]:
        """The parameter leaves that a layer uses."""
        uses = self.labels.uses.items()
        return tuple(sorted({n for op, ns in uses if self.labels.path.get(op) == path for n in ns}))


@dataclass(frozen=True)
class _Place:
    """A block's place: its order, its scans, and the layer of the call that holds it."""

    order: tuple[int, ...] = ()
    scans: tuple[tuple[int, Path, int, bool], ...] = ()
    scope: Path | None = None
    carry: int = 0  # how many of the block's first outputs a scan carries on


def plan_sites(block: Block, table: Table, labels: Labels) -> list[Site]:
    """Choose the sites of a program, in forward order.

    Args:
        block: the program.
        table: its values.
        labels: the layer of every operation.

    Returns:
        Sites of real floating-point tensors; where nothing is named, every floating-point result.
    """
    planner = _Planner(table, labels, {})
    _plan_block(block, _Place(), planner)
    if not planner.found:
        for i, op in enumerate(block.ops):
            for value in op.outputs:
                _add(planner, value, (f"{op.name}[{i}]",), _Place(), i)
    _drop_bookkeeping(block, planner)
    sites = sorted(planner.found.values(), key=lambda site: site.order)
    return [replace(s, parameters=s.parameters or planner.leaves_of(s.path)) for s in sites]


def _drop_bookkeeping(block: Block, planner: _Planner) -> None:
    """A layer's value that only `aux` reads (a running mean) is no row beside its output."""
    reaching: set[Value] = set()
    reach(block, block.outputs[:1], reaching)
    outputs = {site.path for value, site in planner.found.items() if value in reaching}
    for value, site in list(planner.found.items()):
        beside = any(site.path[:n] in outputs for n in range(1, len(site.path)))
        twin = site.path in outputs or (beside and not planner.leaves_of(site.path))
        if value not in reaching and twin and value not in planner.labels.taps:
            del planner.found[value]


def rows(sites: list[Site]) -> tuple[list[str], np.ndarray]:
    """The rows that the sites give, one an iteration, in forward order.

    Args:
        sites: the sites, each with `prod(site.lengths)` iterations.

    Returns:
        The rows' names, and for each row its index into the iterations of all sites, concatenated.
    """
    entries = []
    offset = 0
    for site in sites:
        for flat, index in enumerate(np.ndindex(site.lengths)):
            entries.append((_forward_key(site, index), _row_name(site, index), offset + flat))
        offset += int(np.prod(site.lengths, dtype=int))
    entries.sort(key=lambda entry: entry[0])
    return unique([name for _, name, _ in entries]), np.array([i for *_, i in entries], dtype=int)


def _forward_key(site: Site, index: tuple[int, ...]) -> tuple[int, ...]:
    steps = {}
    for (depth, _, length, backward), k in zip(site.scans, index, strict=True):
        steps[depth] = length - 1 - k if backward else k
    key: list[int] = []
    for depth, position in enumerate(site.order):
        key += [position, steps.get(depth, 0)]
    return (*key, sys.maxsize)  # what a call returns comes after what is inside it


def _row_name(site: Site, index: tuple[int, ...]) -> str:
    parts = list(site.path)
    for (_, path, _, _), k in zip(site.scans, index, strict=True):
        inside = path and site.path[: len(path)] == path
        parts[len(path) - 1 if inside else -1] += f"[{k}]"
    return "/".join(parts)


def _plan_block(block: Block, place: _Place, planner: _Planner) -> None:
    labels = planner.labels
    readers = _readers(block)
    for i, op in enumerate(block.ops):
        for inner in op.blocks:
            _plan_block(inner, _inside(op, inner, i, place, labels), planner)
        for value in op.outputs:
            if value in labels.taps:
                _add(planner, value, (labels.taps[value],), place, i)
            elif _leaves_scope(op, value, readers, place, labels) and not _inner_site(
                op, value, planner
            ):
                _add(planner, value, labels.path[op] or (labels.root or ("output",))[-1:], place, i)
    _plan_parameters(block, place, readers, planner)
    _let_taps_replace(block, readers, planner)
    if place.carry:
        _plan_carry(block, place, planner)


def _let_taps_replace(
    block: Block, readers: dict[Value, list[Op | None]], planner: _Planner
) -> None:
    """A tensor that the user named right away is one row, under the user's name."""
    for op in block.ops:
        tap = op.outputs[0] if op.name == "name" else None
        source = next(iter(value_inputs(op)), None)
        if tap in planner.found and source in planner.found and readers[source] == [op]:
            layer = planner.found.pop(source)
            used = layer.parameters or planner.leaves_of(layer.path)
            planner.found[tap] = replace(planner.found[tap], parameters=used)


def _readers(block: Block) -> dict[Value, list[Op | None]]:
    """Value -> the operations that read it; None stands for the block's own output."""
    readers: dict[Value, list[Op | None]] = defaultdict(list)
    for op in block.ops:
        for value in value_inputs(op):
            readers[value].append(op)
    for ref in block.outputs:
        if not isinstance(ref, Lit):
            readers[ref].append(None)
    return readers


def _leaves_scope(
    op: Op, value: Value, readers: dict[Value, list[Op | None]], place: _Place, labels: Labels
) -> bool:
    if op not in labels.by_scope or op.name == "name":
        return False
    path = labels.path[op]
    for reader in readers[value]:
        outside = place.scope if reader is None else labels.path.get(reader)
        if reader is None and place.order and outside is None:
            outside = ()
        if outside is None or outside[: len(path)] != path or (reader is None and not place.order):
            return True
    return False


def _inner_site(op: Op, value: Value, planner: _Planner) -> bool:
    """Whether the value is a tensor that already has a site inside the call that returns it."""
    if op.kind == "cond" or not op.blocks:
        return False
    ref = op.blocks[0].outputs[op.outputs.index(value)]
    return not isinstance(ref, Lit) and ref in planner.found


def _inside(op: Op, inner: Block, i: int, place: _Place, labels: Labels) -> _Place:
    scans = place.scans
    if op.kind == "scan":
        scans = (
            *scans,
            (
                len(place.order),
                _scan_path(op, inner, labels),
                op.length,
                bool(op.eqn.params["reverse"]),
            ),
        )
    return _Place((*place.order, i), scans, labels.path.get(op), op.num_carry)


def _scan_path(op: Op, inner: Block, labels: Labels) -> Path:
    """The layer path of a scan: what all its named operations share."""
    inside = [labels.path[o] for _, o in walk(inner) if labels.path.get(o)]
    return common_prefix(inside) or labels.path.get(op) or ("scan",)


def _plan_parameters(
    block: Block, place: _Place, readers: dict[Value, list[Op | None]], planner: _Planner
) -> None:
    """Modules that no scope names: their output is the last value that uses their parameters."""
    labels = planner.labels
    uses = [
        (i, op) for i, op in enumerate(block.ops) if op in labels.uses and op not in labels.by_scope
    ]
    visits: list[tuple[Path, set[str], int, Op]] = []
    latest: dict[Path, int] = {}
    for i, op in uses:
        path, names = labels.path[op], set(labels.uses[op])
        known = latest.get(path)
        if known is not None and not visits[known][1] & names:
            visits[known] = (path, visits[known][1] | names, i, op)
        else:
            latest[path] = len(visits)
            visits.append((path, names, i, op))
    visits = _absorb_biases(visits, readers)
    for path, names, i, op in visits:
        for value in op.outputs:
            _add(planner, value, path, place, i, tuple(sorted(names)))
            _plan_residual(block, value, path, place, readers, planner)


def _absorb_biases(
    visits: list[tuple[Path, set[str], int, Op]], readers: dict[Value, list[Op | None]]
) -> list[tuple[Path, set[str], int, Op]]:
    """Join `b` to `w` where the leaves lie at the root: `w`'s only reader adds `b`."""
    kept: list[tuple[Path, set[str], int, Op]] = []
    for visit in visits:
        path, names, i, op = visit
        previous = kept[-1] if kept else None
        if (
            previous
            and op.name == "add"
            and len(path) == 1
            and path != previous[0]
            and len(names) == 1
        ):
            source = previous[3].outputs[0]
            if source in value_inputs(op) and readers[source] == [op]:
                kept[-1] = (previous[0], previous[1] | names, i, op)
                continue
        kept.append(visit)
    return kept


def _plan_residual(
    block: Block,
    value: Value,
    path: Path,
    place: _Place,
    readers: dict[Value, list[Op | None]],
    planner: _Planner,
) -> None:
    """The sum that adds a branch to its input, named by the module that ends with the branch."""
    labels = planner.labels
    if len(readers[value]) != 1 or not isinstance(op := readers[value][0], Op):
        return
    if op.name not in ("add", "add_any") or op in labels.uses or op in labels.by_scope:
        return
    if any(
        isinstance(ref, Lit) or planner.table.avals[ref].shape != planner.table.avals[value].shape
        for ref in op.inputs
    ):
        return
    position = block.ops.index(op)
    later = {labels.path[o] for o in block.ops[position:] if o in labels.uses}
    complete = [
        path[:depth]
        for depth in range(1, len(path))
        if not any(other[:depth] == path[:depth] for other in later)
    ]
    name = complete[0] if complete else (*path[:-1], f"{path[-1]}+")
    _add(planner, op.outputs[0], name, place, position)


def _plan_carry(block: Block, place: _Place, planner: _Planner) -> None:
    """What a scan carries to its next iteration is that iteration's output."""
    path = place.scans[-1][1]
    produced = {v: (i, op) for i, op in enumerate(block.ops) for v in op.outputs}
    carried = [
        ref
        for ref in block.outputs[: place.carry]
        if not isinstance(ref, Lit)
        and ref in produced
        and is_real_dtype(getattr(planner.table.avals[ref], "dtype", None))
    ]
    if len(carried) == 1 and carried[0] not in planner.found:  # one row an iteration, not two
        for value, site in list(planner.found.items()):
            here = site.scans == place.scans and site.order[: len(place.order)] == place.order
            if here and site.path == path and value not in planner.labels.taps:
                del planner.found[value]
    for n, ref in enumerate(carried):
        i, op = produced[ref]
        if ref not in planner.found and not _inner_site(op, ref, planner):
            name = path if len(carried) == 1 else (*path, f"carry{n}")
            _add(planner, ref, name, place, i)


def _add(
    planner: _Planner,
    value: Value,
    path: Path,
    place: _Place,
    position: int,
    parameters: tuple[str, ...] = (),
) -> None:
    aval = planner.table.avals[value]
    if value in planner.found or not is_real_dtype(getattr(aval, "dtype", None)):
        return
    order = (*place.order, position)
    planner.found[value] = Site(
        value, path, order, place.scans, tuple(aval.shape), str(aval.dtype), parameters
    )
