"""What types lose: gradients stored in half precision, and norms in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.atlas import deep, frame
from jaxgrad import theory, tree
from jaxgrad.nn import mlp


def _rounded(g: jax.Array, half: jax.Array) -> jax.Array:
    """The nearest fp16 numbers where `half`, else the nearest bf16 ones."""
    narrow, wide = (g.astype(dtype).astype(g.dtype) for dtype in ("float16", "bfloat16"))
    return jnp.where(half, narrow, wide)


def backward(
    blocks: Any, states: jax.Array, g: jax.Array, half: jax.Array, model: mlp.Config
) -> tuple[jax.Array, jax.Array]:
    """By layer, shares of dL/dh_l that are zero, and finite, where every dL/dh_l is rounded.

    The layers themselves compute in float32: the forward pass has no part in what is lost.
    """

    def layer(g: jax.Array, both: Any) -> tuple[jax.Array, Any]:
        params, h = both
        g = _rounded(jax.vjp(lambda h: mlp.block(params, h, model), h)[1](g)[0], half)
        return g, (jnp.mean(g == 0), jnp.mean(jnp.isfinite(g)))

    _, (zero, finite) = lax.scan(layer, _rounded(g, half), (blocks, states), reverse=True)
    return zero, finite


def exact(blocks: Any, states: jax.Array, g: jax.Array, model: mlp.Config) -> jax.Array:
    """By layer, log2 of the root mean square of dL/dh_l; the last entry is the output's.

    The gradient is scaled to one after each layer, so depth cannot underflow.
    """

    def unit(g: jax.Array) -> tuple[jax.Array, jax.Array]:
        largest = jnp.max(jnp.abs(g))
        rms = largest * jnp.sqrt(jnp.mean((g / largest) ** 2))
        return g / rms, jnp.log2(rms)

    def layer(carry: tuple, both: Any) -> tuple[tuple, jax.Array]:
        (g, log), (params, h) = carry, both
        g, more = unit(jax.vjp(lambda h: mlp.block(params, h, model), h)[1](g)[0])
        return (g, log + more), log + more

    first = unit(g)
    _, logs = lax.scan(layer, first, (blocks, states), reverse=True)
    return jnp.append(logs, first[1])


def norms() -> frame.Arrays:
    """Norms of 64 equal numbers 10^k, as `jnp.linalg.norm` and as jaxgrad has them."""
    exponents = np.arange(-36, 39)
    vectors = np.repeat(10.0 ** exponents[:, None], 64, 1).astype(np.float32)

    def both(v: jax.Array) -> frame.Arrays:
        return {"plain": jnp.linalg.norm(v), "safe": tree.global_norm(v)}

    return {"exponent": exponents, **frame.mapped(both, vectors)}


def judge_norm(arrays: frame.Arrays) -> frame.Verdict:
    """The plain norm of 64 numbers 10^k is right to 0.1 %, for all k that float32 has."""
    true = 8 * 10.0 ** np.asarray(arrays["exponent"], float)
    good, safe = (np.abs(arrays[name] / true - 1) < 1e-3 for name in ("plain", "safe"))
    if not good.any():
        return frame.Verdict("false", "wrong at all magnitudes")
    right = arrays["exponent"][good]
    # 8 x 10^38 is no float32, whatever the norm
    measured = (
        f"jnp.linalg.norm is right for elements from 1e{right.min()} to 1e{right.max()}, 0 below "
        f"and inf above; jaxgrad.tree.global_norm from 1e{arrays['exponent'][safe].min()} to "
        f"1e{arrays['exponent'][safe].max()}"
    )
    if good[true < np.finfo(np.float32).max].all():
        return frame.Verdict("holds", measured)
    return frame.Verdict("holds if", measured, f"elements from 1e{right.min()} to 1e{right.max()}")


def gain(activation: str, initializer: str, width: int) -> float:
    """Mean-field factor of the gradient's root mean square a layer, at the fixed point."""
    sigma_w, sigma_b = deep.sigmas(initializer, width)
    q = 1.0
    for _ in range(30):
        q = float(theory.variance_map(activation, q, sigma_w, sigma_b))
    return float(theory.chi_1(activation, q, sigma_w)) ** 0.5
