"""Products of layers that kill units: more rows in a leaf than dimensions are left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad.graded import Graded

DEPTH, SEEDS = 5, 4


@jax.jit
def swept(matrices):
    """Log singular values from a forward and a backward sweep over the same layers."""
    forward = backward = Graded.identity(matrices.shape[-1], dtype=matrices.dtype)
    forward, _ = jax.lax.scan(lambda p, m: (p.left_multiply(m), None), forward, matrices)
    backward, _ = jax.lax.scan(lambda p, m: (p.right_multiply(m), None), backward, matrices[::-1])
    return forward.log_singular_values(), backward.log_singular_values()


def layers(width, killed, rows, seed):
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((DEPTH, width, width)) / np.sqrt(width)
    alive = rng.random((DEPTH, width)) >= killed
    alive[:, :2] = True
    return weights * (alive[:, :, None] if rows else alive[:, None, :])


@pytest.mark.parametrize("width", [40, 72])
@pytest.mark.parametrize("killed", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("rows", [True, False])
def test_the_singular_values_of_dead_units_are_those_of_float64(width, killed, rows):
    for seed in range(SEEDS):
        matrices = layers(width, killed, rows, seed)
        product = np.linalg.multi_dot([*matrices[::-1]])
        values = np.linalg.svd(product, compute_uv=False)
        bulk = values > 1e-10 * values[0]  # the rest is rounding of the float64 oracle
        alive = np.sum(values > 1e-13 * values[0])
        for found in swept(jnp.asarray(matrices, jnp.float32)):
            assert not np.isnan(found).any()
            trusted = np.log(values[bulk][: alive // 2])
            np.testing.assert_allclose(found[: alive // 2], trusted, atol=1e-3)
            # beyond the rank nothing is left but noise of the last bits
            assert np.all(found[alive:] < found[0] + np.log(1e-6))
