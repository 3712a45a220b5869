"""A function as its exact chain of layers.

`factorize` finds the layers of any function by itself; `Chain.from_layers` and `Chain.scanned` take
them as given. In all three `f = f_L . ... . f_1`, so that `df/dx = J_L ... J_1` exactly.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxgrad.graph import factorization, given
from jaxgrad.graph.factorization import Graph, Link
from jaxgrad.graph.program import Program
from jaxgrad.tree import leaf_names


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a chain, with everything but its input held fixed.

    Attributes:
        name: the module's path, the user's `tap`, or a made-up name (then the chain's `graph` lists
            it).
        function: state -> state.
        link: the layer as a program, once it is known for which input; None for a layer given as a
            function.
    """

    name: str
    function: Callable[[PyTree], PyTree]
    link: Link | None = None

    def __call__(self, h: PyTree) -> PyTree:
        """The next state; side inputs keep the values that they had when the chain was made."""
        return self.function(h)


@dataclass(frozen=True, eq=False)
class Chain:
    """Layers whose composition is a function.

    Attributes:
        layers: the layers, first to last.
        graph: what was found on the way, None where the layers were given.
    """

    layers: tuple[Layer, ...]
    graph: Graph | None = None
    _resolve: Callable[[Any], "factorization.Run"] | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def from_layers(layers: Sequence[tuple[str, Callable[[PyTree], PyTree]]]) -> "Chain":
        """A chain of given layers.

        Args:
            layers: (name, function) pairs; every function takes the previous one's result. Layers
                that differ in the arrays that they close over only are compiled once.

        Raises:
            ValueError: if two layers share a name.
        """
        names = [name for name, _ in layers]
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise ValueError(
                f"Chain.from_layers: layer names must be distinct, got {repeated} twice"
            )
        return Chain(tuple(Layer(name, function) for name, function in layers))

    @staticmethod
    def scanned(
        block: Callable[[PyTree, PyTree], PyTree], stacked_params: PyTree, name: str = "layers"
    ) -> "Chain":
        """A chain of equal layers, compiled once.

        Args:
            block: `block(params_k, h) -> h`.
            stacked_params: pytree of arrays with a leading axis of the same length, one entry a
                layer.
            name: the layers are called `name[0]`, `name[1]`, ...

        Raises:
            ValueError: if the leading axes differ or there is none.
        """
        leaves = jax.tree.leaves(stacked_params)
        shapes = dict(zip(leaf_names(stacked_params), map(jnp.shape, leaves), strict=True))
        lengths = {shape[:1] for shape in shapes.values()}
        if len(lengths) != 1 or () in lengths:
            raise ValueError(
                "Chain.scanned: expected stacked_params to be arrays with one leading axis of one "
                f"length, got {shapes or 'an empty tree'}; stack one entry a layer with jnp.stack"
            )

        def layer(k: int) -> Callable[[PyTree], PyTree]:
            return lambda h: block(jax.tree.map(lambda a: a[k], stacked_params), h)

        layers = tuple(Layer(f"{name}[{k}]", layer(k)) for k in range(*lengths.pop()))
        return Chain(
            layers,
            _resolve=lambda x: given.resolve_scanned(block, stacked_params, layers, x),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names."""
        return tuple(layer.name for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, k: int) -> Layer:
        return self.layers[k]

    def run(self, x: PyTree) -> "factorization.Run":
        """The chain's programs with the values that they take at `x`."""
        if self._resolve is not None:
            return self._resolve(x)
        return given.resolve_given(self.layers, x, self._cache)

    def __call__(self, x: PyTree) -> PyTree:
        """The function's value at `x`; side values (integers, masks) are computed anew."""
        return self.states(x)[-1]

    def states(self, x: PyTree) -> tuple[PyTree, ...]:
        """The states `(h_0, ..., h_L)`; `h_0` is `x` or, for integers, the first float cut."""
        run = self.run(x)
        return tuple(run.tree_of(k, state) for k, state in enumerate(run.states))

    def __repr__(self) -> str:
        shown = list(self.names) if len(self) <= 12 else [*self.names[:6], "...", *self.names[-5:]]
        text = f"Chain of {len(self)} layers: " + " -> ".join(shown)
        return text + (f"\n{self.graph}" if self.graph and str(self.graph) else "")


def factorize(
    f: Callable[..., Array],
    *args: Any,
    argnum: int = 0,
    batch_axis: int | None = None,
    layers: str | int = "scopes",
) -> Chain:
    """Factor a function into its exact chain of layers: cut where its dataflow narrows.

    A function without an operation on its input, such as `lambda x: x`, is the empty chain: one
    state, no layers, and the identity as the product of its Jacobians.

    A flax NNX module is called as it is, `factorize(model, x)`; to hold its parameters apart,
    `graph, params = nnx.split(model)` and `factorize(lambda x: nnx.merge(graph, params)(x), x)`.

    Args:
        f: any JAX function of arrays: plain, flax linen or NNX, equinox, haiku, with `jit`, `scan`,
            `remat`, ...
        *args: its arguments; all but `argnum` are held fixed.
        argnum: the argument that the chain starts from; negative numbers count from the end.
        batch_axis: None if `f` takes one example; else the axis of the argument that counts
            examples, whose independence of each other is then verified.
        layers: "scopes": one layer a module; "cuts": a layer between any two cuts; an integer: one
            layer a scope of that depth.

    Returns:
        The chain. `chain.graph` says what was opaque (run, and differentiated by its own rules, but
        not looked into: `shard_map`, `while`, custom derivatives, callbacks), uncovered, named by
        jaxgrad, or held as a side input.

    Raises:
        TypeError: if the argument does not exist, or a leaf of it is no real array.
        ValueError: if no gradient path leads from the argument to the output (it names what stops
            it), if the output is no array, or if the examples of a batch are coupled (it names
            where).
    """
    links, graph, resolve = factorization.factorize(f, args, argnum, batch_axis, layers)
    made = tuple(Layer(link.name, link, link) for link in links)
    return Chain(made, graph, _resolve=resolve)


__all__ = ["Chain", "Graph", "Layer", "Program", "factorize"]
