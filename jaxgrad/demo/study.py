"""One model, watched: its chain, its flow at initialization, and its flow while Adam trains it."""

import functools
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jaxgrad.chain import Chain, factorize
from jaxgrad.demo.models import Task
from jaxgrad.flow import Flow, value_and_grad_flow
from jaxgrad.report.record import Gains, History, RunRecord
from jaxgrad.tree import inexact_leaves, replace_inexact

PROBES = 8
MEASUREMENTS = 60

Progress = Callable[[str, int, int], None]


def study(task: Task, *, command: str, progress: Progress | None = None) -> RunRecord:
    """Measures a task at initialization, trains it, and measures it again on the same batch.

    Args:
        task: what to study.
        command: what makes the report again, for the page.
        progress: called with (what is being done, done, total).

    Returns:
        The record of the run; the flow is measured at every step, and kept at about 60 of them.
    """
    tell = progress or (lambda *_: None)
    start = time.perf_counter()
    batch = next(task.batches())
    values = [jnp.asarray(leaf) for leaf in inexact_leaves(task.params)]
    rebuild = functools.partial(replace_inexact, task.params)
    measure = _measurer(task.loss, rebuild)
    tell("compiling the first pass", 0, task.steps)
    (first_loss, initial), _ = measure(values, batch)
    tell("measuring the layers", 0, task.steps)
    initial_gains, notes = layer_gains(task.loss, task.params, batch)
    final = final_gains = history = last_loss = None
    facts = {"parameters": f"{_count(task.params):,}", "loss": f"{float(first_loss):.3g}"}
    if task.steps:
        values, history = _train(task, values, measure, tell)
        params = rebuild(values)
        (last_loss, final), _ = measure(values, batch)
        final_gains, _ = layer_gains(task.loss, params, batch)
        facts["loss"] += f" to {float(last_loss):.3g}"
        rule = f"Adam, {task.learning_rate:g}" if task.optimizer is None else "your optimizer"
        facts["training"] = f"{task.steps} steps of {rule}"
        if task.evaluate is not None:
            label, value = task.evaluate(params)
            facts[label] = value
    facts |= dict(task.facts)
    facts["time"] = f"{time.perf_counter() - start:.0f} s on {jax.devices()[0].device_kind}"
    return RunRecord(
        name=task.name, title=task.title, description=task.description, initial=initial,
        final=final, initial_gains=initial_gains,
        final_gains=final_gains, history=history, facts=facts,
        notes=(*notes, *_flow_notes(initial)), command=command, initial_loss=float(first_loss),
        final_loss=None if last_loss is None else float(last_loss),
    )  # fmt: skip


def layer_gains(
    loss: Callable[[PyTree, PyTree], Array], params: PyTree, batch: PyTree, *, probes: int = PROBES
) -> tuple[Gains | None, tuple[str, ...]]:
    """The gain of every layer of the chain that leads from the batch to the loss.

    The chain starts at the batch's first float leaf, else at its first leaf. A layer's gain is
    `||J||_F / sqrt(n_in)`, estimated by pulling random normal cotangents back (Hutchinson 1989):
    `E ||J^T u||^2 = ||J||_F^2`. Over a batch it is the root mean square of the examples' gains.

    Args:
        loss: `loss(params, batch)`.
        params: its parameters.
        batch: the data.
        probes: random cotangents a layer.

    Returns:
        The gains, or None where the loss is no chain of layers from there, and what to tell the
        reader about the chain.
    """
    leaves, treedef = jax.tree.flatten(batch)
    kinds = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]
    place = kinds.index(True) if True in kinds else 0

    def from_leaf(x: Array, params: PyTree) -> Array:
        return loss(params, jax.tree.unflatten(treedef, [*leaves[:place], x, *leaves[place + 1 :]]))

    try:
        chain = factorize(from_leaf, leaves[place], params)
    except (NotImplementedError, TypeError, ValueError) as error:
        return None, (f"no Jacobian gains: {str(error).splitlines()[0]}",)
    values = _probed_gains(chain, jnp.asarray(leaves[place]), probes)
    # the chain names a layer by its parameter's path from the argument, the flow from the tree
    names = tuple(name.removeprefix("params/") for name in chain.names)
    note = (
        f"Jacobian gains are estimates from {probes} random cotangents a layer; the last layer of "
        "the chain has none, since it ends in the loss"
    )
    return Gains(names[:-1], values[:-1]), (note, *_chain_notes(chain))


def _probed_gains(chain: Chain, x: Array, probes: int) -> np.ndarray:
    states = chain.states(x)

    @jax.jit
    def squares(states: tuple[PyTree, ...], key: Array) -> list[Array]:
        found = []
        for k, layer in enumerate(chain.layers):
            out, pull = jax.vjp(layer, states[k])
            pulled = jax.vmap(pull)(_normal_like(jax.random.fold_in(key, k), out, probes))
            found.append(sum(jnp.sum(g**2) / probes for g in jax.tree.leaves(pulled)))
        return found

    # ||J||_F^2 / n_in; n_in of the whole state
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(h)) for h in states[:-1]]
    sums = np.asarray(squares(states, jax.random.key(0)), np.float64)
    return np.sqrt(sums / np.maximum(sizes, 1))


def _normal_like(key: Array, tree: PyTree, probes: int) -> PyTree:
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jax.random.normal(k, (probes, *leaf.shape), leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


def _measurer(loss: Callable[..., Array], rebuild: Callable[[list[Array]], PyTree]) -> Any:
    @jax.jit
    def measure(values: list[Array], batch: PyTree) -> tuple[tuple[Array, Flow], list[Array]]:
        measured, grads = value_and_grad_flow(loss)(rebuild(values), batch)
        return measured, jax.tree.leaves(grads)  # None, the gradient of the others, is no leaf

    return measure


def _train(
    task: Task, values: list[Array], measure: Any, tell: Progress
) -> tuple[list[Array], History]:
    optimizer = task.optimizer or optax.adam(task.learning_rate)

    @jax.jit
    def apply(values: list[Array], state: PyTree, grads: list[Array]) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, values)
        return optax.apply_updates(values, updates), state

    state, batches = optimizer.init(values), task.batches()
    every = max(1, task.steps // MEASUREMENTS)
    losses, kept, steps = [], [], []
    for number in range(task.steps):
        (value, flow), grads = measure(values, next(batches))
        values, state = apply(values, state, grads)
        losses.append(value)
        if number % every == 0 or number == task.steps - 1:
            kept.append(np.asarray(flow.gradient_rms))  # waits: dispatch would run ahead of the bar
            steps.append(number)
        tell("training", number + 1, task.steps)
    return values, History(np.asarray(steps), np.asarray(kept), np.asarray(losses, np.float64))


def _chain_notes(chain: Chain) -> list[str]:
    graph = chain.graph
    if graph is None:
        return []
    notes = [f"the chain starts at {graph.start}"] if graph.start else []
    for label, values in (
        ("one layer of the chain, not opened", graph.closed_scans),
        ("held fixed as side inputs of the chain", graph.side_inputs),
        ("layers without a name of their own", graph.made_up_names),
    ):
        notes += _listed(label, values)
    return notes


def _flow_notes(flow: Flow) -> list[str]:
    opaque = [re.sub(r"\([^()]*/([^()/]*)", r"(\1", text) for text in flow.opaque]  # no folders
    unmeasured = _listed("parameters of no measured layer", flow.uncovered)
    return _listed("run but not looked into", opaque) + unmeasured


def _listed(label: str, values: Any, most: int = 6) -> list[str]:
    values = list(dict.fromkeys(str(value) for value in values))
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return [f"{label}: {', '.join(values[:most])}{more}"] if values else []


def _count(params: PyTree) -> int:
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype"))
