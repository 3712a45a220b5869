"""What a test model is: the `Case` record, and the few helpers that every table of models uses.

The models themselves are in the files `zoo_*.py`, a framework or a theme each; `cases.py` gathers
them. They are what a user of the framework would write, small: widths 4 to 12, 2 to 4 layers, 3 to
6 time steps, batches of 3.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLAGS = {
    "integer-input": "x is an integer array: the chain starts at the first float cut",
    "few-cuts": "long skips or a width that never narrows: almost everything is one layer",
    "pytree-input": "x is a pytree of several arrays",
    "pytree-output": "f returns a pytree of several arrays",
    "tuple-state": "what is carried between layers is several arrays, such as the LSTM's (c, h)",
    "time": "a chain over time: f is a function of the initial state, the inputs are held fixed",
    "scan": "layers, or time steps, inside lax.scan",
    "remat": "a jax.checkpoint in some framework's dress",
    "several-inputs": "x is a tuple of arguments, f(*x); `argnum` says which one is followed",
    "coupled-batch": "the examples of f_batch(xs) are not independent of each other",
    "forward-only": "reverse mode raises (a while_loop on the path); forward mode works",
    "reverse-only": "forward mode raises (a custom_vjp on the path); reverse mode works",
    "surrogate-gradient": "the gradient is not the derivative, on purpose (stop_gradient and kin)",
    "low-precision": "computes in bfloat16 or float16 even when it is built in float64",
    "float32-inside": "a step computes in float32 even when it is built in float64",
    "nonlinear-vjp": "a custom_vjp whose backward pass is not linear: there is no Jacobian",
    "no-loss": "has no parameters, no batch, or nothing to learn",
    "zero-jacobian": "every element of df/dx is exactly zero",
    "nonfinite-gradient": "the value is finite, and the gradient is not",
    "effects": "prints, or calls back to Python, on the way",
    "empty": "some array on the path has no elements",
    "complex": "complex numbers between a real input and a real output",
}


@dataclasses.dataclass(frozen=True)
class Parts:
    """A model taken to its parts, from which a `Case` builds the functions of the public calls.

    Attributes:
        apply: `(params, x) -> y`, one example.
        params: a pytree; its float32 leaves become float64 where float64 is asked for.
        xs: a batch of examples, the first axis of every leaf being the batch's; or None.
        x: one example, if it is not the first of `xs`.
        apply_batch: `(params, xs) -> ys`; `jax.vmap` of `apply` where it is None and there are
            `xs`.
        loss: `(predictions, targets) -> scalar`, or None where the model cannot be trained.
        close: `params -> f`, where the user would not write `lambda x: apply(params, x)`.
    """

    apply: Callable[..., Any]
    params: Any = None
    xs: Any = None
    x: Any = None
    apply_batch: Callable[..., Any] | None = None
    loss: Callable[..., Any] | None = None
    close: Callable[[Any], Callable[..., Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A model that a user might bring, and what is known about it beforehand.

    Attributes:
        name: framework and model, unique.
        framework: "jax", "linen", "nnx", "equinox" or "haiku".
        kind: the family, such as "mlp" or "transformer".
        parts: makes the model, given the dtype that its parameters and inputs are to have.
        scopes: the least number of layers under `layers="scopes"`.
        cuts: the least number of layers under `layers="cuts"`.
        names: substrings that the layers' names must contain, each in at least one name.
        flags: keys of `FLAGS`.
        argnum: which argument is followed, where there are several.
        iterations: how many iterations of a scan are layers of their own; they are in `cuts`.
    """

    name: str
    framework: str
    kind: str
    parts: Callable[[Any], Parts]
    scopes: int = 1
    cuts: int = 1
    names: tuple[str, ...] = ()
    flags: frozenset[str] = frozenset()
    argnum: int = 0
    iterations: int = 0

    def __post_init__(self) -> None:
        if unknown := self.flags - FLAGS.keys():
            raise ValueError(
                f"{self.name}: unknown flags {sorted(unknown)}, expected some of {sorted(FLAGS)}"
            )

    @property
    def rounding(self) -> float:
        """How far two ways to compute the same may differ, relatively, when built in float64."""
        return {"low-precision": 0.1, "float32-inside": 1e-5}.get(
            next(iter(self.flags & {"low-precision", "float32-inside"}), ""), 1e-12
        )

    def build(self, dtype: Any = jnp.float32) -> tuple[Callable[..., Any], Any]:
        """One example's function, its parameters closed over, and an input for it: `(f, x)`."""
        parts = self._parts(dtype)
        x = first(parts.xs) if parts.x is None else parts.x
        if parts.close is not None:
            return parts.close(parts.params), x
        if "several-inputs" in self.flags:
            return lambda *args: parts.apply(parts.params, *args), x
        return lambda x: parts.apply(parts.params, x), x

    def build_batched(self, dtype: Any = jnp.float32) -> tuple[Callable[..., Any], Any] | None:
        """A batch's function and a batch, `(f_batch, xs)`, or None where a batch makes no sense."""
        parts = self._parts(dtype)
        if parts.xs is None:
            return None
        apply = _batched(parts)
        return lambda xs: apply(parts.params, xs), parts.xs

    def build_loss(self, dtype: Any = jnp.float32) -> tuple[Callable[..., Any], Any, dict] | None:
        """A training loss and what it takes, `(loss(params, batch), params, batch)`, or None."""
        parts = self._parts(dtype)
        if parts.loss is None or parts.xs is None or not jax.tree.leaves(parts.params):
            return None
        apply, criterion = _batched(parts), parts.loss
        ys = jax.eval_shape(lambda xs: apply(parts.params, xs), parts.xs)
        batch = {"x": parts.xs, "y": jax.tree.map(_target(criterion), ys)}

        def loss(params: Any, batch: dict) -> jax.Array:
            return criterion(apply(params, batch["x"]), batch["y"])

        return loss, parts.params, batch

    def _parts(self, dtype: Any) -> Parts:
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                f"{self.name}: {np.dtype(dtype)} was asked for and x64 is off; "
                "build and run under `with jax.enable_x64(True):`"
            )
        parts = self.parts(dtype)
        params, xs, x = cast((parts.params, parts.xs, parts.x), dtype)
        return dataclasses.replace(parts, params=params, xs=xs, x=x)


def case(framework: str, kind: str, **facts: Any) -> Callable[[Callable[[Any], Parts]], Case]:
    """Makes the decorated function, which returns `Parts`, a `Case` named after it."""
    flags = frozenset(facts.pop("flags", "").split())

    def decorate(parts: Callable[[Any], Parts]) -> Case:
        return Case(f"{framework}_{parts.__name__}", framework, kind, parts, flags=flags, **facts)

    return decorate


def table(namespace: dict[str, Any]) -> tuple[Case, ...]:
    """The cases among a module's globals, in the order of definition."""
    return tuple(value for value in namespace.values() if isinstance(value, Case))


def mse(predictions: Any, targets: Any) -> jax.Array:
    """Mean squared error, over every leaf."""
    squares = jax.tree.map(lambda p, t: jnp.mean((p - t) ** 2), predictions, targets)
    return jax.tree.reduce(jnp.add, squares)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy of logits (..., classes) and integer labels (...)."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_p, labels[..., None], axis=-1))


def first(xs: Any) -> Any:
    """The first example of a batch."""
    return jax.tree.map(lambda a: a[0], xs)


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal numbers, float32, the same on every machine and JAX version."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tokens(*shape: int, vocabulary: int = 7, seed: int = 0) -> np.ndarray:
    """Random token ids below `vocabulary`, int32."""
    return np.random.default_rng(seed).integers(0, vocabulary, shape).astype(np.int32)


def dense(
    n_in: int, n_out: int, *, bias: bool = True, gain: float = 1.0, seed: int = 0
) -> dict[str, np.ndarray]:
    """A kernel (n_in, n_out) that keeps the scale for `gain=1`, and a small bias."""
    layer = {"kernel": gain * floats(n_in, n_out, seed=seed) / np.float32(np.sqrt(n_in))}
    return layer | {"bias": 0.1 * floats(n_out, seed=seed + 1000)} if bias else layer


def fill(abstract: Any, *, stacked: int = 0, out_first: bool = False) -> Any:
    """Values for a pytree of shapes, so that no initializer has to be compiled.

    Scales and variances get one plus noise, other vectors small noise, and the rest normal numbers
    over the root of the fan-in. A leaf's values depend on its path and shape only.

    Args:
        abstract: what `jax.eval_shape` of a framework's `init` returns.
        stacked: how many leading axes number the layers of a stack.
        out_first: whether kernels are (out, in, ...), as in equinox, and not (..., in, out).
    """

    def value(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        shape = leaf.shape[stacked:]
        normal = floats(*leaf.shape, seed=zlib.crc32(name.encode()))
        vector = len(shape) < 2
        positive = "scale" in name or "var" in name or (vector and "weight" in name)
        if positive or vector:
            return jnp.asarray(positive + 0.1 * normal, leaf.dtype)
        fan_in = np.prod(shape) / (shape[0] if out_first else shape[-1])
        return jnp.asarray(normal / np.sqrt(fan_in), leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, abstract)


def cast(tree: Any, dtype: Any) -> Any:
    """The tree as jax arrays, its float32 leaves in `dtype`; other leaves stay as they are."""

    def leaf(a: Any) -> Any:
        if not isinstance(a, np.ndarray | np.generic | jax.Array):
            return a
        return jnp.asarray(a, dtype if a.dtype == jnp.float32 else None)

    return jax.tree.map(leaf, tree)


def _batched(parts: Parts) -> Callable[..., Any]:
    return parts.apply_batch or (lambda params, xs: jax.vmap(lambda x: parts.apply(params, x))(xs))


def _target(criterion: Callable[..., Any]) -> Callable[[Any], jax.Array]:
    def target(y: Any) -> jax.Array:
        if criterion is cross_entropy:
            return jnp.asarray(tokens(*y.shape[:-1], vocabulary=y.shape[-1], seed=99))
        return jnp.asarray(floats(*y.shape, seed=99), y.dtype)

    return target
