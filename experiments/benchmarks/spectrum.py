"""What does a product in log scale cost over the plain product, which is wrong?

100 layers of 256 x 256, 16 examples. How often the product must orthogonalize depends on the
layers: hardly ever for near-isometries, at nearly every layer for Gaussian ones in float32, whose
smallest mode loses 3.4 nats a layer; one QR costs as much as 15 matrix products on a CPU. The
spectrum is timed apart, beside a plain SVD. Run: ``./scripts/bench spectrum``.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import harness
from jaxgrad.graded import Graded, graded_product

WIDTH, DEPTH, BATCH = 256, 100, 16
MOST = 5.0
KINDS = ("orthogonal", "saturating", "residual", "gaussian")


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


def main() -> int:
    """Measures every chain in both precisions. Gaussian layers are known to miss the bound."""
    options = harness.options(__doc__)
    # A call takes seconds: few rounds say enough.
    options = dataclasses.replace(options, rounds=min(options.rounds, 5), compile_rounds=1)
    tables, claims = {}, []
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            for kind in KINDS:
                name = f"{kind}, {dtype}"
                tables[name] = measure(kind, dtype, options)
                ratio = tables[name]["graded product"].time_ratio
                claims.append(harness.Claim(f"{name}: over the plain product", ratio, MOST))
    return harness.finish("spectrum", tables, claims, options)


if __name__ == "__main__":
    raise SystemExit(main())
