"""Where the examples of a batch lie in one array, and how that moves with its axes.

An array is read in row-major order. Its examples lie at a *stride* s when the flat index is `outer
* (B * s) + b * s + inner`, b being the number of the example: one integer, which a reshape keeps,
also when it merges the batch with time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from jaxgrad.graph.ir import Op

Shape = tuple[int, ...]


class Unfollowable(Exception):
    """No rule can tell where the examples go."""


@dataclass(frozen=True, eq=False)
class Coupled:
    """A value in which the examples are mixed.

    Attributes:
        why: what the operation did to the batch.
        ops: the operation that did it, then the calls around it.
        smooth: whether a gradient passes through the value.
    """

    why: str
    ops: tuple[Op, ...] = ()
    smooth: bool = True


Spec = int | None | Coupled  # a stride; None where a value does not depend on the batch; or coupled


@dataclass(frozen=True, eq=False)
class Call:
    """One application of a primitive: its parameters, shapes, and the strides of its operands."""

    params: Mapping[str, Any]
    count: int
    specs: Sequence[Spec]
    shapes: Sequence[Shape]
    outs: Sequence[Shape]


def strides(shape: Shape) -> list[int]:
    """Row-major strides, in elements."""
    return [prod(shape[i + 1 :]) for i in range(len(shape))]


def candidates(shape: Shape, count: int) -> list[int]:
    """Every stride at which `count` examples fit in; axes of that very size come first."""
    size = prod(shape)
    whole = [s for d, s in zip(shape, strides(shape), strict=True) if d == count]
    if size == 0 or size % count:
        return []
    rest = [s for s in range(1, size // count + 1) if size // count % s == 0]
    return list(dict.fromkeys([*whole, *rest]))


def locate(shape: Shape, stride: int, count: int) -> tuple[int, int]:
    """The axis that holds the examples, and its number of elements between two of them.

    Raises:
        Unfollowable: if the batch is spread over several axes.
    """
    for axis, (dim, step) in enumerate(zip(shape, strides(shape), strict=True)):
        if step <= stride and stride * count <= step * dim:
            inner, rest = divmod(stride, step)
            if rest == 0 and dim % (count * inner) == 0:
                return axis, inner
    raise Unfollowable


def join(specs: Iterable[Spec]) -> Spec:
    """The stride of what is computed position by position from several values."""
    found: Spec = None
    for spec in specs:
        if isinstance(spec, Coupled):
            return spec
        if found is not None and spec is not None and spec != found:
            return Coupled("it combines every example with every other")
        found = spec if found is None else found
    return found


def moved(
    call: Call, i: int, axes: Mapping[int, int], why: str = "", partial: bool = False, out: int = 0
) -> Spec:
    """The stride of a result on account of operand `i`, whose axis `a` becomes `axes[a]`.

    Args:
        call: the application.
        i: which operand.
        axes: operand axis -> result axis; the operation acts along those that are absent.
        why: how it couples examples where it acts along their axis; empty if not certain.
        partial: whether that is certain only for an axis of nothing but examples.
        out: which result.
    """
    spec = call.specs[i]
    if not isinstance(spec, int):
        return spec
    axis, inner = locate(call.shapes[i], spec, call.count)
    if axis not in axes:
        if why and not (partial and call.shapes[i][axis] != call.count):
            return Coupled(why)
        raise Unfollowable
    target = axes[axis]
    if call.outs[out][target] != call.shapes[i][axis]:
        raise Unfollowable
    return strides(call.outs[out])[target] * inner


def step(spec: Spec, shape: Shape, count: int) -> Spec:
    """The stride of `x[k]`, given that of `x`.

    Raises:
        Unfollowable: if the examples lie along the first axis.
    """
    if isinstance(spec, int) and spec * count > prod(shape[1:]):
        raise Unfollowable
    return spec
