"""Updates that are smaller than what a parameter's type can hold."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.training import Trainer

_LOST = 0.5  # share of a leaf's updates that change nothing
Lost = tuple[str, str, float]  # a leaf's name, its dtype, the share


def lost_shares(names: Sequence[str], dtypes: Sequence[str], shares: np.ndarray) -> list[Lost]:
    """The leaves of half precision that lose most of their updates, the worst one first.

    Args:
        names: of the leaves.
        dtypes: their types.
        shares: of the updates that changed nothing, (steps, leaves).
    """
    typical = np.nanmedian(shares, axis=0) if len(shares) else np.zeros(len(names))
    wanted = [
        (name, dtype, float(share))
        for name, dtype, share in zip(names, dtypes, typical, strict=True)
        if dtype in ("bfloat16", "float16") and share > _LOST
    ]
    return sorted(wanted, key=lambda item: -item[2])


def lost_updates(lost: list[Lost], facts: dict[str, Any], confidence: float) -> Finding:
    """The finding; `lost` holds the leaves, the worst one first."""
    name, dtype, share = lost[0]
    bits = {"bfloat16": 8, "float16": 11}[dtype]
    return Finding(
        "precision.lost_updates", "error", "running", name,
        f"{share:.0%} of the updates of {name} change nothing: they are smaller than half the last "
        f"of the {bits} bits that {dtype} keeps of a parameter.",
        {"lost": share, "threshold": _LOST, "dtype": dtype, "layers": [n for n, *_ in lost]}
        | facts,
        fix("precision.lost_updates", dtype=dtype), confidence,
        may_be_wrong="the run has converged, and little is left to learn",
    )  # fmt: skip


def lost(evidence: Evidence) -> list[Finding]:
    """Parameters in half precision that stay where they are; float32 copies of them learn."""
    if evidence.optimizer is None or not evidence.initial.finite:
        return []
    problem, run = evidence.problem, evidence.main
    if run.stopped and not np.isfinite(run.update_norms[run.stopped - 1]):
        return _broken_update(evidence)
    if not any(v.dtype in (jnp.bfloat16, jnp.float16) for v in problem.values):
        return []
    dtypes = [str(v.dtype) for v in problem.values]
    moved = run.rounded_away[run.update_norms > 0]
    found = lost_shares(problem.names, dtypes, moved)
    if not found or run.stopped is not None:
        return []
    evidence.tell(f"training {evidence.steps} steps with float32 parameters")
    cured = _with_wide_parameters(evidence)
    # the same program but for the rounding: what differs is the rounding's doing
    if not evidence.gains(cured, times=1.5, by=0.05):
        return []
    facts = {"loss_as_given": run.last, "loss_with_float32_parameters": cured.last}
    return [lost_updates(found, facts, 0.93)]


def _broken_update(evidence: Evidence) -> list[Finding]:
    """A finite gradient becomes an update that is no number: inside of the optimizer."""
    problem, run = evidence.problem, evidence.main
    step = (run.stopped or 1) - 1
    leaf = int(np.argmin(np.isfinite(run.update_rms[step])))
    name, dtype = problem.names[leaf], str(problem.values[leaf].dtype)
    facts = {
        "step": step, "gradient_norm": float(run.gradient_norms[step]), "dtype": dtype,
        "layers": [n for n, r in zip(problem.names, run.update_rms[step], strict=True)
                   if not np.isfinite(r)],
    }  # fmt: skip
    half = dtype in ("float16", "bfloat16")
    if half and _with_wide_parameters(evidence).stopped is None:
        return [
            Finding(
                "precision.underflow", "error", "counterfactual", name,
                f"At step {step} the optimizer makes NaN or infinity of a finite gradient: {name} "
                f"is kept in {dtype}, where its epsilon, or a squared gradient, is zero. With "
                "float32 parameters the run is finite.",
                facts, fix("precision.lost_updates", dtype=dtype), 0.93,
            )
        ]  # fmt: skip
    return [
        Finding(
            "gradient.nonfinite", "error", "running", "optimizer",
            f"At step {step} the optimizer makes NaN or infinity of a finite gradient, first of "
            f"{name}: a division by zero where the gradient is zero.",
            facts, "tx = optax.adam(learning_rate, eps=1e-8)   # never eps=0",
            0.85,
        )
    ]  # fmt: skip


def _with_wide_parameters(evidence: Evidence) -> Any:
    """The same training where float32 parameters are kept, and rounded inside the loss."""
    problem = evidence.problem
    dtypes = [v.dtype for v in problem.values]

    def loss(params: Any, *rest: Any) -> Any:
        wide = problem.flat(params)
        narrow = [x.astype(d) for x, d in zip(wide, dtypes, strict=True)]
        return problem.loss(problem.params(narrow), *rest)

    leaves = list(problem.leaves)
    for i, value in zip(problem.wanted, problem.values, strict=True):
        leaves[i] = value.astype(jnp.float32)
    wide = dataclasses.replace(problem, loss=loss, leaves=tuple(leaves))
    return Trainer(wide, evidence.optimizer, evidence.steps).run()
