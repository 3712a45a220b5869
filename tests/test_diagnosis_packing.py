"""What is measured of all leaves at once, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad.diagnosis.packing import step_figures

SHAPES = [(3, 5), (200,), (), (4, 40, 2), (0, 7), (129,)]


def _leaves(seed, scales, dtypes, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    found = []
    for shape, scale, dtype in zip(shapes, scales, dtypes, strict=True):
        x = rng.standard_normal(shape) * scale
        if np.issubdtype(dtype, np.complexfloating):
            x = x + 1j * rng.standard_normal(shape) * scale
        found.append(jnp.asarray(x, dtype))
    return found


def _exact(x):
    wide = np.asarray(x, np.complex128 if jnp.iscomplexobj(x) else np.float64).ravel()
    return np.concatenate([wide.real, wide.imag]) if jnp.iscomplexobj(x) else wide


MIXED = [jnp.float32, jnp.bfloat16, jnp.float32, jnp.complex64, jnp.float32, jnp.float16]


@pytest.mark.parametrize("dtypes", [[jnp.float32] * 6, MIXED], ids=["float32", "mixed"])
def test_sizes_and_cosine_are_those_of_float64_at_any_scale_of_the_leaves(dtypes):
    values = _leaves(0, [1, 1e-3, 1, 1e-25, 1, 1], dtypes)
    grads = _leaves(1, [1e-30, 1, 1e12, 1e-8, 1, 1e-4], dtypes)
    updates = _leaves(2, [1e-3, 1e-3, 1e-2, 1e-26, 1, 1e-3], dtypes)
    found = jax.jit(step_figures)(values, grads, updates)
    for key, leaves in (("weight", values), ("gradient", grads), ("update", updates)):
        exact = [np.sqrt(np.sum(_exact(x) ** 2) / max(_exact(x).size, 1)) for x in leaves]
        np.testing.assert_allclose(found[f"{key}_rms"], exact, rtol=1e-5, atol=0)
    g, u = (
        np.concatenate([_exact(x) for x in leaves]) for leaves in (map(jnp.conj, grads), updates)
    )
    np.testing.assert_allclose(found["gradient_norm"], np.linalg.norm(g), rtol=1e-5, atol=0)
    np.testing.assert_allclose(found["update_norm"], np.linalg.norm(u), rtol=1e-5, atol=0)
    cosine = -(g @ u) / np.linalg.norm(g) / np.linalg.norm(u)
    np.testing.assert_allclose(found["alignment"], cosine, rtol=1e-4, atol=1e-6)
    assert found["finite"]


def test_the_share_of_updates_that_round_away_is_counted_in_each_leafs_own_dtype():
    values = [jnp.ones(300, jnp.bfloat16), jnp.ones(300), jnp.ones(300, jnp.float16)]
    step = jnp.where(jnp.arange(300) < 100, 2.0**-10, jnp.where(jnp.arange(300) < 200, 0.0, 0.5))
    found = jax.jit(step_figures)(values, values, [step, step, step])
    np.testing.assert_array_equal(found["rounded_away"], [0.5, 0.0, 0.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", range(2))
def test_a_nonfinite_gradient_anywhere_is_seen(bad, where):
    leaves = [jnp.ones((7, 30)), jnp.ones(3)]
    grads = [x.at[(0,) * x.ndim].set(bad) if i == where else x for i, x in enumerate(leaves)]
    assert not jax.jit(step_figures)(leaves, grads, leaves)["finite"]
    assert jax.jit(step_figures)(grads, leaves, leaves)["finite"]


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_nan_among_larger_numbers_is_seen_in_any_place(share):
    rng = np.random.default_rng(0)
    for _ in range(5):
        x = rng.standard_normal((64, 300)) * 1e3
        x = np.where(rng.random(x.shape) < share, np.nan, x)
        bad = [jnp.asarray(x, jnp.float32), jnp.ones(3)]
        assert not jax.jit(step_figures)(bad, bad, bad)["finite"]


def test_gradients_just_below_the_largest_number_are_measured():
    leaves = [jnp.full((7, 30), 1.5e38), jnp.full(3, 3e38)]
    found = jax.jit(step_figures)(leaves, leaves, leaves)
    np.testing.assert_allclose(found["gradient_rms"], [1.5e38, 3e38], rtol=1e-5)
    assert found["finite"]


def test_without_gradient_or_update_nothing_is_aligned():
    leaves, nothing = [jnp.ones((7, 30)), jnp.ones(3)], [jnp.zeros((7, 30)), jnp.zeros(3)]
    for grads, updates in ((nothing, leaves), (leaves, nothing)):
        found = jax.jit(step_figures)(leaves, grads, updates)
        assert found["alignment"] == 0
        assert found["finite"]


def test_a_descent_on_a_complex_parameter_is_aligned():
    z = jnp.asarray([1 + 2j, -0.5 + 0.25j])
    gradient = jax.grad(lambda z: jnp.sum(jnp.abs(z) ** 2))(z)
    found = step_figures([z], [gradient], [-0.1 * gradient.conj()])
    np.testing.assert_allclose(found["alignment"], 1.0, rtol=1e-6)
