"""Faults that are put into a program drawn at random, each at a random severity in [0, 1)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.diagnosis_faults import erasing
from experiments.random_programs import Made, with_matrices


@dataclass(frozen=True)
class Fault:
    """A change of a program, and what a judge may call its primary cause.

    Attributes:
        name: of the fault.
        codes: of findings, any of which is right.
        change: of the program and the severity.
        families: of programs that it applies to; all if empty.
        depth: of layers that it takes at least.
        classes: whether it takes a classification.
        regression: whether it takes a regression.
    """

    name: str
    codes: tuple[str, ...]
    change: Callable[[Made, float], Made]
    families: tuple[str, ...] = ()
    depth: int = 1
    classes: bool = False
    regression: bool = False


def _pick(severity: float, *values: Any) -> Any:
    """The first value for the most severe."""
    return values[int((1 - severity) * len(values) * 0.999)]


def _small(made: Made, severity: float) -> Made:
    return with_matrices(made, lambda a: a * _pick(severity, 0.01, 0.03, 0.1))


def _large(made: Made, severity: float) -> Made:
    return with_matrices(made, lambda a: a * _pick(severity, 10.0, 6.0, 4.0))


def _constant(made: Made, severity: float) -> Made:
    return with_matrices(made, lambda a: jnp.full_like(a, _pick(severity, 0.1, 0.03)))


def _negative_biases(made: Made, severity: float) -> Made:
    down = _pick(severity, 6.0, 3.0)
    layers = [layer | {"b": layer["b"] - down} for layer in made.params["layers"]]
    return replace(made, params=made.params | {"layers": layers}, activation=jax.nn.relu)


def _sigmoids(made: Made, severity: float) -> Made:
    del severity
    return replace(made, activation=jax.nn.sigmoid)


def _rate(*factors: float) -> Callable[[Made, float], Made]:
    return lambda made, severity: replace(made, rate=made.rate * _pick(severity, *factors))


def _clip_after(made: Made, severity: float) -> Made:
    return replace(made, before=(), after=(optax.clip_by_global_norm(_pick(severity, 1e-4, 1e-3)),))


def _tiny_clip(made: Made, severity: float) -> Made:
    return replace(made, before=(optax.clip_by_global_norm(_pick(severity, 1e-4, 1e-3)),))


def _sums(made: Made, severity: float) -> Made:
    every = _pick(severity, 16, 8)
    return replace(made, around=lambda tx: optax.MultiSteps(tx, every, use_grad_mean=False))


def _ascent(made: Made, severity: float) -> Made:
    del severity
    return replace(made, after=(*made.after, optax.scale(-1.0)))


def _softmax(made: Made, severity: float) -> Made:
    del severity
    return replace(made, shown=jax.nn.softmax)


def _rectified(made: Made, severity: float) -> Made:
    del severity
    return replace(made, shown=jax.nn.relu)


def _labels(made: Made, severity: float) -> Made:
    del severity
    return replace(made, shift=1)


def _raw_inputs(made: Made, severity: float) -> Made:
    scale, shift = _pick(severity, 255.0, 60.0), _pick(severity, 128.0, 0.0)
    batches = [((x * scale + shift).astype(np.float32), y) for x, y in made.batches]
    return replace(made, batches=batches)


def _penalty(made: Made, severity: float) -> Made:
    factor = _pick(severity, 1.0, 0.3)
    return replace(
        made, penalty=lambda params: factor * sum(jnp.sum(a**2) for a in jax.tree.leaves(params))
    )


def _dropout(made: Made, severity: float) -> Made:
    rate = _pick(severity, 0.97, 0.9)

    def between(i: int, h: Any, key: Any) -> Any:
        keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, h.shape)
        return jnp.where(keep, h / (1 - rate), 0.0)

    return replace(made, between=between, noisy=True)


def _stopped(made: Made, severity: float) -> Made:
    at = made.last if severity > 0.5 else 0

    def between(i: int, h: Any, _: Any) -> Any:
        return jax.lax.stop_gradient(h) if i == at else h

    return replace(made, between=between)


def _root(made: Made, severity: float) -> Made:
    at = made.last if severity > 0.5 else 0

    def between(i: int, h: Any, _: Any) -> Any:
        return h + jnp.where(h > 0, jnp.sqrt(h), 0.0) if i == at else h

    return replace(made, between=between)


def _stepped(made: Made, severity: float) -> Made:
    at = made.last if severity > 0.5 else 0
    step = jnp.round if severity * 100 % 2 < 1 else lambda h: h.astype(jnp.int32).astype(h.dtype)
    return replace(made, between=lambda i, h, _: step(h) if i == at else h)


def _half(made: Made, severity: float) -> Made:
    small, forward, criterion = _pick(severity, 1e-6, 1e-5), made.forward, made.criterion
    half = lambda tree: jax.tree.map(  # noqa: E731
        lambda a: a.astype(jnp.float16) if a.dtype == jnp.float32 else a, tree
    )
    return replace(
        made,
        forward=lambda p, x, *rest: forward(half(p), half(x), *rest).astype(jnp.float32),
        criterion=lambda z, y: small * criterion(z, y),
    )


def _scheduled(schedule: Callable[[float, float], Any]) -> Callable[[Made, float], Made]:
    return lambda made, severity: replace(
        made, facts=made.facts | {"warmup": False}, rate=schedule(made.rate, severity)
    )


def _ruled(rule: Callable[[float], Callable[[Any], Any]]) -> Callable[[Made, float], Made]:
    return lambda made, severity: replace(made, rule=rule(severity))


def _heavy(made: Made, severity: float) -> Made:
    momentum = _pick(severity, 0.999, 0.99)
    facts = made.facts | {"warmup": False}
    return replace(made, facts=facts, rate=0.05, rule=lambda r: optax.sgd(r, momentum=momentum))


def _raw_targets(made: Made, severity: float) -> Made:
    scale, shift = _pick(severity, (1e4, 3e4), (300.0, 1e3))
    batches = [(x, (y * scale + shift).astype(np.float32)) for x, y in made.batches]
    return replace(made, batches=batches)


def _bounded(made: Made, severity: float) -> Made:
    return replace(made, shown=_pick(severity, jax.nn.sigmoid, jax.nn.relu))


def _broadcast(made: Made, severity: float) -> Made:
    del severity
    return replace(made, criterion=lambda z, y: jnp.mean(jnp.square(z - y)))


def _batch_axis(made: Made, severity: float) -> Made:
    del severity

    def criterion(z: Any, y: Any) -> Any:
        logs = jax.nn.log_softmax(z, axis=0)
        return -jnp.take_along_axis(logs, y[..., None], -1).mean()

    return replace(made, criterion=criterion)


def _loud_attention(made: Made, severity: float) -> Made:
    factor = _pick(severity, 12.0, 6.0)
    layers = [layer | {"qkv": layer["qkv"] * factor} for layer in made.params["layers"]]
    return replace(made, params=made.params | {"layers": layers})


def _erased(made: Made, severity: float) -> Made:
    return replace(made, around=lambda tx: erasing(tx, _pick(severity, 16, 8)))


def _outlier(made: Made, severity: float) -> Made:
    factor, batches = _pick(severity, 1e5, 1e3), list(made.batches)
    batches[5] = ((batches[5][0] * factor).astype(np.float32), batches[5][1])
    return replace(made, batches=batches)


def _of_one(made: Made, severity: float) -> Made:
    del severity
    return replace(made, batches=[(x[:1], y[:1]) for x, y in made.batches])


_SATURATED = ("unit.saturated", "init.too_large")
FAULTS = (
    Fault("small weights", ("init.too_small", "gradient.vanishing"), _small, ("mlp", "conv"), 4),
    Fault("large weights", (*_SATURATED, "gradient.exploding"), _large, ("mlp", "conv"), 3),
    Fault("equal weights", ("init.symmetric",), _constant, ("mlp", "conv")),
    Fault("negative biases", ("unit.dead",), _negative_biases, ("mlp", "conv")),
    Fault("sigmoids", ("gradient.vanishing", "init.activation_mismatch"), _sigmoids, ("mlp",), 6),
    Fault("high rate", ("lr.too_high", "unit.dead", "loss.spike"), _rate(300.0, 60.0)),
    Fault("low rate", ("lr.too_low",), _rate(1e-4, 3e-3)),
    Fault("clip after the rule", ("optimizer.clip_after_update",), _clip_after),
    Fault("tiny clip", ("optimizer.clip_always",), _tiny_clip),
    Fault("summed micro-batches", ("accumulation.sums",), _sums),
    Fault("ascent", ("optimizer.ascent",), _ascent),
    Fault("softmax twice", ("loss.double_softmax",), _softmax, classes=True),
    Fault("ReLU on logits", ("loss.output_mismatch", "unit.dead"), _rectified),
    Fault("labels from one", ("data.labels_out_of_range",), _labels, classes=True),
    Fault("raw inputs", ("data.unnormalized", "unit.saturated"), _raw_inputs, ("mlp", "conv")),
    Fault("strong penalty", ("regularization.dominates",), _penalty),
    Fault("strong dropout", ("regularization.dropout_too_strong",), _dropout),
    Fault("stopped gradient", ("gradient.blocked",), _stopped),
    Fault("unsafe root", ("gradient.nonfinite",), _root),
    Fault("steps in the forward pass", ("gradient.blocked",), _stepped),
    Fault("float16 loss without scaling", ("precision.underflow",), _half),
    Fault(
        "endless warm-up",
        ("lr.too_low",),
        _scheduled(lambda rate, s: optax.linear_schedule(0.0, rate, _pick(s, 10**6, 10**5))),
    ),
    Fault(
        "rate that ends",
        ("lr.too_low",),
        _scheduled(lambda rate, s: optax.exponential_decay(rate, 1, _pick(s, 0.6, 0.8))),
    ),
    Fault(
        "strong decay",
        ("regularization.dominates",),
        _ruled(lambda s: lambda r: optax.adamw(r, weight_decay=_pick(s, 100.0, 30.0))),
    ),
    Fault(
        "large epsilon",
        ("lr.too_low",),
        _ruled(lambda s: lambda r: optax.adam(r, eps=_pick(s, 100.0, 10.0))),
    ),
    Fault("heavy momentum", ("lr.too_high", "unit.dead", "loss.spike"), _heavy),
    Fault("raw targets", ("data.unnormalized",), _raw_targets, regression=True),
    Fault("bounded regression", ("loss.output_mismatch", "unit.dead"), _bounded, regression=True),
    Fault(
        "broadcast loss",
        ("loss.output_mismatch",),
        _broadcast,
        ("mlp", "residual"),
        regression=True,
    ),
    Fault("softmax over the batch", ("loss.output_mismatch",), _batch_axis, classes=True),
    Fault(
        "loud attention",
        ("attention.logit_growth", "init.too_large"),
        _loud_attention,
        ("transformer",),
    ),
    Fault("erased accumulation", ("accumulation.ineffective",), _erased),
    Fault(
        "one bad batch",
        ("loss.spike", "data.unnormalized"),
        _outlier,
        ("mlp", "conv", "gru", "lstm", "residual"),
    ),
    Fault("batch norm of one example", ("norm.batch_of_one",), _of_one, ("resnet",)),
)
