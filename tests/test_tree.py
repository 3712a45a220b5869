"""Names of leaves, and norms at both ends of every dtype's range."""

import time
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgrad import tree

norm = jax.jit(tree.global_norm)


class Pair(NamedTuple):
    first: object
    second: object


def test_names_join_keys_attributes_and_indices_in_leaf_order():
    model = {"block_0": {"mlp": {"kernel": 1.0}}, "layers": [Pair(1.0, (2.0, 3.0))]}
    assert tree.leaf_names(model) == (
        "block_0/mlp/kernel",
        "layers[0]/first",
        "layers[0]/second[0]",
        "layers[0]/second[1]",
    )


def test_names_of_equinox_and_nnx_leaves_read_like_attributes():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs)])

    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    assert tree.leaf_names(state) == ("layers[0]/bias", "layers[0]/kernel")
    mlp = eqx.filter(eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)), eqx.is_array)
    assert tree.leaf_names(mlp)[:2] == ("layers[0]/weight", "layers[0]/bias")


def test_names_are_distinct_even_where_paths_read_the_same():
    names = tree.leaf_names({"a/b": 1.0, "a": {"b": 2.0}, "c": 3.0})
    assert len(set(names)) == 3
    assert names[-1] == "c"
    assert tree.leaf_names(1.0) == ("",)
    assert tree.leaf_names(1.0, root="x") == ("x",)


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (jnp.ones(2), True),
        (np.ones(2), True),
        (np.float32(1), True),
        (jnp.ones(2, jnp.bfloat16), True),
        (jnp.ones(2, jnp.complex64), True),
        (jax.ShapeDtypeStruct((2,), jnp.float32), True),
        (jnp.arange(2), False),
        (jnp.array(True), False),
        (np.zeros(2, jax.dtypes.float0), False),
        (jax.random.key(0), False),
        (1.0, False),
        (None, False),
        ("name", False),
    ],
)
def test_only_inexact_arrays_carry_a_gradient(leaf, expected):
    assert tree.is_inexact_array(leaf) is expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0, 4.0], 5.0),
        ([1e20, 1e20], np.sqrt(2) * 1e20),
        ([1e-23] * 4, 2e-23),
        ([1e-37] * 4, 2e-37),
        ([1e30, 1e-30], 1e30),
        ([0.0, 0.0], 0.0),
        ([np.inf, 1.0], np.inf),
        ([np.inf, np.nan], np.nan),
        ([], 0.0),
    ],
)
def test_the_norm_neither_overflows_nor_underflows(values, expected):
    got = norm(jnp.array(values, jnp.float32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-7, atol=0)


def test_half_precision_is_accumulated_in_float32():
    assert norm(jnp.array([300, 400], jnp.float16)) == 500
    np.testing.assert_allclose(norm(jnp.ones(100_000, jnp.float16)), 316.22777, rtol=1e-6)
    one = jnp.ones((), jnp.bfloat16)
    np.testing.assert_allclose(norm([one] * 1000), 31.622776, rtol=1e-6)


def test_a_norm_beyond_the_range_still_has_two_finite_factors():
    scale, relative = jax.jit(tree.scaled_norm)(jnp.full(16, 3e38, jnp.float32))
    assert np.isinf(norm(jnp.full(16, 3e38, jnp.float32)))
    np.testing.assert_allclose(float(scale) * float(relative), 1.2e39, rtol=1e-6)
    assert np.frexp(float(scale))[0] == 0.5


def test_leaves_without_a_gradient_are_passed_by():
    passed_by = [None, 7, jnp.arange(9), np.zeros(3, jax.dtypes.float0), jnp.zeros((0, 2))]
    assert norm([*passed_by[1:3], jnp.zeros((0,))]) == 0
    assert tree.global_norm([*passed_by, jnp.array([3.0]), jnp.array(4.0)]) == 5
    assert tree.global_norm({}) == 0


def test_the_gradient_is_the_unit_vector_and_zero_at_zero():
    grad = jax.jit(jax.grad(tree.global_norm))
    for size in (1e-30, 1.0, 1e30):
        got = grad(jnp.array([3.0, 4.0], jnp.float32) * size)
        np.testing.assert_allclose(got, [0.6, 0.8], rtol=3e-7, atol=0)
    assert np.array_equal(grad(jnp.zeros(2)), np.zeros(2))
    g = jax.grad(lambda z: tree.global_norm([z]))(jnp.array([3 + 4j], jnp.complex64))
    np.testing.assert_allclose(g, [0.6 - 0.8j], rtol=1e-6)  # JAX's convention: conj of steepest


def test_the_scaled_norm_differentiates_like_the_norm():
    def product(x):
        scale, relative = tree.scaled_norm(x)
        return scale * relative

    for x in (jnp.array([3.0, 4.0]), jnp.array([3e30, 4e30]), jnp.zeros(2)):
        np.testing.assert_allclose(
            jax.grad(product)(x), jax.grad(tree.global_norm)(x), rtol=1e-6, atol=0
        )


_shapes = {"a": (3, 5), "b": [(), (7000,), (0, 2)], "c": (4097,)}
_template = jax.tree.map(np.zeros, _shapes, is_leaf=lambda s: isinstance(s, tuple))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(-120, 120), st.integers(0, 40))
def test_the_norm_agrees_with_float64_at_every_magnitude(seed, exponent, spread):
    rng = np.random.default_rng(seed)
    draw = lambda z: np.float32(  # noqa: E731
        np.ldexp(rng.standard_normal(z.shape), exponent - rng.integers(0, spread + 1, z.shape))
    )
    sample = jax.tree.map(draw, _template)
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(sample)]).astype(np.float64)
    # XLA flushes subnormal inputs to zero; they are at most 2**-126 each.
    np.testing.assert_allclose(
        norm(sample), np.linalg.norm(flat), rtol=4e-7, atol=2.0**-126 * flat.size**0.5
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(-60, 60), st.integers(-40, 40))
def test_scaling_by_a_power_of_two_is_exact(seed, exponent, shift):
    rng = np.random.default_rng(seed)
    x = jax.tree.map(lambda z: np.float32(np.ldexp(1 + rng.random(z.shape), exponent)), _template)
    scaled = jax.tree.map(lambda z: np.float32(np.ldexp(z, shift)), x)
    assert np.ldexp(norm(x), shift) == norm(scaled)


def test_double_precision_stays_double():
    with jax.enable_x64(True):
        got = jax.jit(tree.global_norm)([jnp.full(4, 1e200), jnp.ones(2, jnp.float32)])
        assert got.dtype == jnp.float64
        assert got == 2e200


def test_the_norm_works_under_vmap():
    rows = jnp.array([[3, 4], [3e30, 4e30], [0, 0]], jnp.float32)
    np.testing.assert_allclose(jax.vmap(tree.global_norm)(rows), [5, 5e30, 0], rtol=2e-7)


def test_a_norm_over_two_thousand_leaves_compiles_in_seconds():
    leaves = [jnp.ones(16)] * 2000
    start = time.process_time()  # neighbors do not count
    compiled = jax.jit(tree.global_norm).lower(leaves).compile()
    assert time.process_time() - start < 12  # measured 1.8 s alone; optax.tree.norm takes 18 s
    np.testing.assert_allclose(compiled(leaves), np.sqrt(32000), rtol=1e-6)


def test_mapping_passes_by_what_carries_no_gradient():
    grads = {"a": jnp.ones(2), "b": None, "c": np.zeros(2, jax.dtypes.float0), "d": jnp.arange(2)}
    state = {"a": jnp.full(2, 5.0), "b": {"x": jnp.ones(3)}, "c": None, "d": None}
    kept = tree.map_inexact(lambda g, s: g + s, grads, state, keep=1)
    assert np.array_equal(kept["a"], [6, 6])
    assert kept["b"] is state["b"]
    assert kept["c"] is None
    passed = tree.map_inexact(lambda g, s: g + s, grads, state)
    assert passed["b"] is None
    assert passed["c"] is grads["c"]


def test_mapping_names_the_leaf_whose_shapes_differ():
    with pytest.raises(ValueError, match=r"block/w.*\(3,\).*\(1,\)"):
        tree.map_inexact(jnp.add, {"block": {"w": jnp.ones(3)}}, {"block": {"w": jnp.ones(1)}})
    with pytest.raises(ValueError, match="structure"):
        tree.map_inexact(jnp.add, {"a": jnp.ones(3)}, {"b": jnp.ones(3)})
