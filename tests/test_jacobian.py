"""Layer Jacobians and products: exact, batched, chunked, structured, refused when too large."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME, CASES
from reference import full_jacobian, log_singular_values_of_product

import jaxgrad as jg
from jaxgrad import jacobian
from jaxgrad.graph import structure

BATCHED = [
    "jax_mlp_relu",
    "jax_cnn",
    "jax_transformer_post_ln",
    "jax_lstm_state",
    "linen_resnet_inference",
    "linen_transformer_pre_ln",
    "nnx_scan_blocks",
    "equinox_mlp",
    "haiku_mlp",
]


def weights(count, width, gain=1.0, dtype=jnp.float64):
    rng = np.random.default_rng(0)
    scale = gain / np.sqrt(width)
    return [jnp.asarray(scale * rng.standard_normal((width, width)), dtype) for _ in range(count)]


def mlp(ws, act=jnp.tanh):
    def f(x):
        for w in ws:
            x = act(x @ w)
        return x

    return f


@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_gives_every_examples_own_jacobians(name, x64):
    case = BY_NAME[name]
    f_batch, xs = case.build_batched(jnp.float64)
    chain = jg.factorize(f_batch, xs, batch_axis=0)
    assert chain.graph.independence == "proved"
    start = chain.states(xs)[0]

    def rest(h):
        for layer in chain.layers:
            h = layer(h)
        return h

    def flat(tree, axis):
        return jnp.concatenate([a.reshape(*a.shape[:axis], -1) for a in jax.tree.leaves(tree)], -1)

    examples = jax.tree.leaves(xs)[0].shape[0]
    product = None
    for j in jg.layer_jacobians(chain, xs):
        assert j.shape[0] == examples
        product = j if product is None else j @ product
    full = jax.jacrev(lambda h: flat(rest(h), 1))(start)
    full = jnp.concatenate(
        [a.reshape(*a.shape[:2], examples, -1) for a in jax.tree.leaves(full)], -1
    )
    expected = jnp.stack([full[i, :, i] for i in range(examples)])
    scale = jnp.max(jnp.abs(expected))
    np.testing.assert_allclose(product, expected, rtol=0, atol=case.rounding * scale)


@pytest.mark.parametrize(
    "case", [c for c in CASES if "coupled-batch" in c.flags], ids=lambda c: c.name
)
def test_a_coupled_batch_is_refused(case):
    f_batch, xs = case.build_batched()
    with pytest.raises(ValueError, match=r"coupled by .*batch_axis=None"):
        jg.factorize(f_batch, xs, batch_axis=0)


@pytest.mark.parametrize("direction", ["backward", "forward"])
def test_partial_products_are_the_gradients_of_the_states(direction, x64):
    ws = weights(5, 4)
    f = mlp(ws)
    x = jnp.linspace(-1, 1, 4)
    chain = jg.factorize(f, x)
    products = jg.jacobian_products(chain, x, direction)
    states = chain.states(x)
    assert len(products) == len(chain) + 1
    for k, product in enumerate(products):

        def after(h, k=k):
            for layer in chain.layers[k:]:
                h = layer(h)
            return h

        def before(h, k=k):
            for layer in chain.layers[:k]:
                h = layer(h)
            return h

        expected = (
            jax.jacrev(after)(states[k]) if direction == "backward" else jax.jacrev(before)(x)
        )
        np.testing.assert_allclose(product.to_dense(), expected, rtol=1e-12, atol=1e-15)


def test_a_product_that_no_float_holds_keeps_its_size(x64):
    chain = jg.Chain.from_layers([(f"l{k}", lambda h: 1e-9 * h) for k in range(60)])
    product = jg.jacobian_product(chain, jnp.ones(3))
    np.testing.assert_allclose(product.log_norm(), 60 * np.log(1e-9) + 0.5 * np.log(3), rtol=1e-13)


def test_log_singular_values_of_a_sigmoid_net_against_mpmath(x64):
    ws = weights(12, 4)
    x = jnp.linspace(-1, 1, 4)
    chain = jg.factorize(mlp(ws, jax.nn.sigmoid), x)
    factors = [np.asarray(j) for j in jg.layer_jacobians(chain, x)]
    expected = log_singular_values_of_product(factors)
    found = jg.jacobian_product(chain, x).log_singular_values()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_dense_and_elementwise_layers_need_no_push(x64, monkeypatch):
    def refuse(*_):
        raise AssertionError("a push or pull was made")

    monkeypatch.setattr(jacobian, "_pushed", refuse)
    monkeypatch.setattr(jacobian, "_pulled", refuse)
    jax.clear_caches()
    ws = weights(3, 5)
    xs = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5)))
    for act in (jnp.tanh, jax.nn.relu, jax.nn.sigmoid, jax.nn.gelu, jax.nn.silu):
        f = mlp(ws, act)
        chain = jg.factorize(f, xs, batch_axis=0, layers="cuts")
        for layer, j in zip(chain.layers, jg.layer_jacobians(chain, xs), strict=True):
            del layer
            assert j.shape == (3, 5, 5)
        chain = jg.factorize(f, xs[0])
        product = np.eye(5)
        for j in jg.layer_jacobians(chain, xs[0]):
            product = np.asarray(j) @ product
        np.testing.assert_allclose(product, full_jacobian(f, xs[0]), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    "fun",
    [
        lambda h: h * h[::-1],  # not elementwise
        lambda h: jnp.cumsum(h),
        lambda h: h / jnp.linalg.norm(h),
        lambda h: jnp.where(h > 0, h, 2 * h),
        lambda h: jnp.where(h > 0, h, 1.0),
        lambda h: 1.0 / h,
        lambda h: h + jnp.tanh(h @ jnp.ones((4, 4))) * h,  # a residual branch, a gate
        lambda h: h + jnp.sum(h),
        lambda h: h @ jnp.outer(h, h),
        lambda h: jnp.sort(h),
    ],
)
def test_what_is_not_provably_structured_is_not_taken_for_it(fun, x64):
    h = jnp.array([0.3, -1.2, 2.0, 0.7])
    found = structure.structured_jacobian(fun, h)
    expected = jax.jacfwd(fun)(h)
    assert found is None or np.allclose(found, expected, rtol=1e-13, atol=0)
    chain = jg.factorize(fun, h)
    product = np.eye(4)
    for j in jg.layer_jacobians(chain, h):
        product = np.asarray(j) @ product
    np.testing.assert_allclose(product, expected, rtol=1e-12, atol=1e-15)


def test_rectangular_weights_are_not_transposed(x64):
    rng = np.random.default_rng(0)
    w1, w2 = jnp.asarray(rng.standard_normal((3, 7))), jnp.asarray(rng.standard_normal((2, 7)))

    def f(x):
        return w2 @ jnp.tanh(x @ w1)

    x = jnp.ones(3)
    shapes = [j.shape for j in jg.layer_jacobians(jg.factorize(f, x, layers="cuts"), x)]
    assert shapes == [(7, 3), (7, 7), (2, 7)]
    np.testing.assert_allclose(
        jg.jacobian_product(jg.factorize(f, x), x).to_dense(), full_jacobian(f, x), rtol=1e-12
    )


@pytest.mark.parametrize("chunk_size", [1, 2, 3, None])
def test_chunks_change_nothing(chunk_size, x64):
    def f(x):
        return jnp.cumsum(jnp.tanh(x)) / (1 + jnp.sum(x**2))

    x = jnp.linspace(-1, 1, 7)
    chain = jg.factorize(f, x)
    whole = full_jacobian(f, x)
    product = jg.jacobian_product(chain, x, chunk_size=chunk_size).to_dense()
    np.testing.assert_allclose(product, whole, rtol=1e-12, atol=1e-16)


def test_a_while_loop_is_pushed_and_a_custom_vjp_pulled(x64):
    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (double(x), None), lambda _, g: (2 * g,))

    def halved(x):
        return jax.lax.while_loop(lambda h: jnp.max(h) > 1, lambda h: h / 2, x)

    x = jnp.array([3.0, 1.0, 0.5])
    for f, factor in ((double, 2.0), (halved, 0.25)):
        chain = jg.factorize(lambda x, f=f: jnp.cumsum(f(x)), x)
        dense = jg.jacobian_product(chain, x).to_dense()
        np.testing.assert_allclose(dense, factor * np.tril(np.ones((3, 3))), atol=1e-14)
    both = jg.factorize(lambda x: double(halved(x)) + halved(x), x)
    with pytest.raises(ValueError, match=r"layer .* holds a while_loop.* custom_vjp"):
        jg.layer_jacobians(both, x)


def test_half_precision_states_give_float32_jacobians():
    w = weights(1, 4, dtype=jnp.bfloat16)[0]
    x = jnp.ones(4, jnp.bfloat16)
    chain = jg.factorize(lambda x: jnp.tanh(x @ w), x)
    (j,) = jg.layer_jacobians(chain, x)
    assert j.dtype == jnp.float32
    expected = jax.jacrev(chain[0])(x).astype(jnp.float32)
    np.testing.assert_allclose(j, expected, rtol=0.02, atol=0.01)


def test_what_cannot_fit_is_refused_with_its_size_and_a_way_out():
    chain = jg.factorize(lambda x: jnp.sin(x) * jnp.cos(jnp.sum(x)), jnp.ones(400_000))
    with pytest.raises(ValueError, match=r"(?s)GiB.*400000 x 400000.*jax.linearize"):
        jg.layer_jacobians(chain, jnp.ones(400_000))


def test_unknown_direction():
    chain = jg.factorize(jnp.sin, jnp.ones(2))
    with pytest.raises(ValueError, match="'backward' or 'forward'"):
        jg.jacobian_products(chain, jnp.ones(2), "sideways")


def test_planted_faults_are_seen(x64, monkeypatch):
    """A transposed Jacobian and a dropped layer change the product."""
    ws = weights(4, 4)
    f, x = mlp(ws), jnp.linspace(-1, 1, 4)
    chain = jg.factorize(f, x)
    jacobians = [np.asarray(j) for j in jg.layer_jacobians(chain, x)]
    expected = full_jacobian(f, x)

    def product(js):
        p = np.eye(4)
        for j in js:
            p = j @ p
        return p

    def wrong(js):
        return np.max(np.abs(product(js) - expected)) / np.max(np.abs(expected))

    assert wrong(jacobians) < 1e-12
    assert wrong([jacobians[0], jacobians[1].T, *jacobians[2:]]) > 1e-2
    assert wrong([*jacobians[:2], *jacobians[3:]]) > 1e-2
