"""The Jacobians of a chain: layer by layer, and their products.

A layer's Jacobian is read off where the program proves its form (elementwise, dense), else it takes
min(n_in, n_out) pushes or pulls through that layer alone, in chunks of bounded memory. With a
batch, one push serves all examples.
"""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxgrad.chain import Chain
from jaxgrad.graded import Graded
from jaxgrad.graded.deferred import Deferred, Plain
from jaxgrad.graph import structure
from jaxgrad.graph.compat import Tracer
from jaxgrad.graph.factorization import Link, Run
from jaxgrad.graph.program import Program, State

_CHUNK_BYTES = 2**28
_PRECISION = "highest"


def layer_jacobians(
    chain: Chain, x: PyTree, *, chunk_size: int | None = None
) -> tuple[Float[Array, "*batch n_out n_in"], ...]:
    """The exact Jacobian of every layer at the states that `x` leads to.

    Args:
        chain: the chain.
        x: its input.
        chunk_size: how many rows or columns are computed at once; None: as many as fit in 256 MiB.

    Returns:
        One array (n_out, n_in) a layer, (examples, n_out, n_in) if the chain was made with
        `batch_axis`; states are flattened row-major, the leaves of a pytree one after the other.
        Half precision is returned in float32.

    Raises:
        ValueError: if they do not fit into memory, or a layer has no derivative in either
            direction.
    """
    run = chain.run(x)
    _check_memory(run)
    return tuple(_layer_jacobian(run, k, chunk_size) for k in range(len(run.links)))


def jacobian_product(chain: Chain, x: PyTree, *, chunk_size: int | None = None) -> Graded:
    """The Jacobian of the whole function, `J_L ... J_1`, at extended range.

    Args:
        chain: the chain.
        x: its input.
        chunk_size: see `layer_jacobians`.

    Returns:
        `Graded` of shape (n_L, n_0), with a leading axis of examples if the chain was made with
        `batch_axis`.
    """
    run = chain.run(x)
    _check_memory(run)
    forward = _size(run, 0) <= _size(run, len(run.links))
    product = _identity(run, 0)
    for product in _products(run, forward, chunk_size, every=False):  # noqa: B007
        pass  # one at a time: they are large
    return product


def jacobian_products(
    chain: Chain, x: PyTree, direction: str = "backward", *, chunk_size: int | None = None
) -> tuple[Graded, ...]:
    """All partial products, in one sweep.

    Args:
        chain: the chain.
        x: its input.
        direction: "backward": `P[k] = dh_L/dh_k`; "forward": `P[k] = dh_k/dh_0`.
        chunk_size: see `layer_jacobians`.

    Returns:
        L + 1 `Graded`; the last (backward) or the first (forward) is the identity.
    """
    if direction not in ("backward", "forward"):
        raise ValueError(
            f"jacobian_products(direction=): expected 'backward' or 'forward', got {direction!r}"
        )
    run = chain.run(x)
    _check_memory(run, products=True)
    forward = direction == "forward"
    products = list(_products(run, forward, chunk_size))
    return tuple(products if forward else products[::-1])


def _products(
    run: Run, forward: bool, chunk_size: int | None, every: bool = True
) -> Iterator[Graded]:
    """The partial products, from the empty one on, or the last one alone.

    They are multiplied out; the sweep that orthogonalizes at every layer is made, once for all of
    them, when it is needed: for singular values, or where rounding has spoilt the plain products.
    """
    count = len(run.links)
    order = range(count) if forward else range(count - 1, -1, -1)
    empty = _identity(run, 0 if forward else count)

    @functools.cache
    def settled() -> list[Graded]:
        products = [empty]
        for k in order:
            product = _multiplied(products[-1], _layer_jacobian(run, k, chunk_size), forward)
            products = [*products, product] if every else [product]
        return products

    arrays = (*run.states, *(k.constants for k in run.links), *(k.sides for k in run.links))
    traced = [a for state in arrays for a in state]
    if any(isinstance(a, Tracer) for a in traced):  # nobody can look whether the plain ones do
        yield from settled()
        return
    yield empty
    plain = None
    for index, k in enumerate(order):
        matrix = _layer_jacobian(run, k, chunk_size).astype(empty.dtype)
        plain = Plain.of(matrix) if plain is None else _plainly_multiplied(plain, matrix, forward)
        yield Deferred(plain, lambda at=index + 1 if every else -1: settled()[at])


@functools.partial(jax.jit, static_argnums=2)
def _multiplied(product: Graded, matrix: Array, forward: bool) -> Graded:
    return product.left_multiply(matrix) if forward else product.right_multiply(matrix)


@functools.partial(jax.jit, static_argnums=2)
def _plainly_multiplied(plain: Plain, matrix: Array, forward: bool) -> Plain:
    return plain.multiplied(matrix, forward)


def _identity(run: Run, k: int) -> Graded:
    link = run.links[0] if run.links else None
    batch = () if link is None or link.batch_in is None else (link.batch_in.count,)
    dtypes = [a.dtype for state in run.states for a in state]
    return Graded.identity(
        _size(run, k), batch, jnp.promote_types(jnp.result_type(*dtypes), jnp.float32)
    )


def _size(run: Run, k: int) -> int:
    """Elements of one example's state."""
    total = sum(int(np.prod(a.shape)) for a in run.states[k])
    layout = run.links[0].batch_in if run.links else None
    return total // layout.count if layout is not None else total


def _layer_jacobian(run: Run, k: int, chunk_size: int | None) -> Array:
    link, state = run.links[k], run.states[k]
    n_in, n_out = _size(run, k), _size(run, k + 1)
    forward = _direction(link, n_in, n_out)
    examples = 1 if link.batch_in is None else link.batch_in.count
    chunk = chunk_size or _chunk(link.program, n_in if forward else n_out, examples)
    spec = _Spec(link.program, link.batch_in, link.batch_out, forward, max(1, chunk))
    return _jitted_jacobian(spec, link.constants, link.sides, state)


class _Spec(tuple):
    """What a layer's Jacobian is compiled for: (program, layouts, direction, chunk)."""

    __slots__ = ()

    def __new__(cls, *items: Any) -> "_Spec":
        return super().__new__(cls, items)


@functools.partial(jax.jit, static_argnums=0)
def _jitted_jacobian(spec: _Spec, constants: State, sides: State, state: State) -> Array:
    program, batch_in, batch_out, forward, chunk = spec

    def fun(rows: Array) -> Array:
        after, _ = program.run(constants, sides, _unflat(rows, state, batch_in))
        return _flat(after, batch_out)

    with jax.default_matmul_precision(_PRECISION):
        h = _flat(state, batch_in)
        matrix = structure.structured_jacobian(fun, h) if forward else None
        if matrix is None:
            matrix = _pushed(fun, h, chunk) if forward else _pulled(fun, h, chunk)
    return matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))


def _flat(state: State, layout: Any) -> Array:
    if layout is not None:
        return layout.to_examples(state)
    parts = [a.ravel() for a in state]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _unflat(rows: Array, like: State, layout: Any) -> State:
    if layout is not None:
        return layout.from_examples(rows)
    parts = jnp.split(rows, np.cumsum([a.size for a in like])[:-1]) if len(like) > 1 else [rows]
    return tuple(p.reshape(a.shape).astype(a.dtype) for p, a in zip(parts, like, strict=True))


def _pushed(fun: Callable[[Array], Array], h: Array, chunk: int) -> Array:
    """Columns: one tangent for every input element, the same in all examples."""
    _, push = jax.linearize(fun, h)
    n = h.shape[-1]

    def column(j: Array) -> Array:
        return push(jnp.broadcast_to(jax.nn.one_hot(j, n, dtype=h.dtype), h.shape))

    columns = _mapped(column, n, chunk)
    return jnp.moveaxis(columns, 0, -1)


def _pulled(fun: Callable[[Array], Array], h: Array, chunk: int) -> Array:
    """Rows: one cotangent for every output element, the same in all examples."""
    out, pull = jax.vjp(fun, h)
    n = out.shape[-1]

    def row(i: Array) -> Array:
        return pull(jnp.broadcast_to(jax.nn.one_hot(i, n, dtype=out.dtype), out.shape))[0]

    return jnp.moveaxis(_mapped(row, n, chunk), 0, -2)


def _mapped(fun: Callable[[Array], Array], n: int, chunk: int) -> Array:
    indices = jnp.arange(n)
    try:
        return jax.vmap(fun)(indices) if chunk >= n else jax.lax.map(fun, indices, batch_size=chunk)
    except NotImplementedError:  # an operation without a rule for batches, as ragged_dot has gaps
        return jax.lax.map(fun, indices)


def _direction(link: Link, n_in: int, n_out: int) -> bool:
    """Whether to push (True) or pull: what the layer allows, else the fewer."""
    can_push, can_pull = structure.directions(link.program)
    if not (can_push or can_pull):
        raise ValueError(
            f"layer {link.name!r} holds a while_loop, which has no reverse-mode derivative, and a "
            "custom_vjp, which has no forward-mode one: its Jacobian cannot be computed. "
            "Use lax.scan for the loop, or custom_jvp."
        )
    if not (can_push and can_pull):
        return can_push
    return n_in <= n_out or _may_be_structured(structure.primitives_in(link.program))


def _may_be_structured(found: set[str]) -> bool:
    return found <= _CHEAP


_CHEAP = {
    "dot_general", "add", "sub", "mul", "div", "neg", "tanh", "logistic", "exp", "max", "min",
    "erf", "select_n", "convert_element_type", "custom_jvp_call", "integer_pow", "square",
    "broadcast_in_dim", "jit", "pjit", "log1p", "expm1", "sin", "cos", "copy", "gt", "lt", "ge",
    "le", "eq", "ne", "reshape", "transpose", "index", "stop_gradient",
}  # fmt: skip


def _chunk(program: Program, count: int, examples: int) -> int:
    """How many pushes fit into the budget, by the largest tensor inside the layer."""
    sizes = [
        int(np.prod(program.table.avals[v].shape)) * np.dtype("float32").itemsize
        for op in program.ops
        for v in op.outputs
        if hasattr(program.table.avals[v], "shape")
    ]
    del examples  # the tensors of a batched layer already hold all examples
    return int(min(count, max(1, _CHUNK_BYTES // max([1, *sizes]))))


def _check_memory(run: Run, products: bool = False) -> None:
    """Refuse what cannot fit, with the size and the way out."""
    total, largest = 0, (0, "", 0, 0)
    batch = run.links[0].batch_in.count if run.links and run.links[0].batch_in else 1
    last = _size(run, len(run.links))
    for k, link in enumerate(run.links):
        n_in, n_out = _size(run, k), _size(run, k + 1)
        size = batch * n_in * n_out * 4
        total += size + (batch * n_in * max(last, n_in) * 8 if products else 0)
        largest = max(largest, (size, link.name, n_out, n_in))
    limit = _memory_limit()
    if total > limit:
        size, name, n_out, n_in = largest
        raise ValueError(
            f"the dense Jacobians need {total / 2**30:.1f} GiB and there are "
            f"{limit / 2**30:.1f} GiB; the largest is layer {name!r}: {batch} x {n_out} x {n_in}, "
            f"{size / 2**30:.1f} GiB. Take fewer examples, or ask without the matrix: "
            "jax.linearize(chain[k], h) for products of one layer with vectors, "
            "value_and_grad_flow for the gradient's size by layer."
        )


def _memory_limit() -> int:
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return int(0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
