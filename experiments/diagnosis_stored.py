"""The benchmark's programs, recorded while they train and diagnosed when they are over."""

import functools
from pathlib import Path
from typing import Any

import jax
import optax

from experiments.diagnosis_programs import Program
from jaxgrad import monitor
from jaxgrad.diagnosis import Report, diagnose_run
from jaxgrad.flow import value_and_grad_flow
from jaxgrad.tree import inexact_leaves, replace_inexact

STEPS = 120


def record(made: dict[str, Any], folder: Path, steps: int = STEPS) -> None:
    """Trains a program as a user would, with a recorder in the loop."""
    loss, tx = made["loss"], monitor.watch(optimizer_of(made))
    batches = list(made.get("batches") or [made["batch"]])
    key = made.get("key")
    params_of = functools.partial(replace_inexact, made["params"])
    tree_of = functools.partial(replace_inexact, made["params"], keep=False)

    @jax.jit
    def step(values: list[Any], state: Any, batch: Any, t: Any) -> Any:
        extra = () if key is None else (jax.random.fold_in(key, t),)
        (value, flow), grads = value_and_grad_flow(loss)(params_of(values), batch, *extra)
        gradient = tree_of(list(inexact_leaves(grads)))
        updates, state = tx.update(gradient, state, tree_of(values))
        moved = optax.apply_updates(values, list(inexact_leaves(updates)))
        return moved, state, (value, flow, updates, gradient)

    values = list(inexact_leaves(made["params"]))
    state = tx.init(tree_of(values))
    classes = made.get("classes")
    with monitor.Recorder(folder, optimizer=optimizer_of(made), classes=classes) as recorder:
        for t in range(steps):
            before = values
            values, state, out = step(values, state, batches[t % len(batches)], t)
            trees = {"params": tree_of(before), "updates": out[2], "grads": out[3]}
            recorder(t, out[0], out[1], **trees, state=state)


def optimizer_of(made: dict[str, Any]) -> Any:
    """The program's optimizer as a transformation."""
    tx = made["optimizer"]
    return tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx


def examine_stored(program: Program, seed: int, folder: Path) -> Report:
    """Records a program's training and diagnoses the folder."""
    made = program.make(seed)
    record(made | {"classes": classes_of(made)}, folder)
    return diagnose_run(folder)


def classes_of(made: dict[str, Any]) -> int | None:
    """Number of classes as its user knows it: as large as the logits of a cross-entropy."""
    from jaxgrad.diagnosis.evidence import Evidence
    from jaxgrad.diagnosis.problem import make_problem

    problem = make_problem(
        made["loss"], made["params"], made["batch"], batches=None, has_aux=False,
        key=made.get("key"), trainable=None,
    )  # fmt: skip
    head = Evidence(problem, None, None).head
    return None if head is None or head.size < 2 else head.size
