"""An epsilon that outweighs the gradients, so that an adaptive rule does not adapt."""

import jax
import jax.numpy as jnp

from jaxgrad.diagnosis.evidence import LEARNS, Evidence
from jaxgrad.diagnosis.finding import Finding

_LOUDER = 2.0**20  # a factor of gradients that leaves any epsilon behind


def epsilon(evidence: Evidence) -> list[Finding]:
    """A rule whose steps do not depend on the gradient's scale, but for an epsilon far above it.

    Gradients a million times larger, and again a thousand times, tell both; that a clip does the
    same is no fault.
    """
    run, problem, tx = evidence.main, evidence.problem, evidence.trainer.tx
    own = evidence.progress(run)
    unclear = run.stopped is not None or evidence.is_trained or not any(run.update_norms)
    if own > 0.1 or unclear or evidence.every > 1 or evidence.clip not in (None, "none"):
        return []
    tree = problem.tree(problem.values)
    state = tx.init(tree)

    @jax.jit
    def size(gain: jax.Array) -> jax.Array:
        grads = [jnp.asarray(g) * gain.astype(g.dtype) for g in evidence.initial.grads]
        moved = problem.flat(tx.update(problem.tree(grads), state, tree)[0])
        return jnp.sqrt(sum(jnp.sum(jnp.square(u.astype(jnp.float32))) for u in moved))

    try:
        given, large, larger = (float(size(jnp.float32(g))) for g in (1.0, _LOUDER, 2.0**30))
    except TypeError:  # a rule that needs more than gradients
        return []
    if not large > 30 * given or not larger < 1.2 * large:
        return []
    cured = evidence.run(gain=_LOUDER)
    gained = evidence.progress(cured)
    if not gained > max(LEARNS, 5 * own):
        return []
    if evidence.progress(evidence.longer) > 0.4 * gained:
        return []  # a slow start only
    return [
        Finding(
            "lr.too_low", "error", "counterfactual", "optimizer",
            "The rule's epsilon is far above the gradients, and makes its steps "
            f"{large / given:.3g} times smaller; beside gradients that it is small against, the "
            f"run takes off {gained:.0%} of the loss instead of {max(own, 0.0):.2%}.",
            {"times_smaller": large / given, "threshold": 30.0, "loss_as_given": run.last,
             "loss_without_epsilon": cured.last},
            "tx = optax.adam(learning_rate, eps=1e-8)", 0.9,
            may_be_wrong="the learning rate is raised later",
        )
    ]  # fmt: skip
