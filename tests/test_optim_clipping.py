"""Clips: the right norm at every magnitude and dtype, and where optax's is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgrad import optim, tree
from tests import reference_optim as reference
from tests.optim_cases import SHAPES, sample

MAKERS = [
    optim.clip_by_value,
    optim.clip_by_global_norm,
    optim.clip_by_block_rms,
    optim.adaptive_clip,
]


def apply(tx, grads, params=None):
    return tx.update(grads, tx.init(params), params)[0]


exact_clip = jax.jit(lambda g, m: apply(optim.clip_by_global_norm(m), g))
norm_of = jax.jit(tree.global_norm)
optax_clip = jax.jit(lambda g, m: apply(optax.clip_by_global_norm(m), g))


@given(seed=st.integers(0, 2**31 - 1), exponent=st.integers(-100, 120))
def test_the_global_clip_agrees_with_float64_at_every_magnitude(seed, exponent):
    _, grads = sample(SHAPES["nested"], seed, exponent, steps=1)
    leaves = jax.tree.leaves(grads)
    limit = np.float32(np.ldexp(1.0, exponent))
    got = jax.tree.leaves(exact_clip(grads, limit))
    for g, right in zip(got, reference.clip_by_global_norm(leaves, limit), strict=True):
        np.testing.assert_allclose(g, right, rtol=5e-7, atol=2.0**-120)


@given(seed=st.integers(0, 2**31 - 1), shift=st.integers(-30, 30))
def test_scaling_gradient_and_threshold_by_a_power_of_two_scales_the_clip_exactly(seed, shift):
    _, grads = sample(SHAPES["nested"], seed, steps=1)
    scaled = jax.tree.map(lambda g: np.ldexp(g, shift).astype(g.dtype), grads)
    small, big = exact_clip(grads, 0.37), exact_clip(scaled, np.float32(np.ldexp(0.37, shift)))
    for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(big), strict=True):
        assert np.array_equal(np.ldexp(np.asarray(a), shift), b)


@given(seed=st.integers(0, 2**31 - 1))
def test_the_clipped_norm_is_the_threshold_within_an_ulp_and_clipping_again_changes_ulps_only(seed):
    _, grads = sample(SHAPES["nested"], seed, 3, steps=1)
    once = exact_clip(grads, 1.0)
    assert norm_of(once) <= 1 + 4e-7
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(exact_clip(once, 1.0)), strict=True):
        np.testing.assert_allclose(a, b, rtol=4e-7, atol=0)


def test_a_clip_that_is_not_triggered_changes_no_bit():
    g = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.1], jnp.bfloat16)}
    for limit in (5.01, 1e30, np.inf):
        same = exact_clip(g, limit)
        assert all(np.array_equal(g[k], same[k]) for k in g)
    assert np.array_equal(exact_clip(jnp.array([3.0, 4.0]), 5.0), [3, 4])


@given(seed=st.integers(0, 2**31 - 1), exponent=st.integers(-70, 70))
def test_block_and_unit_clips_agree_with_float64(seed, exponent):
    params, grads = sample(SHAPES["nested"], seed, exponent, steps=1)
    grads = jax.tree.map(lambda g: g[0], grads)
    leaves = jax.tree.leaves(grads)
    limit = np.float32(np.ldexp(0.5, exponent))
    got = jax.tree.leaves(_block(grads, limit))
    for g, right in zip(got, reference.clip_by_block_rms(leaves, limit), strict=True):
        np.testing.assert_allclose(g, right, rtol=1e-6, atol=2.0**-120)
    got = jax.tree.leaves(_adaptive(grads, params))
    right = reference.adaptive_clip(leaves, jax.tree.leaves(params), 0.1)
    for g, r in zip(got, right, strict=True):
        np.testing.assert_allclose(g, r, rtol=1e-6, atol=2.0**-120)


_block = jax.jit(lambda g, m: apply(optim.clip_by_block_rms(m), g))
_adaptive = jax.jit(lambda g, p: apply(optim.adaptive_clip(0.1), g, p))


def test_golden_cases():
    np.testing.assert_allclose(exact_clip(jnp.array([100.0, 100.0]), 1.0), [0.70711] * 2, atol=1e-5)
    np.testing.assert_allclose(_block(jnp.array([3.0, 4.0]), 1.0), [0.8485, 1.1314], atol=1e-4)
    np.testing.assert_allclose(exact_clip(jnp.array([3 + 4j]), 1.0), [0.6 + 0.8j], rtol=1e-6)
    clipped = apply(optim.clip_by_value(1.0), jnp.array([np.nan, np.inf, -3, 0.5]))
    np.testing.assert_array_equal(clipped, [np.nan, 1, -1, 0.5])


# ------------------------------------------------------------------- where optax is wrong


@pytest.mark.parametrize(
    ("values", "dtype", "limit", "right", "optax_says"),
    [
        ([0, 0], "float32", 0.0, [0, 0], [np.nan, np.nan]),
        ([1e20, 1e20], "float32", 1.0, [0.70710678, 0.70710678], [0, 0]),
        ([3e38] * 16, "float32", 1.0, [0.25] * 16, [0] * 16),
        ([1e-23] * 4, "float32", 1e-24, [5e-25] * 4, [1e-23] * 4),
        ([300, 400], "float16", 1.0, [0.6, 0.8], [0, 0]),
        ([1, 1], "float32", np.inf, [1, 1], [1, 1]),
    ],
)
def test_norms_that_overflow_or_underflow_clip_right(values, dtype, limit, right, optax_says):
    g = jnp.array(values, dtype)
    np.testing.assert_allclose(
        exact_clip(g, limit), right, rtol=1e-3 if dtype == "float16" else 2e-7
    )
    np.testing.assert_allclose(optax_clip(g, limit), optax_says, rtol=1e-6)


def test_a_bfloat16_clip_to_one_leaves_one_where_optax_leaves_much_more():
    rng = np.random.default_rng(0)
    grads = [jnp.array(rng.standard_normal(512), jnp.bfloat16) for _ in range(300)]

    def norm(leaves):
        return np.linalg.norm(np.concatenate([np.float64(x) for x in leaves]))

    assert abs(norm(exact_clip(grads, 1.0)) - 1) < 2e-3
    theirs = [jnp.ones((), jnp.bfloat16)] * 1000
    assert float(optax.tree.norm(theirs)) == 16
    assert float(tree.global_norm(theirs)) == pytest.approx(1000**0.5)


def test_the_slope_of_a_clip_at_zero_is_the_identity():
    def total(tx, *params):
        return jax.jit(jax.grad(lambda g: jnp.sum(apply(tx, g, *params))))(jnp.zeros(2))

    assert np.isnan(total(optax.clip_by_global_norm(1.0))).all()
    assert np.array_equal(total(optim.clip_by_global_norm(1.0)), [1, 1])
    assert np.array_equal(total(optim.adaptive_clip(0.1), jnp.ones(2)), [1, 1])
    assert np.array_equal(total(optim.clip_by_block_rms(1.0)), [1, 1])


def test_the_slope_of_an_active_clip_agrees_with_finite_differences(x64):
    @jax.jit
    def loss(g):
        return jnp.sum(jnp.sin(apply(optim.clip_by_global_norm(1.0), g)))

    g, d = jnp.array([3.0, -2.0, 0.5]), jnp.array([0.3, 0.1, -0.7])
    wanted = (loss(g + 1e-6 * d) - loss(g - 1e-6 * d)) / 2e-6
    np.testing.assert_allclose(jnp.vdot(jax.jit(jax.grad(loss))(g), d), wanted, rtol=1e-8)


def test_block_rms_clip_of_zeros_to_zero_is_zero_where_optax_gives_nan():
    assert np.isnan(apply(optax.clip_by_block_rms(0.0), jnp.zeros(2))).all()
    assert np.array_equal(apply(optim.clip_by_block_rms(0.0), jnp.zeros(2)), [0, 0])


def test_unit_clip_reaches_tiny_thresholds_where_optax_divides_by_its_floor():
    g, p = jnp.full(4, 2.5e-7), jnp.zeros(4)  # norm 5e-7, limit 1e-4 * 1e-3 = 1e-7
    norm = lambda u: float(jnp.linalg.norm(u))  # noqa: E731
    assert norm(apply(optim.adaptive_clip(1e-4), g, p)) == pytest.approx(1e-7)
    assert norm(apply(optax.adaptive_grad_clip(1e-4), g, p)) == pytest.approx(5e-8)


@pytest.mark.parametrize("make", MAKERS)
def test_negative_thresholds_are_errors_and_nan_where_they_appear_inside_jit(make):
    with pytest.raises(ValueError, match=r"expected a number >= 0, got -1"):
        make(-1.0)
    g = jnp.array([3.0, 4.0])
    assert np.isnan(jax.jit(lambda m: apply(make(m), g, g))(-1.0)).all()
    flipped = apply(optax.clip_by_global_norm(-1.0), g)
    assert (flipped < 0).all()  # optax turns the gradient around


@pytest.mark.parametrize("make", MAKERS[1:3])
def test_leaves_without_gradients_are_passed_by(make):
    float0 = np.zeros(2, jax.dtypes.float0)
    grads = {"w": jnp.array([30.0, 40.0]), "none": None, "int": jnp.arange(3), "zero": float0}
    out = apply(make(1.0), grads)
    assert out["none"] is None
    assert out["int"] is grads["int"]
    assert out["zero"] is float0
    assert 0 < float(tree.global_norm(out["w"])) < 2
    with pytest.raises((TypeError, AttributeError)):
        apply(optax.clip_by_global_norm(1.0), grads)


def test_injected_thresholds_clip_mixed_trees_where_optax_raises():
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0], jnp.bfloat16)}
    for inject in (optim.inject_hyperparams, optax.inject_hyperparams):
        tx = inject(optim.clip_by_global_norm)(max_norm=1.0)
        out, _ = tx.update(grads, tx.init(grads))
        assert float(out["a"][0]) == pytest.approx(0.6)
        assert out["b"].dtype == jnp.bfloat16
    tx = optax.inject_hyperparams(optax.clip_by_global_norm)(max_norm=1.0)
    with pytest.raises(TypeError):
        tx.update(grads, tx.init(grads))


def test_infinite_and_nan_entries_stay_visible():
    np.testing.assert_array_equal(exact_clip(jnp.array([np.inf, 1.0]), 1.0), [np.nan, 0])
    assert np.isnan(exact_clip(jnp.array([np.nan, 1.0]), 1.0)).all()


def test_what_needs_parameters_or_order_says_so():
    with pytest.raises(ValueError, match="update\\(grads, state, params\\)"):
        apply(optim.adaptive_clip(0.1), jnp.ones(2))
    with pytest.raises(ValueError, match="complex"):
        apply(optim.clip_by_value(0.1), jnp.array([1j]))
    g = jnp.ones((2,) * 6)
    with pytest.raises(ValueError, match="axis"):
        apply(optim.adaptive_clip(0.1), g, g)


@pytest.mark.slow
def test_a_clip_over_two_thousand_leaves_compiles_in_seconds():
    import time

    grads = [jnp.ones(16)] * 2000
    start = time.process_time()
    jax.jit(lambda g: apply(optim.clip_by_global_norm(1.0), g)).lower(grads).compile()
    assert time.process_time() - start < 25
