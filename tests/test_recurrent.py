"""Recurrent networks through time: gradients by step, growth rates, truncation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_graded

import jaxgrad as jg
from jaxgrad import recurrent, spectrum

KEY = jax.random.PRNGKey(0)
PLATFORMS = ["cpu", "cuda", "tpu"]
STEPS, WIDTH, INPUTS = 12, 5, 3


def vanilla(p, h, x):
    return jnp.tanh(p["w"] @ h + p["u"] @ x)


def gru(p, h, x):
    z, r = jnp.split(jax.nn.sigmoid(p["w"][: 2 * WIDTH] @ h + p["u"][: 2 * WIDTH] @ x), 2)
    n = jnp.tanh(p["w"][2 * WIDTH : 3 * WIDTH] @ (r * h) + p["u"][2 * WIDTH : 3 * WIDTH] @ x)
    return (1 - z) * h + z * n


def lstm(p, carry, x):
    h, c = carry
    i, f, o, g = jnp.split(p["w"] @ h + p["u"] @ x, 4)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


CELLS = {"vanilla": (vanilla, 1), "GRU": (gru, 3), "LSTM": (lstm, 4)}
ALL_CELLS = ["vanilla", "LSTM", pytest.param("GRU", marks=pytest.mark.slow)]


def network(name, gain=1.2, dtype=jnp.float64):
    """Cell, parameters, first carry, inputs."""
    rng = np.random.default_rng(0)
    cell, gates = CELLS[name]
    params = {
        "w": jnp.asarray(
            gain * rng.standard_normal((gates * WIDTH, WIDTH)) / np.sqrt(WIDTH), dtype
        ),
        "u": jnp.asarray(rng.standard_normal((gates * WIDTH, INPUTS)), dtype),
    }
    carry = jnp.asarray(rng.standard_normal(WIDTH) / 3, dtype)
    carry = (carry, carry / 2) if name == "LSTM" else carry
    return cell, params, carry, jnp.asarray(rng.standard_normal((STEPS, INPUTS)), dtype)


def loss(carries):
    """Reads every step, and each a little differently."""
    leaves = jax.tree.leaves(carries)
    weights = jnp.linspace(1, 2, leaves[0].shape[0])
    return sum(jnp.sum(weights * jnp.sum(jnp.sin(2 * leaf), axis=-1) ** 2) for leaf in leaves)


def carries_of(cell, params, carry, xs, added=None):
    """All carries h_1 ... h_T, by a loop; `added` perturbs h_0 ... h_T."""

    def shift(h, t):
        return h if added is None else jax.tree.map(lambda a, b: a + b[t], h, added)

    h, seen = shift(carry, 0), []
    for t, x in enumerate(xs):
        h = shift(cell(params, h, x), t + 1)
        seen.append(h)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)


@pytest.mark.parametrize("name", ALL_CELLS)
def test_the_profile_is_the_gradient_with_respect_to_every_carry(name, x64):
    cell, params, carry, xs = network(name)
    zeros = jax.tree.map(lambda a: jnp.zeros((STEPS + 1, *a.shape)), carry)

    def perturbed(added):
        return loss(carries_of(cell, params, carry, xs, added))

    expected = jax.jit(jax.grad(perturbed))(zeros)
    expected = np.concatenate([np.asarray(a) for a in jax.tree.leaves(expected)], axis=-1)
    found = recurrent.gradient_profile(cell, params, carry, xs, loss)
    np.testing.assert_allclose(
        np.exp(found.log_norms), np.linalg.norm(expected, axis=-1), rtol=1e-12
    )
    direct = jax.grad(loss)(carries_of(cell, params, carry, xs))
    direct = np.concatenate([np.asarray(a) for a in jax.tree.leaves(direct)], axis=-1)
    np.testing.assert_allclose(
        np.exp(found.log_direct_norms), [0, *np.linalg.norm(direct, axis=-1)], rtol=1e-12
    )


def test_a_profile_of_ten_thousand_steps_neither_underflows_nor_overflows():
    steps = 10_000
    for factor in (0.5, 4.0):
        found = recurrent.gradient_profile(
            lambda p, h, x: p * h + 0 * x, jnp.float32(factor), jnp.ones(3), jnp.ones(steps),
            lambda hs: jnp.sum(hs[-1]) + 0 * jnp.sum(hs[0]),
        )  # fmt: skip
        expected = np.log(np.sqrt(3)) + np.log(factor) * (steps - np.arange(steps + 1))
        np.testing.assert_allclose(found.log_norms, expected, rtol=1e-6, atol=1e-6)
        assert np.all(np.isneginf(found.log_direct_norms[:-1]))


@pytest.mark.parametrize("name", ALL_CELLS)
def test_the_lyapunov_spectrum_of_a_cell_is_that_of_its_jacobians_product(name, x64):
    cell, params, carry, xs = network(name)
    chain = recurrent.time_chain(cell, params, xs)
    found = spectrum.lyapunov_exponents(chain, carry, depths=[1, STEPS])
    factors, start = [], carry
    for x in xs:
        blocks = jax.tree.leaves(jax.jacobian(lambda h, x=x: cell(params, h, x))(carry))
        side = round(len(blocks) ** 0.5)
        rows = [np.concatenate(blocks[i * side : (i + 1) * side], axis=1) for i in range(side)]
        factors.append(np.concatenate(rows))
        carry = cell(params, carry, x)
    for depth, rates in zip(found.depths, found.exponents, strict=True):
        truth = reference_graded.log_singular_values(factors[:depth]) / depth
        np.testing.assert_allclose(rates, truth, rtol=0, atol=1e-10)
    if name != "LSTM":
        top, _ = spectrum.top_singular_values(chain, start, 2, key=KEY)
        np.testing.assert_allclose(top / STEPS, found.exponents[-1][:2], rtol=0, atol=1e-9)


def test_an_orthogonal_linear_cell_has_equal_exponents_and_a_contracting_one_its_rate():
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0].astype(np.float32)
    chain = recurrent.time_chain(lambda p, h, x: p @ h + x, 0.9 * q, jnp.ones((500, 4)))
    found = spectrum.lyapunov_exponents(chain, jnp.zeros(4), depths=[500])
    np.testing.assert_allclose(found.exponents[0], np.log(0.9), rtol=0, atol=1e-6)


def windowed_by_hand(cell, params, carry, xs, k):
    """The sum over readings t and steps s > t - k of d_t J_t ... J_{s+1} dh_s/dparams."""
    before = [carry]
    for x in xs:
        before.append(cell(params, before[-1], x))
    direct = jax.grad(loss)(carries_of(cell, params, carry, xs))
    total = jax.tree.map(jnp.zeros_like, params)
    for t in range(1, len(xs) + 1):
        g = jax.tree.map(lambda a, t=t: a[t - 1], direct)
        for s in range(t, max(t - k, 0), -1):
            _, pull = jax.vjp(lambda p, h, s=s: cell(p, h, xs[s - 1]), params, before[s - 1])
            own, g = pull(g)
            total = jax.tree.map(jnp.add, total, own)
    return flat(total)


def chunked_by_hand(cell, params, carry, xs, k):
    def objective(params):
        h, seen = carry, []
        for t, x in enumerate(xs):
            h = jax.lax.stop_gradient(h) if t % k == 0 else h
            h = cell(params, h, x)
            seen.append(h)
        return loss(jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen))

    return flat(jax.grad(objective)(params))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("method", ["window", "chunks"])
@pytest.mark.parametrize("name", ALL_CELLS)
def test_the_bias_of_truncation_is_that_of_gradients_truncated_by_hand(name, method, x64):
    cell, params, carry, xs = network(name)
    horizons = [1, 3, STEPS, 2 * STEPS]
    found = recurrent.truncation_bias(cell, params, carry, xs, loss, horizons, method=method)
    by_hand = {"window": windowed_by_hand, "chunks": chunked_by_hand}[method]
    with jax.disable_jit():
        rows = [by_hand(cell, params, carry, xs, k) for k in (1, 3)]
        full = flat(jax.grad(lambda p: loss(carries_of(cell, p, carry, xs)))(params))
    for index, row in enumerate(rows):
        size = np.linalg.norm(full)
        error = np.linalg.norm(row - full) / size
        np.testing.assert_allclose(found.relative_error[index], error, rtol=1e-9)
        cosine = row @ full / size / np.linalg.norm(row)
        np.testing.assert_allclose(found.cosine[index], cosine, rtol=1e-9)
        np.testing.assert_allclose(found.norm_ratio[index], np.linalg.norm(row) / size, rtol=1e-9)
    np.testing.assert_allclose(found.relative_error[2:], 0, atol=1e-13)  # as long as the sequence
    np.testing.assert_allclose(found.cosine[2:], 1, rtol=1e-12)
    assert np.all(found.relative_error[:2] > 0.01)


def test_the_bias_of_a_linear_scalar_network_is_its_closed_form(x64):
    # h_T = sum_s a^(T-s) x_s, so dh_T/da = sum_j h_{T-1-j} a^j; a window of k keeps j < k.
    a, steps = 0.9, 40
    xs = jnp.ones(steps)
    h = np.concatenate([[0], np.cumsum(a ** np.arange(steps))])
    terms = h[steps - 1 :: -1][:steps] * a ** np.arange(steps)
    found = recurrent.truncation_bias(
        lambda p, h, x: p * h + x, jnp.float64(a), jnp.float64(0), xs, lambda hs: hs[-1], [1, 5, 20]
    )
    expected = [1 - terms[:k].sum() / terms.sum() for k in (1, 5, 20)]
    np.testing.assert_allclose(found.relative_error, expected, rtol=1e-12)


def test_what_cannot_be_answered_is_refused():
    cell, params, carry, xs = network("vanilla", dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"horizons=.*from 1 on"):
        recurrent.truncation_bias(cell, params, carry, xs, loss, [0, 2])
    with pytest.raises(ValueError, match=r"'window' or 'chunks', got 'middle'"):
        recurrent.truncation_bias(cell, params, carry, xs, loss, [2], method="middle")
    with pytest.raises(ValueError, match=r"leading axis"):
        recurrent.time_chain(cell, params, jnp.float32(1))
    with pytest.raises(ValueError, match=r"at least one step"):
        recurrent.time_chain(cell, params, xs[:0])


def test_a_network_factorized_with_respect_to_its_first_carry_gives_the_same_chain(x64):
    cell, params, carry, xs = network("vanilla")

    def f(h):
        return jax.lax.scan(lambda h, x: (cell(params, h, x), None), h, xs)[0]

    steps = recurrent.time_chain(cell, params, xs)
    whole = jg.jacobian_product(jg.factorize(f, carry), carry).to_dense()
    np.testing.assert_allclose(
        jg.jacobian_product(steps, carry).to_dense(), whole, rtol=0, atol=1e-14
    )
    assert steps.names[:2] == ("steps[0]", "steps[1]")


@pytest.mark.parametrize(
    "call",
    [
        lambda *args: recurrent.gradient_profile(*args, loss),
        lambda *args: recurrent.truncation_bias(*args, loss, [1, 4])[1:],
        lambda *args: recurrent.truncation_bias(*args, loss, [1, 4], method="chunks")[1:],
    ],
    ids=["profile", "window", "chunks"],
)
def test_it_lowers_for_every_platform(call):
    cell, params, carry, xs = network("LSTM", dtype=jnp.float32)
    traced = jax.jit(lambda params, carry: call(cell, params, carry, xs))
    exported = jax.export.export(traced, platforms=PLATFORMS)(params, carry)
    assert exported.platforms == tuple(PLATFORMS)
