"""The largest singular values of a chain, beside matfree and a dense SVD; scaling; memory.

Tanh layers with Gaussian weights, the top 5 values. matfree takes the number of its Lanczos steps
as given, and returns no error: here it gets the fewest (in fours) that reach jaxgrad's accuracy,
found by comparing with the dense answer in float64, which its user would not have. jaxgrad stops by
its residuals, at 2e-3 here, where the values err by 1e-6 as matfree's then do. Both linearize once.
The dense case multiplies the layers' Jacobians and calls an SVD. Run:
`./scripts/bench extremes` (also part of `./scripts/bench spectrum`); matfree's case needs
`JAXGRAD_EXTRAS=test,bench`.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxgrad as jg
from experiments.benchmarks import harness
from jaxgrad.spectrum import extremes, plan, singular_moments, top_singular_values

try:
    from matfree import decomp, eig
except ImportError:
    decomp = eig = None

COUNT = 5
KEY = jax.random.PRNGKey(0)
TOLERANCE = 2e-3
SHAPES = ((512, 8), (1024, 8), (2048, 8))  # width, depth
DENSE_UP_TO = 1024  # a dense SVD of more takes minutes for all rounds


def tanh_net(n: int, depth: int) -> tuple[jg.Chain, Callable, jax.Array]:
    """The chain, the same as a function, and an input."""
    rng = np.random.default_rng(0)
    weights = 1.2 * rng.standard_normal((depth, n, n)) / np.sqrt(n)
    weights = jnp.asarray(weights.astype(np.float32))
    chain = jg.Chain.scanned(lambda w, h: jnp.tanh(w @ h), weights)
    x = jnp.asarray(rng.standard_normal(n), jnp.float32)
    return chain, lambda x: jax.lax.scan(lambda h, w: (jnp.tanh(w @ h), None), x, weights)[0], x


def truth(chain: jg.Chain, x: jax.Array) -> np.ndarray:
    """The top values in float64, from the dense product."""
    product = np.eye(x.shape[0])
    for jacobian in jg.layer_jacobians(chain, x):
        product = np.asarray(jacobian, np.float64) @ product
    return np.log(np.linalg.svd(product, compute_uv=False)[:COUNT])


def by_matfree(f: Callable, steps: int) -> Callable:
    def top(x: jax.Array) -> jax.Array:
        _, push = jax.linearize(f, x)
        start = jax.random.normal(KEY, x.shape, x.dtype)
        return jnp.log(eig.svd_partial(decomp.bidiag(steps))(push, start)[1][:COUNT])

    return top


def fewest_steps(f: Callable, x: jax.Array, true: np.ndarray, accuracy: float) -> int | None:
    """How many steps matfree needs, in fours, by bisection."""

    def enough(steps: int) -> bool:
        logs = jax.jit(by_matfree(f, steps))(x)
        return float(np.max(np.abs(np.asarray(logs) - true))) <= accuracy

    low, high = 2, 32
    if not enough(4 * high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(4 * middle) else (middle, high)
    return 4 * high


def against_others(
    n: int, depth: int, options: harness.Options
) -> tuple[dict[str, harness.Result], dict[str, Any]]:
    chain, f, x = tanh_net(n, depth)
    true = truth(chain, x)

    def ours(x: jax.Array) -> Any:
        return top_singular_values(chain, x, COUNT, key=KEY, tolerance=TOLERANCE)

    def dense(x: jax.Array) -> jax.Array:
        jacobian = jax.jacrev(f)(x)
        return jnp.log(jnp.linalg.svd(jacobian, compute_uv=False)[:COUNT])

    logs, residuals = jax.jit(ours)(x)
    error = float(np.max(np.abs(np.asarray(logs) - true)))
    facts = {"error": error, "largest residual": float(jnp.max(residuals))}
    cases = [harness.Case("jaxgrad", ours, (x,))]
    if n <= DENSE_UP_TO:
        cases.append(harness.Case("dense SVD", dense, (x,)))
    if eig is not None:
        steps = fewest_steps(f, x, true, max(error, 1e-6))
        facts["matfree's fewest steps"] = steps
        if steps is not None:
            cases.append(harness.Case(f"matfree, {steps} steps", by_matfree(f, steps), (x,)))
    baseline = cases[-1].name
    return harness.compare(cases, baseline=baseline, options=options), facts


def scaling() -> dict[str, Any]:
    """Seconds of a search with 60 products by depth and width, and the exponents fitted to them."""

    def seconds(n: int, depth: int) -> float:
        chain, _, x = tanh_net(n, depth)
        made, arrays = plan.plan_of(chain.run(x), "bench")
        problem = extremes._problem(made, COUNT, (1e-7, 60, None), "bench")
        search = extremes._top.lower(made, problem, arrays, KEY).compile()
        _ = jax.block_until_ready(search(arrays, KEY))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            _ = jax.block_until_ready(search(arrays, KEY))
            times.append(time.perf_counter() - start)
        return min(times)

    depths = {str(depth): seconds(512, depth) for depth in (8, 16, 32)}
    widths = {str(n): seconds(n, 8) for n in (512, 1024, 2048)}
    fitted = {}
    for name, table in (("L", depths), ("n", widths)):
        slope = np.polyfit(
            np.log([float(size) for size in table]), np.log(list(table.values())), 1
        )[0]
        fitted[name] = float(slope)
    return {"seconds by L at n = 512": depths, "seconds by n at L = 8": widths, "exponents": fitted}


def first_calls() -> dict[str, float]:
    """Seconds of the first call, tracing and compilation in it, by depth: distinct closures."""
    times = {}
    for depth in (10, 100, 1000):
        jax.clear_caches()
        rng = np.random.default_rng(0)
        weights = [rng.standard_normal((64, 64)).astype(np.float32) / 8 for _ in range(depth)]
        layers = [(f"l{k}", lambda h, w=w: jnp.tanh(w @ h)) for k, w in enumerate(weights)]
        start = time.perf_counter()
        chain = jg.Chain.from_layers(layers)
        _ = jax.block_until_ready(top_singular_values(chain, jnp.ones(64), 1, key=KEY))
        times[str(depth)] = time.perf_counter() - start
    return times


def memory_of_a_million() -> dict[str, float]:
    """MiB of a state of 1,000 x 1,000 behind 10 convolutions: everything the search holds."""
    kernels = np.random.default_rng(0).standard_normal((10, 1, 1, 3, 3)).astype(np.float32) / 3

    def block(kernel: jax.Array, h: jax.Array) -> jax.Array:
        convolved = jax.lax.conv_general_dilated(h[None, None], kernel, (1, 1), "SAME")
        return jnp.tanh(convolved[0, 0])

    chain = jg.Chain.scanned(block, jnp.asarray(kernels))
    x = jnp.ones((1000, 1000))
    made, arrays = plan.plan_of(chain.run(x), "bench")
    problem = extremes._problem(made, 4, (None, 400, None), "bench")
    search = extremes._top.lower(made, problem, arrays, KEY).compile()
    moments = jax.jit(lambda x: singular_moments(chain, x, key=KEY)).lower(x).compile()
    found = {}
    for name, program in (("top 4", search), ("moments, 64 probes", moments)):
        account = program.memory_analysis()
        parts = (
            account.temp_size_in_bytes,
            account.argument_size_in_bytes,
            account.output_size_in_bytes,
        )
        found[name] = sum(parts) / 2**20
    return found


def measure(
    options: harness.Options,
) -> tuple[Mapping[str, Any], list[harness.Claim], dict[str, Any]]:
    """All tables, claims and facts."""
    shapes = SHAPES if options.rounds > 3 else SHAPES[:2]
    options = dataclasses.replace(options, rounds=min(options.rounds, 7), compile_rounds=1)
    tables, claims, facts = {}, [], {}
    for n, depth in shapes:
        title = f"top {COUNT}, n = {n}, L = {depth}"
        tables[title], facts[title] = against_others(n, depth, options)
        results = tables[title]
        for other in results:
            if other != "jaxgrad":
                ours = np.asarray(results["jaxgrad"].samples) / np.asarray(results[other].samples)
                claims.append(harness.Claim(f"{title}: over {other}", float(np.median(ours)), 1.0))
    facts["scaling"] = scaling()
    claims.append(
        harness.Claim("time is at most linear in L", facts["scaling"]["exponents"]["L"], 1.1)
    )
    claims.append(
        harness.Claim("time is at most quadratic in n", facts["scaling"]["exponents"]["n"], 2.2)
    )
    facts["first call, seconds by depth"] = first_calls()
    facts["MiB at a state of 1,000,000"] = memory_of_a_million()
    for name, size in facts["MiB at a state of 1,000,000"].items():
        claims.append(harness.Claim(f"GiB at a state of 1,000,000, {name}", size / 1024, 2.0))
    return tables, claims, facts


def main() -> int:
    """Measures everything."""
    options = harness.options(__doc__)
    tables, claims, facts = measure(options)
    for name, values in facts.items():
        print(f"{name}: {values}")
    return harness.finish("extremes", tables, claims, options, facts)


if __name__ == "__main__":
    raise SystemExit(main())
