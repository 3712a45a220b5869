"""A chain as what is compiled: runs of equal layers, and the arrays that they read.

Equal layers, and repeated patterns of layers, become one scanned body, so that a chain of 1,000
equal blocks compiles once. Arrays that all repeats share, such as the weights of a recurrent cell,
are kept once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.graph import structure
from jaxgrad.graph.factorization import Link, Run
from jaxgrad.graph.program import Program

# A pattern of at most this many layers is looked for: (attention, MLP), (conv, norm, ReLU), ...
_LONGEST_PERIOD = 8

Arrays = tuple[tuple[tuple[Any, ...], ...], ...]  # of every segment, step by step


@dataclass(frozen=True)
class Step:
    """One layer as it is compiled; equal layers have equal steps.

    Attributes:
        program: what it computes.
        batch_in: where the examples lie in the incoming state; None without a batch.
        batch_out: the same for the outgoing state.
        backward_only: whether it has a rule for the backward direction alone (`custom_vjp`).
    """

    program: Program
    batch_in: Any
    batch_out: Any
    backward_only: bool


@dataclass(frozen=True)
class Segment:
    """Layers that are run one after the other, several times.

    Attributes:
        steps: the layers.
        repeats: how often; they are scanned if more than once.
        shared: for every step, which of its arrays all repeats share; the others are stacked.
    """

    steps: tuple[Step, ...]
    repeats: int
    shared: tuple[tuple[bool, ...], ...]


@dataclass(frozen=True)
class Plan:
    """What the operator of a chain is compiled for.

    Attributes:
        segments: the layers in runs.
        size_in: elements of one example's input.
        size_out: elements of one example's output.
        examples: how many; 1 without a batch.
        dtype: in which vectors are kept: float32, or float64 if a state is.
    """

    segments: tuple[Segment, ...]
    size_in: int
    size_out: int
    examples: int
    dtype: str

    @property
    def smaller(self) -> int:
        """The number of singular values."""
        return min(self.size_in, self.size_out)


def plan_of(run: Run, caller: str) -> tuple[Plan, Arrays]:
    """The plan of a chain at an input, and its arrays.

    Args:
        run: the chain at the input.
        caller: the function that the user called, for errors.

    Raises:
        TypeError: if a state holds integers, which have no Jacobian.
        ValueError: if a layer has no transposed derivative.
    """
    _check_states(run, caller)
    for link, state in zip(run.links, run.states, strict=False):
        if "while" in structure.primitives_in(link.program):
            _check_transpose(link, state, caller)
    steps = [_step(link) for link in run.links]
    numbers: dict[Step, int] = {}
    pattern = [numbers.setdefault(step, len(numbers)) for step in steps]
    values = [
        (*link.constants, *link.sides, *state)
        for link, state in zip(run.links, run.states, strict=False)
    ]
    segments, arrays = [], []
    for start, period, repeats in _runs(pattern):
        columns = [values[start + i : start + period * repeats : period] for i in range(period)]
        joined = [_joined(column) for column in columns]
        shared = tuple(tuple(flag for flag, _ in step) for step in joined)
        segments.append(Segment(tuple(steps[start : start + period]), repeats, shared))
        arrays.append(tuple(tuple(array for _, array in step) for step in joined))
    layout = run.links[0].batch_in if run.links else None
    count = 1 if layout is None else layout.count
    sizes = [sum(int(np.prod(a.shape)) for a in run.states[k]) // count for k in (0, -1)]
    dtypes = [a.dtype for state in run.states for a in state]
    dtype = jnp.promote_types(jnp.result_type(*dtypes), jnp.float32)
    return Plan(tuple(segments), sizes[0], sizes[1], count, dtype.name), tuple(arrays)


def is_batched(run: Run) -> bool:
    """Whether the chain was made with `batch_axis`."""
    return bool(run.links) and run.links[0].batch_in is not None


def _check_states(run: Run, caller: str) -> None:
    for k, state in enumerate(run.states):
        wrong = [a.dtype.name for a in state if not jnp.issubdtype(a.dtype, jnp.floating)]
        if wrong:
            where = "the input" if k == 0 else f"the output of layer {run.links[k - 1].name!r}"
            raise TypeError(
                f"{caller}: expected states of floating-point arrays, got {wrong[0]} in {where}. "
                "Hold counters and indices fixed: close over them, or scan over them."
            )


def _check_transpose(link: Link, state: Sequence[Any], caller: str) -> None:
    """A while loop may compute what has no tangent; if it does not, the layer has no transpose."""

    def transposed(state: tuple[Any, ...]) -> Any:
        out, pull = jax.vjp(lambda s: link.program.run(link.constants, link.sides, s)[0], state)
        if _is_backward_only(link):  # its forward direction is the transpose of its rule
            return jax.linear_transpose(pull, out)(pull(out))
        return pull(out)

    try:
        _ = jax.eval_shape(transposed, tuple(state))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{caller}: layer {link.name!r} holds a while_loop, whose derivative has no transpose. "
            "Use lax.scan, or fori_loop with fixed bounds, for the loop; log_singular_values needs "
            "no transpose."
        ) from error


def _step(link: Link) -> Step:
    return Step(link.program, link.batch_in, link.batch_out, _is_backward_only(link))


def _is_backward_only(link: Link) -> bool:
    return not structure.directions(link.program)[0]


def _runs(pattern: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(start, period, repeats) of the runs, greedily the longest."""
    start = 0
    while start < len(pattern):
        best = (1, 1)
        for period in range(1, min(_LONGEST_PERIOD, (len(pattern) - start) // 2) + 1):
            body = pattern[start : start + period]
            repeats = 1
            while pattern[start + repeats * period : start + (repeats + 1) * period] == body:
                repeats += 1
            if repeats > 1 and period * repeats > best[0] * best[1]:
                best = (period, repeats)
        yield start, best[0], best[1]
        start += best[0] * best[1]


def _joined(column: Sequence[tuple[Any, ...]]) -> list[tuple[bool, Any]]:
    """One step's arrays over its repeats: (shared, array) for each of them."""
    joined = []
    for repeats in zip(*column, strict=True):
        first = repeats[0]
        if all(array is first for array in repeats):
            joined.append((True, first))
        else:
            joined.append((False, jnp.stack(repeats)))
    return joined
