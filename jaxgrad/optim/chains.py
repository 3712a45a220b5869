"""The same rules as optax chains, under the same names and signatures.

``TWINS`` in `jaxgrad.optim` pairs them. Under one jit the hand-written rule with
``numerics="optax"`` gives the same bits. ``numerics`` here accepts ``"optax"`` only, and
``nu_dtype`` None only: optax has neither choice.
"""

from typing import Any

import jax.numpy as jnp
import optax
import optax.contrib

from jaxgrad.optim.chain_schedules import (  # noqa: F401 (they are twins too)
    constant,
    inverse_sqrt,
    warmup_cosine,
    warmup_linear,
    warmup_stable_decay,
)
from jaxgrad.optim.orthogonal import _QUINTIC


def _optax_only(numerics: str, nu_dtype: Any = None) -> None:
    if numerics != "optax":
        raise ValueError(f"numerics: an optax chain has optax's numerics only, got {numerics!r}")
    if nu_dtype is not None:
        raise ValueError("nu_dtype: optax keeps second moments in the parameters' dtype")


def sgd(
    learning_rate: Any,
    momentum: Any = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    numerics: str = "optax",
) -> optax.GradientTransformationExtraArgs:
    """Twin of `jaxgrad.optim.sgd`."""
    _optax_only(numerics)
    trace = optax.identity()
    if momentum is not None:
        trace = optax.trace(momentum, nesterov, accumulator_dtype)
    return optax.chain(trace, optax.scale_by_learning_rate(learning_rate))


def momentum(
    learning_rate: Any,
    momentum: Any = 0.9,
    accumulator_dtype: Any = None,
    *,
    numerics: str = "optax",
) -> optax.GradientTransformationExtraArgs:
    """Twin of `jaxgrad.optim.momentum`."""
    return sgd(learning_rate, momentum, False, accumulator_dtype, numerics=numerics)


def nesterov(
    learning_rate: Any,
    momentum: Any = 0.9,
    accumulator_dtype: Any = None,
    *,
    numerics: str = "optax",
) -> optax.GradientTransformationExtraArgs:
    """Twin of `jaxgrad.optim.nesterov`."""
    return sgd(learning_rate, momentum, True, accumulator_dtype, numerics=numerics)


def lion(  # noqa: PLR0913
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.99,
    mu_dtype: Any = None,
    weight_decay: Any = 1e-3,
    mask: Any = None,
    *,
    numerics: str = "optax",
) -> optax.GradientTransformationExtraArgs:
    """Twin of `jaxgrad.optim.lion`."""
    _optax_only(numerics)
    return optax.chain(
        optax.scale_by_lion(b1, b2, mu_dtype),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def adam(  # noqa: PLR0913
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    nu_dtype: Any = None,
    numerics: str = "optax",
) -> optax.GradientTransformationExtraArgs:
    """Twin of `jaxgrad.optim.adam`."""
    _optax_only(numerics, nu_dtype)
    return optax.chain(
        optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )


def adamw(  # noqa: PLR0913, PLR0917
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    mu_dtype: Any = None,
    weight_decay: Any = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
    nu_dtype: Any = None,
    numerics: str = "optax",
) -> optax.GradientTransformationExtraArgs:
    """Twin of `jaxgrad.optim.adamw`."""
    _optax_only(numerics, nu_dtype)
    return optax.chain(
        optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def rmsprop(  # noqa: PLR0913, PLR0917
    learning_rate: Any,
    decay: Any = 0.9,
    eps: Any = 1e-8,
    initial_scale: Any = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: Any = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    nu_dtype: Any = None,
    numerics: str = "optax",
) -> optax.GradientTransformationExtraArgs:
    """Twin of `jaxgrad.optim.rmsprop`."""
    _optax_only(numerics, nu_dtype)
    scale = optax.scale_by_stddev if centered else optax.scale_by_rms
    trace = optax.identity() if momentum is None else optax.trace(momentum, nesterov)
    return optax.chain(
        scale(decay, eps, initial_scale, eps_in_sqrt, bias_correction),
        optax.scale_by_learning_rate(learning_rate),
        trace,
    )


def adagrad(
    learning_rate: Any,
    initial_accumulator_value: Any = 0.1,
    eps: Any = 1e-7,
    *,
    nu_dtype: Any = None,
    numerics: str = "optax",
) -> optax.GradientTransformationExtraArgs:
    """Twin of `jaxgrad.optim.adagrad`."""
    _optax_only(numerics, nu_dtype)
    return optax.chain(
        optax.scale_by_rss(initial_accumulator_value, eps),
        optax.scale_by_learning_rate(learning_rate),
    )


def adafactor(  # noqa: PLR0913, PLR0917
    learning_rate: Any = None,
    min_dim_size_to_factor: int = 128,
    decay_rate: Any = 0.8,
    decay_offset: Any = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: Any = 1.0,
    momentum: Any = None,
    dtype_momentum: Any = jnp.float32,
    weight_decay_rate: Any = None,
    eps: Any = 1e-30,
    factored: bool = True,
    weight_decay_mask: Any = None,
    *,
    nu_dtype: Any = None,
    numerics: str = "optax",
) -> optax.GradientTransformationExtraArgs:
    """Twin of `jaxgrad.optim.adafactor`."""
    _optax_only(numerics, nu_dtype)
    parts: list[Any] = [
        optax.scale_by_factored_rms(factored, decay_rate, decay_offset, min_dim_size_to_factor, eps)
    ]
    if clipping_threshold is not None:
        parts.append(optax.clip_by_block_rms(clipping_threshold))
    if learning_rate is not None:
        parts.append(optax.scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        parts.append(optax.scale_by_param_block_rms())
    if momentum is not None:
        parts.append(optax.ema(momentum, debias=False, accumulator_dtype=dtype_momentum))
    if weight_decay_rate is not None:
        parts.append(optax.add_decayed_weights(weight_decay_rate, mask=weight_decay_mask))
    return optax.chain(*parts, optax.scale(-1))


def muon(  # noqa: PLR0913, PLR0917
    learning_rate: Any,
    ns_coeffs: Any = _QUINTIC,
    ns_steps: int = 5,
    beta: Any = 0.95,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: Any = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    adam_b1: Any = 0.9,
    adam_b2: Any = 0.999,
    adam_eps_root: Any = 0.0,
    adam_weight_decay: Any = 0.0,
    adam_learning_rate: Any = None,
    consistent_rms: Any = None,
    numerics: str = "optax",
) -> optax.GradientTransformation:
    """Twin of `jaxgrad.optim.muon`: ``optax.contrib.muon`` itself."""
    _optax_only(numerics)
    return optax.contrib.muon(
        learning_rate,
        ns_coeffs,
        ns_steps,
        beta,
        eps,
        weight_decay,
        weight_decay_mask,
        mu_dtype,
        nesterov=nesterov,
        adaptive=adaptive,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_eps_root=adam_eps_root,
        adam_weight_decay=adam_weight_decay,
        adam_learning_rate=adam_learning_rate,
        consistent_rms=consistent_rms,
    )


def schedule_free_adamw(  # noqa: PLR0913, PLR0917
    learning_rate: Any = 0.0025,
    warmup_steps: int | None = None,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    weight_lr_power: Any = 2.0,
    state_dtype: Any = None,
    *,
    nu_dtype: Any = None,
    numerics: str = "optax",
) -> optax.GradientTransformationExtraArgs:
    """Twin of `jaxgrad.optim.schedule_free_adamw`: ``optax.contrib.schedule_free`` of RMSprop."""
    _optax_only(numerics, nu_dtype)
    rate = learning_rate
    if warmup_steps is not None:
        rate = optax.warmup_constant_schedule(0, learning_rate, warmup_steps)
    base = optax.chain(
        optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    return optax.contrib.schedule_free(base, rate, b1, weight_lr_power, state_dtype)


def clip_by_value(max_delta: Any, *, numerics: str = "optax") -> optax.GradientTransformation:
    """Twin of `jaxgrad.optim.clip_by_value`."""
    _optax_only(numerics)
    return optax.clip(max_delta)


def clip_by_global_norm(max_norm: Any, *, numerics: str = "optax") -> optax.GradientTransformation:
    """Twin of `jaxgrad.optim.clip_by_global_norm`."""
    _optax_only(numerics)
    return optax.clip_by_global_norm(max_norm)


def clip_by_block_rms(threshold: Any, *, numerics: str = "optax") -> optax.GradientTransformation:
    """Twin of `jaxgrad.optim.clip_by_block_rms`."""
    _optax_only(numerics)
    return optax.clip_by_block_rms(threshold)


def adaptive_clip(
    clipping: Any, eps: Any = 1e-3, axis: Any = None, *, numerics: str = "optax"
) -> optax.GradientTransformation:
    """Twin of `jaxgrad.optim.adaptive_clip`."""
    _optax_only(numerics)
    return optax.adaptive_grad_clip(clipping, eps, axis)


def add_decayed_weights(
    weight_decay: Any = 0.0, mask: Any = None, *, numerics: str = "optax"
) -> optax.GradientTransformation:
    """Twin of `jaxgrad.optim.add_decayed_weights`."""
    _optax_only(numerics)
    return optax.add_decayed_weights(weight_decay, mask)


def accumulate(
    tx: Any, every: Any, *, mean: bool = True, weights: Any = None, numerics: str = "optax"
) -> optax.GradientTransformation:
    """Twin of `jaxgrad.optim.accumulate`; optax has no weights."""
    _optax_only(numerics)
    if weights is not None:
        raise ValueError("weights: optax.MultiSteps has none")
    return optax.MultiSteps(tx, every, mean).gradient_transformation()


def apply_if_finite(
    inner: Any, max_consecutive_errors: int, *, numerics: str = "optax"
) -> optax.GradientTransformation:
    """Twin of `jaxgrad.optim.apply_if_finite`."""
    _optax_only(numerics)
    return optax.apply_if_finite(inner, max_consecutive_errors)
