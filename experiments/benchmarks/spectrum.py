"""What does a product in log scale cost over the plain product, and how wrong is the plain one?

100 layers of 256 x 256, 16 examples. How often the product must orthogonalize depends on the
layers: hardly ever for near-isometries, at every layer for Gaussian ones in float32, whose smallest
mode loses 3.4 nats a layer. The spectrum is timed apart, beside a plain SVD. Then small products of
several kinds, against arithmetic of as many digits as they need: largest errors of all log singular
values, in nats, of a plain product and its SVD, of the diagonal of a plain QR recursion, and of
`Graded`. Run: ``./scripts/bench spectrum``.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import extremes, harness
from jaxgrad.graded import Graded, graded_product, log_singular_values_mp

WIDTH, DEPTH, BATCH = 256, 100, 16
MOST = 5.0
KINDS = ("orthogonal", "saturating", "residual", "gaussian")
SMALL, DEPTHS = 8, (10, 100, 400)


def chain(kind: str, dtype: str) -> jax.Array:
    """(DEPTH, BATCH, WIDTH, WIDTH), made on the host layer by layer."""
    rng = np.random.default_rng(0)
    layers = []
    for _ in range(DEPTH):
        layer = rng.standard_normal((BATCH, WIDTH, WIDTH)).astype(np.float32) / np.sqrt(WIDTH)
        if kind == "residual":
            layer = np.eye(WIDTH) + 0.3 * layer
        if kind in ("orthogonal", "saturating"):
            layer = np.linalg.qr(layer)[0]
        if kind == "saturating":
            layer = layer * rng.uniform(0.8, 1, (BATCH, WIDTH, 1))
        layers.append(layer.astype(dtype))
    return jnp.asarray(np.stack(layers))


def plain_product(stack: jax.Array) -> jax.Array:
    """What underflows."""
    eye = jnp.broadcast_to(jnp.eye(WIDTH, dtype=stack.dtype), stack.shape[1:])

    def step(product, layer):
        return jnp.matmul(layer, product, precision="highest"), None

    return jax.lax.scan(step, eye, stack)[0]


def measure(kind: str, dtype: str, options: harness.Options) -> dict[str, harness.Result]:
    """Both products, and both spectra of what they give."""
    stack = chain(kind, dtype)
    cases = [
        harness.Case("plain product", plain_product, (stack,)),
        harness.Case("graded product", graded_product, (stack,)),
    ]
    results = harness.compare(cases, baseline="plain product", options=options)
    product, dense = jax.jit(graded_product)(stack), jax.jit(plain_product)(stack)
    cases = [
        harness.Case("plain SVD", lambda m: jnp.linalg.svd(m, compute_uv=False), (dense,)),
        harness.Case("graded spectrum", Graded.spectrum, (product,)),
    ]
    return results | harness.compare(cases, baseline="plain SVD", options=options)


def rotation(rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((SMALL, SMALL)))[0]


def sigmoid_net(rng: np.random.Generator) -> Iterator[np.ndarray]:
    state = rng.standard_normal(SMALL)
    while True:
        weights = rng.standard_normal((SMALL, SMALL)) * np.sqrt(2 / SMALL)
        state = 1 / (1 + np.exp(-weights @ state))
        yield (state * (1 - state))[:, None] * weights


def endless(layer: Callable[[np.random.Generator], np.ndarray]):
    """Independent layers."""

    def layers(rng):
        while True:
            yield layer(rng)

    return layers


FAMILIES = {
    "gaussian": endless(lambda rng: rng.standard_normal((SMALL, SMALL)) / np.sqrt(SMALL)),
    "orthogonal x 0.5 to 2": endless(lambda rng: rng.uniform(0.5, 2) * rotation(rng)),
    "sigmoid net": sigmoid_net,
    "ill-conditioned diagonal": endless(
        lambda rng: np.exp(-np.arange(SMALL))[:, None] * rng.standard_normal((SMALL, SMALL))
    ),
    "nearly singular": endless(
        lambda rng: rotation(rng) @ np.diag([1.0] * (SMALL - 1) + [1e-3]) @ rotation(rng)
    ),
}


def by_plain_svd(layers: np.ndarray) -> np.ndarray:
    """Log singular values of the product as it comes."""
    product = np.eye(SMALL, dtype=layers.dtype)
    for layer in layers:
        product = layer @ product
    with np.errstate(divide="ignore"):
        return np.log(np.linalg.svd(product, compute_uv=False).astype(float))


def by_qr_diagonal(layers: np.ndarray) -> np.ndarray:
    """Sums of log |R_ii|, as for Lyapunov exponents: right only per layer, at infinite depth."""
    basis, logs = np.eye(SMALL, dtype=layers.dtype), np.zeros(SMALL)
    for layer in layers:
        basis, triangle = np.linalg.qr(layer @ basis)
        logs += np.log(np.abs(np.diagonal(triangle).astype(float)))
    return np.sort(logs)[::-1]


@jax.jit
def by_graded(stack: jax.Array):
    return graded_product(stack).spectrum()


def errors(dtype: str) -> list[dict]:
    """Largest errors in nats against multi-precision, one row a family and depth."""
    rows = []
    for family, layers in FAMILIES.items():
        for depth in DEPTHS:
            source = layers(np.random.default_rng(0))
            stack = np.stack([next(source) for _ in range(depth)]).astype(dtype)
            exact = log_singular_values_mp(stack.astype(float))
            # Identities fill the stack: one compilation for all depths.
            filled = np.concatenate([stack, np.stack([np.eye(SMALL, dtype=dtype)] * max(DEPTHS))])
            result = by_graded(jnp.asarray(filled[: max(DEPTHS)]))
            difference = np.asarray(result.log(), float) - exact
            trusted = np.asarray(result.certificate.trusted)
            rows.append(
                {
                    "dtype": dtype,
                    "family": family,
                    "depth": depth,
                    "range": float(exact[0] - exact[-1]),
                    "plain SVD": largest(by_plain_svd(stack) - exact),
                    "plain QR diagonal": largest(by_qr_diagonal(stack) - exact),
                    "Graded": largest(difference),
                    "Graded, trusted": largest(difference[trusted]) if np.any(trusted) else 0.0,
                    "half an ulp": float(np.finfo(dtype).eps * np.max(np.abs(exact)) / 2),
                    "trusted": int(np.sum(trusted)),
                }
            )
    return rows


def largest(differences: np.ndarray) -> float:
    value = float(np.max(np.abs(differences)))
    return value if math.isfinite(value) else math.inf


def print_errors(rows: list[dict]) -> None:
    print(f"largest errors of {SMALL} log singular values, in nats")
    print(f"  {'dtype':<9}{'layers':<26}{'depth':>6}{'range':>9}{'plain SVD':>11}", end="")
    print(f"{'plain QR':>10}{'Graded':>10}{'ulp/2':>10}{'trusted':>9}")
    for r in rows:
        print(
            f"  {r['dtype']:<9}{r['family']:<26}{r['depth']:>6}{r['range']:>9.1f}"
            f"{r['plain SVD']:>11.3g}{r['plain QR diagonal']:>10.3g}{r['Graded']:>10.1e}"
            f"{r['half an ulp']:>10.1e}{r['trusted']:>9}"
        )


def main() -> int:
    """Measures every chain in both precisions."""
    options = harness.options(__doc__)
    # A call takes seconds: few rounds say enough.
    options = dataclasses.replace(options, rounds=min(options.rounds, 5), compile_rounds=1)
    tables, claims, accuracy = {}, [], []
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            for kind in KINDS:
                name = f"{kind}, {dtype}"
                tables[name] = measure(kind, dtype, options)
                ratio = tables[name]["graded product"].time_ratio
                claims.append(harness.Claim(f"{name}: over the plain product", ratio, MOST))
            rows = errors(dtype)
            print_errors(rows)
            bar = {"float32": 1e-3, "float64": 1e-10}[dtype]
            worst = max(r["Graded, trusted"] - r["half an ulp"] for r in rows)
            claims.append(harness.Claim(f"{dtype}: error of Graded, nats", worst, bar))
            accuracy += rows
    more_tables, more_claims, facts = extremes.measure(options)
    facts = {"errors in nats": accuracy, **facts}
    return harness.finish("spectrum", tables | more_tables, claims + more_claims, options, facts)


if __name__ == "__main__":
    raise SystemExit(main())
