"""One backward pass that also says what happens to the gradient on its way.

`value_and_grad_flow` is `jax.value_and_grad` with one more result. It traces the loss once, puts a
tap at the output of every layer, and differentiates with respect to the taps' slots too; the
statistics are the slots' "gradients".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxgrad import flow_rows, statistics, taps
from jaxgrad.graph import arguments, capture, names, reading, rewrite, sites
from jaxgrad.graph.ir import is_real_dtype

_FLOW_ARRAYS = (
    "activation_rms", "activation_mean", "activation_max", "activation_zero_share",
    "activation_nonfinite", "gradient_rms", "gradient_max", "gradient_nonfinite",
    "gradient_below_float16", "gradient_below_bfloat16",
    "gradient_reached", "weight_rms", "weight_gradient_rms", "weight_gradient_nonfinite",
)  # fmt: skip
_FLOW_FACTS = (
    "names", "parameter_names", "site_parameters", "opaque", "uncovered", "summarized",
)  # fmt: skip


@dataclass(frozen=True)
class Flow:
    """What one forward and backward pass did, layer by layer; a pytree.

    A row is a layer's output: its activation, and the gradient of the loss with respect to it. Rows
    are in forward order; a layer inside a scan has a row an iteration (in nested scans that run it
    more than 128 times the iterations of whole scans share a row, see `summarized`). Arrays have
    shape `(len(names),)` (leading axes are added by `vmap`) and are float32, float64 only if a
    tapped tensor is; of complex tensors the magnitudes are measured. A row in a branch of a `cond`
    that was not taken holds NaN in its statistics and 0 in its counts; where JAX stops at NaNs
    (`jax_debug_nans`, when traced) it holds -1 instead, which no root mean square, maximum or share
    can be.

    A loss may take derivatives itself: a gradient penalty, an inner training step, a PINN's u_x.
    Rows are the activations of its forward passes outside of them, the one with the updated
    parameters for example. What inner backward passes and tangents compute has no row; a layer that
    runs inside an inner derivative only has one row, of its first forward pass there.

    Attributes:
        activation_rms: root mean square of the layer's output.
        activation_mean: its mean.
        activation_max: its largest magnitude.
        activation_zero_share: share of its elements that are exactly zero.
        activation_nonfinite: number of NaN and infinite elements.
        gradient_rms: root mean square of the gradient of the loss with respect to the output.
        gradient_max: its largest magnitude.
        gradient_nonfinite: number of NaN and infinite elements.
        gradient_below_float16: share that is not zero and below float16's smallest normal number.
        gradient_below_bfloat16: the same for bfloat16.
        gradient_reached: 1 where a gradient came by, 0 where every path to the loss is cut.
        weight_rms: root mean square of each parameter leaf, shape `(len(parameter_names),)`.
        weight_gradient_rms: that of its gradient.
        weight_gradient_nonfinite: number of NaN and infinite elements in its gradient.
        names: the rows' names.
        parameter_names: the parameter leaves' names.
        site_parameters: for each row, the names of the parameter leaves of its layer.
        opaque: operations that were run but not looked into.
        uncovered: parameter leaves whose layer has no row.
        summarized: layers in nested loops that ran so often that a row holds the iterations of
            whole loops together, as one tensor.
    """

    # Arrays, but also whatever jax.tree.map puts in their place: not checked at run time.
    activation_rms: Any
    activation_mean: Any
    activation_max: Any
    activation_zero_share: Any
    activation_nonfinite: Any
    gradient_rms: Any
    gradient_max: Any
    gradient_nonfinite: Any
    gradient_below_float16: Any
    gradient_below_bfloat16: Any
    gradient_reached: Any
    weight_rms: Any
    weight_gradient_rms: Any
    weight_gradient_nonfinite: Any
    names: tuple[str, ...] = field(metadata={"static": True})
    parameter_names: tuple[str, ...] = field(metadata={"static": True})
    site_parameters: tuple[tuple[str, ...], ...] = field(metadata={"static": True})
    opaque: tuple[str, ...] = field(metadata={"static": True})
    uncovered: tuple[str, ...] = field(metadata={"static": True})
    summarized: tuple[str, ...] = field(default=(), metadata={"static": True})

    @property
    def nonfinite(self) -> Array:
        """Number of NaN and infinite elements in all rows, activations and gradients together."""
        return jnp.sum(self.activation_nonfinite, -1) + jnp.sum(self.gradient_nonfinite, -1)

    def to_rows(self) -> list[dict[str, Any]]:
        """One dict a row, with Python floats, joined with the parameters of its layer.

        Returns:
            Dicts with the key `name`, one key for each row statistic, and `parameters`: a list of
            dicts `{name, weight_rms, weight_gradient_rms, weight_gradient_nonfinite}`.

        Raises:
            ValueError: if the flow is batched (made under `vmap`); take one example with
                `jax.tree.map` first.
        """
        if self.activation_rms.ndim != 1:
            raise ValueError(
                "to_rows() expects one flow with arrays of shape (rows,), got "
                f"{self.activation_rms.shape}; select one with jax.tree.map(lambda a: a[i], flow)"
            )
        table = {f: np.asarray(getattr(self, f)).tolist() for f in _FLOW_ARRAYS}
        leaf = {name: i for i, name in enumerate(self.parameter_names)}
        weight_fields = [f for f in _FLOW_ARRAYS if f.startswith("weight")]
        rows = []
        for k, name in enumerate(self.names):
            row: dict[str, Any] = {"name": name}
            row |= {f: table[f][k] for f in _FLOW_ARRAYS if f not in weight_fields}
            row["parameters"] = [
                {"name": p} | {f: table[f][leaf[p]] for f in weight_fields}
                for p in self.site_parameters[k]
                if p in leaf
            ]
            rows.append(row)
        return rows


_ = jax.tree_util.register_dataclass(Flow, data_fields=_FLOW_ARRAYS, meta_fields=_FLOW_FACTS)


def value_and_grad_flow(
    fun: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """`jax.value_and_grad` that also returns the `Flow` of the pass.

    The parameter gradients are those of `jax.value_and_grad`: the program is the same, with
    identities in it. Works under `jit` (use it: an unjitted call traces the function anew), `vmap`,
    `scan`, `remat`, donation and sharding. A site is the output of every named scope (flax linen
    and haiku name theirs) or, without scopes, of every module that the parameters' paths name;
    `jaxgrad.tap` adds sites.

    For flax NNX split the module and merge it inside: `graph, params = nnx.split(model)`, then
    `value_and_grad_flow(lambda params, x: loss(nnx.merge(graph, params)(x)))(params, x)`.

    Args:
        fun: function that returns a real scalar, or `(scalar, aux)` with `has_aux`.
        argnums: which positional arguments to differentiate. They may be any pytrees: leaves that
            are no floating-point arrays have no gradient and come back as None.
        has_aux: whether `fun` returns a pair.

    Returns:
        A function with `fun`'s arguments that returns `((value, flow), grads)`, with `has_aux`
        `((value, aux, flow), grads)`. `grads` has the structure of the argument, a tuple of them if
        `argnums` is one.

    Raises:
        TypeError: if `fun` does not return a real floating-point scalar, or nothing can be
            differentiated.
        ValueError: if the gradient meets a call to Python without a derivative; it names the layer.
    """

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        numbers = [argnums] if isinstance(argnums, int) else list(argnums)
        numbers = [n % len(args) if -len(args) <= n < 0 else n for n in numbers]
        split = arguments.split(fun, args, kwargs, numbers)
        program = _Program(fun, split, has_aux)
        value, aux, flow, leaves = program.run()
        grads = _unflatten(args, numbers, split, leaves)
        grads = grads[0] if isinstance(argnums, int) else tuple(grads)
        return ((value, aux, flow) if has_aux else (value, flow)), grads

    return wrapped


class _Program:
    """A loss, traced for one set of arguments, with its sites."""

    def __init__(self, fun: Callable[..., Any], split: arguments.Arguments, has_aux: bool) -> None:
        self.split = split
        self.static_aux: list[Any] = []
        self.aux_tree = None
        traced = [split.leaves[i] for i in split.traced]

        def flat(*leaves: Any) -> tuple[Any, list[Any]]:
            result = split.call(fun, leaves)
            value, aux = _value_and_aux(result, has_aux)
            aux_leaves, self.aux_tree = jax.tree.flatten(aux)
            self.static_aux = [None if _is_output(a) else a for a in aux_leaves]
            return value, [a for a in aux_leaves if _is_output(a)]

        self.capture = capture.capture(flat, traced)
        block, table = self.capture.block, self.capture.table
        parameters = {
            block.inputs[i]: split.names[position]
            for i, position in enumerate(split.traced)
            if position in split.names and _is_weight(split.leaves[position])
        }
        self.labels = names.label(block, table, parameters)
        self.sites = sites.plan_sites(block, table, self.labels, also_complex=True)
        self.table = flow_rows.Table.of(self.sites)
        self.parameters = parameters

    def run(self) -> tuple[Any, Any, Flow, list[Any]]:
        split, block, table = self.split, self.capture.block, self.capture.table
        places = {position: i for i, position in enumerate(split.traced)}
        wanted = [split.leaves[p] for p in split.wanted]
        tapped = rewrite.Tapped(
            table, {s.value: i for i, s in enumerate(self.sites)}, _measure, _blank_record
        )
        slots = {i: taps.statistics_slot(s.dtype, s.lengths) for i, s in enumerate(self.sites)}

        def objective(leaves: list[Any], slots: dict[int, Array]) -> tuple[Any, tuple[Any, Any]]:
            values = [split.leaves[p] for p in split.traced]
            for position, leaf in zip(split.wanted, leaves, strict=True):
                values[places[position]] = leaf
            (value, *aux), records = tapped.run(block, values, slots)
            return value, (aux, records)

        differentiated = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        try:
            (value, (aux, records)), (grads, slot_grads) = differentiated(wanted, slots)
        except ValueError as error:
            reading.explain(error, block, self.labels)
            raise
        return value, self._join_aux(aux), self._flow(records, slot_grads, grads), grads

    def _join_aux(self, aux: list[Any]) -> Any:
        arrays = iter(aux)
        leaves = [next(arrays) if a is None else a for a in self.static_aux]
        return jax.tree.unflatten(self.aux_tree, leaves)

    def _flow(self, records: dict[int, Any], slot_grads: dict[int, Any], grads: list[Any]) -> Flow:
        activations, ran, runs = self.table.sums(records, statistics.ACTIVATION)
        gradients, reached, _ = self.table.sums(slot_grads, statistics.GRADIENT, runs)
        weights = [self.split.leaves[p] for p in self.split.wanted]
        weight_gradient_rms, nonfinite = statistics.leaf_statistics(grads)

        def measured(statistic: Callable[..., Array], found: statistics.Sums) -> Array:
            return jnp.where(ran > 0, statistic(found), _missing())

        return Flow(
            activation_rms=measured(statistics.rms, activations),
            activation_mean=measured(statistics.mean, activations),
            activation_max=measured(statistics.max_abs, activations),
            activation_zero_share=measured(statistics.zero_share, activations),
            activation_nonfinite=activations.nonfinite,
            gradient_rms=measured(statistics.rms, gradients),
            gradient_max=measured(statistics.max_abs, gradients),
            gradient_nonfinite=gradients.nonfinite,
            gradient_below_float16=measured(statistics.below_float16, gradients),
            gradient_below_bfloat16=measured(statistics.below_bfloat16, gradients),
            gradient_reached=reached,
            weight_rms=statistics.leaf_rms(weights),
            weight_gradient_rms=weight_gradient_rms,
            weight_gradient_nonfinite=nonfinite,
            names=self.table.rows.names,
            parameter_names=tuple(self.split.names[p] for p in self.split.wanted),
            site_parameters=self.table.parameters,
            opaque=reading.opaque_regions(self.capture.block, self.capture.table, self.labels),
            uncovered=reading.uncovered(
                self.capture.block, self.parameters, self.labels, self.sites
            ),
            summarized=self.table.summarized,
        )


def _measure(x: Array, slot: Array) -> tuple[Array, Array]:
    return taps.statistics_tap(x, slot), statistics.sums(x, statistics.ACTIVATION)


def _missing() -> float:
    """What stands for a statistic of what was not run: no one must take it for a measurement."""
    stops = jax.config.jax_debug_nans  # pyright: ignore[reportAttributeAccessIssue]
    return -1.0 if stops else math.nan


def _blank_record(slot: Array) -> Array:
    return jnp.zeros((*slot.shape[:-1], 1 + len(statistics.ACTIVATION)), slot.dtype)


def _is_output(leaf: Any) -> bool:
    """Whether a leaf of aux comes out of the trace; anything else is returned as it is."""
    return isinstance(leaf, jax.Array)


def _is_weight(leaf: Any) -> bool:
    """Whether a leaf can name a layer: floats and quantized weights, not keys or step counters."""
    is_integer = jnp.issubdtype(leaf.dtype, jnp.integer) and leaf.dtype != jnp.uint32
    return jnp.issubdtype(leaf.dtype, jnp.inexact) or (is_integer and leaf.ndim > 0)


def _value_and_aux(result: Any, has_aux: bool) -> tuple[Any, Any]:
    value, aux = result, ()
    if has_aux:
        if not (isinstance(result, tuple | list) and len(result) == 2):
            raise TypeError(
                f"value_and_grad_flow(has_aux=True) expects the function to return (value, aux), "
                f"got {type(result).__name__}"
            )
        value, aux = result
    shape = () if isinstance(value, float) else getattr(value, "shape", None)
    dtype = jnp.result_type(value) if shape is not None else None
    if shape != () or not is_real_dtype(dtype):
        got = f"{dtype}{list(shape)}" if shape is not None else type(value).__name__
        hint = " (pass has_aux=True if it returns (loss, aux))" if isinstance(value, tuple) else ""
        raise TypeError(
            f"value_and_grad_flow expects a function that returns a real scalar, got {got}{hint}; "
            "reduce the loss with .mean() or .sum() first"
        )
    return value, aux


def _unflatten(
    args: tuple, numbers: list[int], split: arguments.Arguments, grads: list[Any]
) -> list[Any]:
    """Gradients in the structure of each differentiated argument; None where there is none."""
    by_position = dict(zip(split.wanted, grads, strict=True))
    starts = np.concatenate([[0], np.cumsum([len(jax.tree.leaves(a)) for a in args])])
    trees = []
    for number in numbers:
        leaves, treedef = jax.tree.flatten(args[number])
        positions = range(int(starts[number]), int(starts[number]) + len(leaves))
        trees.append(jax.tree.unflatten(treedef, [by_position.get(p) for p in positions]))
    return trees
