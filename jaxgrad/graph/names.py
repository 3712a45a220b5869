"""Which layer an operation belongs to: the user's tap, else its scope, else its parameters.

Flax linen and haiku put the module's whole path into the scope; equinox puts the class only, NNX
and plain functions nothing. There the path of the parameter says it, followed by dataflow: what is
computed from parameters alone (a cast, a transposition, a weight norm) still carries their names.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from jaxgrad.graph.ir import Block, Lit, Op, Table, Value, value_inputs, walk

Path = tuple[str, ...]

# Scopes that name a class or an operation and not one module of the model.
_CLASS_SCOPE = re.compile(r"^(eqx|equinox)\.|->|^\$|^(checkpoint|rematted_computation|named)$")
# Elementwise arithmetic that keeps a constant operand from turning a weight into data (a mask on a
# weight).
_SHAPING = {"mul", "add", "sub", "div", "select_n", "max", "min", "concatenate", "pad"}
_SHAPING |= {"dynamic_slice", "dynamic_update_slice"}
# The collection in which flax keeps its parameters: no module of the model.
_COLLECTIONS = ("params", "param", "batch_stats", "state")


@dataclass(eq=False)
class Labels:
    """The layer path of every operation of a capture.

    Attributes:
        path: operation -> path of the layer it belongs to; absent where nothing names it.
        uses: operation -> names of the parameter leaves that it mixes with data.
        taps: value -> name that the user gave it.
        by_scope: operations whose path comes from a scope.
        root: the scope of the whole model; its own operations have the path `()`.
        named: values that are computed from named parameters alone.
        penalties: those of them that sum parameters up to one number.
    """

    path: dict[Op, Path] = field(default_factory=dict)
    uses: dict[Op, frozenset[str]] = field(default_factory=dict)
    taps: dict[Value, str] = field(default_factory=dict)
    by_scope: set[Op] = field(default_factory=set)
    root: Path = ()
    named: set[Value] = field(default_factory=set)
    penalties: set[Value] = field(default_factory=set)


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


def label(block: Block, table: Table, parameters: dict[Value, str]) -> Labels:
    """Find the layer path of every operation.

    Args:
        block: the program.
        table: its values.
        parameters: value -> name of the parameter leaf, for inputs and constants of the block.
    """
    labels = Labels()
    roles = {v: frozenset([n]) for v, n in parameters.items()}
    _uses(block, roles, set(table.constants), table, labels)
    labels.named = set(roles)
    ambiguous = _ambiguous_scopes(block, labels)
    root = labels.root = _root_scope(block, ambiguous)
    for _, op in walk(block):
        if op.name == "name":
            labels.taps[op.outputs[0]] = op.eqn.params["name"]
        scope = _clean(op.scope, ambiguous)
        modules = {module_of(name) for name in labels.uses.get(op, ())}
        if scope and (scope != root or not modules):
            labels.path[op] = scope[len(root) :]
            labels.by_scope.add(op)
        elif modules:
            labels.path[op] = common_prefix(modules) or min(modules)
    return labels


def label_calls(ops: Iterable[Op], labels: Labels) -> None:
    """Label the scans and branches that stay one operation by what is inside them."""
    for op in ops:
        inside = [o for inner in op.blocks for _, o in walk(inner)]
        if not inside or labels.uses.get(op):
            continue
        paths = [labels.path[o] for o in inside if labels.path.get(o)]
        leaves = frozenset().union(*(labels.uses.get(o, ()) for o in inside))
        if leaves:
            labels.uses[op] = leaves
        if paths and not labels.path.get(op):
            labels.path[op] = common_prefix(paths) or min(paths)


def _uses(
    block: Block,
    roles: dict[Value, frozenset[str]],
    neutral: set[Value],
    table: Table,
    labels: Labels,
) -> None:
    """Follow parameters.

    `roles` holds the values that are computed from parameters alone, `neutral` those from constants
    alone.
    """
    for op in block.ops:
        inputs = value_inputs(op)
        named = [roles[v] for v in inputs if v in roles]
        names = frozenset().union(*named)
        others = [v for v in inputs if v not in roles]
        shaping = op.name in _SHAPING and all(v in neutral for v in others)
        if names and (not others or shaping):
            roles |= dict.fromkeys(op.outputs, names)
            if _is_penalty(op, inputs, labels.penalties, table):
                labels.penalties.update(op.outputs)
        elif names and not op.blocks:
            weights = [roles[v] for v in inputs if v in roles and v not in labels.penalties]
            if weights:
                labels.uses[op] = frozenset().union(*weights)
        elif not op.blocks and all(v in neutral and v not in table.constants for v in others):
            neutral |= set(op.outputs)
        for inner in op.blocks:
            _pass_neutral(op, inner, neutral, table)
            _uses(inner, _inner_roles(op, inner, roles, labels.penalties), neutral, table, labels)
            _leave(op, inner, roles, neutral, labels.penalties)


def _leave(
    op: Op,
    inner: Block,
    roles: dict[Value, frozenset[str]],
    neutral: set[Value],
    penalties: set[Value],
) -> None:
    """What a call returns is what its body made it."""
    if op.kind not in ("jit", "remat"):
        return
    for outer, ref in zip(op.outputs, inner.outputs, strict=True):
        if not isinstance(ref, Lit) and ref in roles:
            roles[outer] = roles[ref]
        for known in (neutral, penalties):
            if not isinstance(ref, Lit) and ref in known:
                known.add(outer)


def _is_penalty(op: Op, inputs: Sequence[Value], penalties: set[Value], table: Table) -> bool:
    """Whether parameters become one number here (an L2 norm), or did before.

    Such a number is added to a loss, or divides a weight; data that it meets is no layer's output.
    """
    shapes = [getattr(table.avals[v], "shape", ()) for v in inputs]
    reduced = op.name.startswith(("reduce_", "dot_general")) and any(shapes)
    scalar = all(getattr(table.avals[v], "shape", None) == () for v in op.outputs)
    passed_on = [v for v in inputs if v in penalties]
    rest = [v for v, shape in zip(inputs, shapes, strict=True) if v not in penalties and shape]
    return (reduced and scalar) or (bool(passed_on) and not rest)


def _pass_neutral(op: Op, inner: Block, neutral: set[Value], table: Table) -> None:
    """Constants stay constants inside a call; of what a loop carries, only its integer counter."""
    arguments = op.inputs[1:] if op.kind == "cond" else op.inputs
    carried = range(op.num_consts, op.num_consts + op.num_carry)
    for i, (value, ref) in enumerate(zip(inner.inputs, arguments, strict=True)):
        constant = isinstance(ref, Lit) or ref in neutral
        counter = not table.avals[value].shape and not table.is_float(value)
        if constant and (i not in carried or counter):
            neutral.add(value)


def _inner_roles(
    op: Op, inner: Block, roles: dict[Value, frozenset[str]], penalties: set[Value]
) -> dict[Value, frozenset[str]]:
    arguments = op.inputs[1:] if op.kind == "cond" else op.inputs
    carried = range(op.num_consts, op.num_consts + op.num_carry)
    for i, (value, ref) in enumerate(zip(inner.inputs, arguments, strict=True)):
        if not isinstance(ref, Lit) and ref in roles and i not in carried:
            roles[value] = roles[ref]
            if ref in penalties:
                penalties.add(value)
    return roles


def _clean(scope: Path, ambiguous: set[Path]) -> Path:
    """The scope without parts that name no module, cut before its first ambiguous part."""
    kept: list[str] = []
    for i, part in enumerate(scope):
        if scope[: i + 1] in ambiguous:
            break
        if _CLASS_SCOPE.search(part):
            if part.startswith(("eqx.", "equinox.")):
                break
            continue
        owner = part.rpartition(".")[0]
        following = scope[i + 1] if i + 1 < len(scope) else None
        if owner and (
            owner in kept or owner == following
        ):  # flax: `blocks.body/blocks`, a method's name
            continue
        kept.append(part)
    return tuple(kept)


def _root_scope(block: Block, ambiguous: set[Path]) -> Path:
    """The scope of the whole model, which adds nothing to a name: at most the outermost module."""
    cleaned = [(op, _clean(op.scope, ambiguous)) for _, op in walk(block)]
    # a scan outside of every scope shows that the scope inside it is a layer and not the model
    scopes = [scope for op, scope in cleaned if scope or op.kind == "scan"]
    prefix = common_prefix(scopes)
    if (
        len({s[: len(prefix) + 1] for s in scopes}) <= 1
    ):  # a single module: its name is all there is
        return ()
    return prefix


def _ambiguous_scopes(block: Block, labels: Labels) -> set[Path]:
    """Scopes entered for several modules: `with named_scope("block")` in a loop over blocks.

    Two visits of one scope that use different parameters, or parameters that differ in an index
    only (`blocks[0]`, `blocks[1]`), belong to different modules; one module called twice uses the
    same ones.
    """
    visits: dict[Path, list[set[str]]] = defaultdict(list)
    own: dict[Path, set[str]] = defaultdict(set)
    current: Path = ()
    for _, op in walk(block):
        own[op.scope] |= labels.uses.get(op, frozenset())
        for depth in range(1, len(op.scope) + 1):
            prefix = op.scope[:depth]
            if current[:depth] != prefix or not visits[prefix]:
                visits[prefix].append(set())
            visits[prefix][-1] |= labels.uses.get(op, frozenset())
        current = op.scope
    return {scope for scope, sets in visits.items() if _disjoint(sets) or _repeated(own[scope])}


def _disjoint(visits: Sequence[set[str]]) -> bool:
    used = [names for names in visits if names]
    return len(used) > 1 and not set.intersection(*used)


def _repeated(names: set[str]) -> bool:
    """Whether every parameter has a counterpart in another index: one scope, many modules."""
    shapes = Counter(re.sub(r"\[\d+\]", "[]", name, count=1) for name in names)
    return bool(shapes) and min(shapes.values()) > 1


def unique(names: Sequence[str]) -> list[str]:
    """Number repeated names, in order: `x, x` becomes `x, x#2`."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return result
