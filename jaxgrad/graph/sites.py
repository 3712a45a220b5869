"""Where taps go and what they are called.

A site is a tensor that leaves a layer: a value made under a scope and read outside it, the last
value that uses a module's parameters, the sum that closes a residual branch, what a scan carries to
its next iteration, or a value that the user named. A site inside a scan gives a row an iteration.

Sites are activations. A loss may differentiate on its own account (a gradient penalty, an inner
training step, a PINN's u_x): what its backward passes compute is no site, nor are the tangents, nor
the parameters that it updates. The forward pass of an inner derivative has a layer's site only if
the layer has none elsewhere and the loss reads the tensor.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp

from jaxgrad.graph.ir import (
    Block,
    Lit,
    Op,
    Table,
    Value,
    is_float_dtype,
    is_real_dtype,
    reach,
    value_inputs,
    walk,
)
from jaxgrad.graph.names import Labels
from jaxgrad.graph.paths import Path, common_prefix
from jaxgrad.graph.site import Loop, Site, rows
from jaxgrad.graph.visits import Branches, Readers, module_visits

__all__ = ["Site", "plan_sites", "rows"]


@dataclass(eq=False)
class _Planner:
    table: Table
    labels: Labels
    found: dict[Value, Site]
    is_tensor: Callable[[Any], bool] = is_real_dtype
    within: dict[Op, Path] = field(default_factory=dict)

    @functools.cached_property
    def leaves(self) -> dict[Path, tuple[str, ...]]:
        """Path of a layer -> the parameter leaves that it uses."""
        found: dict[Path, set[str]] = defaultdict(set)
        for op, names in self.labels.uses.items():
            if op in self.labels.path:
                found[self.labels.path[op]].update(names)
        return {path: tuple(sorted(names)) for path, names in found.items()}

    def leaves_of(self, path: Path) -> tuple[str, ...]:
        """The parameter leaves that a layer uses."""
        return self.leaves.get(path, ())

    def used_by(self, site: Site) -> tuple[str, ...]:
        """The parameter leaves of a site's layer."""
        return site.parameters or self.leaves_of(site.path)


@dataclass(frozen=True)
class _Place:
    """A block's place: its order, its scans, and the layer of the call that holds it."""

    order: tuple[int, ...] = ()
    scans: tuple[Loop, ...] = ()
    scope: Path | None = None
    carry: int = 0  # how many of the block's first outputs a scan carries on
    unread: frozenset[Value] = frozenset()  # outputs that only a backward pass reads
    reported: frozenset[Value] = frozenset()  # outputs that are for `aux` alone
    carried: frozenset[Value] = frozenset()  # what a scan carries on, in its body's calls too


def plan_sites(
    block: Block, table: Table, labels: Labels, also_complex: bool = False
) -> list[Site]:
    """Choose the sites of a program, in forward order.

    Args:
        block: the program.
        table: its values.
        labels: the layer of every operation.
        also_complex: whether complex tensors are sites too.

    Returns:
        Sites of floating-point tensors; where nothing is named, every floating-point result.
    """
    planner = _Planner(table, labels, {}, is_float_dtype if also_complex else is_real_dtype)
    reported = frozenset(ref for ref in block.outputs[1:] if not isinstance(ref, Lit))
    _plan_block(block, _Place(reported=reported - set(block.outputs[:1])), planner)
    if not planner.found:
        for i, op in enumerate(block.ops):
            for value in op.outputs if op.derivative != "backward" else ():
                _add(planner, value, (f"{op.name}[{i}]",), _Place(), (i, op))
    reaching: set[Value] = set()
    reach(block, block.outputs[:1], reaching)
    _drop_bookkeeping(reaching, planner)
    _drop_second_passes(reaching, planner)
    sites = sorted(planner.found.values(), key=lambda site: site.order)
    return [replace(site, parameters=planner.used_by(site)) for site in sites]


def _drop_second_passes(reaching: set[Value], planner: _Planner) -> None:
    """Of the forward passes in inner derivatives a layer keeps the first, if it has no other."""
    inside = [site for site in planner.found.values() if site.inside_derivative]
    elsewhere = [site for site in planner.found.values() if not site.inside_derivative]
    seen = {site.path for site in elsewhere}
    used = {name for site in elsewhere for name in planner.used_by(site)}
    for site in sorted(inside, key=lambda site: site.order):
        names = planner.used_by(site)
        known = site.path in seen or (bool(names) and used.issuperset(names))
        if known or site.value not in reaching:
            del planner.found[site.value]
        seen.add(site.path)


def _drop_bookkeeping(reaching: set[Value], planner: _Planner) -> None:
    """A layer's value that only `aux` reads (a running mean) is no row beside its output."""
    outputs = {site.path for value, site in planner.found.items() if value in reaching}
    for value, site in list(planner.found.items()):
        beside = any(site.path[:n] in outputs for n in range(1, len(site.path)))
        twin = site.path in outputs or (beside and not planner.leaves_of(site.path))
        if value not in reaching and twin and value not in planner.labels.taps:
            del planner.found[value]


def _plan_block(block: Block, place: _Place, planner: _Planner) -> None:
    labels = planner.labels
    readers = _readers(block, place)
    planner.within |= _scans_within(block, labels)
    for i, op in enumerate(block.ops):
        if op.derivative == "backward":
            continue
        for inner in op.blocks:
            _plan_block(inner, _inside(op, inner, i, place, planner, readers), planner)
        for value in op.outputs:
            if value in labels.taps:
                _add(planner, value, (labels.taps[value],), place, (i, op))
            elif _leaves_scope(op, value, readers, place, labels) and not _inner_site(
                op, value, planner
            ):
                path = labels.path[op] or (labels.root or ("output",))[-1:]
                _add(planner, value, path, place, (i, op))
    _plan_modules(block, place, readers, planner)
    _let_taps_replace(block, readers, planner)
    if place.carry:
        _plan_carry(block, place, planner)


def _let_taps_replace(block: Block, readers: Readers, planner: _Planner) -> None:
    """A tensor that the user named right away is one row, under the user's name."""
    for op in block.ops:
        tap = op.outputs[0] if op.name == "name" else None
        source = next(iter(value_inputs(op)), None)
        if tap in planner.found and source in planner.found and readers[source] == [op]:
            layer = planner.found.pop(source)
            planner.found[tap] = replace(planner.found[tap], parameters=planner.used_by(layer))


def _readers(block: Block, place: _Place = _Place()) -> Readers:
    """Value -> the operations that read it; None stands for the block's own output.

    What an inner backward pass reads (a residual) has not left its layer for that, nor has what is
    read inside and reported by `aux` besides (a norm's running state).
    """
    readers: Readers = defaultdict(list)
    for op in block.ops:
        for value in value_inputs(op) if op.derivative != "backward" else ():
            readers[value].append(op)
    for ref in block.outputs:
        if isinstance(ref, Lit) or ref in place.unread or (ref in place.reported and readers[ref]):
            continue
        readers[ref].append(None)
    return readers


def _leaves_scope(op: Op, value: Value, readers: Readers, place: _Place, labels: Labels) -> bool:
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


def _inside(
    op: Op, inner: Block, i: int, place: _Place, planner: _Planner, readers: Readers
) -> _Place:
    scans, labels = place.scans, planner.labels
    if op.kind == "scan":
        path = planner.within.get(op) or _scan_path(op, inner, labels)
        stacked = any(ref in labels.named for ref in op.inputs[op.num_consts + op.num_carry :])
        backward = bool(op.eqn.params["reverse"])
        scans = (*scans, Loop(len(place.order), path, op.length, backward, stacked))
    pairs: list[tuple[Value, Any]] = list(zip(op.outputs, inner.outputs, strict=True))
    unread = frozenset(ref for v, ref in pairs if op.derivative and v not in readers)
    called = pairs if op.kind in ("jit", "remat") else []
    reported = [r for v, r in called if v in place.reported and readers.get(v) == [None]]
    carried: list[Any] = [ref for v, ref in called if v in place.carried]
    carried += inner.outputs[: op.num_carry]
    return _Place(
        (*place.order, i), scans, labels.path.get(op), op.num_carry, unread,
        frozenset(reported), frozenset(v for v in carried if not isinstance(v, Lit)),
    )  # fmt: skip


def _scan_path(op: Op, inner: Block, labels: Labels) -> Path:
    """The layer path of a scan: what all its named operations share."""
    inside = [labels.path[o] for _, o in walk(inner) if labels.path.get(o)]
    return common_prefix(inside) or labels.path.get(op) or ("scan",)


def _scans_within(block: Block, labels: Labels) -> dict[Op, Path]:
    """Scans that nothing in them names -> the layer that runs before and after them, and `scan`."""
    found: dict[Op, Path] = {}
    paths = [labels.path.get(op) or common_prefix(
        labels.path[o] for b in op.blocks for _, o in walk(b) if labels.path.get(o)
    ) for op in block.ops]  # fmt: skip
    before: Path = ()
    for i, op in enumerate(block.ops):
        if op.kind == "scan" and not paths[i] and before:
            after = next((path for path in paths[i + 1 :] if path), ())
            found[op] = (*common_prefix([before, after]), "scan")
        before = paths[i] or before
    return found


def _plan_modules(block: Block, place: _Place, readers: Readers, planner: _Planner) -> None:
    """Modules that no scope names: their output is where what they made comes together."""
    labels, table = planner.labels, planner.table
    visits = module_visits(block, labels, readers)
    if not visits:
        return
    branches = Branches(
        block,
        labels,
        table,
        lambda v: v not in table.constants and _is_data(table.avals[v]),
        readers,
    )
    for visit in visits:
        used = tuple(sorted(visit.names))
        output, position, op = branches.output(visit)
        outputs = visit.op.outputs
        for value in (output,) if len(outputs) == 1 else _results(outputs, planner):
            _add(planner, value, visit.path, place, (position, op), used)
            if closing := branches.closing_sum(value):
                name = branches.name(visit.path, closing.position)
                total = closing.op.outputs[0]
                unnamed = closing.scaled and name[-1].endswith("+")
                if not (unnamed and total in place.carried):  # else: the scan's own
                    _add(planner, total, name, place, (closing.position, closing.op))


def _results(values: Sequence[Any], planner: _Planner) -> list[Value]:
    """The tensors that an operation with several results is there for.

    Beside them an implicit layer returns the time that it came to, a blockwise attention the
    logarithms of its sums: of fewer axes, and of no interest to who reads the layer's row.
    """
    shapes = {v: getattr(planner.table.avals[v], "shape", ()) for v in values}
    floats = [v for v in values if planner.table.is_float(v)]
    most = max((len(shapes[v]) for v in floats), default=0)
    return [v for v in floats if len(shapes[v]) == most]


def _plan_carry(block: Block, place: _Place, planner: _Planner) -> None:
    """What a scan carries to its next iteration is that iteration's output."""
    path = place.scans[-1][1]
    produced = {v: (i, op) for i, op in enumerate(block.ops) for v in op.outputs}
    carried = [
        ref
        for ref in block.outputs[: place.carry]
        if not isinstance(ref, Lit)
        and ref in produced
        and ref not in planner.labels.named
        and ref not in planner.labels.gradients
        and ref in planner.labels.fed
        and planner.is_tensor(getattr(planner.table.avals[ref], "dtype", None))
    ]
    carried = _results(carried, planner)
    if len(carried) == 1 and carried[0] not in planner.found:  # one row an iteration, not two
        for value, site in list(planner.found.items()):
            here = site.scans == place.scans and site.order[: len(place.order)] == place.order
            if here and site.path == path and value not in planner.labels.taps:
                del planner.found[value]
    for n, ref in enumerate(carried):
        if ref not in planner.found and not _inner_site(produced[ref][1], ref, planner):
            name = path if len(carried) == 1 else (*path, f"carry{n}")
            _add(planner, ref, name, place, produced[ref])


def _add(
    planner: _Planner,
    value: Value,
    path: Path,
    place: _Place,
    made: tuple[int, Op],
    parameters: tuple[str, ...] = (),
) -> None:
    aval = planner.table.avals[value]
    labels = planner.labels
    constant = value in labels.neutral and value not in labels.taps
    known = value in planner.found or constant
    if known or not planner.is_tensor(getattr(aval, "dtype", None)):
        return
    position, op = made
    order, shape, dtype = (*place.order, position), tuple(aval.shape), str(aval.dtype)
    planner.found[value] = Site(
        value, path, order, place.scans, shape, dtype, parameters, bool(op.derivative)
    )


def _is_data(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    return is_float_dtype(dtype) or (dtype is not None and jnp.issubdtype(dtype, jnp.signedinteger))
