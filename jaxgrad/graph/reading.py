"""What a captured program says about itself: opaque regions and parameters that no site covers."""

from jaxgrad.graph import compat
from jaxgrad.graph.ir import Block, Lit, Op, Table, Value, value_inputs, walk
from jaxgrad.graph.names import Labels
from jaxgrad.graph.sites import Site


def opaque_regions(block: Block, table: Table, labels: Labels) -> tuple[str, ...]:
    """Operations that jaxgrad runs but does not look into, with layer and source line."""
    found = []
    for _, op in walk(block):
        if op.kind == "opaque" and any(table.is_float(v) for v in op.outputs) and not _is_small(op):
            found.append(describe(op, labels))
    return tuple(dict.fromkeys(found))


def _is_small(op: Op) -> bool:
    """An activation with a rule of its own, such as `jax.nn.relu`: nothing inside to see."""
    inner = {e.primitive.name for e in compat.inner_eqns(op.eqn.params)}
    return op.name == "custom_jvp_call" and not inner & {
        "dot_general",
        "conv_general_dilated",
        "scan",
        "while",
    }


def describe(op: Op, labels: Labels) -> str:
    """`primitive in layer (file:line)`."""
    where = "/".join(labels.path.get(op, ()))
    line = compat.source_line(op.eqn)
    name = op.eqn.params.get("name") or op.name
    text = f"{op.name} {name!r}" if name != op.name else op.name
    return text + (f" in {where}" if where else "") + (f" ({line})" if line else "")


def read_values(block: Block) -> set[Value]:
    """The values that an operation reads, or that the block returns; a call reads what it uses."""
    read = {ref for ref in block.outputs if not isinstance(ref, Lit)}
    for op in block.ops:
        read.update(value_inputs(op) if not op.blocks else ())
        arguments = op.inputs[1:] if op.kind == "cond" else op.inputs
        for inner in op.blocks:
            inside = read_values(inner)
            pairs = zip(inner.inputs, arguments, strict=True)
            read.update(ref for v, ref in pairs if v in inside and not isinstance(ref, Lit))
            read.update(inside)
    return read


def uncovered(
    block: Block, parameters: dict[Value, str], labels: Labels, sites: list[Site]
) -> tuple[str, ...]:
    """Parameter leaves that no site's layer uses, or that nothing uses at all."""
    read = read_values(block)
    covered = {name for site in sites for name in site.parameters}
    covered |= {
        name
        for op, names in labels.uses.items()
        for name in names
        if any(labels.path.get(op, ())[: len(s.path)] == s.path for s in sites)
    }
    return tuple(
        name if value in read else f"{name} (unused)"
        for value, name in parameters.items()
        if name not in covered
    )
