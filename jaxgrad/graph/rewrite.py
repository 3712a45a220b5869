"""Graph + sites -> the same program with a tap at every site.

A block is evaluated equation by equation. Calls without a site inside are bound as they stand;
those with one are rebuilt around their rewritten body by JAX's public `jit`, `checkpoint`, `scan`
and `switch`. Inside a scan the slots of the cotangents are `xs`, so that their gradients stack per
iteration instead of adding up.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxgrad.graph import compat
from jaxgrad.graph.capture import block_of
from jaxgrad.graph.ir import Block, Lit, Op, Ref, Table, Value, value_inputs, walk

# (tensor, slot) -> (the same tensor, what is recorded of it on the way forward)
Tap = Callable[[Any, Any], tuple[Any, Any]]


def evaluate(block: Block, table: Table, args: Sequence[Any]) -> list[Any]:
    """Run a block as it is."""
    outputs, _ = Tapped(table, {}, lambda x, slot: (x, slot)).run(block, args, {})
    return outputs


class Tapped:
    """Evaluator of blocks that passes every tensor in `sites` through `tap`.

    Attributes:
        table: values of the program.
        sites: tensor -> index of its site.
        tap: what happens at a site.
        blank: shape and dtype of a tap's record, for the branch of a `cond` that was not taken.
    """

    def __init__(self, table: Table, sites: dict[Value, int], tap: Tap, blank: Any = None) -> None:
        self.table, self.sites, self.tap, self.blank = table, sites, tap, blank
        # a call, so that tensors of one type share its trace, its derivative and its lowering; XLA
        # inlines it
        self.shared_tap = jax.jit(tap)

    def run(
        self, block: Block, args: Sequence[Any], slots: dict[int, Any]
    ) -> tuple[list[Any], dict[int, Any]]:
        """Evaluate a block.

        Args:
            block: the program.
            args: one value for every input of the block.
            slots: site index -> slot, for all sites in the block; in a scan, with a leading axis an
                iteration.

        Returns:
            The block's outputs, and site index -> what its tap recorded.
        """
        env: dict[Value, Any] = dict(zip(block.inputs, args, strict=True))
        last = {v: i for i, op in enumerate(block.ops) for v in value_inputs(op)}
        keep = {ref for ref in block.outputs if not isinstance(ref, Lit)}
        records: dict[int, Any] = {}
        for i, op in enumerate(block.ops):
            values = [self._read(ref, env) for ref in op.inputs]
            inside = self.inside(op)
            if inside:
                outputs, inner = self._call(op, values, {s: slots[s] for s in inside})
                records |= inner
            else:
                bind = compat.bind_shared if op.kind == "plain" else compat.bind
                outputs = bind(op.eqn, values)
            env.update(zip(op.outputs, outputs, strict=True))
            for value in op.outputs:
                if value in self.sites:
                    site = self.sites[value]
                    env[value], records[site] = self.shared_tap(env[value], slots[site])
            for value in value_inputs(op):  # free what nothing reads any more
                if last[value] == i and value not in keep:
                    env.pop(value, None)
        return [self._read(ref, env) for ref in block.outputs], records

    def inside(self, op: Op) -> list[int]:
        """The sites within an operation's blocks."""
        values = [v for b in op.blocks for _, inner in walk(b) for v in inner.outputs]
        return sorted(self.sites[v] for v in values if v in self.sites)

    def _read(self, ref: Ref, env: dict[Value, Any]) -> Any:
        if isinstance(ref, Lit):
            return ref.value
        return env[ref] if ref in env else self.table.constants[ref]

    def _call(
        self, op: Op, values: list[Any], slots: dict[int, Any]
    ) -> tuple[list[Any], dict[int, Any]]:
        with compat.context_of(op.eqn):
            if op.kind == "jit":
                return self._jit(op, values, slots)
            if op.kind == "remat":
                return self._remat(op, values, slots)
            if op.kind == "scan":
                return self._scan(op, values, slots)
            return self._cond(op, values, slots)

    def _jit(self, op: Op, values: list[Any], slots: dict[int, Any]) -> tuple[list[Any], dict]:
        if _holds_tracers(op):  # nothing to share between calls, and a cache would leak the tracers
            return self.run(op.blocks[0], values, slots)
        sites = sorted(slots)
        ranks = tuple(
            (rank, sites.index(self.sites[v]))
            for rank, v in enumerate(_outputs_of(op.blocks[0]))
            if v in self.sites
        )
        call = _compiled_call(_Identity(compat.called_jaxpr(op.eqn)), ranks, self.tap, self.blank)
        outputs, records = call(values, [slots[s] for s in sites])
        return outputs, dict(zip(sites, records, strict=True))

    def _remat(self, op: Op, values: list[Any], slots: dict[int, Any]) -> tuple[list[Any], dict]:
        params = op.eqn.params
        options = {k: params[k] for k in ("prevent_cse", "policy") if k in params}
        body = jax.checkpoint(functools.partial(self.run, op.blocks[0]), **options)
        return body(values, slots)

    def _scan(self, op: Op, values: list[Any], slots: dict[int, Any]) -> tuple[list[Any], dict]:
        block, first = op.blocks[0], op.num_consts + op.num_carry
        constants, carry, xs = (
            values[: op.num_consts],
            values[op.num_consts : first],
            values[first:],
        )

        def body(carry: list[Any], step: tuple[list[Any], dict[int, Any]]) -> tuple[list[Any], Any]:
            outputs, records = self.run(block, [*constants, *carry, *step[0]], step[1])
            return outputs[: op.num_carry], (outputs[op.num_carry :], records)

        options = {
            k: op.eqn.params[k]
            for k in ("reverse", "unroll", "_split_transpose")
            if k in op.eqn.params
        }
        carry, (ys, records) = jax.lax.scan(body, carry, (xs, slots), length=op.length, **options)
        return [*carry, *ys], records

    def _cond(self, op: Op, values: list[Any], slots: dict[int, Any]) -> tuple[list[Any], dict]:
        def branch(block: Block) -> Callable[..., Any]:
            def run(operands: list[Any], slots: dict[int, Any]) -> tuple[list[Any], dict[int, Any]]:
                outputs, records = self.run(block, operands, slots)
                blanks = {s: jax.tree.map(jnp.zeros_like, self.blank(slots[s])) for s in slots}
                return outputs, blanks | records

            return run

        index, operands = values[0], values[1:]
        return jax.lax.switch(index, [branch(b) for b in op.blocks], operands, slots)


def _holds_tracers(op: Op) -> bool:
    _, consts = compat.open_jaxpr(compat.called_jaxpr(op.eqn))
    return any(isinstance(const, compat.Tracer) for const in consts)


class _Identity:
    """A key that compares by identity and keeps its object alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _outputs_of(block: Block) -> list[Value]:
    return [v for _, op in walk(block) for v in op.outputs]


@functools.lru_cache(maxsize=256)
def _compiled_call(key: _Identity, ranks: tuple, tap: Tap, blank: Any) -> Callable[..., Any]:
    """The inner `jit` with taps, compiled once for all calls of one traced function.

    Args:
        key: the traced function; JAX hands out the same object at every call of the same signature.
        ranks: (which of the block's values, which slot) for every site in it.
        tap: what happens at a site.
        blank: see `Tapped`.
    """
    table = Table()
    block = block_of(key.value, table)
    values = _outputs_of(block)
    tapped = Tapped(table, {values[rank]: site for rank, site in ranks}, tap, blank)

    @jax.jit
    def call(args: list[Any], slots: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs, records = tapped.run(block, args, dict(enumerate(slots)))
        return outputs, [records[i] for i in range(len(slots))]

    return call
