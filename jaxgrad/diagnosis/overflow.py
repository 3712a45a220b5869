"""Infinities of float16 that no loss shows: a norm, or a quotient, makes zeros of them."""

import jax.numpy as jnp

from jaxgrad.diagnosis.altered import altered, reachable
from jaxgrad.diagnosis.births import overflows
from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.gradients import GROWING
from jaxgrad.diagnosis.training import Trainer
from jaxgrad.diagnosis.wiring import source_line

_LARGEST = 65504.0


def overflowed(evidence: Evidence) -> list[Finding]:
    """Values beyond the end of float16 behind a finite loss, without which the run learns.

    The same training with all of them held at the largest number of float16 tells it; an infinity
    that only fills a mask, or that a sigmoid is made of, changes nothing there.
    """
    problem, wiring = evidence.problem, evidence.wiring
    half = any(wiring.dtype(v) == "float16" for v in wiring.reaching)
    if not half or not evidence.initial.finite:
        return []
    op, infinite = overflows(problem, wiring)
    if op is None or op.name not in GROWING:
        return []
    held = altered(
        problem, wiring, reachable(infinite, wiring), lambda x, _: jnp.clip(x, -_LARGEST, _LARGEST)
    )
    if held is None:
        return []
    evidence.tell(f"training {evidence.steps} steps with float16 held at its largest number")
    cured = Trainer(held, evidence.optimizer, evidence.steps).run()
    if not evidence.gains(cured):
        return []
    line = source_line(op)
    return [
        Finding(
            "precision.overflow", "error", "counterfactual",
            wiring.layer_after(op.outputs[0], 20),
            f"float16 ends at 65504, and {op.name}" + (f" ({line})" if line else "")
            + " exceeds it; what follows makes a finite loss of the infinity, but what it carried "
            f"is lost. With such values held at 65504 the same training gets to {cured.last:.3g} "
            f"instead of {evidence.main.last:.3g}.",
            {"operation": op.name, "line": line, "loss_as_given": evidence.main.last,
             "loss_with_values_held": cured.last},
            fix("precision.overflow"), 0.92,
            may_be_wrong="the values are clipped on purpose",
        )
    ]  # fmt: skip
