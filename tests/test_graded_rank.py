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


def relu_examples(seed, examples=5, width=6, inputs=4):
    """The Jacobian of `relu(x @ w)` over a few examples: blocks, each with its dead rows."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((inputs, width)) / 2
    matrix = np.zeros((examples * width, examples * inputs))
    for k in range(examples):
        alive = rng.standard_normal(inputs) @ weights > 0
        rows, columns = slice(k * width, (k + 1) * width), slice(k * inputs, (k + 1) * inputs)
        matrix[rows, columns] = alive[:, None] * weights.T
    return matrix


def test_a_dependent_column_takes_nothing_of_the_others_with_it():
    """A noise pivot, found only after the rows before it are known, once hid what came after it."""
    matrices = np.stack([relu_examples(seed) for seed in range(1100)])  # a decision for each

    @jax.jit
    def held(matrices):
        made = jax.lax.map(Graded.from_dense, matrices)
        return made.to_dense(), made.rank

    dense, rank = held(jnp.asarray(matrices, jnp.float32))
    np.testing.assert_allclose(dense, matrices, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(rank, np.linalg.matrix_rank(matrices))


@jax.jit
def certified(matrix):
    spectrum = Graded.from_dense(matrix).left_multiply(matrix).spectrum()
    return spectrum.log(), spectrum.certificate


def test_a_value_that_fell_below_rounding_is_not_vouched_for_and_one_that_must_be_zero_is():
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((6, 6))
    alive = np.arange(6) < 4
    must_be_zero = {
        "dead rows": alive[:, None] * dense,
        "dead columns": dense * alive,
        "zero": np.zeros((6, 6)),
    }
    only_small = {
        "rank one and noise": np.outer(dense[0], dense[1]) + 1e-12 * dense,
        "softmax": np.diag(np.full(6, 1 / 6)) - 1 / 36 * (1 + 1e-7 * dense),
        "flushed": dense * 1e-41,
    }
    for name, matrix in must_be_zero.items():
        logs, certificate = certified(jnp.asarray(matrix, jnp.float32))
        assert np.sum(np.isinf(logs)) == 6 - np.linalg.matrix_rank(matrix), name
        assert np.all(certificate.trusted), name
    for name, matrix in only_small.items():
        logs, certificate = certified(jnp.asarray(matrix, jnp.float32))
        assert np.isinf(logs[-1]), name
        assert not np.any(certificate.trusted[np.isinf(logs)]), name
        assert np.all(certificate.trusted[np.isfinite(logs)]), name
