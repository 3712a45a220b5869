"""How long does a verdict take? `jg.diagnose` over one compilation and 20 steps of the model.

Three models that train, each diagnosed from a cleared cache: until the initial stage is over (all
that is said before the first trial training), and whole. Beside it what a `Recorder` in a training
loop costs, over the same loop without it. Run: ``./scripts/bench diagnosis``.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jaxgrad as jg
from experiments.atlas import training
from experiments.benchmarks import flow, harness
from jaxgrad.nn import mlp, resnet

STEPS, RATE = 20, 1e-3
AT_MOST = 5.0


def models() -> dict[str, tuple[Callable[..., Any], Any, Any]]:
    """Name -> loss, parameters, batch."""
    x, y = (a[:128] for a in training.digits())
    perceptron = mlp.Config(64, 10, 64, 8)
    network = resnet.Config(1, 10)
    key = jax.random.key(0)
    kernels, running = resnet.init(key, network)

    def mlp_loss(params: Any, batch: Any) -> jax.Array:
        return training.cross_entropy(mlp.apply(params, batch[0], perceptron), batch[1])

    def resnet_loss(params: Any, batch: Any) -> jax.Array:
        logits, _ = resnet.apply_training(params, running, batch[0], network)
        return training.cross_entropy(logits, batch[1])

    return {
        "8 ReLU layers": (mlp_loss, mlp.init(key, perceptron), (x, y)),
        "ResNet": (resnet_loss, kernels, (x.reshape(-1, 8, 8, 1), y)),
        f"{flow.BLOCKS}-block transformer": flow.problem("unrolled"),
    }


def plain_seconds(loss: Callable[..., Any], params: Any, batch: Any) -> float:
    """One compilation of the gradient and `STEPS` calls."""
    jax.clear_caches()
    start = time.perf_counter()
    step = jax.jit(jax.value_and_grad(loss))
    for _ in range(STEPS):
        _ = jax.block_until_ready(step(params, batch))
    return time.perf_counter() - start


def verdict_seconds(loss: Callable[..., Any], params: Any, batch: Any) -> tuple[float, float]:
    """Until the first trial training begins, and whole."""
    jax.clear_caches()
    began: list[float] = []

    def progress(line: str) -> None:
        if line.startswith("training"):
            began.append(time.perf_counter())

    start = time.perf_counter()
    report = jg.diagnose(loss, params, batch, optimizer=optax.adam(RATE), progress=progress)
    end = time.perf_counter()
    assert report.primary is None, report
    return began[0] - start, end - start


def recorder_cases() -> list[harness.Case]:
    """A training step with its flow, with and without a recorder behind it."""
    loss, params, batch = models()["8 ReLU layers"]
    tx = jg.monitor.watch(optax.adam(RATE))
    state = tx.init(params)
    measure = jg.value_and_grad_flow(loss)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        (value, seen), grads = measure(params, batch)
        updates, after = tx.update(grads, state, params)
        return value, seen, grads, updates, after

    record = jg.monitor.Recorder(Path(tempfile.mkdtemp()) / "run", optimizer=tx)
    count = iter(range(10**9))

    def recorded() -> Any:
        value, seen, grads, updates, after = step(params, state)
        record(next(count), value, seen, params=params, updates=updates, grads=grads, state=after)
        return value

    return [
        harness.Case("step", lambda: step(params, state), jit=False),
        harness.Case("step and recorder", recorded, jit=False),
    ]


def main() -> int:
    options = harness.options(__doc__)
    rounds = min(options.rounds, 5)
    extra, claims = {}, []
    for name, model in models().items():
        pairs = [(plain_seconds(*model), *verdict_seconds(*model)) for _ in range(rounds)]
        plain, initial, whole = np.median(np.asarray(pairs), axis=0)
        ratios = np.median([(i / p, w / p) for p, i, w in pairs], axis=0)
        extra[name] = {
            f"seconds of a compilation and {STEPS} steps": float(plain),
            "seconds of the initial stage": float(initial), "seconds of the verdict": float(whole),
            "verdict over a compilation and steps": float(ratios[1]),
        }  # fmt: skip
        print(f"{name}: {extra[name]}", flush=True)
        what = f"{name}: initial stage over a compilation and {STEPS} steps"
        claims.append(harness.Claim(what, float(ratios[0]), AT_MOST))
    table = harness.compare(recorder_cases(), baseline="step", options=options)
    return harness.finish("diagnosis", {"a step of 8 ReLU layers": table}, claims, options, extra)


if __name__ == "__main__":
    raise SystemExit(main())
