"""Gradients that vanish, explode, are flushed to zero, or are no numbers."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.diagnosis.altered import altered
from jaxgrad.diagnosis.evidence import LEARNS, Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.training import Trainer
from jaxgrad.diagnosis.units import layer_of_leaf
from jaxgrad.diagnosis.weights import compounded, scales, too_large
from jaxgrad.diagnosis.wiring import source_line

# An overflow in one of these is a matter of size; in all others a NaN is a matter of domain.
GROWING = {
    *("exp", "mul", "dot_general", "conv_general_dilated", "add", "add_any", "integer_pow"),
    *("square", "reduce_sum", "expm1", "cosh", "sinh", "convert_element_type", "sub", "cumsum"),
}


_FLOAT16_SCALE = 2.0**12
_SHRINKS = 0.05  # of a gradient, from the last hidden layer to the first: a chain worth a trial


def nonfinite(evidence: Evidence) -> list[Finding]:
    """NaN or infinity at the given parameters, or in the gradient of the step where a run broke."""
    first = evidence.initial
    if first.finite and (evidence.main.stopped is None or not evidence.main.loss_finite_at_stop):
        return _bad_batch(evidence)
    forward, backward = evidence.births
    birth = forward if forward is not None else backward
    if birth is None:
        return _nonfinite_data(evidence)
    wiring = evidence.wiring
    output = birth.op.outputs[0]
    stage = "initial" if not first.finite else "running"
    inner = next((v for v in birth.op.inputs if isinstance(v, int)), output)
    where = wiring.layer(inner if birth.backward else output) or wiring.layer_after(output, 8)
    facts = {
        "operation": birth.op.name, "line": source_line(birth.op),
        "pass": "backward" if birth.backward else "forward", "iteration": list(birth.iteration),
    }  # fmt: skip
    half = "float16" in (wiring.dtype(output), wiring.dtype(inner))
    grows = birth.op.name in GROWING and not birth.written
    if half and grows:
        return [
            Finding(
                "precision.overflow", "error", stage, where,
                f"float16 ends at 65504, and the {facts['pass']} pass of {birth.op.name} exceeds "
                "it; float32 would be finite.",
                facts, fix("precision.overflow"), 0.92,
            )
        ]  # fmt: skip
    if birth.backward and stage == "initial" and grows:
        quiet = evidence.instrument.measure(evidence.problem.values, scale=2.0**-60)
        if quiet.finite:
            return [exploding(where, facts)]
    if not birth.backward and grows:
        if stage == "running":
            return []
        return [_overflow(evidence, where, facts | {"loss": first.value})]
    if stage == "running" and grows:
        return []
    return [
        Finding(
            "gradient.nonfinite", "error", stage, where,
            f"NaN or infinity is born in the {facts['pass']} pass of {birth.op.name}"
            + (f" ({facts['line']})" if facts["line"] else "")
            + (f", iteration {birth.iteration}" if birth.iteration else "")
            + ("; it meets an infinity or a NaN that the program writes itself, as a mask does."
               if birth.written else "; no large value leads to it."),
            facts, fix("gradient.nonfinite", operation=_unsafe(birth.op.name)), 0.93,
        )
    ]  # fmt: skip


def _unsafe(name: str) -> str:
    """What the fix writes out: functions of positive numbers under their own name."""
    return name if name in ("log", "sqrt") else "sqrt"


def _overflow(evidence: Evidence, where: str, facts: dict[str, Any]) -> Finding:
    """Values too large for their type: of wide weights, of a recurrence, or of neither."""
    found = scales(evidence)
    if not found or max(s.ratio for s in found) > 2 or compounded(found) > 30:
        return too_large(evidence, facts, "error")
    if facts["iteration"]:
        return exploding(where, facts)
    return Finding(
        "gradient.nonfinite", "error", "initial", where,
        f"{facts['operation']} overflows" + (f" ({facts['line']})" if facts["line"] else "")
        + ", though the weights before it are of the usual size.",
        facts, "x = jnp.clip(x, -20.0, 20.0)   # bound the argument, or scale it down", 0.85,
    )  # fmt: skip


def _bad_batch(evidence: Evidence) -> list[Finding]:
    """A batch with a NaN of its own; a loss that breaks down otherwise is a matter of the rate."""
    at = evidence.main.stopped
    others = [b for b in evidence.problem.batches if b is not evidence.broken_batch]
    if at is None or all(_clean(evidence.broken_batch)) or not any(all(_clean(b)) for b in others):
        return []
    forward, _ = evidence.births
    if forward is not None:
        return []
    facts = {"step": at, "batch": at % len(evidence.problem.batches)}
    return [replace(f, evidence=f.evidence | facts) for f in _nonfinite_data(evidence)]


def _clean(batch: Any) -> list[bool]:
    """Whether the arrays of a batch are finite."""
    return [
        bool(jnp.isfinite(leaf).all())
        for leaf in jax.tree.leaves(batch)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]


def _nonfinite_data(evidence: Evidence) -> list[Finding]:
    leaves = jax.tree.leaves(evidence.broken_batch)
    bad = [
        name
        for name, leaf in zip(evidence.wiring.data_names, leaves, strict=False)
        if getattr(leaf, "dtype", None) is not None
        and jnp.issubdtype(leaf.dtype, jnp.inexact)
        and not bool(jnp.isfinite(leaf).all())
    ]
    where = bad[0] if bad else ""
    what = f"{where} holds NaN or infinity" if bad else "parameters or data hold NaN or infinity"
    return [
        Finding(
            "gradient.nonfinite", "error", "initial", where, f"{what} before any layer.",
            {"layers": bad}, "assert jnp.isfinite(x).all()", 0.9,
        )
    ]  # fmt: skip


def exploding(where: str, facts: dict[str, Any]) -> Finding:
    """The finding, at the layer where the gradient is largest."""
    return Finding(
        "gradient.exploding", "error", "initial", where,
        "Every layer, or step of the recurrence, enlarges the gradient on its way back.",
        facts, fix("gradient.exploding"), 0.85,
    )  # fmt: skip


def flow_profile(evidence: Evidence) -> list[tuple[str, float]]:
    """Cotangent RMS at the hidden pre-activations, in forward order, iterations one by one."""
    profile = []
    for activation in evidence.hidden():
        tensor = evidence.initial.tensors.get(activation.source)
        if tensor is None or evidence.wiring.is_head(activation.output):
            continue
        sizes = np.atleast_1d(tensor.row["gradient_rms"]).reshape(-1)
        if not sizes.any() and _is_reached(evidence, activation.where):
            continue  # the loss uses the layer, not this value of it: its derivative, for instance
        many = len(sizes) > 1
        for k, size in enumerate(sizes):
            name = f"{activation.where}[{k}]" if many else activation.where
            profile.append((name, float(size)))
    return profile


def _is_reached(evidence: Evidence, layer: str) -> bool:
    """Whether a parameter of a layer receives a gradient."""
    pairs = zip(evidence.problem.names, evidence.initial.grads, strict=True)
    return any(np.any(np.asarray(g) != 0) for n, g in pairs if layer_of_leaf(evidence, n) == layer)


def gradient_scale(evidence: Evidence) -> list[Finding]:
    """Gradients that vanish or explode from the last hidden layer, or time step, to the first."""
    if not evidence.initial.finite:
        return []
    profile = [(n, s) for n, s in flow_profile(evidence) if np.isfinite(s)]
    if len(profile) < 4:
        return _exploding_rows(evidence)
    sizes = np.array([s for _, s in profile])
    if sizes[-1] <= 0:
        return []
    ratio = sizes[0] / sizes[-1]
    half = sizes[: max(len(sizes) // 2, 1)].max() / sizes[-1]
    names = [n for n, _ in profile]
    where = evidence.hidden()[0].where
    if ratio < 1e-3:
        return _vanishing(evidence, (where, ratio, half), names)
    if ratio < _SHRINKS and not evidence.improves:
        return _centered(evidence, where, float(ratio))
    if ratio > 1e3 and evidence.stuck:
        facts = {"first_over_last": float(ratio), "threshold": 1e3}
        return [exploding(where, facts)]
    return []


def _exploding_rows(evidence: Evidence) -> list[Finding]:
    """Without activations between the layers, as in a linear recurrence: row by row."""
    rows = evidence.initial.rows["gradient_rms"]
    known = [(n, s) for n, s in zip(evidence.initial.names, rows, strict=True) if s > 0]
    if len(known) < 4 or known[0][1] < 1e3 * known[-1][1] or not evidence.stuck:
        return []
    facts = {"first_over_last": float(known[0][1] / known[-1][1]), "threshold": 1e3}
    return [exploding(known[0][0], facts)]


def _vanishing(
    evidence: Evidence, measured: tuple[str, float, float], names: list[str]
) -> list[Finding]:
    where, ratio, half = measured
    unresolved = half < 1e-7  # below the resolution of float32 beside the last ones
    if evidence.improves and not unresolved:
        return []
    if not unresolved and not evidence.stuck:
        return _centered(evidence, where, float(ratio))
    severity = "warning" if evidence.improves else "error"
    facts = {
        "first_over_last": float(ratio), "threshold": 1e-3, "first_half_over_last": float(half),
        "layers": names[: len(names) // 2],
    }  # fmt: skip
    return [vanishing(where, severity, ratio, facts)]


def _centered(evidence: Evidence, where: str, ratio: float) -> list[Finding]:
    """Sigmoids that let a run crawl: the same training with tanh in their place tells it."""
    sigmoids = [a.output for a in evidence.hidden() if a.kind == "sigmoid"]
    if len(sigmoids) <= 3:
        return []
    problem = altered(evidence.problem, evidence.wiring, sigmoids, lambda s, _: _tanh_of_sigmoid(s))
    if problem is None:
        return []
    evidence.tell(f"training {evidence.steps} steps with tanh in the place of sigmoids")
    other = Trainer(problem, evidence.optimizer, evidence.steps).run()
    if evidence.progress(other) < LEARNS or not evidence.gains(other, by=0.2):
        return []
    facts = {
        "first_over_last": ratio, "threshold": _SHRINKS, "loss_as_given": evidence.main.last,
        "loss_with_tanh": other.last,
    }  # fmt: skip
    return [vanishing(where, "error", ratio, facts)]


def _tanh_of_sigmoid(s: jax.Array) -> jax.Array:
    """Of s = sigmoid(z): tanh(z), of zero mean and four times the slope."""
    return (2 * s - 1) / (jnp.square(s) + jnp.square(1 - s))


def vanishing(where: str, severity: str, ratio: float, facts: dict[str, Any]) -> Finding:
    """The finding: `ratio` of the first to the last gradient, and what else is known."""
    return Finding(
        "gradient.vanishing", severity, "initial", where,
        f"The gradient shrinks to {ratio:.1g} of itself between the last layer and the first.",
        facts, fix("gradient.vanishing"), 0.85,
        may_be_wrong="the first steps of a sequence do not matter for this task",
    )  # fmt: skip


def underflow(evidence: Evidence) -> list[Finding]:
    """Gradients that a half-precision dtype flushes to zero: they come back under a loss scale."""
    wiring = evidence.wiring
    half = [v for v in wiring.live if wiring.dtype(v) == "float16"]
    if not half or not evidence.initial.finite:
        return []
    for scale in (_FLOAT16_SCALE, 2.0**6):
        scaled = evidence.instrument.measure(evidence.problem.values, scale=scale)
        if scaled.finite:
            break
    else:
        return []
    lost = []
    for name, g, big in zip(
        evidence.problem.names, evidence.initial.grads, scaled.grads, strict=True
    ):
        true = np.asarray(big, np.float64) / scale
        error = np.linalg.norm(true - np.asarray(g, np.float64)) / max(np.linalg.norm(true), 1e-300)
        flushed = float(np.mean((np.asarray(g) == 0) & (true != 0))) if g.size else 0.0
        if error > 0.1 and flushed > 0.1:
            lost.append((name, float(error), flushed))
    if not lost:
        return []
    name, error, flushed = max(lost, key=lambda item: item[1])
    return [
        Finding(
            "precision.underflow", "error", "initial", layer_of_leaf(evidence, name),
            f"float16 flushes {flushed:.0%} of the gradient of {name} to zero; multiplied by "
            f"{scale:g} before the backward pass, it is there.",
            {"lost": flushed, "relative_error": error, "threshold": 0.1,
             "layers": [n for n, *_ in lost]},
            fix("precision.underflow"), 0.94,
        )
    ]  # fmt: skip
