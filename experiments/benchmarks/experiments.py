"""What does one compiled call for all seeds of a sweep save, over as many separate runs?

32 seeds of one training run on the digits: vmapped in one call, and one after the other through a
function that was compiled once. Both give the same losses, but for rounding.
Run: ``./scripts/bench experiments``.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.atlas import measuring, training
from experiments.benchmarks import harness
from jaxgrad import optim
from jaxgrad.nn import mlp

SEEDS, STEPS, BATCH, RATE = 32, 50, 32, 3e-3
# Batched products round differently, and training amplifies it: these first losses must agree.
FIRST = 10
# name -> width, depth, and what one call may take of the time of 32 runs. A net of overhead gains;
# one of products of matrices must not lose much, as batches of small products are slow on CPUs.
SIZES = {"width 16, 4 layers": (16, 4, 0.9), "width 64, 4 layers": (64, 4, 1.5)}
BASE, ALL, ONE = "32 runs, compiled once", "32 seeds in one call", "one run"
# What a sweep of scalars must not cost: a compilation of its own for every run.
ANEW = "32 runs, each compiled"


def run_of(width: int, depth: int) -> Callable[[jax.Array], jax.Array]:
    """A training run: key -> loss of every step."""
    model = mlp.Config(64, 10, width, depth, scan=True)
    digits = training.digits()

    def loss(params: Any, key: jax.Array) -> jax.Array:
        x, y = training.draw(key, *digits, BATCH)
        return training.cross_entropy(mlp.apply(params, x, model), y)

    def run(key: jax.Array) -> jax.Array:
        params = measuring.deep_mlp(key, model)
        return training.train(loss, params, optim.adam(RATE), key, STEPS)[1]

    return run


def compare(width: int, depth: int, options: harness.Options) -> tuple[dict, dict[str, float]]:
    """Results of one size, and figures beside them."""
    run, keys = run_of(width, depth), jax.random.split(jax.random.key(0), SEEDS)
    single, together = jax.jit(run), jax.vmap(run)
    each = list(keys)

    def one_after_the_other() -> list[jax.Array]:
        return [single(key) for key in each]

    apart = np.stack([np.asarray(losses) for losses in one_after_the_other()])
    difference = np.abs(np.asarray(jax.jit(together)(keys)) - apart)[:, :FIRST].max() / apart.max()
    cases = [
        harness.Case(BASE, one_after_the_other, jit=False),
        harness.Case(ALL, together, (keys,)),
        harness.Case(ONE, run, (each[0],)),
    ]
    results = harness.compare(cases, baseline=BASE, options=options)
    compile_seconds = {
        name: results[name].trace_seconds + results[name].compile_seconds for name in (ALL, ONE)
    }
    whole = compile_seconds[ALL] + results[ALL].seconds
    once = compile_seconds[ONE] + results[BASE].seconds
    return results, {
        "difference": float(difference),
        "compilation over that of one run": compile_seconds[ALL] / compile_seconds[ONE],
        f"compiled and run, over {BASE}": whole / once,
        f"over {ANEW}": whole / (once + (SEEDS - 1) * compile_seconds[ONE]),
    }


def main() -> int:
    options = harness.options(__doc__)
    tables, extra, claims = {}, {}, []
    for size, (width, depth, bound) in SIZES.items():
        title = f"{SEEDS} seeds x {STEPS} steps of Adam, {size}"
        tables[title], figures = compare(width, depth, options)
        extra[title] = figures
        for what, value in figures.items():
            print(f"{size}: {what}: {value:.3g}")
        ratio = tables[title][ALL].time_ratio
        claims += [
            harness.Claim(f"{size}: time of one call over {BASE}", ratio, bound),
            harness.Claim(f"{size}: compiled and run, over {ANEW}", figures[f"over {ANEW}"], 0.2),
            harness.Claim(
                f"{size}: difference of the first {FIRST} losses", figures["difference"], 1e-3
            ),
        ]
    return harness.finish("experiments", tables, claims, options, extra)


if __name__ == "__main__":
    raise SystemExit(main())
