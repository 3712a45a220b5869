"""Diagnosis: the one primary cause, with evidence and a cure, and silence on healthy runs."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import PyTree

from jaxgrad.diagnosis import (
    causes,
    events,
    gradients,
    heads,
    inputs,
    labels,
    mixing,
    optimizers,
    overflow,
    paths,
    rates,
    rounding,
    terms,
    units,
    weights,
)  # fmt: skip
from jaxgrad.diagnosis.course import Course, course_of
from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.finding import Finding as Finding
from jaxgrad.diagnosis.finding import Report as Report
from jaxgrad.diagnosis.finding import matches
from jaxgrad.diagnosis.problem import make_problem, why_undifferentiable
from jaxgrad.diagnosis.stored import diagnose_run as diagnose_run

# The registry: rules in the order of a run's life. Each takes the evidence and returns findings.
STATIC = [
    paths.blocked, optimizers.clip_after_update, heads.single_class, heads.double_softmax,
    heads.output_mismatch, labels.labels_out_of_range, paths.batch_of_one,
]  # fmt: skip
INITIAL = [
    gradients.nonfinite, gradients.underflow, overflow.overflowed, units.symmetric,
    mixing.mixed_examples, mixing.thrown_away, inputs.unnormalized, units.dead,
    units.saturated, weights.init_scale, gradients.gradient_scale,
]  # fmt: skip
RUNNING = [
    events.cancelled, optimizers.accumulation, events.ascent, events.falling_without_end,
    terms.dropout, terms.regularization, terms.attention, rounding.lost, optimizers.clip_always,
    rates.learning_rate, events.spike, events.breakdown,
]  # fmt: skip
RULES: list[Callable[[Evidence], list[Finding]]] = [*STATIC, *INITIAL, *RUNNING]
# Faults after which nothing that is measured means anything.
_CONCLUSIVE = {
    "gradient.blocked", "loss.single_class_softmax", "data.labels_out_of_range",
    "loss.output_mismatch", "norm.batch_of_one", "init.symmetric", "loss.double_softmax",
}  # fmt: skip


def diagnose(  # noqa: PLR0913, PLR0917 (a public signature)
    loss: Callable[..., Any],
    params: PyTree,
    batch: PyTree,
    optimizer: Any = None,
    batches: Iterable[PyTree] | None = None,
    has_aux: bool = False,
    key: Any = None,
    trainable: Any = None,
    ignore: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Says why a network does not train, or that nothing is wrong.

    The loss is traced, its layers are measured in one instrumented pass, and it is trained for some
    80 to 160 steps; where something looks wrong, the training is repeated under other
    circumstances (learning rates, warm-up, weights rescaled, data standardized), which settles what
    symptoms cannot.

    Args:
        loss: ``loss(params, batch)`` or ``loss(params, batch, key)``, a real scalar.
        params: parameters at which training starts: any pytree.
        batch: one batch.
        optimizer: an optax transformation, or an object with ``init`` and ``update``. None: the
            trainings use Adam at 1e-3, and nothing is said of optimizer and learning rate.
        batches: further batches of the same shapes; the first 16 are used in turn, of batches with
            fewer than 16 examples up to 160.
        has_aux: whether the loss returns ``(loss, aux)``.
        key: random key for the loss; made up where the loss needs three arguments.
        trainable: pytree (or prefix) of bool, or a function of a leaf's name: False for leaves that
            are frozen on purpose.
        ignore: findings that are known and meant, as ``"code"`` or ``"code:where"`` with ``*``.
        progress: called with a line whenever something is begun.

    Returns:
        The report; `primary` is None for a healthy run. Of a run that is over, `diagnose_run` says
        what can be said of its recording.

    Raises:
        TypeError: if the loss returns no real scalar, or the parameters hold no float array.
    """
    problem = make_problem(
        loss, params, batch, batches=batches, has_aux=has_aux, key=key, trainable=trainable
    )
    evidence = Evidence(problem, optimizer, progress)
    evidence.undifferentiable = why_undifferentiable(problem)
    found = paths.blocked(evidence) if evidence.undifferentiable else _apply_rules(evidence)
    kept = [f for f in found if not matches(f, ignore)]
    primary, findings = causes.judge(kept)
    rows = () if evidence.undifferentiable else _rows(evidence)
    facts = {} if evidence.undifferentiable else _facts(evidence)
    course = None if evidence.undifferentiable else _course(evidence)
    return Report(primary, findings, rows, facts, tuple(evidence.notes), course)


def _apply_rules(evidence: Evidence) -> list[Finding]:
    found: list[Finding] = []
    for rule in RULES:
        if any(f.severity == "error" and f.code in _CONCLUSIVE for f in found):
            break
        try:
            found += rule(evidence)
        except Exception as error:  # said in the report: one rule that fails must not hide the rest
            evidence.notes.append(f"rule {rule.__name__} failed: {type(error).__name__}: {error}")
    return found


def _course(evidence: Evidence) -> Course | None:
    try:
        return course_of(evidence)
    except Exception as error:  # the findings stand without pictures
        evidence.notes.append(f"no pictures could be drawn: {type(error).__name__}: {error}")
        return None


def _rows(evidence: Evidence) -> tuple[dict[str, Any], ...]:
    measured = evidence.initial
    index = {n: i for i, n in enumerate(evidence.problem.names)}
    rows = []
    for k, name in enumerate(measured.names):
        owners = [p for p in measured.row_parameters[k] if p in index]
        gradients = [measured.grads[index[p]] for p in owners]
        sizes = [
            float(np.sqrt(np.mean(np.square(g, dtype=np.float64)))) for g in gradients if g.size
        ]
        rows.append(
            {
                "name": name,
                "activation_rms": float(measured.rows["rms"][k]),
                "gradient_rms": float(measured.rows["gradient_rms"][k]),
                "zero_share": float(measured.rows["zero_share"][k]),
                "weight_gradient_rms": max(sizes) if sizes else None,
                "parameters": owners,
            }
        )
    return tuple(rows)


def _facts(evidence: Evidence) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "loss": evidence.initial.value, "gradient_norm": evidence.initial.norm,
        "chance": evidence.chance, "parameters": sum(v.size for v in evidence.problem.values),
    }  # fmt: skip
    if () in evidence._runs:
        run = evidence.main
        facts |= {
            "steps": len(run.losses), "loss_at_the_end": run.last,
            "update_over_weight": run.update_ratio, "stopped": run.stopped,
            "micro_steps": evidence.every,
        }  # fmt: skip
    return facts
