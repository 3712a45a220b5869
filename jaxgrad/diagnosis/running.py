"""What goes wrong while the loss is trained, and what a change of one circumstance does to it."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.diagnosis.evidence import LEARNS, Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.initial import layer_of_leaf
from jaxgrad.diagnosis.problem import Problem
from jaxgrad.diagnosis.training import Run, Trainer
from jaxgrad.graph.ir import Value

_SLOW = 10.0**-4.5  # update RMS over weight RMS; healthy runs stand between 1e-2 and 1e-4


def ascent(evidence: Evidence) -> list[Finding]:
    """The first update goes up the gradient."""
    if evidence.optimizer is None or not evidence.initial.finite:
        return []
    run = evidence.main
    moved = np.flatnonzero((run.update_norms > 0) & np.isfinite(run.alignment))[:5]
    if not moved.size or np.median(run.alignment[moved]) > -0.05 or run.alignment[moved[0]] > 0:
        return []
    return [
        Finding(
            "optimizer.ascent", "error", "running", "optimizer",
            "The updates go up the gradient: their cosine with the negative gradient is "
            f"{run.alignment[moved[0]]:.2f} at the first step.",
            {"cosine": [float(c) for c in run.alignment[moved]], "threshold": -0.05},
            fix("optimizer.ascent"), 0.97,
            may_be_wrong="the objective is meant to be maximized",
        )
    ]  # fmt: skip


def falling_without_end(evidence: Evidence) -> list[Finding]:
    """A cross-entropy with its sign flipped: every row's gradient raises one logit's loss."""
    head = evidence.head
    if head is None or head.kind != "log" or head.size < 3 or not evidence.initial.finite:
        return []
    if evidence.initial.value >= 0 or evidence.chance is None:
        return []
    if abs(evidence.initial.value + evidence.chance) > 0.7 * evidence.chance:
        return []
    return [
        Finding(
            "optimizer.ascent", "error", "initial", head.where,
            f"The loss begins at {evidence.initial.value:.3g}, minus the logarithm of the number "
            "of classes: its sign is flipped, and the likelihood of the labels is minimized.",
            {"loss": evidence.initial.value, "minus_chance": -evidence.chance},
            "loss = -log_probabilities[labels].mean()", 0.9,
        )
    ]  # fmt: skip


def clip_always(evidence: Evidence) -> list[Finding]:
    """The clip takes off nine tenths of almost every gradient."""
    order = evidence.clip
    if order is None or order not in ("before", "both", "stateless", "mixed"):
        return []
    threshold = _threshold(evidence)
    norms = evidence.main.gradient_norms
    norms = norms[np.isfinite(norms)]
    if threshold is None or not norms.size:
        return []
    share, ratio = float(np.mean(norms > threshold)), float(np.median(norms) / threshold)
    if share < 0.9 or ratio < 10:
        return []
    return [
        Finding(
            "optimizer.clip_always", "warning", "running", "optimizer",
            f"The clip is active at {share:.0%} of the steps and divides the gradient by "
            f"{ratio:.3g} in the median: it sets the step size.",
            {"share_clipped": share, "ratio": ratio, "clip_norm": threshold,
             "raw_norm_90th_percentile": float(np.quantile(norms, 0.9)), "threshold": 10.0},
            fix("optimizer.clip_always", threshold=float(np.quantile(norms, 0.9))), 0.88,
            may_be_wrong="normalized gradients are meant",
        )
    ]  # fmt: skip


def _threshold(evidence: Evidence) -> float | None:
    """Norm along the given gradient at which a fresh state stops to answer; None if it never."""
    problem, tx = evidence.problem, evidence.trainer.tx
    if not evidence.initial.finite or evidence.initial.norm == 0:
        return None
    tree = problem.tree(problem.values)
    powers = np.arange(-32.0, 17.0)
    every = evidence.every

    @jax.jit
    def answers(factors: jax.Array) -> list[jax.Array]:
        def one(factor: jax.Array) -> list[jax.Array]:
            grads = [jnp.asarray(g) * factor for g in evidence.initial.grads]
            state = tx.init(tree)
            for _ in range(min(every, 8)):
                updates, state = tx.update(problem.tree(grads), state, tree)
            floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
            seen = problem.flat(updates) if evidence.clip == "stateless" else floats
            return [jnp.sum(jnp.abs(x)) for x in seen]

        return jax.lax.map(one, factors)

    try:
        table = jax.device_get(answers(jnp.asarray(2.0**powers, jnp.float32)))
    except TypeError:
        return None
    found = []
    for column in map(np.asarray, table):
        if not np.isfinite(column).all() or column[-1] == 0:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            slopes = np.diff(np.log2(column))
        rises = np.abs(slopes[:4].mean() - 1) < 0.05 or np.abs(slopes[:4].mean() - 2) < 0.1
        if rises and np.abs(slopes[-4:]).max() < 0.01:
            power = 1 if slopes[:4].mean() < 1.5 else 2
            gain = np.log2(column[0]) / power - powers[0]
            found.append(2.0 ** (np.log2(column[-1]) / power - gain))
    return float(min(found)) * evidence.initial.norm if found else None


# -------------------------------------------------------------------------------- learning rate


def learning_rate(evidence: Evidence) -> list[Finding]:
    """Too high, too low, a batch too small for it, or Post-LN without a warm-up."""
    if evidence.optimizer is None or not evidence.initial.finite:
        return []
    if evidence.every > 1 and not (evidence.main.update_norms > 0).any():
        return []
    too_low = _too_low(evidence)
    if too_low:
        return too_low
    if evidence.improves and not _shaken(evidence):
        return []
    return _too_high(evidence)


def _shaken(evidence: Evidence) -> bool:
    """Whether a run that improves was far above its start on the way."""
    losses = evidence.main.losses
    base = evidence.initial.value
    return bool(np.nanmax(losses) > 3 * abs(base) and np.nanmedian(losses) > 0.5 * abs(base))


def _too_low(evidence: Evidence) -> list[Finding]:
    run = evidence.main
    if run.stopped is not None or run.update_ratio > _SLOW or evidence.warms_up:
        return []
    own = evidence.progress(run)
    if own > 0.05:
        return []
    for scale in (10.0, 100.0, 1e3, 1e4, 1e5):
        other = evidence.run(scale=scale)
        gained = evidence.progress(other)
        if gained > max(0.1, 10 * own) and scale >= 100:
            return [_low(evidence, scale, gained)]
        if gained > LEARNS:
            return []
    if run.update_norms.max() == 0 and evidence.progress(evidence.run(reference=True)) > 0.1:
        return [_low(evidence, math.inf, evidence.progress(evidence.run(reference=True)))]
    return []


def _low(evidence: Evidence, scale: float, gained: float) -> Finding:
    run = evidence.main
    return Finding(
        "lr.too_low", "error", "counterfactual", "optimizer",
        f"In {len(run.losses)} steps the updates took {evidence.progress(run):.2%} off the loss; "
        f"{scale:g} times larger ones take off {gained:.0%}.",
        {"update_over_weight": run.update_ratio, "threshold": _SLOW,
         "loss_as_given": run.last, "scale": scale, "taken_off_at_scale": gained},
        fix("lr.too_low", factor=scale), 0.9,
        may_be_wrong="a schedule raises the rate later",
    )  # fmt: skip


def _too_high(evidence: Evidence) -> list[Finding]:
    run = evidence.main
    own = evidence.progress(run)
    best, factor = own, 1.0
    for scale in (0.1, 0.01, 0.001):
        gained = evidence.progress(evidence.run(scale=scale))
        if gained > best:
            best, factor = gained, scale
        if best > LEARNS:
            break
    post = is_post_ln(evidence)
    if post and not evidence.warms_up:
        found = _post_ln(evidence, best)
        if found:
            return found
    if not math.isfinite(best) or best < max(0.1, 2 * own):
        return []
    if _moves_little(run):
        return []
    small = _batch_too_small(evidence, own)
    if small:
        return small
    return [
        Finding(
            "lr.too_high", "error", "counterfactual", "optimizer",
            (f"The training breaks down at step {run.stopped}" if run.stopped is not None
             else f"The training gets to a loss of {run.last:.3g}")
            + f"; with updates {1 / factor:g} times smaller it gets to "
            f"{evidence.run(scale=factor).last:.3g}.",
            {"first_loss": run.first, "loss_as_given": run.last, "scale": factor,
             "loss_at_scale": evidence.run(scale=factor).last,
             "update_over_weight": run.update_ratio},
            fix("lr.too_high", factor=factor), 0.9,
        )
    ]  # fmt: skip


def _moves_little(run: Run) -> bool:
    return run.stopped is None and run.update_ratio < 1e-4


def is_post_ln(evidence: Evidence) -> bool:
    """Whether norms stand on the residual path itself."""
    norms = [n for n in evidence.structure.norms if n.after_sum and not n.over_batch]
    post = sum(n.copies for n in norms if n.post)
    return post >= 4 and post > sum(n.copies for n in norms if not n.post)


def _post_ln(evidence: Evidence, best: float) -> list[Finding]:
    own = evidence.progress(evidence.main)
    steps = evidence.steps
    warm = max(
        evidence.progress(evidence.run(warmup=steps)),
        evidence.progress(evidence.run(scale=0.3, warmup=steps)),
    )
    cured = max(warm, best)
    if cured < max(0.02, 2 * own):
        return []
    norm = next(n for n in evidence.structure.norms if n.post)
    return [
        Finding(
            "norm.post_ln_without_warmup", "error", "counterfactual", norm.where,
            "The norms stand on the residual path (Post-LN), and the learning rate starts at its "
            "peak: the deep stack stalls, and gentler first steps mend it.",
            {"loss_as_given": evidence.main.last, "taken_off": own,
             "taken_off_with_warmup": warm, "taken_off_at_lower_rates": best,
             "norms": sum(n.copies for n in evidence.structure.norms if n.post)},
            fix("norm.post_ln_without_warmup"), 0.85,
            may_be_wrong="the learning rate is too high for any arrangement of norms",
        )
    ]  # fmt: skip


def _batch_too_small(evidence: Evidence, own: float) -> list[Finding]:
    """The same rate on the union of the batches."""
    problem = evidence.problem
    count = len(problem.batches)
    sizes = {x.shape[0] for x in jax.tree.leaves(problem.batch) if getattr(x, "ndim", 0)}
    if count < 4 or len(sizes) != 1 or min(sizes) > 8:
        return []
    union = jax.tree.map(
        lambda *xs: jnp.concatenate(xs) if getattr(xs[0], "ndim", 0) else xs[0], *problem.batches
    )
    evidence.tell("training on the union of the batches")
    bigger = Problem(**{**vars(problem), "batch": union, "batches": (union,)})
    run = Trainer(bigger, evidence.optimizer, evidence.steps).run()
    gained = (run.first - run.last) / max(abs(run.first), 1e-12)
    if not gained > max(LEARNS, 2 * own):
        return []
    return [
        Finding(
            "batch.too_small", "error", "counterfactual", "optimizer",
            f"With batches of {min(sizes)} the gradient is mostly noise at this learning rate; on "
            f"batches of {min(sizes) * count} the same rate learns.",
            {"batch": min(sizes), "taken_off": own, "taken_off_by_larger_batch": gained},
            fix("batch.too_small", every=count), 0.8,
        )
    ]  # fmt: skip


# ------------------------------------------------------------------------------------- terms, masks


def regularization(evidence: Evidence) -> list[Finding]:
    """Penalties, or decoupled decay, whose gradient is larger than that of the data."""
    if not evidence.initial.finite:
        return []
    return _penalty(evidence) or _decay(evidence)


def _penalty(evidence: Evidence) -> list[Finding]:
    penalties = evidence.structure.penalties
    if not penalties:
        return []
    grads = _gradient_of(evidence, penalties)
    data = [g - r for g, r in zip(evidence.initial.grads, grads, strict=True)]
    ratio = _norm(grads) / max(_norm(data), 1e-30)
    if ratio < 3 or evidence.is_trained:
        return []
    return [_dominates(evidence, ratio, "the penalty in the loss")]


def _gradient_of(evidence: Evidence, penalties: list[Value]) -> list[np.ndarray]:
    from jaxgrad.diagnosis.passes import inputs_for, tappable
    from jaxgrad.graph import rewrite

    wiring, problem = evidence.wiring, evidence.problem
    places = {tappable(v, wiring) for v in penalties} - {None}
    taps = {v: i for i, v in enumerate(places)}
    tapped = rewrite.Tapped(wiring.table, taps, lambda x, _: (jax.lax.stop_gradient(x), x), None)
    slots = {i: jnp.zeros(()) for i in taps.values()}

    def data_only(values: list[jax.Array]) -> jax.Array:
        out, _ = tapped.run(wiring.block, inputs_for(problem, values, problem.batch), slots)
        return out[0]

    data = jax.device_get(jax.jit(jax.grad(data_only))(problem.values))
    return [g - d for g, d in zip(evidence.initial.grads, data, strict=True)]


def _norm(leaves: list[np.ndarray]) -> float:
    return math.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in leaves))


def _decay(evidence: Evidence) -> list[Finding]:
    """What the optimizer does to the parameters where the gradient is zero."""
    if evidence.optimizer is None:
        return []
    problem, tx = evidence.problem, evidence.trainer.tx
    tree, state = problem.tree(problem.values), None
    zeros = problem.tree([jnp.zeros_like(v) for v in problem.values])
    real = problem.tree([jnp.asarray(g) for g in evidence.initial.grads])
    try:
        state = tx.init(tree)
        update = jax.jit(lambda g: tx.update(g, state, tree)[0])
        still = [np.asarray(u) for u in problem.flat(update(zeros))]
        moved = [np.asarray(u) for u in problem.flat(update(real))]
    except TypeError:
        return []
    ratio = _norm(still) / max(_norm([a - b for a, b in zip(moved, still, strict=True)]), 1e-30)
    if ratio < 0.5 or not np.isfinite(ratio) or _norm(still) == 0:
        return []
    shrunk = _norm([np.asarray(v) for v in evidence.main.values]) / max(
        _norm([np.asarray(v) for v in problem.values]), 1e-30
    )
    free = evidence.progress(evidence.run(reference=True))
    if ratio < 3 and (shrunk > 0.8 or evidence.progress(evidence.main) > 0.5 * free):
        return []
    return [_dominates(evidence, ratio, "the weight decay of the optimizer")]


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


# ---------------------------------------------------------------------------------------- attention


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
    if len(known) < 3 or not evidence.stuck:
        return []
    start = max(s for _, s in known[: max(len(known) // 3, 1)])
    name, share = min(known[len(known) // 2 :], key=lambda item: item[1])
    if start < 0.05 or share > 1e-3 * start or share == 0:
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


# ------------------------------------------------------------------------------------------ events


def spike(evidence: Evidence) -> list[Finding]:
    """A loss far above all others before it, from which the run comes back."""
    losses, norms = evidence.main.losses, evidence.main.gradient_norms
    if evidence.main.stopped is not None or len(losses) < 20:
        return []
    for t in range(8, len(losses) - 2):
        before = losses[max(t - 21, 0) : t]
        middle = float(np.median(before))
        spread = float(np.median(np.abs(before - middle))) * 1.4826
        high = losses[t] > middle + 10 * max(spread, 0.05 * abs(middle))
        above = losses[t] > max(before.max() * 3, losses[:3].max() * 2)
        if not (high and above and norms[t] > 5 * np.median(norms[max(t - 21, 0) : t])):
            continue
        return [
            Finding(
                "loss.spike", "warning", "running", f"step {t}",
                f"At step {t} the loss jumps from {middle:.3g} to {losses[t]:.3g}.",
                {"step": t, "loss": float(losses[t]), "median_before": middle,
                 "batch": t % len(evidence.problem.batches),
                 "gradient_norm": float(norms[t]), "threshold": "10 sigma and 3 x"},
                fix("loss.spike", step=t), 0.85,
            )
        ]  # fmt: skip
    return []


def breakdown(evidence: Evidence) -> list[Finding]:
    """The run breaks down at every learning rate that was tried."""
    run = evidence.main
    if run.stopped is None or not evidence.initial.finite:
        return []
    if any(evidence.run(scale=s).stopped is None for s in (0.1, 0.01, 0.001)) or not run.stopped:
        return []
    leaf = evidence.problem.names[int(np.nanargmax(run.gradient_rms[run.stopped - 1]))]
    return [
        Finding(
            "gradient.exploding", "error", "running", layer_of_leaf(evidence, leaf),
            f"The training breaks down at step {run.stopped}, at a thousandth of the learning rate "
            "too.",
            {"step": run.stopped, "gradient_norm": float(run.gradient_norms[run.stopped])},
            fix("gradient.exploding"), 0.6,
        )
    ]  # fmt: skip


RULES = [
    ascent, falling_without_end, dropout, regularization, attention, clip_always, learning_rate,
    spike, breakdown,
]  # fmt: skip
