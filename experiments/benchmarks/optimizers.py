"""How fast are the hand-written optimizers, beside optax, torch and the memory floor?

Every step applies its updates; parameters and state are donated, gradients are not. A second copy
of optax's step runs beside the first: two copies of one program show the noise. The floor is
what one step must read and write at the bandwidth of an in-place ``a += b`` (12 bytes an entry),
measured in the same interleaved run. Run: ``./scripts/bench optimizers``; torch's cases need
``JAXGRAD_EXTRAS=test,peers``.
"""

import gc
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import harness
from jaxgrad import optim, tree

# A 12-block transformer of width 512 with a vocabulary of 4096: 195 leaves.
WIDTH, BLOCKS, VOCABULARY = 512, 12, 4096
BLOCK = [(512, 512)] * 4 + [(512,)] * 8 + [(512, 2048), (2048,), (2048, 512), (512,)]
BIG = [(VOCABULARY, WIDTH), (512,), (512,), *(BLOCK * BLOCKS)]
SMALL = [(256,)] * 1000
# Bytes an entry that a float32 step reads and writes at least.
FLOOR = {"sgd": 12, "momentum": 20, "adam": 28, "adamw": 28, "lion": 20, "clip+adamw": 32}
RATE = 1e-3


def arrays(shapes: list[tuple[int, ...]], seed: int) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(s, dtype=np.float32)) for s in shapes]


class Stepper:
    """A donated training step that keeps its own parameters and state."""

    def __init__(self, tx: Any, params: Any, grads: Any, options: dict[str, bool] | None = None):
        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.grads, self.params = grads, jax.tree.map(jnp.copy, params)
        self.state = tx.init(self.params)
        self.step = jax.jit(step, donate_argnums=(0, 1), compiler_options=options or None)
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        start = time.perf_counter()
        self()
        self.first_call_seconds = time.perf_counter() - start

    def __call__(self, times: int = 1) -> None:
        """Runs some steps and waits for them."""
        for _ in range(times):
            self.params, self.state = self.step(self.params, self.state, self.grads)
        jax.block_until_ready(self.params)


def stream(grads: Any) -> Callable[[], None]:
    """The floor's unit: an in-place a += b over all leaves joined."""
    total = jnp.concatenate([jnp.ravel(g) for g in grads])
    other, add = total + 1, jax.jit(lambda a, b: a + b, donate_argnums=0)
    kept = [total]

    def run() -> None:
        kept[0] = add(kept[0], other)
        jax.block_until_ready(kept[0])

    run()
    return run


def torch_case(name: str, grads: Any, **how: bool) -> Callable[[], None] | None:
    try:
        import torch
    except ImportError:
        return None
    leaves = [torch.nn.Parameter(torch.tensor(np.asarray(g))) for g in grads]
    for leaf, g in zip(leaves, grads, strict=True):
        leaf.grad = torch.tensor(np.asarray(g))
    makers = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    if name not in makers:
        return None
    return makers[name](leaves, lr=RATE, **how).step


def pair(name: str) -> tuple[Any, Any]:
    if name == "clip+adamw":
        clips = optim.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)
        return (
            optim.chain(clips[0], optim.adamw(RATE)),
            optax.chain(clips[1], optax.adamw(RATE)),
        )
    if name == "accumulate(adamw, 4)":
        inner = optim.adamw(RATE), optax.adamw(RATE)
        return optim.accumulate(inner[0], 4), optax.MultiSteps(inner[1], 4)
    hand, chain = optim.TWINS[name]
    return hand(RATE), chain(RATE)


def big_group(name: str, options: harness.Options) -> tuple[dict, dict[str, float]]:
    """One rule at 40 million entries; returns results and figures beside them."""
    params, grads = arrays(BIG, 0), arrays(BIG, 1)
    hand, theirs = pair(name)
    flags = optim.compiler_options()
    ours, other = Stepper(hand, params, grads, flags), Stepper(theirs, params, grads)
    copy = Stepper(theirs, params, grads)
    plain = Stepper(hand, params, grads)
    times = 4 if name.startswith("accumulate") else 1
    cases = [
        harness.Case("optax", lambda: other(times), jit=False),
        harness.Case("optax, second copy", lambda: copy(times), jit=False),
        harness.Case("jaxgrad", lambda: plain(times), jit=False),
        harness.Case("jaxgrad, compiler_options()", lambda: ours(times), jit=False),
        harness.Case("stream", stream(grads), jit=False),
    ]
    fused = torch_case(name, grads, fused=True)
    if fused is not None:
        cases.append(harness.Case("torch fused", fused, jit=False))
        foreach = torch_case(name, grads, foreach=True)
        cases.append(harness.Case("torch foreach", foreach, jit=False))
    results = harness.compare(cases, baseline="optax", options=options)
    count = tree.count_parameters(params)
    figures = {
        "state bytes per parameter, jaxgrad": ours.state_bytes / count,
        "state bytes per parameter, optax": other.state_bytes / count,
        "compile and first call over optax's": ours.first_call_seconds / other.first_call_seconds,
    }
    if name in FLOOR:
        unit = results["stream"].seconds / 12
        for case in ("optax", "jaxgrad", "jaxgrad, compiler_options()", "torch fused"):
            if case in results:
                figures[f"{case}, x floor"] = results[case].seconds / (unit * FLOOR[name])
    return results, figures


def small_group(options: harness.Options) -> dict:
    params, grads = arrays(SMALL, 0), arrays(SMALL, 1)
    packed, _ = optim.pack(params)
    packed_grads, _ = optim.pack(grads)
    steppers = {
        "optax": Stepper(optax.adamw(RATE), params, grads),
        "jaxgrad": Stepper(optim.adamw(RATE), params, grads),
        "jaxgrad, flat(tx)": Stepper(optim.flat(optim.adamw(RATE)), params, grads),
        "jaxgrad, packed": Stepper(optim.adamw(RATE), packed, packed_grads),
        "clip, packed": Stepper(
            optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(RATE)), packed, packed_grads
        ),
    }
    cases = [harness.Case(n, stepper, jit=False) for n, stepper in steppers.items()]
    fused = torch_case("adamw", grads, fused=True)
    if fused is not None:
        cases.append(harness.Case("torch fused", fused, jit=False))
    return harness.compare(cases, baseline="optax", options=options)


def compile_seconds() -> float:
    """The time to compile the norm that a clip takes, over 2,000 leaves."""
    params = arrays([(64,)] * 2000, 0)
    start = time.perf_counter()
    _ = jax.jit(lambda g: tree.global_norm(g)).lower(params).compile()  # noqa: PLW0108
    return time.perf_counter() - start


def state_bytes() -> dict[str, dict[str, float]]:
    """Bytes of state per parameter, float32, of every rule and of its twin."""
    params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}

    def bytes_of(make: Callable[..., Any]) -> float:
        leaves = jax.tree.leaves(jax.eval_shape(make(RATE).init, params))
        return sum(a.size * a.dtype.itemsize for a in leaves) / 1024**2

    return {
        name: {"jaxgrad": bytes_of(hand), "optax": bytes_of(chain)}
        for name, (hand, chain) in optim.TWINS.items()
        if not name.startswith(("clip", "adaptive_clip"))
    }


def main() -> int:
    options = harness.options(__doc__)
    extra: dict[str, Any] = {"state bytes per parameter": state_bytes()}
    bounds = {"sgd": 1.0, "momentum": 1.0, "adam": 1.0, "adamw": 1.0, "lion": 0.45}
    bounds |= {"clip+adamw": 0.55, "accumulate(adamw, 4)": 0.45}
    groups, claims = {}, []
    for name, bound in bounds.items():
        results, figures = big_group(name, options)
        groups[f"{name}, 40M entries in {len(BIG)} leaves"] = results
        extra[name] = figures
        for what, value in figures.items():
            print(f"{name}: {what}: {value:.3g}")
        best = min(
            (results[c].time_ratio for c in ("jaxgrad", "jaxgrad, compiler_options()")),
            key=lambda ratio: ratio.median,
        )
        control = results["optax, second copy"].time_ratio if bound == 1.0 else None
        claims.append(harness.Claim(f"{name}: time over optax", best, bound, control))
        gc.collect()
    small = small_group(options)
    groups["adamw, 1000 leaves of 256"] = small
    claims.append(
        harness.Claim("packed state: time over optax", small["jaxgrad, packed"].time_ratio, 0.05)
    )
    claims.append(harness.Claim("norm of 2000 leaves: compile, seconds", compile_seconds(), 5.0))
    return harness.finish("optimizers", groups, claims, options, extra)


if __name__ == "__main__":
    raise SystemExit(main())
