"""Products in log scale, against exact integers, closed forms and exact laws."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import reference_graded as reference
from jax import export

from jaxgrad.graded import Graded, graded_product, graded_products, log_singular_values_mp

N, DEPTH = 6, 64
BARS = {"float32": 1e-3, "float64": 1e-10}


@jax.jit
def spectrum(stack):
    return graded_product(stack).spectrum()


def measured(matrices, dtype):
    """Log singular values and certificate; identities fill the stack: one compilation for all."""
    filled = np.stack([*matrices, *[np.eye(N)] * (DEPTH - len(matrices))]).astype(dtype)
    result = spectrum(jnp.asarray(filled))
    return np.asarray(result.log(), np.float64), result.certificate


def orthogonal(rng, n=N):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def sigmoid_net(rng, depth):
    state = rng.standard_normal(N)
    for _ in range(depth):
        weights = rng.standard_normal((N, N)) * np.sqrt(2 / N)
        state = 1 / (1 + np.exp(-weights @ state))
        yield (state * (1 - state))[:, None] * weights


def relu_net(rng, depth):
    for _ in range(depth):
        gates = np.arange(N) < rng.integers(4, N + 1)
        yield rng.permutation(gates)[:, None] * rng.standard_normal((N, N))


def nearly_singular(rng, depth):
    for _ in range(depth):
        values = np.ones(N)
        values[-1] = 1e-3
        yield orthogonal(rng) @ np.diag(values) @ orthogonal(rng)


CHAINS = {
    "gaussian": lambda rng, depth: rng.standard_normal((depth, N, N)) / np.sqrt(N),
    "orthogonal": lambda rng, depth: [rng.uniform(0.5, 2) * orthogonal(rng) for _ in range(depth)],
    "sigmoid": sigmoid_net,
    "relu": relu_net,
    "diagonal": lambda rng, depth: [
        np.exp(-2.0 * np.arange(N))[:, None] * rng.standard_normal((N, N)) for _ in range(depth)
    ],
    "nearly singular": nearly_singular,
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", CHAINS)
def test_every_singular_value_above_the_rank_is_that_of_the_exact_product(kind, dtype, x64):
    rng = np.random.default_rng(3)
    matrices = [np.asarray(m, dtype).astype(float) for m in CHAINS[kind](rng, 40)]
    expected = reference.log_singular_values(matrices)
    values, certificate = measured(matrices, dtype)
    assert np.all(np.isfinite(values) == np.isfinite(expected))
    live = np.isfinite(expected)
    # Only the weakest mode may be doubted: the bound is ten standard deviations.
    assert np.all(np.asarray(certificate.trusted)[live][:-1])
    half_ulp = 0.5 * np.finfo(dtype).eps * np.abs(expected[live])
    assert np.all(np.abs(values[live] - expected[live]) <= BARS[dtype] + half_ulp)


def test_a_plain_product_is_wrong_by_tens_of_nats_where_this_one_is_right(x64):
    rng = np.random.default_rng(0)
    matrices = list(CHAINS["diagonal"](rng, 40))
    expected = reference.log_singular_values(matrices)
    plain = np.log(np.linalg.svd(np.linalg.multi_dot(matrices[::-1]), compute_uv=False))
    values, _ = measured(matrices, "float64")
    assert np.max(np.abs(plain - expected)) > 30
    assert np.max(np.abs(values - expected)) < 1e-10


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_certificate_bounds_the_error_even_where_it_is_large(dtype, x64):
    """Layers as ill-conditioned as the dtype can hold, so that errors are real."""
    worst = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        size = {"float32": 1.6, "float64": 4.0}[dtype]
        matrices = [
            (orthogonal(rng) @ np.diag(np.exp(-size * np.arange(N))) @ orthogonal(rng)).astype(
                dtype
            )
            for _ in range(12)
        ]
        expected = reference.log_singular_values([m.astype(float) for m in matrices])
        values, certificate = measured(matrices, dtype)
        live = np.isfinite(values)
        error = np.abs(values - expected)[live] - np.finfo(dtype).eps * np.abs(expected[live])
        worst = max(worst, np.max(error / np.asarray(certificate.error, float)[live]))
    assert worst < 1


@jax.jit
def spectrum_layer_by_layer(stack):
    start = Graded.identity(N, dtype=stack.dtype)
    return jax.lax.scan(lambda p, m: (p.left_multiply(m), None), start, stack)[0].spectrum()


@pytest.mark.parametrize("by", [spectrum, spectrum_layer_by_layer])
@pytest.mark.parametrize("depth", [12, 24, 48, DEPTH])
def test_repeated_layers_far_from_normal_are_vouched_for_only_as_far_as_they_are_right(by, depth):
    """Powers of Jordan blocks make of a rounding error what no sum of rounding errors shows."""
    worst, wrong, vouched = 0, 0, 0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        block = rng.uniform(0.3, 1) * np.eye(N) + np.diag(rng.uniform(0.2, 1, N - 1), 1)
        block = block.astype(np.float32)
        expected = reference.log_singular_values([block.astype(float)] * depth)
        stack = [block] * depth + [np.eye(N, dtype=np.float32)] * (DEPTH - depth)
        result = by(jnp.asarray(np.stack(stack)))
        error = np.abs(np.asarray(result.log(), float) - expected)
        error -= np.finfo(np.float32).eps * np.abs(expected)
        worst = max(worst, np.max(error / np.asarray(result.certificate.error)))
        trusted = np.asarray(result.certificate.trusted)
        wrong = max(wrong, np.max(error, where=trusted, initial=0))
        vouched += np.sum(trusted)
    assert worst < 1
    assert wrong < BARS["float32"]
    assert vouched >= {12: 3 * N, 24: N, 48: 3, DEPTH: 1}[depth]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_chain_and_then_its_inverses_raise_the_certificate(dtype, x64):
    """The modes separate by more than 1/eps and come back: no double can know the answer."""
    rng = np.random.default_rng(0)
    chain = list(rng.standard_normal((32, N, N)))
    chain = [np.asarray(m, dtype).astype(float) for m in chain + list(np.linalg.inv(chain[::-1]))]
    expected = reference.log_singular_values(chain)
    values, certificate = measured(chain, dtype)
    assert np.max(np.abs(values - expected)) > 1e-2
    assert not np.any(certificate.trusted)
    assert certificate.overtaken > 0.9 * certificate.limit
    np.testing.assert_allclose(log_singular_values_mp(chain), expected, rtol=0, atol=1e-11)


def test_signed_permutations_times_powers_of_two_are_bit_exact_at_depth_five_thousand():
    rng = np.random.default_rng(1)
    depth = 5000
    orders = np.stack([rng.permutation(N) for _ in range(depth)])
    signs = rng.choice([-1.0, 1.0], (depth, N, 1))
    powers = rng.integers(-3, 2, depth)
    stack = np.eye(N)[orders] * signs * 2.0 ** powers[:, None, None]
    product = jax.jit(graded_product)(jnp.asarray(stack, jnp.float32))
    expected = np.eye(N)
    for order, sign in zip(orders, signs, strict=True):
        expected = sign * expected[order]
    np.testing.assert_array_equal(product.exponent, powers.sum() + 1)
    np.testing.assert_array_equal(
        product.left @ (product.mantissa[:, None] * 2 * product.right), expected
    )
    result, log_abs_det = jax.jit(lambda p: (p.spectrum(), p.log_abs_det()))(product)
    np.testing.assert_array_equal(result.mantissa, 0.5)
    np.testing.assert_array_equal(result.exponent, powers.sum() + 1)
    assert log_abs_det == np.float32(N * float(powers.sum()) * np.log(2))


@pytest.mark.parametrize("gain", [0.5, 0.9])
def test_scaled_orthogonal_layers_keep_their_pair_to_four_eps_root_depth(gain):
    """A gain that is no power of two too: sums of logarithms in float32 would lose it."""
    rng = np.random.default_rng(2)
    depth = 2000
    stack = (gain * np.linalg.qr(rng.standard_normal((depth, N, N)))[0]).astype(np.float32)
    result = spectrum(jnp.asarray(stack))
    logs = np.log(np.asarray(result.mantissa, float)) + np.asarray(result.exponent) * np.log(2)
    expected = np.sum(np.linalg.slogdet(stack.astype(float))[1]) / N
    assert np.max(np.abs(logs - expected)) <= 4 * np.finfo(np.float32).eps * np.sqrt(depth)


def test_a_dependent_column_that_comes_first_does_not_hide_an_independent_one():
    """Sorting by norm takes the columns 0, 1, 2, and 1 depends on 0: the order must be mended."""
    matrix = np.array([[1, 0.95, 0.5], [0, 0, 0.5], [0, 0, 0]])
    product = jax.jit(Graded.from_dense)(jnp.asarray(matrix, jnp.float32))
    assert product.rank == 2
    np.testing.assert_allclose(product.to_dense(), matrix, rtol=0, atol=1e-6)


HADAMARD = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2


def hadamard_zigzag(rng, depth):
    """`Q[l+1] diag(2**k) Q[l]^T` with exact entries: singular values are 2**sum(k)."""
    bases = [HADAMARD[rng.permutation(4)] * rng.choice([-1, 1], 4) for _ in range(depth + 1)]
    powers = np.sort(rng.integers(-6, 4, (depth, 4)), axis=-1)[:, ::-1]
    stack = [b @ np.diag(2.0**k) @ a.T for a, b, k in zip(bases, bases[1:], powers, strict=False)]
    return np.stack(stack), np.sort(powers.sum(0))[::-1]


def test_rows_of_very_different_sizes_stay_apart_over_many_layers(x64):
    """Pivoting must find a column's remainder under the rounding errors of rows 1e20 times larger.

    Gaussian layers, whose row i is scaled by exp(-i).
    """
    count, depth = 48, 20
    rng = np.random.default_rng(1)
    stack = rng.standard_normal((depth, count, count)) / np.sqrt(count)
    stack = (np.exp(-np.arange(count))[:, None] * stack).astype(np.float32)
    compute = jax.jit(lambda s: graded_product(s).spectrum())
    found, exact = compute(jnp.asarray(stack)), compute(jnp.asarray(stack.astype(np.float64)))
    assert np.all(exact.certificate.error < 1e-4)
    error = np.abs(np.asarray(found.log(), np.float64) - np.asarray(exact.log()))
    assert np.max(error) < 0.02  # over 960 nats
    # the logarithm itself, of some hundreds, is rounded to float32
    rounded = np.finfo(np.float32).eps * np.abs(np.asarray(exact.log()))
    assert np.all(error < found.certificate.error + rounded)
    assert np.all(error[np.asarray(found.certificate.trusted)] < BARS["float32"])


def test_dense_layers_with_known_singular_values_keep_them_over_hundreds_of_layers(x64):
    stack, powers = hadamard_zigzag(np.random.default_rng(5), 400)
    result = spectrum(jnp.asarray(stack))
    np.testing.assert_allclose(result.log(), powers * np.log(2), rtol=0, atol=1e-10)
    assert np.all(result.certificate.trusted)


def test_determinants_of_gaussian_products_follow_the_digamma_law():
    """(R_ii)^2 n is chi-squared with n - i + 1 degrees, for every layer and mode."""
    rng = np.random.default_rng(7)
    batch, depth = 256, 30
    stack = jnp.asarray(rng.standard_normal((depth, batch, N, N)) / np.sqrt(N), jnp.float32)
    values = np.asarray(jax.jit(lambda s: graded_product(s).log_abs_det())(stack), float)
    degrees = np.arange(1, N + 1) / 2
    mean = 0.5 * sum(float(mpmath.digamma(d)) + np.log(2 / N) for d in degrees)
    variance = sum(float(mpmath.psi(1, d)) for d in degrees) / 4
    z = (values.mean() - depth * mean) / np.sqrt(depth * variance / batch)
    assert abs(z) < 4
    assert 0.7 < values.var() / (depth * variance) < 1.4


SHAPES = [(5, 3), (2, 5), (4, 2)]


def test_rectangular_layers_wide_thin_wide_have_the_rank_of_the_narrowest():
    rng = np.random.default_rng(0)
    layers = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]

    @jax.jit
    def everything(layers):
        product = graded_product(layers)
        partial = [graded_products(layers, way) for way in ("forward", "backward")]
        dense = [[part.to_dense() for part in parts] for parts in partial]
        return product, product.log_singular_values(), product.log_norm(), dense

    product, logs, log_norm, (forward, backward) = everything(layers)
    expected = layers[2] @ layers[1] @ layers[0]
    assert product.shape == (4, 3)
    assert product.rank == 2
    values = np.linalg.svd(expected.astype(float), compute_uv=False)
    np.testing.assert_allclose(logs[:2], np.log(values[:2]), rtol=0, atol=1e-5)
    assert logs[2] == -np.inf
    np.testing.assert_allclose(log_norm, np.log(np.linalg.norm(expected)), rtol=1e-6)
    for k, (prefix, suffix) in enumerate(zip(forward, backward, strict=True)):
        np.testing.assert_allclose(prefix, dense_product(layers[:k], 3), rtol=0, atol=1e-5)
        np.testing.assert_allclose(suffix, dense_product(layers[k:], 4), rtol=0, atol=1e-5)


def dense_product(layers, size):
    product = np.eye(layers[0].shape[1] if layers else size)
    for layer in layers:
        product = layer @ product
    return product


def test_left_right_transpose_and_matmul_agree_with_dense_products():
    rng = np.random.default_rng(4)
    a, b, c = (rng.standard_normal((N, N)).astype(np.float32) for _ in range(3))

    @jax.jit
    def everything(a, b, c):
        middle = Graded.from_dense(b)
        product = Graded.from_dense(a) @ middle
        both = middle.left_multiply(a).right_multiply(c).to_dense()
        return both, middle.T.to_dense(), product.to_dense(), product.log_abs_det()

    both, transposed, product, log_abs_det = everything(a, b, c)
    np.testing.assert_allclose(both, a @ b @ c, rtol=0, atol=1e-4)
    np.testing.assert_allclose(transposed, b.T, rtol=0, atol=1e-6)
    np.testing.assert_allclose(product, a @ b, rtol=0, atol=1e-5)
    expected = np.linalg.slogdet(a.astype(float) @ b)[1]
    np.testing.assert_allclose(log_abs_det, expected, rtol=0, atol=1e-5)


def test_products_of_products_keep_singular_values_far_beyond_the_range_of_floats(x64):
    rng = np.random.default_rng(6)
    first, second = (list(CHAINS["diagonal"](rng, 32)) for _ in range(2))
    multiply = jax.jit(graded_product)
    joined = jax.jit(lambda a, b: (b @ a).log_singular_values())(
        multiply(np.stack(first)), multiply(np.stack(second))
    )
    whole, _ = measured(first + second, "float64")
    assert whole[0] - whole[-1] > 500
    np.testing.assert_allclose(joined, whole, rtol=0, atol=1e-9)


def test_all_partial_products_of_a_stack_come_in_one_sweep_in_both_directions(x64):
    stack = np.random.default_rng(8).standard_normal((5, 2, N, N))
    for direction in ("forward", "backward"):
        parts = jax.jit(graded_products, static_argnums=1)(stack, direction)
        assert parts.shape == (6, 2, N, N)
        for k in range(6):
            dense = np.broadcast_to(np.eye(N), (2, N, N))
            for matrix in stack[:k] if direction == "forward" else stack[k:]:
                dense = matrix @ dense
            np.testing.assert_allclose(parts.to_dense()[k], dense, rtol=0, atol=1e-10)


def test_dead_units_give_a_rank_and_minus_infinity_never_nan():
    rng = np.random.default_rng(9)
    layers = rng.standard_normal((DEPTH, N, N))
    gates = np.ones((DEPTH, N, 1))
    gates[20, :2] = gates[33, 2:5] = 0
    stack = jnp.asarray(layers * gates, jnp.float32)
    values = spectrum(stack).log()
    assert jax.jit(graded_product)(stack).rank == 3
    assert np.all(np.isfinite(values[:3]))
    assert np.all(values[3:] == -np.inf)


def test_nan_and_inf_stay_visible_and_in_their_batch_entry():
    stack = np.random.default_rng(10).standard_normal((4, 3, N, N)).astype(np.float32)

    @jax.jit
    def everything(stack):
        product = graded_product(stack)
        figures = product.log_norm(), product.to_dense(), product.log_abs_det()
        return product.spectrum(), product.rank, figures

    clean, _, _ = everything(stack)
    stack[1, 1, 2, 3] = np.nan
    stack[2, 2, 0, 0] = np.inf
    result, rank, figures = everything(stack)
    np.testing.assert_allclose(result.log()[0], clean.log()[0], rtol=0, atol=1e-4)
    assert list(rank) == [N, -1, -1]
    assert not np.any(result.certificate.trusted[1:])
    for figure in (result.log(), *figures):
        assert np.all(np.isfinite(figure[0]))
        assert np.all(np.isnan(figure[1:]))


@jax.jit
def smallest_cases():
    return {
        "empty": graded_product(jnp.zeros((0, N, N))).to_dense(),
        "zero": Graded.from_dense(jnp.zeros((3, 3))),
        "one": Graded.from_dense(jnp.full((1, 1), -3.0)).log_singular_values(),
        "nothing": Graded.identity(0).log_singular_values(),
        "det of nothing": Graded.identity(0).log_abs_det(),
        "through nothing": Graded.from_dense(jnp.ones((0, 2)))
        .left_multiply(jnp.ones((3, 0)))
        .log_singular_values(),
        "huge": Graded.from_dense(jnp.full((2, 2), 3e38)).log_norm(),
    }


def test_the_smallest_cases_are_defined():
    cases = smallest_cases()
    np.testing.assert_array_equal(cases["empty"], np.eye(N))
    assert cases["zero"].rank == 0
    assert cases["zero"].log_norm() == -np.inf
    assert np.all(cases["zero"].log_singular_values() == -np.inf)
    np.testing.assert_allclose(cases["one"], np.log([3.0]), rtol=1e-6)
    assert cases["nothing"].shape == (0,)
    assert cases["det of nothing"] == 0
    assert np.all(cases["through nothing"] == -np.inf)
    np.testing.assert_allclose(cases["huge"], np.log(6) + 38 * np.log(10), rtol=1e-6)


def test_a_batch_vmap_and_one_at_a_time_agree():
    stack = np.random.default_rng(11).standard_normal((7, 3, N, N)).astype(np.float32)
    batch = jax.jit(lambda s: graded_product(s).log_singular_values())(stack)
    mapped = jax.jit(jax.vmap(lambda s: graded_product(s).log_singular_values(), in_axes=1))(stack)
    np.testing.assert_allclose(mapped, batch, rtol=1e-5, atol=1e-5)


def test_a_run_that_went_too_far_is_taken_back(x64):
    """Forty harmless layers make the runs long; then two layers in a run are too many.

    One layer's rounding errors alone are exp(8) eps: a tenth of what is vouched for, after eight.
    """
    rng = np.random.default_rng(12)
    harsh = [
        orthogonal(rng) @ np.diag(np.exp(-1.6 * np.arange(N))) @ orthogonal(rng) for _ in range(8)
    ]
    matrices = [orthogonal(rng) for _ in range(40)] + harsh
    values, certificate = measured(matrices, "float64")
    assert np.all(certificate.trusted)
    np.testing.assert_allclose(values, reference.log_singular_values(matrices), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_product_lowers_for_cpu_cuda_and_tpu(dtype, x64):
    stack = jax.ShapeDtypeStruct((3, 2, 4, 4), dtype)
    functions = [
        lambda s: graded_product(s).spectrum(),
        lambda s: (graded_products(s, "backward").log_norm(), graded_product(s).log_abs_det()),
        lambda s: (graded_product(s) @ graded_product(s).T).to_dense(),
    ]
    for function in functions:
        lowered = export.export(jax.jit(function), platforms=["cpu", "cuda", "tpu"])(stack)
        assert lowered.platforms == ("cpu", "cuda", "tpu")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Graded.identity(3).left_multiply(jnp.ones((2, 4))), r"n, 3.*\(2, 4\)"),
        (lambda: Graded.identity(3, dtype=jnp.float16), "float32 or float64"),
        (lambda: Graded.from_dense(jnp.ones((2, 3))).log_abs_det(), "square"),
        (lambda: graded_product([]), "empty list"),
        (lambda: graded_product([jnp.ones((2, 3)), jnp.ones((2, 3))]), "layer 1 has 3 inputs"),
        (lambda: graded_product(jnp.ones((4, 2, 3))), "as a list"),
        (lambda: graded_products(jnp.ones((4, 2, 2)), "sideways"), "sideways"),
        (lambda: log_singular_values_mp([]), "none"),
        (lambda: log_singular_values_mp([np.full((2, 2), np.nan)]), "layer 0"),
    ],
)
def test_bad_input_gets_an_error_that_says_what_came(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gaussian_products_of_two_thousand_layers_match_exact_arithmetic(dtype, x64):
    rng = np.random.default_rng(13)
    stack = (rng.standard_normal((2000, 4, 4)) / 2).astype(dtype)
    expected = log_singular_values_mp(stack.astype(float))
    result = spectrum(jnp.asarray(stack))
    ulp = np.finfo(dtype).eps * np.abs(expected)
    error = np.abs(np.asarray(result.log(), float) - expected)
    assert np.all(error <= BARS[dtype] + ulp)
    assert np.all(error <= result.certificate.error + ulp)
