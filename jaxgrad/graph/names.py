"""Which layer an operation belongs to: the user's tap, else its scope, else its parameters.

Flax linen and haiku put the module's whole path into the scope; equinox puts the class only, NNX
and plain functions nothing. There the path of the parameter says it, followed by dataflow: what is
computed from parameters alone (a cast, a transposition, a weight norm) still carries their names.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from jaxgrad.graph.following import follow
from jaxgrad.graph.ir import Block, Op, Table, Value, walk
from jaxgrad.graph.paths import Path, beside, common_prefix, module_of

# Scopes that name a class or an operation and not one module of the model.
_CLASS_SCOPE = re.compile(r"^(eqx|equinox)\.|->|^\$|^(checkpoint|rematted_computation|named)$")


@dataclass(eq=False)
class Labels:
    """The layer path of every operation of a capture.

    Attributes:
        path: operation -> path of the layer it belongs to; absent where nothing names it.
        uses: operation -> names of the parameter leaves that it mixes with data.
        begins: loop -> names of the parameter leaves that what it carries begins with.
        taps: value -> name that the user gave it.
        by_scope: operations whose path comes from a scope.
        root: the scope of the whole model; its own operations have the path `()`.
        named: values that are computed from named parameters alone.
        gradients: values that are computed from an inner gradient alone.
        fed: values that depend on a named parameter.
        neutral: values that are computed from constants alone.
    """

    path: dict[Op, Path] = field(default_factory=dict)
    uses: dict[Op, frozenset[str]] = field(default_factory=dict)
    begins: dict[Op, frozenset[str]] = field(default_factory=dict)
    taps: dict[Value, str] = field(default_factory=dict)
    by_scope: set[Op] = field(default_factory=set)
    root: Path = ()
    named: set[Value] = field(default_factory=set)
    gradients: set[Value] = field(default_factory=set)
    fed: set[Value] = field(default_factory=set)
    neutral: set[Value] = field(default_factory=set)


def label(block: Block, table: Table, parameters: dict[Value, str]) -> Labels:
    """Find the layer path of every operation.

    Args:
        block: the program.
        table: its values.
        parameters: value -> name of the parameter leaf, for inputs and constants of the block.
    """
    known = follow(block, table, parameters)
    labels = Labels(uses=known.uses, begins=known.begins)
    labels.named, labels.gradients, labels.fed = set(known.owners), known.gradients, known.fed
    labels.neutral = known.neutral
    ambiguous = _ambiguous_scopes(block, labels)
    root = labels.root = _root_scope(block, ambiguous)
    for _, op in walk(block):
        if op.name == "name":
            labels.taps[op.outputs[0]] = op.eqn.params["name"]
        scope = _clean(op.scope, ambiguous)
        modules = {module_of(name) for name in labels.uses.get(op, ())}
        modules = {known.applied[op]} if op in known.applied else modules
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
            labels.path[op] = common_prefix(paths) or beside(paths)


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
        if op.derivative == "backward":
            continue
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
