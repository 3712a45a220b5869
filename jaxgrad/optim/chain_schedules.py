"""The schedules as optax schedules, for `jaxgrad.optim.chains`."""

from typing import Any

import jax.numpy as jnp
import optax


def constant(value: Any) -> optax.Schedule:
    """Twin of `jaxgrad.optim.constant`."""
    return optax.constant_schedule(value)


def warmup_cosine(
    init_value: Any,
    peak_value: Any,
    warmup_steps: int,
    decay_steps: int,
    end_value: Any = 0.0,
    exponent: Any = 1.0,
) -> optax.Schedule:
    """Twin of `jaxgrad.optim.warmup_cosine`."""
    return optax.warmup_cosine_decay_schedule(
        init_value, peak_value, warmup_steps, decay_steps, end_value, exponent
    )


def warmup_linear(
    init_value: Any,
    peak_value: Any,
    warmup_steps: int,
    decay_steps: int,
    end_value: Any = 0.0,
) -> optax.Schedule:
    """Twin of `jaxgrad.optim.warmup_linear`."""
    up = optax.linear_schedule(init_value, peak_value, warmup_steps)
    down = optax.linear_schedule(peak_value, end_value, decay_steps - warmup_steps)
    return optax.join_schedules([up, down], [warmup_steps])


def warmup_stable_decay(
    init_value: Any,
    peak_value: Any,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    end_value: Any = 0.0,
) -> optax.Schedule:
    """Twin of `jaxgrad.optim.warmup_stable_decay`."""
    up = optax.linear_schedule(init_value, peak_value, warmup_steps)
    down = optax.linear_schedule(peak_value, end_value, decay_steps)
    joints = [warmup_steps, warmup_steps + stable_steps]
    return optax.join_schedules([up, optax.constant_schedule(peak_value), down], joints)


def inverse_sqrt(peak_value: Any, warmup_steps: int, init_value: Any = 0.0) -> optax.Schedule:
    """Twin of `jaxgrad.optim.inverse_sqrt`; the decay itself is no optax piece."""
    up = optax.linear_schedule(init_value, peak_value, warmup_steps)
    return optax.join_schedules(
        [up, lambda n: peak_value * jnp.sqrt(warmup_steps / jnp.maximum(n + warmup_steps, 1))],
        [warmup_steps],
    )
