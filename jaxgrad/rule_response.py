"""How an optimizer answers to a gradient that changes sign at every step.

At the edge of stability the parameters oscillate along the top eigenvector: gradients alternate in
sign, and the rule's answer to that one signal, the transfer function at frequency pi, decides. For
SGD it is the learning rate, for momentum lr / (1 + b), for Adam lr (1 - b1) / (1 + b1) / P.
Measuring it needs no name of the rule; that it is elementwise, linear or adaptive, and no sign
descent, is measured too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

# Below every clip in use and far above Adam's eps.
_SMALL = 1e-5
_FIRST_STEPS, _MOST_STEPS = 128, 8192
_SETTLED = 5e-4


class Rule(NamedTuple):
    """What was found of a rule.

    Attributes:
        response: amplitude of the update over that of an alternating gradient, for every parameter,
            as one vector.
        nominal: its learning rate.
        kind: "linear" or "adaptive".
    """

    response: Array
    nominal: float
    kind: str


def read_rule(optimizer: Any, unravel: Callable[[Array], PyTree], gradient: Array) -> Rule:
    """Measure a rule.

    Args:
        optimizer: an optax transformation, or a function from a learning rate to one.
        unravel: from a vector to the parameters' tree.
        gradient: the gradient here, as one vector: adaptive rules are measured at its size.

    Raises:
        TypeError: if it is neither.
        ValueError: if the rule has no stable response: see `max_stable_learning_rate`.
    """
    is_transformation = hasattr(optimizer, "init") and hasattr(optimizer, "update")
    if not is_transformation and not callable(optimizer):
        raise TypeError(
            "optimizer: expected an optax transformation or a function from a learning rate to "
            f"one, such as optax.adam, got {type(optimizer).__name__}"
        )
    probe = _Probe(optimizer if is_transformation else optimizer(1.0), unravel)
    small = jnp.full_like(gradient, _SMALL)
    probe.check_every_step(small)
    response = probe.response(small)
    linear = _largest_change(response, probe.response(2 * small)) < 1e-3
    size = small if linear else jnp.maximum(jnp.abs(gradient), 1e-20)
    if not linear:
        response = probe.response(size)
        probe.check_not_sign(size)
    probe.check_elementwise(size, response)
    if bool(jnp.any(response < 0)):
        raise ValueError(
            "this optimizer adds the gradient instead of subtracting it: no learning rate is "
            "stable. Put optax.scale(-learning_rate) at its end"
        )
    if not bool(jnp.any(response > 0)):
        raise ValueError("this optimizer changes no parameter: its learning rate is zero")
    nominal = (
        1.0 if not is_transformation else probe.nominal(linear, small, float(jnp.max(response)))
    )
    return Rule(response, nominal, "linear" if linear else "adaptive")


def _largest_change(a: Array, b: Array) -> float:
    """The largest relative change of an entry; entries a millionth of the largest count as that."""
    least = 1e-6 * jnp.max(jnp.abs(a))
    return float(jnp.max(jnp.abs(a - b) / jnp.maximum(jnp.maximum(jnp.abs(a), least), 1e-37)))


class _Probe:
    """Runs of one transformation; parameters stay at zero, so that weight decay does nothing."""

    def __init__(self, tx: Any, unravel: Callable[[Array], PyTree]) -> None:
        self.tx, self.unravel = tx, unravel
        self._advance = jax.jit(self._advanced)
        self._trace = jax.jit(self._traced)

    def _update(self, gradient: Array, state: Any, point: Any = 0.0) -> tuple[Array, Any]:
        params = self.unravel(jnp.full_like(gradient, point))
        updates, new = self.tx.update(self.unravel(gradient), state, params)
        new = jax.tree.map(lambda n, o: jnp.asarray(n, jnp.asarray(o).dtype), new, state)
        return jnp.concatenate([jnp.ravel(u) for u in jax.tree.leaves(updates)]), new

    def start(self, like: Array) -> Any:
        return self.tx.init(self.unravel(jnp.zeros_like(like)))

    def _advanced(
        self, size: Array, state: Any, steps: Array, flip: Array, point: Array
    ) -> tuple[Array, Any]:
        """Steps whose gradients are `size * flip^k`; the last gradient has the sign of `size`."""

        def one(k: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            sign = flip ** ((steps - 1 - k) % 2).astype(size.dtype)
            return self._update(size * sign, carry[1], point)

        return jax.lax.fori_loop(0, steps, one, (jnp.zeros_like(size), state))

    def _traced(self, gradients: Array, like: Array) -> Array:
        """Largest update of every step, for gradients that are `gradients[k]` everywhere."""

        def one(state: Any, g: Array) -> tuple[Any, Array]:
            update, state = self._update(g * jnp.ones_like(like), state)
            return state, jnp.max(jnp.abs(update))

        return jax.lax.scan(one, self.start(like), gradients)[1]

    def settled(self, size: Array, flip: float, point: float = 0.0) -> tuple[Array, Any]:
        """The update, and the state, after so many steps that it repeats itself."""
        state, steps, before = self.start(size), _FIRST_STEPS, None
        while True:
            update, state = self._advance(size, state, *map(jnp.asarray, (steps, flip, point)))
            if before is not None and _largest_change(update / size, before / size) < _SETTLED:
                return update, state
            if steps > _MOST_STEPS:
                raise ValueError(
                    "the optimizer's answer to a steady gradient does not settle: pass it with a "
                    "constant learning rate (no schedule)"
                )
            before, steps = update, 2 * steps

    def response(self, size: Array) -> Array:
        """Amplitude of the update over that of the gradient, once the oscillation is steady."""
        return -self.settled(size, -1.0)[0] / size

    def check_every_step(self, size: Array) -> None:
        """Refuse rules that hold updates back."""
        trace = self._trace(jnp.full(64, size[0]), size)
        moved = np.asarray(trace) != 0
        if moved.any() and not moved.all():
            raise ValueError(
                "the optimizer emits no update at some steps: of an accumulating one (MultiSteps, "
                "jaxgrad.optim.accumulate) pass the inner optimizer, whose threshold is the same; "
                "of a warm-up, the constant learning rate that it leads to"
            )

    def check_not_sign(self, size: Array) -> None:
        """Refuse sign descent: its steps have one size, so it oscillates at every learning rate."""
        _, state = self.settled(size, -1.0)
        last = tuple(map(jnp.asarray, (1, -1.0, 0.0)))
        usual, larger = (self._advance(-c * size, state, *last)[0] for c in (1.0, 1.1))
        if _largest_change(usual, larger) < 1e-5:
            raise ValueError(
                "the optimizer's steps do not depend on the gradient's size (sign descent, such as "
                "Lion): it oscillates with an amplitude of its learning rate and has no threshold"
            )

    def _amplitude(self, size: Array, point: float) -> Array:
        """Half the difference of two updates in a row: what is steady (weight decay) drops out."""
        update, state = self.settled(size, -1.0, point)
        last = tuple(map(jnp.asarray, (1, -1.0, point)))
        return (self._advance(-size, state, *last)[0] - update) / 2

    def check_elementwise(self, size: Array, response: Array) -> None:
        """Refuse rules whose update of one parameter depends on others, or on the parameters.

        The response is measured at parameters of zero; here they are one.
        """
        chosen = jnp.arange(size.size) % 2 == 1
        kept = jnp.where(chosen, 0, 1)
        alone = self._amplitude(size, 1.0)
        beside = self._amplitude(jnp.where(chosen, 2 * size, size), 1.0)
        changes = (
            _largest_change(kept * alone, kept * beside),
            _largest_change(response * size, alone),
        )
        if max(changes) > 1e-2:
            raise ValueError(
                "the optimizer is not elementwise, or its steps depend on the parameters' size "
                "(LAMB, LARS, Adafactor, Muon, Shampoo): its stability is not that of a diagonally "
                "preconditioned Hessian, and jaxgrad has no formula for it. Pass the elementwise "
                "rule that it is built on"
            )

    def nominal(self, linear: bool, small: Array, largest: float) -> float:
        """The learning rate: the first step's of a linear rule, a long run's of an adaptive one."""
        if not linear:
            update, _ = self.settled(jnp.full_like(small, 1.0), 1.0)
            return float(jnp.max(jnp.abs(update)))
        size = float(small[0])
        impulse = self._trace(jnp.asarray([size, 0.0, 0.0], small.dtype), small)
        first, second, third = (float(x) / size for x in impulse)
        beta = third / second if second else 0.0
        # the kernel first, second, second * beta, ... against a gradient that alternates
        if abs(first - second / (1 + beta) - largest) > 1e-2 * first:
            raise ValueError(
                "the optimizer's learning rate cannot be told apart from its rule (a schedule, or "
                "a rule that is linear and neither SGD, momentum nor Nesterov's): pass a function "
                "from the learning rate to the optimizer, such as "
                "lambda lr: optax.chain(..., optax.sgd(lr))"
            )
        nesterov = beta > 0 and abs(second / first - beta**2 / (1 + beta)) < 1e-3
        return first / (1 + beta) if nesterov else first
