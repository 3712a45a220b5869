"""Where the examples of a batch lie after one primitive, given where they lie before it.

A rule maps the strides of the operands to those of the results (see `batch_layout`). It says that
examples are coupled where no stride describes the result, and must raise `Unfollowable` where it
does not know: the operation is probed then.
"""

from collections.abc import Callable, Iterable
from math import prod

from jaxgrad.graph.batch_layout import (
    Call,
    Coupled,
    Spec,
    Unfollowable,
    join,
    locate,
    moved,
    strides,
)

Rule = Callable[[Call], list[Spec]]


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
    return [join(moved(call, i, axes, "it reduces over the batch") for i in operands)] * len(
        call.outs
    )


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


def _pieces(cut: Callable[[Call, int, int], list[int]], why: str) -> Rule:
    """Axes cut, or joined, between whole copies of the batch: every piece keeps the stride.

    `cut(call, axis, out)` lists the places along an axis where the pieces begin and end.
    """

    def rule(call: Call) -> list[Spec]:
        found = []
        for out, shape in enumerate(call.outs):
            specs: list[Spec] = []
            for i, spec in enumerate(call.specs):
                if isinstance(spec, int):
                    axis, inner = locate(call.shapes[i], spec, call.count)
                    places = cut(call, axis, out)
                    if not any(place % (call.count * inner) for place in places):
                        step = strides(shape)[axis]
                        specs.append(step * inner)
                    elif call.shapes[i][axis] == call.count:
                        specs.append(Coupled(why))
                    else:
                        raise Unfollowable
            found.append(join(specs))
        return found

    return rule


def _slice_places(call: Call, axis: int, _: int) -> list[int]:
    p = call.params
    whole = (p["strides"] or (1,) * (axis + 1))[axis] == 1
    return [p["start_indices"][axis], p["limit_indices"][axis]] if whole else [1]


def _split_places(call: Call, axis: int, out: int) -> list[int]:
    sizes = [int(n) for n in call.params["sizes"]]
    return [sum(sizes[:out]), sizes[out]] if axis == call.params["axis"] else []


def _concatenate_places(call: Call, axis: int, _: int) -> list[int]:
    return [shape[axis] for shape in call.shapes] if axis == call.params["dimension"] else []


def _triangular_solve(call: Call) -> list[Spec]:
    """Solutions for several right-hand sides are independent of each other."""
    ndim = len(call.shapes[1])
    why = "it takes the batch for the axis of a matrix"
    side = ndim - 2 if call.params["left_side"] else ndim - 1
    matrix = moved(call, 0, {a: a for a in range(ndim - 2)}, why)
    return [join([matrix, moved(call, 1, {a: a for a in range(ndim) if a != side}, why)])]


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
    axes = {a: int(p) for a, p in zip(window, d.offset_dims, strict=True)}
    paired = zip(d.operand_batching_dims, d.start_indices_batching_dims, strict=True)
    axes |= {int(a): loops[c] for a, c in paired}
    return [
        join([moved(call, 0, axes), moved(call, 1, dict(enumerate(loops[: len(indices) - 1])))])
    ]


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


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ELEMENTWISE = _words(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil
    clamp clz complex conj convert_element_type copy copy_p cos cosh digamma div eq eq_to erf
    erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow
    is_finite le le_to lgamma log log1p logistic lt lt_to max min mul name ne neg nextafter not
    or pcast polygamma population_count pow pvary random_fold_in random_gamma_grad random_seed
    real reduce_precision regularized_incomplete_beta rem round rsqrt select_n
    sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
    square stop_gradient sub tan tanh threefry2x32 xor zeta
    """
)
_WINDOWS = (
    *(f"reduce_window{kind}" for kind in ("", "_sum", "_max", "_min")),
    "select_and_gather_add",
)
_MATRICES = _words(
    """
    cholesky eig eigh geqrf geqp3 hessenberg householder_product lu qr schur svd
    symmetric_product tridiagonal tridiagonal_solve
    """
)
_SCATTERS = (
    "scatter",
    *(
        f"scatter{mark}{kind}"
        for mark in "-_"
        for kind in ["add", "sub", "mul", "min", "max", "apply"]
    ),
)
_KEYS = ("random_wrap", "random_unwrap", "random_bits", "random_split")

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(("optimization_barrier", "device_put"), _each),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    **dict.fromkeys(("bitcast_convert_type", *_KEYS), _trailing),
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
    "split": _pieces(_split_places, "it takes the batch apart"),
    "slice": _pieces(_slice_places, "it takes some of the examples"),
    "concatenate": _pieces(_concatenate_places, "it joins the batch with something else"),
    "dynamic_slice": _along(_not_full, "it takes some of the examples", partial=True),
    "rev": _along(lambda c: c.params["dimensions"], "it reverses the examples", partial=True),
    "pad": _along(_padded, "it pads the batch", partial=True),
    **dict.fromkeys(_WINDOWS, _along(_windowed, "its window covers several", partial=True)),
    "fft": _along(_fft_axes, "it transforms along the batch"),
    **dict.fromkeys(_MATRICES, _along(_matrix_axes, "it takes the batch for the axis of a matrix")),
    "triangular_solve": _triangular_solve,
    "lu_pivots_to_permutation": _along(_last_axis, "it takes the batch for a permutation"),
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "gather": _gather,
    **dict.fromkeys(_SCATTERS, _scatter),
    "dynamic_update_slice": _dynamic_update_slice,
}  # fmt: skip
