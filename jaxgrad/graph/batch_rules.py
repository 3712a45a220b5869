"""Where the examples of a batch lie after one primitive, given where they lie before it.

An array is read in row-major order. Its examples lie at a *stride* s when the flat index is
`outer * (B * s) + b * s + inner`, b being the number of the example: one integer, which a reshape keeps, also when it
merges the batch with time. A rule maps the strides of the operands to those of the results. It may say that examples
are coupled only where they are, and must raise `Unfollowable` where it does not know: the operation is probed then.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
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


Rule = Callable[[Call], list[Spec]]


def strides(shape: Shape) -> list[int]:
    """Row-major strides, in elements."""
    return [prod(shape[i + 1 :]) for i in range(len(shape))]


def candidates(shape: Shape, count: int) -> list[int]:
    """Every stride at which `count` examples fit into an array; axes of that very size come first."""
    size = prod(shape)
    whole = [s for d, s in zip(shape, strides(shape), strict=True) if d == count]
    if size == 0 or size % count:
        return []
    rest = [s for s in range(1, size // count + 1) if size // count % s == 0]
    return list(dict.fromkeys([*whole, *rest]))


def locate(shape: Shape, stride: int, count: int) -> tuple[int, int]:
    """The axis that holds the examples, and the number of elements of that axis between two of them.

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
    """The stride of a result on account of operand `i`, whose axis `a` becomes the result's axis `axes[a]`.

    Args:
        call: the application.
        i: which operand.
        axes: operand axis -> result axis; the operation acts along the axes that are absent.
        why: how the operation couples examples where it acts along their axis; empty if that is not certain.
        partial: whether it acts on parts of an axis, so that only an axis of nothing but examples tells.
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


def elementwise(call: Call) -> list[Spec]:
    """Position by position; axes of size one, or missing in front, are repeated."""
    found = []
    for i, (spec, shape) in enumerate(zip(call.specs, call.shapes, strict=True)):
        missing = len(call.outs[0]) - len(shape)
        same = shape == call.outs[0]
        axes = {a: a + missing for a in range(len(shape))}
        found.append(spec if same else moved(call, i, axes))
    return [join(found)] * len(call.outs)


def _each(call: Call) -> list[Spec]:
    return list(call.specs)


def _along(acts: Callable[[Call], Iterable[int]], why: str, partial: bool = False) -> Rule:
    """An operation that acts along some axes and leaves the others where they are."""

    def rule(call: Call) -> list[Spec]:
        acted = set(acts(call))
        axes = {a: a for a in range(max(map(len, call.shapes))) if a not in acted}
        operands = range(len(call.shapes))
        return [
            join(moved(call, i, axes, why, partial, out) for i in operands)
            for out in range(len(call.outs))
        ]

    return rule


def _reduced(call: Call) -> list[Spec]:
    acted = {int(a) for a in call.params.get("axes", call.params.get("dimensions"))}
    kept = [a for a in range(len(call.shapes[0])) if a not in acted]
    axes = {a: k for k, a in enumerate(kept)}
    operands = range(len(call.outs))  # initial values follow them
    return [join(moved(call, i, axes, "it reduces over the batch") for i in operands)] * len(call.outs)


def _not_full(call: Call) -> list[int]:
    sizes = call.params.get("slice_sizes", call.outs[0])
    return [a for a, (n, d) in enumerate(zip(sizes, call.shapes[0], strict=True)) if n != d]


def _padded(call: Call) -> list[int]:
    return [a for a, config in enumerate(call.params["padding_config"]) if any(config)]


def _windowed(call: Call) -> list[int]:
    p = call.params
    ndim = len(call.shapes[0])
    parts = (p["window_dimensions"], p["window_strides"], p.get("base_dilation") or (1,) * ndim)
    trivial = [
        all(part[a] == 1 for part in parts) and not any(p["padding"][a]) for a in range(ndim)
    ]
    return [a for a in range(ndim) if not trivial[a]]


def _matrix_axes(call: Call) -> range:
    ndim = max(map(len, call.shapes))
    return range(ndim - 2, ndim)


def _fft_axes(call: Call) -> range:
    ndim = len(call.shapes[0])
    return range(ndim - len(call.params["fft_lengths"]), ndim)


def _last_axis(call: Call) -> list[int]:
    ndim = len(call.shapes[0])
    return [call.params.get("axis", call.params.get("reduction_dimension", -1)) % ndim]


def _broadcast(call: Call) -> list[Spec]:
    return [moved(call, 0, dict(enumerate(map(int, call.params["broadcast_dimensions"]))))]


def _transpose(call: Call) -> list[Spec]:
    return [moved(call, 0, {int(a): k for k, a in enumerate(call.params["permutation"])})]


def _reshape(call: Call) -> list[Spec]:
    order = call.params.get("dimensions")
    if call.params.get("new_sizes") is None or order is None:
        return [call.specs[0]]
    shape = tuple(call.shapes[0][a] for a in order)
    return _transpose(Call({"permutation": order}, call.count, call.specs, call.shapes, [shape]))


def _trailing(call: Call) -> list[Spec]:
    """Axes appear or disappear at the end: random keys and their words, floats and their bytes."""
    if not isinstance(call.specs[0], int) or any(s is not None for s in call.specs[1:]):
        raise Unfollowable
    stride, rest = divmod(call.specs[0] * prod(call.outs[0]), prod(call.shapes[0]))
    if rest:
        raise Unfollowable
    return [stride]


def _dot_general(call: Call) -> list[Spec]:
    contracted, batched = call.params["dimension_numbers"]
    start, specs = len(batched[0]), []
    for i in (0, 1):
        taken = {*contracted[i], *batched[i]}
        free = [a for a in range(len(call.shapes[i])) if a not in taken]
        axes = {a: k for k, a in enumerate(batched[i])} | {a: start + k for k, a in enumerate(free)}
        specs.append(moved(call, i, axes, "it sums over the examples"))
        start += len(free)
    return [join(specs)]


def _conv(call: Call) -> list[Spec]:
    """Examples along the batch axis, or per-example kernels: examples as groups of features."""
    p = call.params
    if p["batch_group_count"] != 1:
        raise Unfollowable
    lhs, rhs, out = p["dimension_numbers"]
    kernel = moved(call, 1, {rhs[0]: out[1]})
    if not isinstance(call.specs[0], int):
        return [join([call.specs[0], kernel])]
    axis, inner = locate(call.shapes[0], call.specs[0], call.count)
    if axis == lhs[0]:
        return [join([moved(call, 0, {lhs[0]: out[0]}), kernel])]
    group_in = call.shapes[0][lhs[1]] // p["feature_group_count"]
    group_out = call.shapes[1][rhs[0]] // p["feature_group_count"]
    if axis != lhs[1] or inner % group_in:
        raise Unfollowable
    return [join([strides(call.outs[0])[out[1]] * (inner // group_in) * group_out, kernel])]


def _gather(call: Call) -> list[Spec]:
    d, (operand, indices) = call.params["dimension_numbers"], call.shapes
    gone = {*d.collapsed_slice_dims, *d.operand_batching_dims}
    window = [a for a in range(len(operand)) if a not in gone]
    loops = [p for p in range(len(call.outs[0])) if p not in set(d.offset_dims)]
    sizes = call.params["slice_sizes"]
    axes = {a: int(p) for a, p in zip(window, d.offset_dims, strict=True) if sizes[a] == operand[a]}
    paired = zip(d.operand_batching_dims, d.start_indices_batching_dims, strict=True)
    axes |= {int(a): loops[c] for a, c in paired}
    return [join([moved(call, 0, axes), moved(call, 1, dict(enumerate(loops[: len(indices) - 1])))])]


def _scatter(call: Call) -> list[Spec]:
    d, (operand, _, updates) = call.params["dimension_numbers"], call.shapes
    gone = {*d.inserted_window_dims, *d.operand_batching_dims}
    window = [a for a in range(len(operand)) if a not in gone]
    loops = [u for u in range(len(updates)) if u not in set(d.update_window_dims)]
    paired = list(zip(d.operand_batching_dims, d.scatter_indices_batching_dims, strict=True))
    axes = dict(zip(map(int, d.update_window_dims), window, strict=True))
    axes |= {loops[c]: int(a) for a, c in paired}
    indices = moved(call, 1, {int(c): int(a) for a, c in paired})
    return [join([call.specs[0], indices, moved(call, 2, axes)])]


def _dynamic_update_slice(call: Call) -> list[Spec]:
    same = {a: a for a in range(len(call.shapes[0]))}
    return [join([call.specs[0], moved(call, 1, same)])]


def step(spec: Spec, shape: Shape, count: int) -> Spec:
    """The stride of `x[k]`, given that of `x`.

    Raises:
        Unfollowable: if the examples lie along the first axis.
    """
    if isinstance(spec, int) and spec * count > prod(shape[1:]):
        raise Unfollowable
    return spec


_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj
    convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma
    igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max min mul name ne neg
    nextafter not or pcast polygamma population_count pow pvary random_fold_in random_gamma_grad random_seed real
    reduce_precision regularized_incomplete_beta rem round rsqrt select_n sharding_constraint shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh threefry2x32 xor zeta
""".split()
_WINDOWS = "reduce_window reduce_window_sum reduce_window_max reduce_window_min select_and_gather_add"
_MATRICES = """
    cholesky eig eigh geqrf geqp3 hessenberg householder_product lu qr schur svd symmetric_product triangular_solve
    tridiagonal tridiagonal_solve
""".split()
_SCATTERS = ("", "-add", "-sub", "-mul", "-min", "-max", "-apply")

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(("optimization_barrier", "device_put"), _each),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    **dict.fromkeys(
        ("bitcast_convert_type", "random_wrap", "random_unwrap", "random_bits", "random_split"), _trailing
    ),
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    **{f"reduce_{n}": _reduced for n in ("and", "or", "xor", "max", "min", "prod", "sum")},
    **dict.fromkeys(("reduce", "argmax", "argmin"), _reduced),
    **{
        f"cum{n}": _along(lambda c: [c.params["axis"]], "it accumulates along the batch")
        for n in ("sum", "prod", "max", "min", "logsumexp")
    },
    "sort": _along(lambda c: [c.params["dimension"]], "it sorts the examples"),
    **dict.fromkeys(("top_k", "approx_top_k"), _along(_last_axis, "it selects among the examples")),
    "split": _along(lambda c: [c.params["axis"]], "it takes the batch apart", partial=True),
    "slice": _along(_not_full, "it takes some of the examples", partial=True),
    "dynamic_slice": _along(_not_full, "it takes some of the examples", partial=True),
    "rev": _along(lambda c: c.params["dimensions"], "it reverses the examples", partial=True),
    "pad": _along(_padded, "it pads the batch", partial=True),
    "concatenate": _along(lambda c: [c.params["dimension"]], "it joins batches", partial=True),
    **dict.fromkeys(_WINDOWS.split(), _along(_windowed, "its window covers several examples", partial=True)),
    "fft": _along(_fft_axes, "it transforms along the batch"),
    **dict.fromkeys(_MATRICES, _along(_matrix_axes, "it takes the batch for the axis of a matrix")),
    "lu_pivots_to_permutation": _along(_last_axis, "it takes the batch for a permutation"),
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "gather": _gather,
    **dict.fromkeys(
        [prefix + kind for kind in _SCATTERS for prefix in ("scatter",)]
        + [("scatter" + kind).replace("-", "_") for kind in _SCATTERS],
        _scatter,
    ),
    "dynamic_update_slice": _dynamic_update_slice,
}  # fmt: skip
