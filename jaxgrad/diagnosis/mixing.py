"""Examples of a batch that are mixed, and sums that are thrown away."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.diagnosis.altered import altered
from jaxgrad.diagnosis.evidence import WELL, Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.fixes import fix
from jaxgrad.diagnosis.passes import tappable
from jaxgrad.diagnosis.problem import FEW
from jaxgrad.diagnosis.training import Trainer
from jaxgrad.diagnosis.wiring import inputs_for
from jaxgrad.graph import rewrite
from jaxgrad.graph.ir import Lit, Value

_PROBED = 8  # examples that are exchanged one by one


def mixed_examples(evidence: Evidence) -> list[Finding]:
    """The output of an example follows the inputs of others more than its own.

    Examples are exchanged one by one, and the rows of the output that change are looked at. Batch
    statistics let others have a say too, but never the greater one; along a time axis in the
    place of the batch's, what comes later cannot change what was before.
    """
    if not evidence.initial.finite or evidence.progress(evidence.main) >= WELL:
        return []
    wiring, problem = evidence.wiring, evidence.problem
    leaves = [x for x in jax.tree.leaves(problem.batch) if isinstance(x, jax.Array)]
    sizes = {x.shape[0] if x.ndim else 0 for x in leaves}
    if len(sizes) != 1 or min(sizes) < FEW or any(x.shape[:1] == x.shape[1:2] for x in leaves):
        return []
    outputs = [v for v in evidence.structure.outputs if wiring.shape(v)[:1] == tuple(sizes)]
    at = tappable(outputs[-1], wiring) if outputs else None
    if at is None or wiring.lengths[wiring.producer[at]] or outputs[-1] not in wiring.from_data:
        return []
    shares = _shares_of_others(evidence, at, leaves)
    if shares is None or shares.min() < 1 or np.median(shares) < 2:
        return []
    where = _mixing_layer(evidence, min(sizes)) or wiring.layer(outputs[-1])
    return [
        Finding(
            "loss.output_mismatch", "error", "initial", where,
            "The examples of a batch are mixed: another input for one of them changes the outputs "
            f"of others {float(np.median(shares)):.3g} times as much as its own, as after a "
            "reshape in the place of a transpose.",
            {"others_over_own": float(np.median(shares)), "threshold": 2.0},
            fix("loss.output_mismatch (mixed)"), 0.9,
            may_be_wrong="the first axis of the batch is not that of the examples",
        )
    ]  # fmt: skip


def _shares_of_others(evidence: Evidence, at: Value, leaves: list[jax.Array]) -> np.ndarray | None:
    """Largest change of another row over that of an example's own, for some examples.

    None where only rows on one side of an example ever change.
    """
    wiring, problem = evidence.wiring, evidence.problem
    tapped = rewrite.Tapped(wiring.table, {at: 0}, lambda x, _: (x, x), jnp.zeros_like)
    aval = wiring.table.avals[at]
    slot = {0: jnp.zeros(aval.shape, aval.dtype)}

    @jax.jit
    def rows(arrays: list[jax.Array]) -> jax.Array:
        x = tapped.run(wiring.block, inputs_for(problem, problem.values, arrays), slot)[1][0]
        return x.astype(jnp.float32).reshape(x.shape[0], -1)

    size = leaves[0].shape[0]
    before, shares, sides = rows(leaves), [], set()
    for i in np.unique(np.linspace(1, size - 2, _PROBED).astype(int)):
        k = (i + size // 2) % size
        changed = np.asarray(jnp.abs(rows([x.at[i].set(x[k]) for x in leaves]) - before).max(1))
        others = np.delete(changed, i)
        sides |= {bool(j > i) for j in np.flatnonzero(changed > 0.1 * changed.max()) if j != i}
        shares.append(float(others.max()) / max(float(changed[i]), 1e-30))
    return np.asarray(shares) if len(sides) == 2 else None


def _mixing_layer(evidence: Evidence, size: int) -> str:
    """The layer after the first reshape that splits or joins the axis of the batch."""
    wiring = evidence.wiring
    for op in wiring.ops():
        if op.name != "reshape" or op.outputs[0] not in wiring.from_data & wiring.reaching:
            continue
        before, after = wiring.shape(op.inputs[0]), wiring.shape(op.outputs[0])
        if before[:1] == (size,) and after[:1] != (size,) and len(after) > 1:
            return wiring.layer_after(op.outputs[0], 8)
    return ""


def thrown_away(evidence: Evidence) -> list[Finding]:
    """A parameter whose sum with an activation is computed, and never used.

    Parameters that nothing reads, and whole heads that the loss leaves out, are common and right:
    the same training with the sum in the activation's place tells them apart.
    """
    if not evidence.initial.finite or evidence.progress(evidence.main) >= WELL:
        return []
    wiring, problem = evidence.wiring, evidence.problem
    index = {leaf: i for i, leaf in enumerate(wiring.parameters)}
    for op in wiring.ops():
        if op.name != "add" or op.outputs[0] in wiring.reaching or wiring.lengths[op]:
            continue
        for one, other in ((0, 1), (1, 0)):
            leaf, base = wiring.origin(op.inputs[one])[0], op.inputs[other]
            if isinstance(leaf, Lit) or isinstance(base, Lit) or leaf not in index:
                continue
            unused = leaf not in wiring.reaching and problem.trainable[index[leaf]]
            if unused and base in wiring.reaching & wiring.from_data:
                found = _with_the_sum(evidence, base, index[leaf])
                if found:
                    return found
    return []


def _with_the_sum(evidence: Evidence, base: Value, i: int) -> list[Finding]:
    wiring, problem = evidence.wiring, evidence.problem
    shape, at = problem.values[i].shape, tappable(base, wiring)
    whole = wiring.shape(base)
    if at is None or wiring.lengths[wiring.producer[at]] or whole != wiring.shape(at):
        return []
    if whole[len(whole) - len(shape) :] != shape:
        return []
    other = altered(problem, wiring, [base], lambda x, values: x + values[i])
    if other is None:
        return []
    name = problem.names[i]
    evidence.tell(f"training {evidence.steps} steps with {name} added")
    cured = Trainer(other, evidence.optimizer, evidence.steps).run()
    if not evidence.gains(cured):
        return []
    return [
        Finding(
            "gradient.blocked", "error", "counterfactual", name,
            f"{name} is added to an activation, and the sum is never used: the loss does not "
            f"depend on it. With it {evidence.steps} steps get to {cured.last:.3g} instead of "
            f"{evidence.main.last:.3g}.",
            {"layers": [name], "loss_as_given": evidence.main.last, "loss_with_it": cured.last},
            fix("gradient.blocked (sum)"), 0.93,
        )
    ]  # fmt: skip
