"""Probing a transformation: how its state answers to the size of the gradient.

From a fresh state, run the same gradient direction scaled by c, beside a run with c = 0. A state
leaf that sees the raw gradient moves like c (a first moment) or c² (a second one) however large c
is; one that sees a clipped gradient stops growing. What a clip *after* the state does shows when
one state leaf is scaled by hand: the update grows with it, and then stops at a kink.
Updates themselves are never compared: Adam's are the same for g and for 1000 g.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxgrad.tree import count_parameters, is_array, is_inexact_array, leaf_names, path_name

# Powers of two whose squares stay inside float32 for a gradient of norm one.
_SCALES = np.arange(-56.0, 61.0, 2.0)
# Fine enough that a kink (a clip) and a bend (an eps) differ: see `has_kink`.
_FACTORS = np.arange(-54.0, 54.25, 0.25)


class Responses(NamedTuple):
    """What the probe saw; arrays have shape (scales, steps, leaves).

    Attributes:
        moved: largest deviation of every state leaf from the run with c = 0.
        size: largest entry of that leaf in the run with c = 0.
        updated: largest deviation of every update leaf.
    """

    moved: np.ndarray
    size: np.ndarray
    updated: np.ndarray


# Steps of gradients of norm one after which adaptive thresholds have settled.
_WARM = 32
# Reductions that XLA may fuse into one loop; its compile time is superlinear in them.
_GROUP = 64


def _largest(x: Any) -> Any:
    return jnp.max(jnp.abs(x), initial=0).astype(jnp.float32)


def _largest_each(leaves: list[Any]) -> Any:
    """The largest entry of every leaf, as a vector; one zero for no leaves."""
    sizes = [_largest(x) for x in leaves] or [jnp.zeros(())]
    rows = [jnp.stack(sizes[i : i + _GROUP]) for i in range(0, len(sizes), _GROUP)]
    return rows[0] if len(rows) == 1 else jnp.concatenate(jax.lax.optimization_barrier(rows))


class Probe:
    """The measurements of one transformation; each method compiles once.

    The compiled functions belong to the probe, so that they and the parameters go with it.
    """

    def __init__(self, tx: Any, params: PyTree, extra_args: dict[str, Any]):
        self.tx, self.extra = tx, extra_args
        self.params = jax.tree.map(_single, params)
        # Lookahead keeps a second copy of the parameters; gradients are those of the first.
        pair = isinstance(self.params, optax.LookaheadParams)
        self.direction = _direction(self.params.fast if pair else self.params)
        self.state = state = tx.init(self.params)
        paths = jax.tree_util.tree_flatten_with_path(state)[0]
        self.sizes = [int(np.size(paths[i][1])) for i in self.float_leaves_of(paths)]
        self.float_leaves = self.float_leaves_of(paths)
        names = leaf_names(state, root="state")
        self.names = [names[i] for i in self.float_leaves]
        self.owners = [self._owner(*paths[i]) for i in self.float_leaves]
        self._disown_scalars()
        self._respond = jax.jit(self._responses, static_argnums=2)
        self._saturate = jax.jit(self._saturation)

    @staticmethod
    def float_leaves_of(paths: list[Any]) -> list[int]:
        """Which leaves of a flattened state are floating-point arrays."""
        return [i for i, (_, leaf) in enumerate(paths) if is_inexact_array(leaf)]

    def _disown_scalars(self) -> None:
        """A scalar at index 0 of a chain's state is no state of the first of a list of parameters.

        Where a rule keeps one scalar a parameter, it does so for every parameter.
        """
        params = jax.tree.leaves(self.direction)
        wanted = sum(is_inexact_array(p) for p in params)
        groups = [group for group, _ in self.owners]
        for k, (group, owner) in enumerate(self.owners):
            scalar = self.sizes[k] == 1 and owner is not None and np.size(params[owner]) > 1
            if scalar and groups.count(group) < wanted:
                self.owners[k] = (self.names[k], None)

    def _owner(self, path: Any, leaf: Any) -> tuple[str, int | None]:
        """``(group, parameter)``: the path without its parameter's, and the parameter's index."""
        best: tuple[str, int | None, int] = (path_name(path), None, -1)
        for k, (tail, p) in enumerate(jax.tree_util.tree_flatten_with_path(self.direction)[0]):
            n = len(tail)
            if (
                len(path) < n
                or n <= best[2]
                or [str(a) for a in path[len(path) - n :]] != [str(a) for a in tail]
            ):
                continue
            if n or jnp.shape(leaf) == jnp.shape(p):
                best = (path_name(path[: len(path) - n]), k, n)
        return best[0], best[1]

    def _step(self, state: Any, c: Any) -> tuple[list[Any], Any]:
        def scaled(g: Any) -> Any:
            return (g * c.astype(jnp.finfo(g.dtype).dtype)) if is_inexact_array(g) else g

        grads = jax.tree.map(scaled, self.direction)
        updates, new = self.tx.update(grads, state, self.params, **self.extra)
        return jax.tree.leaves(updates), _in_dtypes(new, state)

    def _floats(self, state: Any) -> list[Any]:
        leaves = jax.tree.leaves(state)
        return [leaves[i] for i in self.float_leaves]

    def _responses(self, state: Any, scales: Any, steps: int) -> Any:
        def one(c: Any) -> Any:
            both = jnp.stack([c, jnp.zeros(())])  # the run at c, and one without a gradient

            def body(states: Any, _: Any) -> Any:
                u, states = jax.vmap(self._step)(states, both)
                floats = self._floats(states)
                row = (
                    _largest_each([pair[0] - pair[1] for pair in floats]),
                    _largest_each([pair[1] for pair in floats]),
                    _largest_each([pair[0] - pair[1] for pair in u]),
                )
                return states, row

            start = jax.tree.map(lambda x: jnp.stack([x, x]), state)
            return jax.lax.scan(body, start, length=steps)[1]

        return jax.lax.map(one, scales)

    def respond(
        self, steps: int, scales: np.ndarray | None = None, *, warm: bool = False
    ) -> Responses:
        """Runs the probe for some steps at every scale (by default 2^-56 to 2^60).

        Args:
            steps: number of steps.
            scales: base-two logarithms of the gradient's norm.
            warm: start after some steps with gradients of norm one, not from a fresh state.

        Returns:
            The responses.
        """
        exponents = self.scales if scales is None else scales
        state = jax.tree.map(jnp.asarray, self.state)
        if warm:
            step = jax.jit(lambda s: self._step(s, jnp.ones(()))[1])
            for _ in range(_WARM):
                state = step(state)
        out = self._respond(state, jnp.asarray(np.exp2(exponents), jnp.float32), steps)
        return Responses(*(np.asarray(part, np.float64) for part in out))

    @property
    def scales(self) -> np.ndarray:
        """Base-two logarithms of the gradient norms that are tried; fewer for big models."""
        return _SCALES if count_parameters(self.params) < 100_000 else _SCALES[::2]

    def _saturation(self, factors: Any, steps: Any, chosen: Any, last: Any) -> Any:
        one = jnp.ones(())
        state = jax.lax.fori_loop(
            0, steps, lambda _, s: self._step(s, one)[1], self.tx.init(self.params)
        )
        leaves, treedef = jax.tree.flatten(state)
        sizes = _largest_each([leaves[i] for i in self.float_leaves])
        unit = jnp.max(sizes * chosen)

        def updates_at(factor: Any) -> list[Any]:
            new = list(leaves)
            for k, i in enumerate(self.float_leaves):
                ratio = jnp.where(chosen[k] > 0, factor / jnp.where(unit > 0, unit, 1), 1)
                new[i] = (leaves[i] * ratio).astype(leaves[i].dtype)
            return self._step(jax.tree.unflatten(treedef, new), last)[0]

        def row(zero: Any, factor: Any) -> Any:
            u = updates_at(factor)
            zero = jax.tree.map(lambda z, a: jnp.where(factor == 0, a, z), zero, u)
            change = _largest_each([a - b for a, b in zip(u, zero, strict=True)])
            return zero, (change, _largest_each(u))

        shapes = jax.eval_shape(updates_at, one)
        start = [jnp.zeros(s.shape, s.dtype) for s in shapes]
        return jax.lax.scan(row, start, factors)[1]

    def saturate(
        self, steps: int, chosen: np.ndarray, last: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scales some state leaves by hand and watches the next update.

        Args:
            steps: steps at c = 1 before.
            chosen: 1 for every float state leaf that is scaled, else 0.
            last: norm of the gradient of the step that is watched.

        Returns:
            The update's deviation from the one with these leaves at zero, its size, both of shape
            (factors, update leaves), and the size at zero. The last factor is negative.
        """
        factors = np.concatenate([[0.0], np.exp2(_FACTORS), [-1024.0]])
        change, size = self._saturate(
            jnp.asarray(factors, jnp.float32),
            steps,
            jnp.asarray(chosen, jnp.float32),
            jnp.float32(last),
        )
        change, size = np.asarray(change, np.float64), np.asarray(size, np.float64)
        return change[1:], size[1:], size[0]


def _single(p: Any) -> Any:
    """Probing needs float32's range."""
    if is_inexact_array(p):
        return jnp.asarray(p, jnp.promote_types(p.dtype, jnp.float32))
    return p


def _direction(params: PyTree) -> PyTree:
    """A gradient of norm one, without small entries; zeros for integer parameters."""
    count = max(count_parameters(params), 1)
    keys = iter(range(len(jax.tree.leaves(params))))

    def draw(p: Any) -> Any:
        rng = np.random.default_rng(next(keys))
        if not is_inexact_array(p):
            return jnp.zeros_like(p) if is_array(p) else p
        size = 1 + 0.25 * rng.random(p.shape)
        return jnp.asarray(size * rng.choice([-1, 1], p.shape) / count**0.5 / 1.13, p.dtype)

    return jax.tree.map(draw, params)


def _in_dtypes(new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.asarray(n, jnp.asarray(o).dtype), new, old)


def slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Slopes of ``log2 y`` over ``x`` between neighbors; NaN where a value is 0 or not finite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.where(np.isfinite(y) & (y > 0), np.log2(y), np.nan)
        return np.diff(log) / np.diff(x)


def has_kink(steep: np.ndarray, least: float = 0.25) -> bool:
    """Whether a slope falls by a quarter over two quarter-octaves.

    A clip falls by one at once. ``x / (x + eps)`` falls by 0.09 at most over that distance, and
    ``x / sqrt(1 + x²)`` by 0.17.
    """
    valid = steep[np.isfinite(steep)]
    return valid.size > 3 and bool(np.any(valid[:-2] - valid[2:] > least))


def compile_probe(tx: Any, params: PyTree, extra_args: dict[str, Any]) -> Probe:
    """Makes a probe, with a helpful error where the transformation cannot be run.

    Args:
        tx: transformation.
        params: parameters.
        extra_args: extra arguments of its update.

    Returns:
        The probe.

    Raises:
        TypeError: if update needs more arguments than these.
    """
    try:
        probe = Probe(tx, params, extra_args)
        _ = jax.eval_shape(lambda: probe._step(tx.init(probe.params), jnp.ones(())))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"clip_order could not run init(params) and update(grads, state, params): {error}. If "
            "the transformation needs further arguments, pass extra_args={...}; parameters are "
            "arrays (of an equinox module, equinox.filter(model, equinox.is_inexact_array))"
        ) from error
    return probe
