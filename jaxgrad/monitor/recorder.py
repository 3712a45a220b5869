"""The recorder: what a training loop hands it, in a run folder of bounded size.

Nothing waits for the device step by step: summaries are computed where the arrays are and fetched
some steps later, together. What is kept of a long run is thinned, but never its beginning, its end,
the extremes of its curves, or the steps at which it broke.
"""

import os
import time
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxgrad import store
from jaxgrad.graph.compat import Tracer
from jaxgrad.monitor.recording import KIND, VERSION, Curve, Snapshots
from jaxgrad.monitor.summary import SCALARS, matches, summarize
from jaxgrad.optim.order import clip_order
from jaxgrad.optim.reading import flattened, read_steps
from jaxgrad.tree import inexact_leaves, map_inexact

_PENDING = 16  # steps that are fetched together


class Recorder:
    """Keeps of a training run what a diagnosis after the fact needs.

    Call it once a step, outside of ``jit`` or inside (there, and in ``scan``, it is called back in
    order; not under ``vmap``), or once for many steps whose losses and flows are stacked. The
    folder is written every few seconds, at the first NaN, and at the end; each write replaces the
    last one whole, so that a killed run leaves what it had written, at most `seconds` old.

    >>> import tempfile, jax, jax.numpy as jnp, optax
    >>> from jaxgrad import monitor, value_and_grad_flow
    >>> loss = lambda params, x: jnp.square(jnp.tanh(x @ params["a"]) @ params["b"]).mean()
    >>> params = {"a": jnp.eye(3), "b": jnp.ones((3, 1))}
    >>> tx = optax.sgd(0.1)
    >>> @jax.jit
    ... def step(params, state, x):
    ...     (value, flow), grads = value_and_grad_flow(loss)(params, x)
    ...     updates, state = tx.update(grads, state, params)
    ...     return optax.apply_updates(params, updates), state, value, flow, updates
    >>> folder, state = tempfile.mkdtemp() + "/run", tx.init(params)
    >>> with monitor.Recorder(folder, optimizer=tx) as record:
    ...     for t in range(3):
    ...         params, state, value, flow, updates = step(params, state, jnp.ones((4, 3)))
    ...         record(t, value, flow, params=params, updates=updates)
    >>> monitor.load_recording(folder).steps
    array([0, 1, 2])

    Args:
        folder: where to write; made if missing.
        optimizer: the optax transformation; where it clips is read off it once.
        classes: number of classes, if the loss is a cross-entropy: its logarithm is the loss of a
            guess.
        snapshots: how many steps are kept layer by layer; at most twice as many are, for a moment.
        points: how many points of a curve are kept; each holds mean, smallest and largest of the
            steps it stands for.
        seconds: how often the folder is written, in seconds.
        resume: whether a recording that is in the folder already is continued.

    Raises:
        FileExistsError: if the folder holds a recording and `resume` is False.
        ValueError: if a number is too small.
    """

    def __init__(  # noqa: PLR0913, PLR0917 (a public signature)
        self,
        folder: str | os.PathLike[str],
        optimizer: Any = None,
        classes: int | None = None,
        snapshots: int = 64,
        points: int = 4096,
        seconds: float = 5.0,
        resume: bool = False,
    ) -> None:
        if snapshots < 4 or points < 16 or seconds < 0 or (classes is not None and classes < 2):
            raise ValueError(
                "Recorder: expected snapshots >= 4, points >= 16, seconds >= 0 and classes >= 2 "
                f"or None, got {snapshots}, {points}, {seconds}, {classes}"
            )
        self._writer = _Writer(Path(folder), snapshots, points, seconds, resume)
        self._optimizer, self._probed = optimizer, optimizer is None
        if classes is not None:
            self._writer.facts["classes"] = classes
        self._summarize = jax.jit(summarize)
        # written at the end of the program, or when the recorder is forgotten, whichever is first
        self._end = weakref.finalize(self, _Writer.save, self._writer)

    def __call__(  # noqa: PLR0913 (a public signature)
        self,
        step: Any,
        loss: Any,
        flow: Any,
        *,
        params: PyTree = None,
        updates: PyTree = None,
        grads: PyTree = None,
        state: PyTree = None,
    ) -> None:
        """Records a step.

        Args:
            step: its number; numbers must ascend.
            loss: its loss, a scalar; or the losses of many steps, with stacked trees.
            flow: the `Flow` of `value_and_grad_flow`.
            params: the parameters; with `updates` and a half-precision type, they show which
                updates are rounded away.
            updates: what the optimizer returned; without them nothing is said of the learning rate.
            grads: raw gradients; with them come their norm, their exponents, and the direction of
                the updates.
            state: the optimizer's state; a `monitor.watch` in it gives raw and clipped norms.

        Raises:
            ValueError: if the layers are not those of the steps before, or numbers do not ascend.
        """
        self._note(flow, {"params": params, "updates": updates, "grads": grads})
        trees = (loss, flow, params, updates, grads, state)
        if any(isinstance(x, Tracer) for x in jax.tree.leaves((step, trees))):
            from jax.experimental import io_callback

            _ = io_callback(self._writer.take, None, step, summarize(*trees), ordered=True)
        elif np.ndim(loss) == 1:
            table = jax.vmap(summarize)(*trees)
            for i, number in enumerate(np.arange(len(loss)) + np.asarray(step)):
                self._writer.take(number, {name: value[i] for name, value in table.items()})
        else:
            self._writer.push(step, self._summarize(*trees))

    record = __call__

    def save(self) -> Path:
        """Writes what is known now and gives the folder."""
        return self._writer.save()

    def close(self) -> None:
        """Writes the last steps."""
        _ = self._end()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _note(self, flow: Any, trees: dict[str, PyTree]) -> None:
        """The facts that are the same at every step."""
        self._writer.check(flow)
        facts, params = self._writer.facts, trees["params"]
        for name, tree in trees.items():
            if tree is not None and not matches(flow, tree):
                found, wanted = len(inexact_leaves(tree)), len(flow.parameter_names)
                facts[f"unmatched_{name}"] = f"{found} leaves beside {wanted} of the flow"
        if "leaf_sizes" not in facts:
            like = next((t for t in trees.values() if t is not None and matches(flow, t)), None)
            if like is not None:
                leaves = inexact_leaves(like)
                facts["leaf_sizes"] = [int(np.prod(x.shape, dtype=int)) for x in leaves]
                facts["leaf_ranks"] = [len(x.shape) for x in leaves]
        if params is not None and "leaf_dtypes" not in facts and matches(flow, params):
            facts["leaf_dtypes"] = [str(x.dtype) for x in inexact_leaves(params)]
        if not self._probed and params is not None:
            self._probed = True
            facts["optimizer"] = _read(self._optimizer, params)


def _read(tx: Any, params: PyTree) -> dict[str, Any]:
    """Where an optimizer clips, as far as it can be told from outside."""
    steps = flattened(read_steps(tx))
    if steps and not any(step.kind == "clip" for step in steps):
        return {"clip_order": "none", "steps": [s.name for s in steps], "leaves": {}}
    ones = map_inexact(lambda x: np.ones(x.shape, x.dtype), params)
    try:
        with jax.ensure_compile_time_eval():  # also where a training step is traced right now
            order = clip_order(tx, ones)
    except Exception as error:  # an optimizer that needs more than gradients
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "clip_order": str(order), "steps": list(order.steps), "leaves": dict(order.leaves),
        "intentional": order.intentional,
    }  # fmt: skip


class _Writer:
    """The recording in memory, and its way to the disk."""

    def __init__(
        self, folder: Path, snapshots: int, points: int, seconds: float, resume: bool
    ) -> None:
        self.folder, self.seconds = folder, seconds
        self.facts: dict[str, Any] = {}
        self.curve, self.snapshots = Curve(points), Snapshots(snapshots)
        self.pending: list[tuple[Any, Any]] = []
        self.last = -1
        self.broken = False
        self.due = 0.0
        if (folder / store.RECORD_FILE).exists():
            if not resume:
                raise FileExistsError(
                    f"{folder} holds a run already: give another folder, or resume=True to go on "
                    "where it ended"
                )
            self._resume()

    def _resume(self) -> None:
        record = store.load_run(self.folder)
        if record.get("kind") != KIND:
            raise FileExistsError(f"{self.folder} holds a run that no Recorder wrote")
        self.facts = dict(record["facts"])
        self.curve.restore(record["curve"])
        self.snapshots.restore(record["snapshots"])
        self.last = int(record["last_step"])

    def check(self, flow: Any) -> None:
        """Whether a flow has the layers of those before."""
        fields = ("names", "parameter_names", "site_parameters", "opaque", "uncovered")
        seen = {name: jax.tree.map(str, _lists(getattr(flow, name))) for name in fields}
        if "names" not in self.facts:
            self.facts |= seen
        for name in ("names", "parameter_names"):
            if self.facts[name] != seen[name]:
                raise ValueError(
                    f"record: the flow's {name} are not those of the steps before "
                    f"({len(seen[name])} now, {len(self.facts[name])} before); record another "
                    "model in a folder of its own"
                )

    def push(self, step: Any, summary: dict[str, Any]) -> None:
        """Takes a step whose numbers are still on the device."""
        number = int(step)
        self._ascends(number, int(self.pending[-1][0]) if self.pending else self.last)
        self.pending.append((number, summary))
        if len(self.pending) >= _PENDING or time.monotonic() > self.due:
            self.drain()

    def drain(self) -> None:
        """Fetches what is pending."""
        pending, self.pending = self.pending, []
        for step, summary in jax.device_get(pending):
            self.take(step, summary)

    def take(self, step: Any, summary: dict[str, Any]) -> None:
        """Takes a step whose numbers are here."""
        number = int(step)
        self._ascends(number, self.last)
        host = {name: np.asarray(value) for name, value in summary.items()}
        bad = not np.isfinite(host["loss"]) or host["nonfinite"] > 0
        self.last = number
        self.curve.add(number, [float(host[name]) for name in SCALARS])
        rows = {name: value for name, value in host.items() if name not in SCALARS}
        self.snapshots.add(number, rows, broken=bool(bad))
        first, self.broken = bad and not self.broken, self.broken or bool(bad)
        if first or time.monotonic() > self.due:
            _ = self.write()

    @staticmethod
    def _ascends(step: int, last: int) -> None:
        if step <= last:
            raise ValueError(f"record: step {step} comes after step {last}; expected more")

    def save(self) -> Path:
        """Fetches what is pending and writes."""
        self.drain()
        return self.write()

    def write(self) -> Path:
        """Writes the folder."""
        start = time.monotonic()
        record = {
            "kind": KIND, "version": VERSION, "facts": self.facts, "last_step": self.last,
            "curve": self.curve.to_dict(), "snapshots": self.snapshots.to_dict(),
        }  # fmt: skip
        _ = store.save_run(self.folder, record)
        now = time.monotonic()
        # writing must stay a small part of the run, however large the model
        self.due = now + max(self.seconds, 50 * (now - start))
        return self.folder


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, tuple | list) else value
