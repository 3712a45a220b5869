"""Statistics of one tensor against float64 numpy, over the whole range of every dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgrad import statistics as S

STATISTICS = (
    S.rms, S.mean, S.max_abs, S.zero_share, S.nonfinite_count, S.below_float16, S.below_bfloat16,
)  # fmt: skip
every = jax.jit(lambda x: [f(x) for f in STATISTICS])
SHAPES = ((), (1,), (7,), (5, 3), (2, 3, 4))


def expected(x):
    """The same in float64, or longdouble for float64; zeros where the device flushes."""
    wide = np.abs(np.asarray(x)).astype(np.longdouble)
    tiny = np.finfo(np.float64 if x.dtype == np.float64 else np.float32).tiny
    wide = np.where(wide < tiny, 0, wide)
    n = max(x.size, 1)
    with np.errstate(invalid="ignore", over="ignore"):
        return [
            np.sqrt(np.sum(wide**2) / n),
            np.sum(np.asarray(x).real.astype(np.longdouble)) / n,
            np.max(wide, initial=0),
            np.sum(wide == 0) / n,
            np.sum(~np.isfinite(wide)),
            np.sum((wide > 0) & (wide < 2.0**-14)) / n,
            np.sum((wide > 0) & (wide < 2.0**-126)) / n,
        ]


def check(x, rtol):
    found = [np.float64(a) for a in every(x)]
    want = expected(x)
    scale = float(want[2])
    for k, (a, b) in enumerate(zip(found, want, strict=True)):
        atol = rtol * scale if k == 1 else 0  # a mean cancels
        np.testing.assert_allclose(a, float(b), rtol=rtol, atol=atol, err_msg=str(STATISTICS[k]))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    power=st.integers(-120, 120),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_every_statistic_is_that_of_float64_at_any_scale(shape, power, zeros, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 2.0**power * (rng.random(shape) >= zeros)
    check(jnp.asarray(x, jnp.float32), rtol=2e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_every_dtype_is_accumulated_wide(dtype):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((300, 50)) * 2.0**-13, dtype)
        check(x, rtol=1e-13 if dtype == "float64" else 3e-6)


@pytest.mark.parametrize("power", [-1000, -600, 0, 500, 1000])
def test_float64_is_measured_over_its_own_range(power):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal(33) * 2.0**power)
        found, want = S.rms(x), np.sqrt(np.mean((np.asarray(x) * 2.0**-power) ** 2)) * 2.0**power
        np.testing.assert_allclose(found, want, rtol=1e-14, atol=0)


def test_the_smallest_normal_numbers_count_as_normal_and_their_neighbors_below_do_not():
    tiny = np.float32(2.0**-14)
    x = jnp.asarray([tiny, -tiny, np.nextafter(tiny, np.float32(0)), 0, 2.0**-100, 1, 3e38])
    assert S.below_float16(x) == np.float32(2 / 7)
    with jax.enable_x64(True):
        tiny = 2.0**-126
        x = jnp.asarray([tiny, -tiny, np.nextafter(tiny, 0), 0, 2.0**-200, 1, 1e300])
        assert S.below_bfloat16(x) == 2 / 7


@pytest.mark.parametrize(
    ("values", "rms", "largest", "count"),
    [
        ([1.0, np.inf, -2.0], np.inf, np.inf, 1),
        ([np.nan, 1.0, 0.0], np.nan, np.nan, 1),
        ([np.nan, -np.inf, 1.0], np.nan, np.nan, 2),
        ([0.0, 0.0], 0, 0, 0),
        ([], 0, 0, 0),
        ([3e38, -3e38, 3e38], 3e38, 3e38, 0),
    ],
)
@pytest.mark.parametrize("repeats", [1, 4000])
def test_special_values_come_through(values, rms, largest, count, repeats):
    x = jnp.asarray(np.repeat(np.float32(values), repeats))
    for measure in (lambda f: f(x), lambda f: jax.jit(f)(x)):
        np.testing.assert_allclose(measure(S.rms), rms, rtol=3e-6)
        np.testing.assert_allclose(measure(S.max_abs), largest, rtol=1e-7)
        assert measure(S.nonfinite_count) == count * repeats
    roots, counts = jax.jit(S.leaf_statistics)([x, x.reshape(-1, 1), jnp.ones(20_000)])
    np.testing.assert_allclose(roots, [rms, rms, 1], rtol=3e-6)
    np.testing.assert_array_equal(counts, [count * repeats, count * repeats, 0])


@pytest.mark.parametrize("bad", [None, np.nan, np.inf])
@pytest.mark.parametrize("power", [-100, -60, 0, 60, 100])
def test_leaves_are_measured_as_single_tensors_are(bad, power):
    rng = np.random.default_rng(0)
    shapes = [(3,), (130, 130), (3,), (20_000,), (2, 2), (130, 130), (0,)]
    leaves = [np.float32(rng.standard_normal(s) * 2.0**power) for s in shapes]
    if bad is not None:
        leaves[1][3, 7] = leaves[1][4, 4] = leaves[2][0] = bad
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    roots, counts = jax.jit(S.leaf_statistics)(leaves)
    np.testing.assert_allclose(roots, [S.rms(leaf) for leaf in leaves], rtol=1e-6, atol=0)
    np.testing.assert_array_equal(counts, [S.nonfinite_count(leaf) for leaf in leaves])
    np.testing.assert_array_equal(jax.jit(S.leaf_rms)(leaves), roots)


def test_a_table_of_sums_gives_what_single_tensors_give():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 5, 4)), jnp.float32)
    x = x.at[2].set(0).at[3, 1].set(jnp.nan)
    for names, statistics in (
        (S.ACTIVATION, STATISTICS[:5]),
        (S.GRADIENT, (*STATISTICS[:1], *STATISTICS[2:])),
    ):
        table = S.from_table(jax.vmap(lambda a, n=names: S.sums(a, n))(x), 20, names)
        for f in statistics:
            np.testing.assert_allclose(f(table), [f(a) for a in x], rtol=1e-6, err_msg=f.__name__)


def test_no_statistic_of_a_finite_tensor_makes_a_nan_on_its_way():
    with jax.debug_nans(True):
        for x in (jnp.zeros((3, 4)), jnp.ones((3, 4)) * 1e30, jnp.ones(0), jnp.ones(()) * 1e-30):
            for f in STATISTICS:
                f(x)


def test_ones_beyond_what_a_float32_counts_are_all_counted():
    x = jnp.ones((2**13, 2**12), jnp.bfloat16).at[5].set(0)
    assert float(S.zero_share(x)) == 2.0**-13


def test_tensors_of_one_device_are_measured_inside_shard_map():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
    spec = jax.sharding.PartitionSpec("d")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8000)), jnp.float32)

    def measured(x):
        roots, counts = S.leaf_statistics([x, x[0]])
        return jnp.stack([*(f(x) for f in STATISTICS), *roots, *counts])[None]

    found = jax.jit(jax.shard_map(measured, mesh=mesh, in_specs=spec, out_specs=spec))(x)
    roots, counts = S.leaf_statistics([x, x[0]])
    want = np.array([*(f(x) for f in STATISTICS), *roots, *counts])
    np.testing.assert_allclose(found[0], want, rtol=1e-6)
