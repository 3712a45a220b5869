"""The rules of published training debuggers, from their documented definitions, on one trace.

What was adapted, and in the tools' favor where there was a choice: accuracy is the probability
that a cross-entropy gives the labels, exp(-loss), for other losses 1 - loss / first loss; an
"epoch" is a check, every ten steps; rules on "all zero" and "unchanged" tensors look at weight
matrices only, since biases begin at zero; the learning rate times the gradient is the optimizer's
own update; a rule names every cause that its documentation gives for it.

Sources: SageMaker Debugger, `debugger-built-in-rules.md` at 1c4d5ff7 of the developer guide;
AutoTrainer (Zhang et al., ICSE 2021), `utils/monitor.py` at 03a463e; DeepDiagnosis (Wardat et al.,
ICSE 2022), `callback/callbacks.py` at 500b017; graphyco 0.1.2, `visualizer/diagnostics.py`;
gradscope 0.1.0, `config.py` and `alerts.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.passes import tappable
from jaxgrad.diagnosis.problem import make_problem
from jaxgrad.diagnosis.wiring import inputs_for
from jaxgrad.graph import rewrite

STEPS, EVERY = 100, 10
_SIGNS = ("mean", "variance", "mean_abs", "zeros", "beyond_9.5", "beyond_-23_17", "beyond_5",
          "rms")  # fmt: skip


@dataclass
class Check:
    """What a tool sees at one check: arrays by parameter, statistics by activation."""

    step: int
    values: list[np.ndarray]
    grads: list[np.ndarray]
    updates: list[np.ndarray]
    before: list[dict[str, float]]  # inputs of the activations
    after: list[dict[str, float]]  # their outputs
    silent: list[float]  # share of units active on less than 1 % of the data
    cotangents: np.ndarray  # RMS at the layers' outputs


@dataclass
class Trace:
    """A training as the tools see it."""

    kinds: list[str]
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    data: list[np.ndarray] = field(default_factory=list)
    classes: bool = False

    def accuracy(self, step: int) -> float:
        """Accuracy, or what stands for it."""
        loss = self.losses[min(step, len(self.losses) - 1)]
        if not np.isfinite(loss):
            return 0.0
        if self.classes:
            return float(np.exp(-max(loss, 0.0)))
        return 1 - loss / self.losses[0] if self.losses[0] else 1.0


def trace(made: dict[str, Any]) -> Trace:
    """Trains a program for a hundred steps and looks at it every ten."""
    problem = make_problem(
        made["loss"], made["params"], made["batch"], batches=made.get("batches"), has_aux=False,
        key=made.get("key"), trainable=made.get("trainable"),
    )  # fmt: skip
    evidence = Evidence(problem, made.get("optimizer"), None)
    hidden = [a for a in evidence.hidden() if tappable(a.output, evidence.wiring) is not None]
    look = _looker(evidence, hidden)
    trainer = evidence.trainer

    @jax.jit
    def step(values: list[Any], state: Any, batch: Any, key: Any) -> Any:
        loss, grads = trainer._grads(values, batch, key)
        tree, gradient = problem.tree(values), problem.tree(grads)
        extra = {"value": loss, "grad": gradient, "value_fn": lambda _: loss}
        updates, state = trainer.tx.update(gradient, state, tree, **extra)
        updates = problem.flat(updates)
        moved = [(v + u).astype(v.dtype) for v, u in zip(values, updates, strict=True)]
        return moved, state, loss, grads, updates

    values, state = problem.values, trainer.tx.init(problem.tree(problem.values))
    found = Trace([a.kind for a in hidden], classes=evidence.chance is not None)
    leaves = jax.tree.leaves(problem.batch)
    found.data = [np.asarray(x, np.float64) for x in leaves if _is_float(x)]
    for t in range(STEPS):
        key = None if problem.key is None else jax.random.fold_in(problem.key, t)
        batch = problem.batches[t % len(problem.batches)]
        seen = look(values, batch, key) if t % EVERY == 0 else None
        at = values
        values, state, loss, grads, updates = step(values, state, batch, key)
        host = [np.asarray(g, np.float64) for g in grads]
        found.losses.append(float(loss))
        found.norms.append(float(np.sqrt(sum(np.sum(np.square(g)) for g in host))))
        if seen is not None:
            moves = [np.asarray(u, np.float64) for u in updates]
            found.checks.append(
                Check(t, [np.asarray(v, np.float64) for v in at], host, moves, *seen)
            )
    return found


def _is_float(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _looker(evidence: Evidence, hidden: list[Any]) -> Callable[..., Any]:
    """A compiled look at all activations, and at the gradient behind every layer."""
    wiring, problem = evidence.wiring, evidence.problem
    places = [tappable(v, wiring) for a in hidden for v in (a.source, a.output)]
    index = {v: i for i, v in enumerate(dict.fromkeys(p for p in places if p is not None))}

    def signs(x: Any) -> Any:
        x = x.astype(jnp.float32)
        found = [x.mean(), x.var(), jnp.abs(x).mean(), (x == 0).mean()]
        found += [(jnp.abs(x) > 9.5).mean(), ((x < -23) | (x > 17)).mean()]
        found += [(jnp.abs(x) >= 5).mean(), jnp.sqrt(jnp.square(x).mean())]
        active = (x != 0).reshape(-1, x.shape[-1] if x.ndim else 1).mean(0)
        return jnp.stack([*found, (active < 0.01).mean()])

    lengths = {i: wiring.lengths.get(wiring.producer[v], ()) for v, i in index.items()}
    slots = {i: jnp.zeros((*n, len(_SIGNS) + 1)) for i, n in lengths.items()}
    tapped = rewrite.Tapped(wiring.table, index, lambda x, _: (x, signs(x)), jnp.zeros_like)
    run = jax.jit(
        lambda values, batch, key: tapped.run(
            wiring.block, inputs_for(problem, values, batch, key), slots
        )[1]
    )

    def look(values: list[Any], batch: Any, key: Any) -> tuple[list, list, list, np.ndarray]:
        seen = {i: np.asarray(x).reshape(-1, len(_SIGNS) + 1) for i, x in
                run(values, batch, key).items()}  # fmt: skip
        table = [seen[index[p]] if p in index else None for p in places]
        rows = [None if t is None else dict(zip(_SIGNS, t.mean(0), strict=False)) for t in table]
        silent = [0.0 if t is None else float(t[:, -1].mean()) for t in table]
        cotangents = evidence.instrument.measure(values, batch, key).rows["gradient_rms"]
        blank = dict.fromkeys(_SIGNS, 0.0)
        rows = [r or blank for r in rows]
        return rows[::2], rows[1::2], silent[1::2], np.asarray(cotangents)

    return look


Alarm = tuple[int, str, tuple[str, ...]]  # step, rule, the causes that it names
_VANISHING, _EXPLODING = ("gradient.vanishing",), ("gradient.exploding", "lr.too_high")
_NAN = ("gradient.nonfinite", "gradient.exploding", "precision.overflow", "lr.too_high")
_INIT = ("init.too_small", "init.too_large", "init.activation_mismatch", "init.symmetric")


def _matrices(arrays: list[np.ndarray]) -> list[np.ndarray]:
    return [a for a in arrays if a.ndim >= 2]


def _bad(check: Check) -> bool:
    return not all(np.isfinite(a).all() for a in (*check.grads, *check.values))


def sagemaker(t: Trace) -> Iterator[Alarm]:
    """SageMaker Debugger's built-in rules at their defaults."""
    if any(abs(x.mean()) > 0.2 for x in t.data if x.ndim >= 2):
        yield 0, "NotNormalizedImages", ("data.unnormalized",)
    for k, c in enumerate(t.checks):
        if any(np.abs(g).mean() < 1e-7 for g in c.grads if g.size):
            yield c.step, "VanishingGradient", _VANISHING
        if _bad(c):
            yield c.step, "ExplodingTensor", _NAN
        if c.step < 10 and _poorly_initialized(t, c):
            yield c.step, "PoorWeightInitialization", _INIT
        if any(s > 0.5 for s, kind in zip(c.silent, t.kinds, strict=True) if kind == "relu"):
            yield c.step, "DeadRelu", ("unit.dead",)
        cut = {"tanh": "beyond_9.5", "sigmoid": "beyond_-23_17"}
        if any(z[cut[a]] > 0.5 for z, a in zip(c.before, t.kinds, strict=True) if a in cut):
            yield c.step, "TanhOrSigmoidSaturation", ("unit.saturated",)
        yield from _update_ratio(c)
        if any(not w.any() for w in _matrices(c.values) + _matrices(c.grads)):
            yield c.step, "AllZero", ("gradient.blocked", "unit.dead", "init.symmetric")
        if k >= 2 and _unchanged(t.checks[k - 2 : k + 1]):
            yield c.step, "UnchangedTensor", ("lr.too_low", "gradient.blocked")
        if c.step >= 10 and not t.losses[c.step] < t.losses[c.step - 10]:
            yield c.step, "LossNotDecreasing", ("lr.too_low", "lr.too_high")


def _poorly_initialized(t: Trace, c: Check) -> bool:
    variances = [z["variance"] for z in c.before if np.isfinite(z["variance"])]
    spread = max(variances) > 10 * max(min(variances), 1e-38) if len(variances) > 1 else False
    narrow = any(np.subtract(*np.percentile(g, [95, 5])) < 1e-3 for g in _matrices(c.grads))
    first = t.losses[:10]
    stalled = len(first) == 10 and min(first[5:]) >= min(first[:5])
    return bool(spread or stalled or (narrow and stalled))


def _update_ratio(c: Check) -> Iterator[Alarm]:
    ratios = [
        np.linalg.norm(u) / (np.linalg.norm(w) + 1e-9)
        for u, w in zip(_matrices(c.updates), _matrices(c.values), strict=True)
    ]
    if any(r > 10 for r in ratios):
        yield c.step, "WeightUpdateRatio", ("lr.too_high",)
    if any(r < 1e-8 for r in ratios):
        yield c.step, "WeightUpdateRatio", ("lr.too_low",)


def _unchanged(checks: list[Check]) -> bool:
    groups = zip(*(_matrices(c.values) for c in checks), strict=True)
    return any(
        np.allclose(a, b, rtol=1e-5, atol=1e-8) and np.allclose(b, c, rtol=1e-5, atol=1e-8)
        for a, b, c in groups
    )


def autotrainer(t: Trace) -> Iterator[Alarm]:
    """AutoTrainer's monitor; its checks are every third epoch, gated by the accuracy."""
    best, swings = 0.0, 0
    for k, c in enumerate(t.checks):
        accuracy = t.accuracy(c.step)
        gained = accuracy - best
        best = max(best, accuracy)
        window = [t.accuracy(s) for s in range(max(c.step - EVERY, 0), c.step + 1)]
        swings += k > 0 and max(window) - min(window) >= 0.03 and window[-1] < max(window)
        if not np.isfinite(t.losses[c.step]) or t.losses[c.step] >= 1e3 or _bad(c):
            yield c.step, "exploding gradient", _NAN
        if any(z["mean_abs"] >= 10 for z in c.after):
            yield c.step, "abnormal data", ("data.unnormalized", "init.too_large")
        if k % 3 or k == 0:
            continue
        gated = best < 0.6 or gained < 0.01
        matrices = _matrices(c.grads)
        first, last = np.linalg.norm(matrices[0]), np.linalg.norm(matrices[-1])
        if gated and first < 1e-4 and first < 1e-3 * last:
            yield c.step, "vanishing gradient", _VANISHING
        if gated and first > 70 * last:
            yield c.step, "exploding gradient", _EXPLODING
        if gated and np.mean(np.concatenate([np.ravel(g == 0) for g in c.grads])) >= 0.7:
            yield c.step, "dying ReLU", ("unit.dead",)
        if swings >= 0.2 * len(t.checks):
            yield c.step, "oscillating loss", ("lr.too_high", "batch.too_small")
        if gained < 0.01 and best < 0.6:
            yield c.step, "slow convergence", ("lr.too_low", "init.too_small")


def deepdiagnosis(t: Trace) -> Iterator[Alarm]:
    """DeepDiagnosis's callbacks."""
    if any(np.abs(x).max() > 1 for x in t.data if x.ndim >= 2):
        yield 0, "data range", ("data.unnormalized",)
    for k, c in enumerate(t.checks):
        if _bad(c) or not np.isfinite(t.losses[c.step]):
            yield c.step, "exploding tensor", _NAN
        if any(w.var() < 1e-5 or w.var() > 10 for w in _matrices(c.values)):
            yield c.step, "poor weight", _INIT
        if any(np.abs(g).mean() < 1e-7 for g in _matrices(c.grads)):
            yield c.step, "vanishing gradient", _VANISHING
        if any(z["beyond_5"] > 0.5 for z, a in zip(c.before, t.kinds, strict=True)
               if a in ("tanh", "sigmoid")):  # fmt: skip
            yield c.step, "saturated activation", ("unit.saturated",)
        ratios = [
            np.linalg.norm(u) / max(np.linalg.norm(w), 1e-30)
            for u, w in zip(_matrices(c.updates), _matrices(c.values), strict=True)
        ]
        if any(r < 1e-5 or r > 0.1 for r in ratios):
            yield c.step, "learning rate", ("lr.too_high", "lr.too_low")
        last = k == len(t.checks) - 1
        zeros = [z["zeros"] for z, a in zip(c.after, t.kinds, strict=True) if a == "relu"]
        if last and any(z >= 0.7 for z in zeros):
            yield c.step, "dead node", ("unit.dead",)


def graphyco(t: Trace) -> Iterator[Alarm]:
    """The diagnostics of graphyco."""
    for c in t.checks:
        known = c.cotangents[np.isfinite(c.cotangents)]
        if known.size and known.max() > 50:
            yield c.step, "exploding", _EXPLODING
        if known.size and known.min() < 1e-6:
            yield c.step, "vanishing", _VANISHING
        relu = [z["zeros"] for z, a in zip(c.after, t.kinds, strict=True) if a == "relu"]
        if any(z > 0.5 for z in relu):
            yield c.step, "dead", ("unit.dead",)
        if _bad(c):
            yield c.step, "not finite", _NAN


def gradscope(t: Trace) -> Iterator[Alarm]:
    """The alerts of gradscope at their defaults."""
    for c in t.checks:
        norms = np.asarray([np.linalg.norm(g) for g in c.grads])
        if _bad(c):
            yield c.step, "not finite", _NAN
        if (norms < 1e-8).any():
            yield c.step, "vanishing", _VANISHING
        if (norms > 1e3).any():
            yield c.step, "exploding", _EXPLODING
        if norms.mean() > 0 and norms.std() / norms.mean() > 2:
            yield c.step, "imbalance", _VANISHING + _EXPLODING
        past = np.asarray(t.norms[max(c.step - 20, 0) : c.step])
        if len(past) >= 10 and t.norms[c.step] > past.mean() + 4 * past.std():
            yield c.step, "spike", ("loss.spike", "lr.too_high")


TOOLS: dict[str, Callable[[Trace], Iterator[Alarm]]] = {
    "SageMaker Debugger": sagemaker, "AutoTrainer": autotrainer, "DeepDiagnosis": deepdiagnosis,
    "graphyco": graphyco, "gradscope": gradscope,
}  # fmt: skip


def examine(made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What every tool says of a program: the first alarm in time, and all rules that fired."""
    seen = trace(made)
    found = {}
    for name, rules in TOOLS.items():
        with np.errstate(all="ignore"):
            alarms = sorted(rules(seen), key=lambda alarm: alarm[0])
        first = alarms[0] if alarms else None
        found[name] = {
            "fired": sorted({rule for _, rule, _ in alarms}),
            "first": None if first is None else first[1],
            "causes": [] if first is None else list(first[2]),
            "any_cause": sorted({c for *_, causes in alarms for c in causes}),
        }
    return found
