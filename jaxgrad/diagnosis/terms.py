"""Penalties, decay, dropout and attention: terms that stand beside the layers."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.diagnosis import guess, summands
from jaxgrad.diagnosis.altered import altered, reachable
from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.problem import arrays_of
from jaxgrad.graph.ir import Value

# A penalty whose first gradient is below this share of the data's does not keep them from learning.
_NOTICED = 0.03
_ROUNDING = 1e-6  # a step by less of the parameters is float32's rounding
_PARALLEL = 0.99  # cosine between a change of the parameters and themselves


def regularization(evidence: Evidence) -> list[Finding]:
    """Penalties, or decoupled decay, whose gradient is larger than that of the data."""
    if not evidence.initial.finite:
        return []
    return _penalty(evidence) or _decay(evidence) or _outweighed(evidence)


def _penalty(evidence: Evidence) -> list[Finding]:
    given, wiring = evidence.structure.penalties, evidence.wiring
    penalties = [term for term in given if not summands.asks_the_model(term, wiring)]
    if not penalties:
        return []
    grads = _gradient_of(evidence, penalties)
    data = [g - r for g, r in zip(evidence.initial.grads, grads, strict=True)]
    ratio = _norm(grads) / max(_norm(data), 1e-30)
    if evidence.is_trained:
        return []
    if ratio < 3:
        facts = summands.given_up(evidence, penalties) if ratio > _NOTICED else None
        return [] if facts is None else [_costs_the_fit(ratio, facts)]
    run, without = evidence.main, guess.loss_of_zeros(evidence.problem, evidence.wiring, penalties)
    if run.stopped is None and without is not None and abs(run.last) < 0.1 * without:
        return []  # both became small together: a condition that is met keeps nothing from learning
    return [_dominates(evidence, ratio, "the penalty in the loss")]


def _costs_the_fit(ratio: float, facts: dict[str, float]) -> Finding:
    return Finding(
        "regularization.dominates", "error", "counterfactual", "loss",
        "The penalty in the loss costs the fit to the data: at the end of the run the rest of the "
        f"loss is {facts['rest_at_the_end']:.3g}, and a model that knows nothing has "
        f"{facts['rest_of_a_model_that_knows_nothing']:.3g}; without the penalty the same training "
        f"gets to {facts['rest_without_the_term']:.3g}.",
        {"penalty_over_data": ratio} | facts, fix("regularization.dominates", factor=100.0), 0.88,
        may_be_wrong="the penalty is lowered later",
    )  # fmt: skip


def _gradient_of(evidence: Evidence, penalties: list[Value]) -> list[np.ndarray | np.generic]:
    problem, wiring = evidence.problem, evidence.wiring
    places = reachable(penalties, wiring)
    fit = altered(problem, wiring, places, lambda x, _: jax.lax.stop_gradient(x)) or problem
    data = jax.device_get(jax.jit(jax.grad(fit.value))(problem.values, arrays_of(problem.batch)))
    return [g - d for g, d in zip(evidence.initial.grads, data, strict=True)]


def _norm(leaves: Sequence[Any]) -> float:
    arrays = [np.asarray(x) for x in leaves]
    return math.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in arrays))


def _decay(evidence: Evidence) -> list[Finding]:
    """What the optimizer does to the parameters where the gradient is zero."""
    if evidence.optimizer is None:
        return []
    problem = evidence.problem
    try:
        still, moved = _steps_without_and_with_data(evidence)
    except TypeError:
        return []
    ratio = _norm(still) / max(_norm([a - b for a, b in zip(moved, still, strict=True)]), 1e-30)
    if ratio < 0.5 or not np.isfinite(ratio) or _norm(still) == 0:
        return []
    size = _norm(problem.values)
    shrunk = _norm(evidence.main.values) / max(size, 1e-30)
    free = evidence.progress(evidence.run(reference=True))
    if ratio < 3 and (shrunk > 0.8 or evidence.progress(evidence.main) > 0.5 * free):
        return []
    found = _dominates(evidence, ratio, "the weight decay of the optimizer")
    share = _norm(still) / max(size, 1e-30)
    facts = {
        "decay_over_parameters": share,
        "breaks_the_run": share > 1 and evidence.main.stopped is not None,  # it overshoots zero
    }
    return [replace(found, evidence=found.evidence | facts)]


def _steps_without_and_with_data(evidence: Evidence) -> tuple[list[Any], list[Any]]:
    """The first step without a gradient and with it; a later one where a rate begins at zero.

    After steps with the gradient a momentum goes on without it, so that the same state is asked
    then for its step beside parameters of zero, where decay is none.
    """
    problem, tx = evidence.problem, evidence.trainer.tx
    tree, zeros = (
        problem.tree(v) for v in (problem.values, [jnp.zeros_like(v) for v in problem.values])
    )
    real = problem.tree([jnp.asarray(g) for g in evidence.initial.grads])
    state = tx.init(tree)
    update = jax.jit(tx.update)
    still, moved = (
        [np.asarray(u) for u in problem.flat(update(g, state, tree)[0])] for g in (zeros, real)
    )
    if _norm(moved) > 0 or not evidence.main.update_norms.any():
        if _norm(still) < _ROUNDING * _norm(problem.values):
            # averages that are kept of parameters (schedule-free) round them, and decay none
            still = [np.zeros_like(u) for u in still]
        return still, moved
    for _ in range(evidence.steps // 4):
        state = update(real, state, tree)[1]
    moved, data = (
        [np.asarray(u) for u in problem.flat(update(real, state, at)[0])] for at in (tree, zeros)
    )
    parts = zip(moved, data, problem.values, strict=True)
    return [_along(a - b, np.asarray(at)) for a, b, at in parts], moved


def _along(change: Any, at: Any) -> Any:
    """A change that is a multiple of the parameters, as decay makes; none if it is another one.

    Rules whose steps go by the size of the parameters (LAMB, LARS, Adafactor) differ beside zero
    without any decay.
    """
    size = np.linalg.norm(change.ravel()) * np.linalg.norm(at.ravel())
    return change if abs(np.vdot(change, at)) > _PARALLEL * size else np.zeros_like(change)


def _outweighed(evidence: Evidence) -> list[Finding]:
    """A term of no target, at whose cost the fit is given up.

    It is made of parameters and data, or of what the model says at places of its own.
    """
    terms = summands.summands(evidence.wiring)
    penalties = [t for t in terms if not summands.fits_data(t, evidence.wiring)]
    if len(penalties) == len(terms) or evidence.is_trained:
        return []
    for term in penalties:
        known = term in evidence.wiring.from_data
        if not known and not summands.asks_the_model(term, evidence.wiring):
            continue
        grads = _gradient_of(evidence, [term])
        data = [g - r for g, r in zip(evidence.initial.grads, grads, strict=True)]
        ratio = _norm(grads) / max(_norm(data), 1e-30)
        facts = summands.outweighs(evidence, term) if ratio > 1 else None
        if facts is None or (
            ratio < 3 and facts["rest_without_the_term"] > 0.5 * facts["rest_at_the_end"]
        ):
            continue
        return [
            Finding(
                "regularization.dominates", "error", "counterfactual", "loss",
                f"A term of the loss pulls {ratio:.3g} times as hard as the fit to the data. The "
                f"run pays it off (from {facts['term_at_first']:.3g} to "
                f"{facts['term_at_the_end']:.3g}) and leaves the rest at "
                f"{facts['rest_at_the_end']:.3g}; without the term that gets to "
                f"{facts['rest_without_the_term']:.3g}.",
                {"penalty_over_data": ratio, "threshold": 3.0} | facts,
                f"loss = fit + {0.1 / ratio:.1g} * term   # raise its weight slowly, if at all",
                0.85, may_be_wrong="the term alone is what the training is for",
            )
        ]  # fmt: skip
    return []


def _dominates(evidence: Evidence, ratio: float, what: str) -> Finding:
    return Finding(
        "regularization.dominates", "error", "initial", "optimizer" if "decay" in what else "loss",
        f"At the first step {what} pulls {ratio:.3g} times as hard as the data.",
        {"penalty_over_data": ratio, "threshold": 3.0, "loss_at_the_end": evidence.main.last},
        fix("regularization.dominates", factor=10 * ratio), 0.88,
        may_be_wrong="the parameters are converged, where both pull equally",
    )  # fmt: skip


def dropout(evidence: Evidence) -> list[Finding]:
    """Masks that leave less than a fifth of the activations."""
    for mask in evidence.structure.masks:
        if mask.predicate not in evidence.values:
            continue
        seen = evidence.values[mask.predicate]
        share = float(np.mean(seen)) if mask.keeps else 1 - float(np.mean(seen))
        if seen.size < 64 or share >= 0.2:
            continue
        return [
            Finding(
                "regularization.dropout_too_strong", "warning" if evidence.improves else "error",
                "initial", mask.where,
                f"Dropout keeps {share:.0%} of the activations of {mask.where}; its noise is "
                f"{(1 - share) / max(share, 1e-9):.1f} times the signal's power.",
                {"kept": share, "threshold": 0.2}, fix("regularization.dropout_too_strong"), 0.92,
                may_be_wrong="the mask is part of the task, as in masked modeling",
            )
        ]  # fmt: skip
    return []


def attention(evidence: Evidence) -> list[Finding]:
    """Scores so large that every softmax picks one key; tokens that become all alike."""
    if not evidence.structure.attention or not evidence.initial.finite:
        return []
    return _logits(evidence) or _rank(evidence)


def _logits(evidence: Evidence) -> list[Finding]:
    for softmax in evidence.structure.attention:
        if softmax.size < 2:
            continue
        at = softmax.scores
        if at not in evidence.initial.tensors:
            continue
        before = float(np.nanmax(evidence.initial.tensors[at].row["rms"]))
        if before >= 8 or (before >= 4 and evidence.stuck):
            return [_attention_finding(softmax.where, "initial", before, before)]
        if evidence.main.stopped is not None or evidence.learns:
            continue
        after = float(np.nanmax(evidence.final.tensors[at].row["rms"]))
        if after > 30 and after > 10 * before:
            return [_attention_finding(softmax.where, "running", before, after)]
    return []


def _attention_finding(where: str, stage: str, before: float, after: float) -> Finding:
    return Finding(
        "attention.logit_growth", "error", stage, where,
        f"The attention scores of {where} have an RMS of {after:.3g}: the softmax picks one key "
        "and passes no gradient to queries and keys.",
        {"rms": after, "rms_at_the_start": before, "threshold": 8.0},
        fix("attention.logit_growth"), 0.85,
        may_be_wrong="sharp attention is what the task needs",
    )  # fmt: skip


def _rank(evidence: Evidence) -> list[Finding]:
    rows = evidence.initial.rows["token_share"]
    known = [
        (n, float(s)) for n, s in zip(evidence.initial.names, rows, strict=True) if np.isfinite(s)
    ]
    if len(known) < 3:
        return []
    start = max(s for _, s in known[: max(len(known) // 3, 1)])
    name, share = min(known[len(known) // 2 :], key=lambda item: item[1])
    lost = share < 1e-6 * start  # in the last bits of float32, whatever is learned from them
    if start < 0.05 or share == 0 or not (lost or (share < 1e-3 * start and evidence.stuck)):
        return []
    where = next(n for n, s in known if s < 0.03 * start)
    return [
        Finding(
            "attention.rank_collapse", "error", "initial", where,
            f"The tokens become all alike: at {name} {share:.1g} of the energy tells them apart, "
            f"at the beginning {start:.2g} does.",
            {"token_share": share, "token_share_at_the_start": start, "threshold": 1e-3 * start,
             "layers": [n for n, s in known if s < 0.03 * start]},
            fix("attention.rank_collapse"), 0.85,
        )
    ]  # fmt: skip
