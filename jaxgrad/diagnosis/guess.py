"""What the loss of a model that knows nothing comes to: every logit, or every prediction, zero."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.diagnosis.altered import altered, reachable
from jaxgrad.diagnosis.parts import Softmax, Structure
from jaxgrad.diagnosis.problem import FEW, Problem, arrays_of, count_examples
from jaxgrad.diagnosis.structure import bound_of
from jaxgrad.diagnosis.wiring import Wiring
from jaxgrad.graph.ir import Value


def logits(structure: Structure, wiring: Wiring) -> list[Value]:
    """The tensors whose softmax, or sigmoid, the loss takes the logarithm of."""
    logs = any(h.kind == "log" for h in structure.log_heads)
    found = [
        s.source for s in structure.softmaxes if s.head and s.size > 1 and (s.kind == "log" or logs)
    ]
    for head in structure.log_heads:
        bound = bound_of(head.source, structure, wiring) or bound_of(head.bare, structure, wiring)
        if head.kind == "log_sigmoid":
            found.append(head.source)
        elif bound is not None and bound.kind == "sigmoid":
            found.append(bound.source)
    return list(dict.fromkeys(found))


def predictions(structure: Structure, wiring: Wiring) -> list[Value]:
    """The tensors that the loss compares with targets, as the last layer gives them."""
    unbounded = [
        d.prediction
        for d in structure.differences
        if bound_of(d.prediction, structure, wiring) is None
    ]
    return list(dict.fromkeys(unbounded))


def loss_of_zeros(problem: Problem, wiring: Wiring, where: Sequence[Value]) -> float | None:
    """`value_of_zeros` where it is a positive loss, None otherwise."""
    loss = value_of_zeros(problem, wiring, where)
    return loss if loss is not None and loss > 0 else None


def value_of_zeros(
    problem: Problem, wiring: Wiring, where: Sequence[Value], fill: float | np.ndarray = 0.0
) -> float | None:
    """The loss with a constant in the place of some tensors; None where there is no number.

    It takes the loss as it is written, with its weights, masks, smoothing and sums: no formula for
    the number of classes could.
    """
    places = reachable(where, wiring)
    other = altered(problem, wiring, places, lambda x, _: jnp.full_like(x, fill))
    if other is None:
        return None
    value = jax.jit(other.value)
    few = (count_examples(problem.batch) or FEW) < FEW
    batches = problem.batches if few else (problem.batch,)
    loss = float(np.mean([value(problem.values, arrays_of(batch)) for batch in batches]))
    return loss if math.isfinite(loss) else None


def loss_of_means(
    problem: Problem, wiring: Wiring, structure: Structure, known: dict[Value, np.ndarray]
) -> float | None:
    """The loss of a regression whose output is its targets' mean, whatever the input.

    Args:
        problem: the problem.
        wiring: its dataflow.
        structure: what was read off it.
        known: tensors of the batch, targets among them.
    """
    pairs = [(d.prediction, d.target) for d in structure.differences]
    if len(pairs) != 1 or not isinstance(pairs[0][1], int) or pairs[0][1] not in known:
        return None
    prediction, target = pairs[0][0], np.asarray(known[pairs[0][1]], np.float32)
    if not target.ndim or target.shape != wiring.shape(prediction) or len(target) < FEW:
        return None
    loss = value_of_zeros(problem, wiring, [prediction], target.mean(0, keepdims=True))
    return loss if loss is not None and loss > 0 else None


def chance(
    problem: Problem, wiring: Wiring, structure: Structure, head: Softmax | None
) -> float | None:
    """The loss of equal logits where the loss is a cross-entropy, None where it is another one.

    Args:
        problem: the problem.
        wiring: its dataflow.
        structure: what was read off it.
        head: the softmax of the classification, if there is one.
    """
    measured = loss_of_zeros(problem, wiring, logits(structure, wiring))
    if measured is None and head is not None and head.size > 1:
        return math.log(head.size)  # a likelihood that is minimized: below zero
    return measured


def marginal_entropy(labels: np.ndarray, unit: float) -> float | None:
    """Entropy of the labels' own distribution in the batch; None without integer labels.

    Args:
        labels: of the batch.
        unit: what one nat is in the loss: 1 of a mean, the number of tokens of a sum.
    """
    if not labels.size or not np.issubdtype(labels.dtype, np.integer):
        return None
    shares = np.unique(labels, return_counts=True)[1] / labels.size
    return unit * float(-np.sum(shares * np.log(shares)))
