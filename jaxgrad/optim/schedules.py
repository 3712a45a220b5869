"""Learning-rate schedules: functions of the number of steps done before.

The first update gets ``schedule(0)``. A schedule accepts Python integers, tracers and arrays of
counts, and returns float32 (float64 where double precision is on and the values are arrays).
"""

from typing import Any

import jax.numpy as jnp

from jaxgrad.optim.base import Schedule


def _check_steps(**steps: Any) -> None:
    for name, value in steps.items():
        if value < 0:
            raise ValueError(f"{name}: expected a number of steps >= 0, got {value}")


def _fraction(count: Any, start: Any, steps: Any) -> Any:
    """How far ``count`` is from ``start`` to ``start + steps``, in [0, 1]."""
    return jnp.clip((count - start) / steps, 0, 1) if steps else jnp.where(count < start, 0.0, 1.0)


def _line(first: Any, last: Any, fraction: Any) -> Any:
    """From ``first`` to ``last``, exact at both ends (optax's form of it)."""
    return (first - last) * (1 - fraction) + last


def _warmed(init_value: Any, peak_value: Any, warmup_steps: Any, count: Any, after: Any) -> Any:
    ramp = _line(init_value, peak_value, _fraction(count, 0, warmup_steps))
    return jnp.where(count < warmup_steps, ramp, after)


def constant(value: Any) -> Schedule:
    """The same learning rate at every step.

    Args:
        value: learning rate.

    Returns:
        A schedule.
    """
    return lambda count: jnp.full(jnp.shape(count), value) if jnp.ndim(count) else value


def warmup_constant(init_value: Any, peak_value: Any, warmup_steps: int) -> Schedule:
    """A line from ``init_value`` to ``peak_value`` in ``warmup_steps`` steps, then constant.

    Args:
        init_value: learning rate of the first step.
        peak_value: learning rate from step ``warmup_steps`` on.
        warmup_steps: length of the line.

    Returns:
        A schedule.
    """
    _check_steps(warmup_steps=warmup_steps)
    return lambda count: _warmed(init_value, peak_value, warmup_steps, count, peak_value)


def warmup_cosine(
    init_value: Any,
    peak_value: Any,
    warmup_steps: int,
    decay_steps: int,
    end_value: Any = 0.0,
    exponent: Any = 1.0,
) -> Schedule:
    """A line up, then half a cosine down (Loshchilov and Hutter, arXiv:1608.03983).

    Args:
        init_value: learning rate of the first step.
        peak_value: learning rate at step ``warmup_steps``.
        warmup_steps: length of the line.
        decay_steps: step at which the cosine ends, the warm-up included.
        end_value: learning rate from then on (torch's rises again).
        exponent: power of the cosine.

    Returns:
        A schedule.

    Raises:
        ValueError: if the cosine has no steps.
    """
    _check_steps(warmup_steps=warmup_steps)
    if decay_steps <= warmup_steps:
        raise ValueError(
            f"decay_steps: expected more than warmup_steps ({warmup_steps}), got {decay_steps}"
        )

    def schedule(count: Any) -> Any:
        fraction = _fraction(count, warmup_steps, decay_steps - warmup_steps)
        cosine = (0.5 * (1 + jnp.cos(jnp.pi * fraction))) ** exponent
        after = _line(peak_value, end_value, 1 - cosine)
        return _warmed(init_value, peak_value, warmup_steps, count, after)

    return schedule


def warmup_linear(
    init_value: Any,
    peak_value: Any,
    warmup_steps: int,
    decay_steps: int,
    end_value: Any = 0.0,
) -> Schedule:
    """A line up, then a line down.

    Args:
        init_value: learning rate of the first step.
        peak_value: learning rate at step ``warmup_steps``.
        warmup_steps: length of the line up.
        decay_steps: step at which the line down ends, the warm-up included.
        end_value: learning rate from then on.

    Returns:
        A schedule.

    Raises:
        ValueError: if the line down has no steps.
    """
    return warmup_stable_decay(
        init_value, peak_value, warmup_steps, 0, decay_steps - warmup_steps, end_value
    )


def warmup_stable_decay(
    init_value: Any,
    peak_value: Any,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    end_value: Any = 0.0,
) -> Schedule:
    """A line up, a plateau, a line down (Hu et al., arXiv:2404.06395).

    Args:
        init_value: learning rate of the first step.
        peak_value: learning rate of the plateau.
        warmup_steps: length of the line up.
        stable_steps: length of the plateau.
        decay_steps: length of the line down.
        end_value: learning rate afterwards.

    Returns:
        A schedule.

    Raises:
        ValueError: if a length is negative or the line down has no steps.
    """
    _check_steps(warmup_steps=warmup_steps, stable_steps=stable_steps)
    if decay_steps <= 0:
        raise ValueError(f"decay_steps: expected at least one step of decay, got {decay_steps}")

    def schedule(count: Any) -> Any:
        fraction = _fraction(count, warmup_steps + stable_steps, decay_steps)
        after = _line(peak_value, end_value, fraction)
        return _warmed(init_value, peak_value, warmup_steps, count, after)

    return schedule


def inverse_sqrt(peak_value: Any, warmup_steps: int, init_value: Any = 0.0) -> Schedule:
    """A line up, then ``peak_value sqrt(warmup_steps / count)`` (Vaswani et al., arXiv:1706.03762).

    optax has no such schedule; its twin is written with `optax.join_schedules`.

    Args:
        peak_value: learning rate at step ``warmup_steps``.
        warmup_steps: length of the line, at least 1.
        init_value: learning rate of the first step.

    Returns:
        A schedule.

    Raises:
        ValueError: if there is no warm-up, where the formula has no scale.
    """
    if warmup_steps < 1:
        raise ValueError(f"warmup_steps: expected at least 1, got {warmup_steps}")

    def schedule(count: Any) -> Any:
        after = peak_value * jnp.sqrt(warmup_steps / jnp.maximum(count, warmup_steps))
        return _warmed(init_value, peak_value, warmup_steps, count, after)

    return schedule
