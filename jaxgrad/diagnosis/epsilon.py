"""An epsilon that outweighs the gradients, so that an adaptive rule does not adapt."""

import jax
import jax.numpy as jnp
import optax

from jaxgrad.diagnosis.evidence import LEARNS, Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.training import Trainer
from jaxgrad.optim.reading import chain_parts, flattened, read_steps

_LOUDER = 2.0**20  # a factor of gradients that leaves any epsilon behind


def epsilon(evidence: Evidence) -> list[Finding]:
    """A rule whose steps do not depend on the gradient's scale, but for an epsilon far above it.

    Gradients a million times larger, and again a thousand times, tell both; that a clip does the
    same is no fault.
    """
    run, problem = evidence.main, evidence.problem
    own = evidence.progress(run)
    unclear = run.stopped is not None or evidence.is_trained or not any(run.update_norms)
    if own > 0.1 or unclear or evidence.every > 1:
        return []
    trainer = evidence.trainer if evidence.clip in (None, "none") else _unclipped(evidence)
    if trainer is None:
        return []
    tx, tree = trainer.tx, problem.tree(problem.values)
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
    evidence.tell(f"training {evidence.steps} steps with louder gradients")
    cured = trainer.run(gain=_LOUDER)
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


def _unclipped(evidence: Evidence) -> Trainer | None:
    """The training without the clips of its chain, which answer to the scale of gradients, too."""
    parts = [(part, flattened(read_steps(part))) for part in chain_parts(evidence.plain_optimizer)]
    rest = [part for part, steps in parts if not steps or any(s.kind != "clip" for s in steps)]
    if not rest or len(rest) == len(parts):
        return None
    return Trainer(evidence.problem, optax.chain(*rest), evidence.steps)
