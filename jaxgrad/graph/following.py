"""Follow the parameters through a program: into calls, branches and loops, and out of them."""

from dataclasses import replace
from typing import Any, cast

from jaxgrad.graph.ir import Block, Lit, Op, Table, Value, value_inputs, walk
from jaxgrad.graph.roles import (
    SHAPING,
    VIEWS,
    Names,
    Readers,
    Roles,
    is_penalty,
    is_update,
    kernels_module,
    scaled_modules,
    scales_an_update,
)


def follow(block: Block, table: Table, parameters: dict[Value, str]) -> Roles:
    """Follow the parameters through a program.

    Args:
        block: the program.
        table: its values.
        parameters: value -> name of the parameter leaf, for inputs and constants of the block.
    """
    roles = Roles(table)
    roles.shapes = {name: roles.shape(value) for value, name in parameters.items()}
    roles.owners = {value: frozenset([name]) for value, name in parameters.items()}
    roles.neutral = set(table.constants)
    roles.fed, roles.views = set(parameters), dict(parameters)
    _follow(block, roles)
    return roles


def _follow(block: Block, roles: Roles) -> None:
    readers = Readers(block)
    for op in block.ops:
        inputs = value_inputs(op)
        if any(v in roles.fed for v in inputs):
            roles.fed.update(op.outputs)
        names = frozenset().union(*(roles.owners[v] for v in inputs if v in roles.owners))
        others = [v for v in inputs if v not in roles.owners]
        if names:
            _meet(op, names, others, readers, roles)
        else:
            _without_parameters(op, others, roles)
        for k, inner in enumerate(op.blocks):
            _enter(op, inner, roles)
            kept = _kept_by_the_loop(op, roles) if k == 0 and op.num_carry else {}
            for known, values in kept.items():
                getattr(roles, known).update(values)
            _follow(inner, roles)
            _leave(op, inner, roles, bool(kept))


def _meet(op: Op, names: Names, others: list[Value], readers: Readers, roles: Roles) -> None:
    """An operation on parameters: it keeps them parameters, or uses them."""
    inputs = value_inputs(op)
    if op.derivative == "backward":
        roles.gradients.update(op.outputs)
    shaping = op.name in SHAPING and all(v in roles.neutral for v in others)
    if not others and (module := kernels_module(op, readers, roles)):
        before = scaled_modules(op, roles)
        for scaled in before:
            roles.uses[scaled.op], roles.applied[scaled.op] = scaled.names, scaled.module
        known = frozenset().union(*(scaled.names for scaled in before))
        roles.uses[op], roles.applied[op] = names - known, module
    elif not others or shaping or is_update(op, others, names, roles):
        roles.owners |= dict.fromkeys(op.outputs, names)
        if scaled := () if others else scaled_modules(op, roles, names):
            roles.scaled |= dict.fromkeys(op.outputs, scaled)
        if op.name in VIEWS and inputs[0] in roles.views:
            roles.views[op.outputs[0]] = roles.views[inputs[0]]
        if is_penalty(op, inputs, roles):
            roles.penalties.update(op.outputs)
    elif scales_an_update(op, others, readers, roles):
        roles.gradients.update(op.outputs)
    elif not op.blocks:
        weights = [
            roles.owners[v] for v in inputs if v in roles.owners and v not in roles.penalties
        ]
        if weights:
            roles.uses[op] = frozenset().union(*weights)


def _without_parameters(op: Op, inputs: list[Value], roles: Roles) -> None:
    constants = roles.table.constants
    if op.derivative == "backward" or (
        any(v in roles.gradients for v in inputs)
        and all(v in roles.gradients or v in roles.neutral for v in inputs)
        and not op.blocks
    ):
        roles.gradients.update(op.outputs)
    elif not op.blocks and all(v in roles.neutral and v not in constants for v in inputs):
        roles.neutral.update(op.outputs)


# ------------------------------------------------------------------- into calls and out of them


def _enter(op: Op, inner: Block, roles: Roles) -> None:
    """What the arguments are, the inputs of the body are; what a loop carries may change."""
    arguments = op.inputs[1:] if op.kind == "cond" else op.inputs
    carried = range(op.num_consts, op.num_consts + op.num_carry)
    loop_is_fed = any(v in roles.fed for v in value_inputs(op))
    for i, (value, ref) in enumerate(zip(inner.inputs, arguments, strict=True)):
        known = not isinstance(ref, Lit)
        counter = not roles.shape(value) and not roles.table.is_float(value)
        if (not known or ref in roles.neutral) and (i not in carried or counter):
            roles.neutral.add(value)
        if (known and ref in roles.fed) or (i in carried and loop_is_fed):
            roles.fed.add(value)
        if not known or i in carried:
            continue
        tables: tuple[Any, ...]
        tables = (roles.owners,) if op.kind == "scan" else (roles.owners, roles.views, roles.scaled)
        for table in tables:
            if ref in table:
                table[value] = table[ref]
        for members in (roles.penalties, roles.gradients):
            if ref in members:
                members.add(value)


def _leave(op: Op, inner: Block, roles: Roles, loop_keeps: bool) -> None:
    """What a call returns is what its body made it; so is what a loop keeps a parameter."""
    if op.kind not in ("jit", "remat") and not loop_keeps:
        return
    count = op.num_carry if loop_keeps else len(op.outputs)
    tables: tuple[Any, ...]
    tables = (roles.owners,) if loop_keeps else (roles.owners, roles.views, roles.scaled)
    sets = (roles.gradients,) if loop_keeps else (roles.neutral, roles.penalties, roles.gradients)
    for outer, ref in zip(op.outputs[:count], inner.outputs[:count], strict=True):
        if isinstance(ref, Lit):
            continue
        for table in tables:
            if ref in table:
                table[outer] = table[ref]
        for members in sets:
            if ref in members:
                members.add(outer)


def _kept_by_the_loop(op: Op, roles: Roles) -> dict[str, dict[Value, Names] | set[Value]]:
    """What a loop carries that stays a parameter, as in an inner training loop: `p -= rate * g`.

    It is assumed, together with weights and an optimizer's state that begin as constants, and given
    up where the body returns something else (a recurrent state that begins as a parameter).
    """
    inner, first = op.blocks[0], op.num_consts
    places = range(op.num_carry)
    begins: list[Any] = [op.inputs[first + i] for i in places]
    held = {i for i in places if begins[i] in roles.owners}
    if held:
        roles.begins[op] = frozenset().union(*(roles.owners[begins[i]] for i in held))
    state = {
        i
        for i in places
        if (isinstance(begins[i], Lit) or begins[i] in roles.neutral | roles.gradients)
        and roles.table.is_float(inner.inputs[first + i])
    }
    trains = any(o.derivative == "backward" for _, o in walk(inner))
    while held or (trains and state):
        owners = {inner.inputs[first + i]: roles.owners[begins[i]] for i in held}
        gradients = {inner.inputs[first + i] for i in state}
        trial = _copy(roles)
        trial.owners |= owners
        trial.gradients |= gradients
        _follow(inner, trial)
        ends = cast("list[Any]", inner.outputs)
        wrong = {
            i for i in held if not roles.owners[begins[i]] <= trial.owners.get(ends[i], frozenset())
        }
        changed = {
            i for i in state if ends[i] not in trial.gradients and ends[i] not in trial.neutral
        }
        if not wrong and not changed:
            return {"owners": owners, "gradients": gradients}
        held, state = held - wrong, state - changed
    return {}


def _copy(roles: Roles) -> Roles:
    return replace(
        roles,
        owners=dict(roles.owners),
        uses={},
        applied={},
        begins={},
        penalties=set(roles.penalties),
        neutral=set(roles.neutral),
        gradients=set(roles.gradients),
        fed=set(roles.fed),
        views=dict(roles.views),
        scaled=dict(roles.scaled),
    )
