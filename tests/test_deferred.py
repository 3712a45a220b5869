"""Products kept plain agree with the settled ones, and know when they may not speak."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad as jg
from jaxgrad.graded import Graded
from jaxgrad.graded.deferred import Deferred, Plain

N, DEPTH = 6, 40
push = jax.jit(Graded.left_multiply)
multiply = jax.jit(lambda plain, matrix: plain.multiplied(matrix, True))


def product_of(matrices):
    """The product of a list, first layer first, deferred; settled it is made layer by layer."""

    def settle():
        *batch, _, n = matrices[0].shape
        settled = Graded.identity(n, tuple(batch), matrices[0].dtype)
        for matrix in matrices:
            settled = push(settled, matrix)
        return settled

    plain = Plain.of(matrices[0])
    for matrix in matrices[1:]:
        plain = multiply(plain, matrix)
    return Deferred(plain, settle)


def gaussian(gain, seed=0, batch=()):
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(gain * rng.standard_normal((*batch, N, N)) / np.sqrt(N), jnp.float32)
        for _ in range(DEPTH)
    ]


def exact(matrices):
    """(mantissa, log2 of its unit) in float64, rescaled at every layer."""
    product, power = np.eye(N), 0
    for matrix in matrices:
        product = np.asarray(matrix, np.float64) @ product
        shift = int(np.floor(np.log2(np.max(np.abs(product)))))
        product, power = product * 2.0**-shift, power + shift
    return product, power


@pytest.mark.parametrize("gain", [1e-4, 0.5, 1.0, 3.0, 1e4])
def test_norms_are_right_at_any_scale(gain):
    matrices = gaussian(gain)
    product, power = exact(matrices)
    deferred = product_of(matrices)
    assert bool(deferred.plain.sound)
    want = np.log(np.linalg.norm(product)) + power * np.log(2)
    np.testing.assert_allclose(deferred.log_norm(), want, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(deferred.settled.log_norm(), want, rtol=1e-6, atol=1e-5)
    if 0.1 < gain < 10:
        error = np.abs(np.asarray(deferred.to_dense(), np.float64) - product * 2.0**power)
        assert np.max(error) <= 1e-5 * np.linalg.norm(product) * 2.0**power


def test_a_product_that_cancels_settles_before_it_speaks():
    # blow up a direction by 1e6, five times over, and kill it exactly at the end
    grow = jnp.diag(jnp.asarray([1e6, 1.0], jnp.float32))
    mix = jnp.asarray([[1.0, 0.0], [1.0, 1.0]], jnp.float32)
    kill = jnp.asarray([[0.0, 0.0], [-1.0, 1.0]], jnp.float32)
    matrices = [mix, grow, grow, mix, kill]
    deferred = product_of(matrices)
    assert not bool(deferred.plain.sound)
    np.testing.assert_array_equal(deferred.to_dense(), deferred.settled.to_dense())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_factors_are_not_hidden(bad):
    matrices = gaussian(1.0)
    matrices[7] = matrices[7].at[2, 3].set(bad)
    assert not bool(product_of(matrices).plain.sound)
    assert np.isnan(product_of(matrices).to_dense()).any()


def test_zero_products_have_norm_minus_infinity_and_rank_zero():
    matrices = [*gaussian(1.0)[:3], jnp.zeros((N, N))]
    product = product_of(matrices)
    assert product.log_norm() == -np.inf
    assert product.rank == 0
    assert np.all(np.asarray(product.to_dense()) == 0)


def test_it_is_a_graded_product_to_everything_else():
    matrices = gaussian(0.7, batch=(2,))
    product = product_of(matrices)
    assert product.shape == product.settled.shape == (2, N, N)
    np.testing.assert_allclose(product.T.to_dense(), np.swapaxes(product.to_dense(), -1, -2), 1e-5)
    inside = jax.jit(lambda p: p.log_norm())(product)
    np.testing.assert_allclose(inside, product.log_norm(), rtol=1e-6)
    mapped = jax.vmap(lambda p: p.log_norm())(product)
    np.testing.assert_allclose(mapped, product.log_norm(), rtol=1e-6)
    assert "shape=(2, 6, 6)" in repr(product)
    with pytest.raises(AttributeError, match="no attribute 'middle'"):
        _ = product.middle


def test_a_planted_error_in_the_rescaling_is_seen(monkeypatch):
    matrices = gaussian(1e4)
    product, power = exact(matrices)
    want = np.log(np.linalg.norm(product)) + power * np.log(2)
    rescaled = Plain._rescaled

    def forgetful(self):
        plain = rescaled(self)
        return Plain(plain.matrix, self.power, plain.noise, plain.sound)

    monkeypatch.setattr(Plain, "_rescaled", forgetful)
    multiply.clear_cache()
    assert abs(float(product_of(matrices).log_norm()) - want) > 1
    multiply.clear_cache()


def test_chains_multiply_plainly_and_settle_for_their_spectrum():
    weights = gaussian(1.0)[:5]

    def f(h):
        for w in weights:
            h = jnp.tanh(h @ w)
        return h

    x = jnp.linspace(-1, 1, N)
    chain = jg.factorize(f, x)
    product = jg.jacobian_product(chain, x)
    assert isinstance(product, Deferred)
    assert "settled" not in vars(product)
    want = np.asarray(jax.jacrev(f)(x))
    np.testing.assert_allclose(product.to_dense(), want, atol=1e-5 * np.abs(want).max())
    assert "settled" not in vars(product)
    values = np.linalg.svd(want.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(product.log_singular_values()[:3], np.log(values[:3]), rtol=1e-3)
    assert "settled" in vars(product)
