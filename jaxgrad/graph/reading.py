"""What a captured program says about itself: opaque regions and parameters that no site covers."""

from collections import Counter
from dataclasses import dataclass

from jaxgrad.graph import compat
from jaxgrad.graph.flatten import CALLBACKS
from jaxgrad.graph.ir import Block, Lit, Op, Table, Value, value_inputs, walk
from jaxgrad.graph.names import Labels
from jaxgrad.graph.sites import Site

# What an operation that is not looked into keeps to itself, where its name does not say it.
_MEANING = {
    "shard_map": "what each device runs is one layer, without rows inside",
} | dict.fromkeys(CALLBACKS, "Python code, without a derivative")


@dataclass(frozen=True)
class Graph:
    """What was found while a function was factorized.

    Attributes:
        cuts: number of cuts, input and output included.
        start: what the first state is.
        opaque: operations that were not looked into: they are run, and differentiated by their own
            rules, as a part of one layer.
        closed_scans: scans that are one layer, each with the reason.
        side_inputs: values that layers take besides the state.
        uncovered: parameters that no named layer uses.
        made_up_names: layers that nothing named.
        independence: "proved" or "probed" for a batch, empty for one example.
    """

    cuts: int
    start: str = "the input"
    opaque: tuple[str, ...] = ()
    closed_scans: tuple[str, ...] = ()
    side_inputs: tuple[str, ...] = ()
    uncovered: tuple[str, ...] = ()
    made_up_names: tuple[str, ...] = ()
    independence: str = ""

    def __str__(self) -> str:
        notes = [f"starts at {self.start}"] if self.start != "the input" else []
        for text, items in (
            ("opaque", self.opaque),
            ("one layer", self.closed_scans),
            ("held as side inputs", _counted(self.side_inputs)),
            ("parameters in no layer", self.uncovered),
            ("named by jaxgrad", self.made_up_names),
        ):
            notes += [f"{text}: {', '.join(items)}"] if items else []
        notes += [f"examples independent ({self.independence})"] if self.independence else []
        return "\n".join(f"  {note}" for note in notes)


def _counted(types: tuple[str, ...]) -> list[str]:
    return [f"{n} of {name}" if n > 1 else name for name, n in Counter(types).items()]


def opaque_regions(block: Block, table: Table, labels: Labels) -> tuple[str, ...]:
    """Operations that jaxgrad runs but does not look into, with layer and source line."""
    found, layer = [], ""
    for _, op in walk(block):
        opaque = op.kind == "opaque" or op.name in _MEANING
        if opaque and any(table.is_float(v) for v in op.outputs) and not _is_small(op):
            found.append(describe(op, labels, layer))
        layer = "/".join(labels.path.get(op, ())) or layer
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


def describe(op: Op, labels: Labels, before: str = "") -> str:
    """`primitive in layer (file:line)`, and what it means where that is not plain.

    What no layer claims is located by the layer `before` it.
    """
    where = "/".join(labels.path.get(op, ()))
    line = compat.source_line(op.eqn)
    name = op.eqn.params.get("name") or op.name
    text = f"{op.name} {name!r}" if name != op.name else op.name
    text += f" in {where}" if where else f" after {before}" if before else ""
    text += f" ({line})" if line else ""
    return f"{text}: {_MEANING[op.name]}" if op.name in _MEANING else text


def explain(error: ValueError, block: Block, labels: Labels) -> None:
    """Say where, if the error is JAX's about a call to Python that has no derivative.

    Raises:
        ValueError: that names the layers which make such calls.
    """
    if "callback" not in str(error).lower():
        return
    places: list[str] = []
    layer = ""
    for _, op in walk(block):
        if op.name in CALLBACKS:
            line = compat.source_line(op.eqn)
            places.append(f"in or after layer {layer!r}" + (f" ({line})" if line else ""))
        layer = "/".join(labels.path.get(op, ())) or layer
    if places:
        raise ValueError(
            f"the loss calls Python {', '.join(dict.fromkeys(places))} on the way of the gradient, "
            "and such a call has no derivative; give the function that makes it a rule of its own "
            "with jax.custom_jvp or jax.custom_vjp, or stop the gradient before it"
        ) from error


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
    rows = {site.path for site in sites}
    for op, names in labels.uses.items():
        path = labels.path.get(op, ())
        # a wrapper's (a spectral norm's) where what it wraps has a row
        wraps = path and any(row[: len(path)] == path for row in rows)
        if wraps or any(path[:depth] in rows for depth in range(len(path) + 1)):
            covered |= names
    tensors = {site.value for site in sites}
    for op, names in labels.begins.items():  # a learned initial state: the loop's rows are its own
        if any(v in tensors for b in op.blocks for _, o in walk(b) for v in o.outputs):
            covered |= names
    return tuple(
        name if value in read else f"{name} (unused)"
        for value, name in parameters.items()
        if name not in covered
    )
