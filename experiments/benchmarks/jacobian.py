"""All layers' Jacobians and all suffix products of a deep MLP, beside `jacrev`, PyTorch and GEMM.

64 tanh layers of width 256, 32 examples, float32. The floor is what the suffix products alone must
multiply: 64 x 32 products of 256 x 256 matrices in one compiled program. `jacrev` differentiates
the output with respect to every hidden state (an additive zero at each, vmapped over the examples),
in JAX and in `torch.func`; it gives the suffix products, and no layer's own Jacobian. Run:
`./scripts/bench jacobian`; PyTorch's case needs `JAXGRAD_EXTRAS=test,peers`.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxgrad as jg
from experiments.benchmarks import harness

DEPTH, WIDTH, EXAMPLES = 64, 256, 32


def problem() -> tuple[np.ndarray, np.ndarray]:
    """Weights at the edge of chaos, and a batch."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((DEPTH, WIDTH, WIDTH)) / np.sqrt(WIDTH)
    return weights.astype(np.float32), rng.standard_normal((EXAMPLES, WIDTH)).astype(np.float32)


def jaxgrad_case(weights: np.ndarray, xs: np.ndarray) -> Callable[[], Any]:
    layers = [jnp.asarray(w) for w in weights]

    def f(h: jax.Array) -> jax.Array:
        for w in layers:
            h = jnp.tanh(h @ w)
        return h

    chain = jg.factorize(f, jnp.asarray(xs), batch_axis=0)
    assert len(chain) == DEPTH, chain

    def run() -> Any:
        jacobians = jg.layer_jacobians(chain, xs)
        products = jg.jacobian_products(chain, xs, direction="backward")
        return jacobians, [getattr(p, "plain", p) for p in products]

    return run


def jacrev_every_state(zeros: jax.Array, weights: jax.Array, xs: jax.Array) -> jax.Array:
    """(examples, n_out, depth, n): the output's Jacobian for every hidden state but the last."""

    def f(zeros: jax.Array, h: jax.Array) -> jax.Array:
        for zero, w in zip(zeros, weights, strict=True):
            h = jnp.tanh((h + zero) @ w)
        return h

    with jax.default_matmul_precision("highest"):
        return jax.vmap(jax.jacrev(f), in_axes=(None, 0))(zeros, xs)


def floor(start: jax.Array, matrices: jax.Array) -> jax.Array:
    """The suffix products' multiplications, and nothing else."""

    def step(product: jax.Array, matrix: jax.Array) -> tuple[jax.Array, None]:
        return jnp.matmul(product, matrix, precision="highest"), None

    return jax.lax.scan(step, start, matrices)[0]


def torch_case(weights: np.ndarray, xs: np.ndarray) -> Callable[[], Any] | None:
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    layers = [torch.from_numpy(w) for w in weights]
    batch = torch.from_numpy(xs)
    zeros = torch.zeros(DEPTH, WIDTH)

    def f(zeros: Any, h: Any) -> Any:
        for zero, w in zip(zeros, layers, strict=True):
            h = torch.tanh((h + zero) @ w)
        return h

    every = torch.func.vmap(torch.func.jacrev(f), in_dims=(None, 0))
    return lambda: every(zeros, batch).sum().item()


def agree(run: Callable[[], Any], weights: np.ndarray, xs: np.ndarray) -> float:
    """Largest difference from `jacrev`, over the largest entry of its suffix product."""
    products = run()[1][:-1]
    expected = jax.jit(jacrev_every_state)(jnp.zeros((DEPTH, WIDTH)), weights, xs)
    worst = 0.0
    for k, plain in enumerate(products):
        found = plain.matrix * jnp.exp2(plain.power.astype(jnp.float32))[:, None, None]
        difference = jnp.max(jnp.abs(found - expected[:, :, k]))
        worst = max(worst, float(difference / jnp.max(jnp.abs(expected[:, :, k]))))
    return worst


def main() -> int:
    options = harness.options(__doc__)
    weights, xs = problem()
    run = jaxgrad_case(weights, xs)
    worst = agree(run, weights, xs)
    print(f"largest difference from jacrev, relative to the largest entry: {worst:.1e}")
    matrices = jnp.asarray(np.broadcast_to(weights[:, None], (DEPTH, EXAMPLES, WIDTH, WIDTH)))
    start = matrices[0]
    cases = [
        harness.Case("GEMM floor", floor, (start, matrices)),
        harness.Case("jaxgrad", run, jit=False),
        harness.Case(
            "jax.jacrev, every state", jacrev_every_state, (jnp.zeros((DEPTH, WIDTH)), weights, xs)
        ),
    ]
    by_torch = torch_case(weights, xs)
    if by_torch is not None:
        cases.append(harness.Case("torch.func.jacrev", by_torch, jit=False))
    results = harness.compare(cases, baseline="GEMM floor", options=options)
    claims = [
        harness.Claim("time over the GEMM floor", results["jaxgrad"].time_ratio, at_most=2.0),
        harness.Claim("difference from jacrev", worst, at_most=1e-4),
    ]
    title = f"{DEPTH} layers of width {WIDTH}, {EXAMPLES} examples"
    return harness.finish("jacobian", {title: results}, claims, options, {"difference": worst})


if __name__ == "__main__":
    raise SystemExit(main())
