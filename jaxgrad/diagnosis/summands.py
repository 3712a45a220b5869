"""Terms of a loss that outweigh its fit to the data: a KL that keeps the latent code empty."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxgrad.diagnosis.altered import altered
from jaxgrad.diagnosis.evidence import KNOWS, WELL, Evidence
from jaxgrad.diagnosis.problem import Problem
from jaxgrad.diagnosis.training import Trainer
from jaxgrad.diagnosis.wiring import Wiring
from jaxgrad.graph.ir import Lit, Ref, Value

# Without the term, the rest of the loss falls so much further, and so much lower; with it, the run
# has paid it off: it is this share of what it was, and next to nothing beside what it costs.
_FURTHER, _LOWER, _PAID, _NOTHING = 1.2, 0.9, 0.1, 0.2


def summands(wiring: Wiring) -> list[Value]:
    """The scalars that the loss is the sum of, behind constant factors."""
    found: list[Value] = []
    queue: list[Ref] = [wiring.loss]
    while queue:
        ref = queue.pop()
        if isinstance(ref, Lit) or ref not in wiring.live or wiring.shape(ref) != ():
            continue
        inner, op = wiring.origin(ref)
        live = [r for r in op.inputs if not isinstance(r, Lit) and r in wiring.live] if op else []
        if op is not None and op.name in ("add", "add_any", "sub"):
            queue += op.inputs
        elif (
            op is not None
            and len(live) == 1
            and op.name in ("mul", "div")
            and _sums(live[0], wiring)
        ):
            queue += live
        elif not isinstance(inner, Lit):
            found.append(inner)
    return list(dict.fromkeys(found))


def _sums(ref: Ref, wiring: Wiring) -> bool:
    _, op = wiring.origin(ref)
    return op is not None and op.name in ("add", "add_any", "sub") and wiring.shape(ref) == ()


def fits_data(term: Value, wiring: Wiring) -> bool:
    """Whether data meet the model's output in a term: a target, a label, an image to rebuild."""
    for value in wiring.upstream([term]):
        op = wiring.producer.get(value)
        if op is None or value not in wiring.live or not wiring.is_head(value):
            continue
        inputs = [r for r in op.inputs if not isinstance(r, Lit)]
        outside = [r for r in inputs if r in wiring.from_data and r not in wiring.depends]
        if outside and any(r in wiring.live and r in wiring.from_data for r in inputs):
            return True
    return False


def asks_the_model(term: Value, wiring: Wiring) -> bool:
    """Whether a term is a condition on the model's output, as at the boundary of an equation.

    There one layer's weights meet what another one's made; a penalty takes every leaf on its own.
    A condition is part of what is to be learned, however hard it pulls at first.
    """
    leaves = set(wiring.parameters)
    for value in wiring.upstream([term]):
        op = wiring.producer.get(value)
        if op is None or op.name not in ("dot_general", "conv_general_dilated"):
            continue
        one, other = (wiring.upstream([ref]) & leaves for ref in op.inputs[:2])
        if one and other and one != other:
            return True
    return False


def without(evidence: Evidence, terms: Sequence[Value]) -> Problem | None:
    """The problem with some terms of its loss at zero."""
    return altered(evidence.problem, evidence.wiring, terms, lambda x, _: jnp.zeros_like(x))


def given_up(evidence: Evidence, terms: Sequence[Value]) -> dict[str, float] | None:
    """The rest of the loss, where only a training without some terms makes anything of it.

    Args:
        evidence: what is known.
        terms: made of parameters alone.
    """
    run, rest = evidence.main, without(evidence, terms)
    if rest is None or run.stopped is not None or evidence.baseline is None:
        return None
    trainer, whole = Trainer(rest, evidence.optimizer, evidence.steps), evidence.trainer
    start, end = trainer.level(evidence.problem.values), trainer.level(run.values)
    nothing = evidence.baseline - (whole.level(evidence.problem.values) - start)
    if end <= KNOWS * nothing and whole.level(run.values) > 2 * end:  # not paid off yet
        end = trainer.level(evidence.longer.values)
    if not end > KNOWS * nothing > 0:
        return None
    evidence.tell(f"training {evidence.steps} steps without penalties")
    free = trainer.run()
    best = trainer.level(free.values)
    if free.stopped is not None or not best < WELL * min(end, nothing):
        return None
    return {
        "rest_at_first": start, "rest_at_the_end": end, "rest_without_the_term": best,
        "rest_of_a_model_that_knows_nothing": nothing,
    }  # fmt: skip


def outweighs(evidence: Evidence, term: Value) -> dict[str, float] | None:
    """What the same training makes of the rest of the loss without a term; None if no more."""
    run, rest = evidence.main, without(evidence, [term])
    if rest is None or run.stopped is not None:
        return None
    evidence.tell(f"training {evidence.steps} steps without a term of the loss")
    trainer = Trainer(rest, evidence.optimizer, evidence.steps)
    free = trainer.run()
    if free.stopped is not None:
        return None
    of_rest, of_all = trainer.level, evidence.trainer.level
    start, end = of_rest(evidence.problem.values), of_rest(run.values)
    first, last = of_all(evidence.problem.values) - start, of_all(run.values) - end
    best = of_rest(free.values)
    if _NOTHING * (start - best) <= last < _PAID * first:  # most of it is paid off, not yet all
        values = evidence.longer.values
        end = of_rest(values)
        last = of_all(values) - end
    if not best < _LOWER * end or not start - best > _FURTHER * (start - end):
        return None
    if not 0 <= last < min(_PAID * first, _NOTHING * (start - best)):
        return None  # both are at odds to the end: a compromise, as it may be meant
    return {
        "rest_at_first": start, "rest_at_the_end": end, "rest_without_the_term": best,
        "term_at_first": first, "term_at_the_end": last,
    }  # fmt: skip
