"""The largest stable learning rate against dense Hessians, the known constants, and divergence."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgrad as jg
from jaxgrad.stability import max_stable_learning_rate, top_hessian_eigenvalue

CURVATURES = jnp.array([0.02, 0.3, 1.0, 2.5, 7.0])


def quadratic(params, curvatures):
    x = jnp.concatenate([params["a"], params["b"]])
    return 0.5 * jnp.sum(curvatures * x**2)


PARAMS = {"a": jnp.array([0.3, -1.0]), "b": jnp.array([0.5, 2.0, -0.4])}


def distance_after(tx, loss, params, batch, steps):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[0][0])
    return math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(run(params))))


LINEAR = {  # rule -> (learning rate -> optimizer, its constant over the top curvature)
    "sgd": (optax.sgd, 2.0),
    "momentum": (lambda lr: optax.sgd(lr, momentum=0.9), 2 * 1.9),
    "nesterov": (lambda lr: optax.sgd(lr, momentum=0.8, nesterov=True), 2 * 1.8 / 2.6),
    "by hand": (lambda lr: jg.optim.momentum(lr, 0.5), 2 * 1.5),
    "clipped": (lambda lr: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(lr)), 2.0),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_rules_have_their_known_constants(name):
    make, constant = LINEAR[name]
    for optimizer in (make, make(0.01)):  # a factory, and an optimizer at some learning rate
        rate = max_stable_learning_rate(quadratic, PARAMS, CURVATURES, optimizer)
        np.testing.assert_allclose(rate, constant / 7.0, rtol=1e-3)


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov"])
def test_descent_diverges_right_above_it_and_converges_right_below(name):
    make, _ = LINEAR[name]
    rate = max_stable_learning_rate(quadratic, PARAMS, CURVATURES, make)
    above, below = (
        distance_after(make(c * rate), quadratic, PARAMS, CURVATURES, 2000) for c in (1.02, 0.98)
    )
    assert not above < 1e6, above
    assert below < 0.05, below


def test_a_factory_settles_the_convention_of_a_bare_moving_average():
    def make(lr):
        return optax.chain(optax.ema(0.9, debias=False), optax.scale(-lr))

    rate = max_stable_learning_rate(quadratic, PARAMS, CURVATURES, make)
    np.testing.assert_allclose(rate, 2 * 1.9 / 0.1 / 7.0, rtol=1e-3)


def _net(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] - y) ** 2)


@pytest.fixture(scope="module")
def net():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "w1": jax.random.normal(keys[0], (4, 8)),
        "b1": 0.1 * jax.random.normal(keys[1], (8,)),
        "w2": jax.random.normal(keys[2], (8, 1)) / 3,
    }
    x = jax.random.normal(keys[3], (32, 4))
    return params, (x, jnp.sin(x[:, :1]) + 0.5 * x[:, 1:2])


def _dense_hessian(params, batch):
    flat, back = jax.flatten_util.ravel_pytree(params)
    return np.asarray(jax.hessian(lambda p: _net(back(p), batch))(flat), np.float64), flat, back


def test_top_eigenvalue_is_the_dense_one_with_an_honest_residual(net):
    params, batch = net
    hessian, _, back = _dense_hessian(params, batch)
    values = np.linalg.eigvalsh(hessian)
    found = top_hessian_eigenvalue(_net, params, batch)
    np.testing.assert_allclose(found.value, values[-1], rtol=1e-4)
    assert found.value <= values[-1] * (1 + 1e-5)
    early = top_hessian_eigenvalue(_net, params, batch, iterations=4)
    assert np.min(np.abs(values - early.value)) <= early.residual * 1.01 and early.iterations == 4
    diagonal = np.linspace(0.1, 3, len(values))
    scaled = top_hessian_eigenvalue(_net, params, batch, scale=back(jnp.asarray(diagonal)))
    root = np.sqrt(diagonal)
    exact = np.linalg.eigvalsh(root[:, None] * hessian * root)[-1]
    np.testing.assert_allclose(scaled.value, exact, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "b1"),
    [
        (optax.adam, 0.9),
        (lambda lr: optax.adamw(lr, b1=0.8), 0.8),
        (lambda lr: optax.rmsprop(lr, decay=0.95), 0.0),
    ],
)
def test_adaptive_rules_follow_the_preconditioned_hessian(make, b1, net):
    params, batch = net
    hessian, flat, back = _dense_hessian(params, batch)
    g = np.asarray(jax.grad(lambda p: _net(back(p), batch))(flat), np.float64)
    scale = 1 / np.sqrt(np.abs(g) + 1e-8)
    top = np.linalg.eigvalsh(scale[:, None] * hessian * scale)[-1]
    expected = (2 + 2 * b1) / (1 - b1) / top
    for optimizer in (make, make(3e-4)):
        rate, report = max_stable_learning_rate(_net, params, batch, optimizer, return_report=True)
        np.testing.assert_allclose(rate, expected, rtol=5e-3)
        assert report.kind == "adaptive"
    np.testing.assert_allclose(report.nominal, 3e-4, rtol=1e-3)


def test_frozen_adam_diverges_right_above_it(net):
    """With its second moment held, as the formula assumes, on the quadratic around this point."""
    params, batch = net
    hessian, flat, back = _dense_hessian(params, batch)
    hessian = hessian + 0.5 * np.eye(len(flat))  # a minimum
    g = np.asarray(jax.grad(lambda p: _net(back(p), batch))(flat), np.float64)

    def loss(p, _):
        x = jax.flatten_util.ravel_pytree(p)[0]
        return jnp.asarray(g) @ x + 0.5 * x @ jnp.asarray(hessian) @ x

    rate = max_stable_learning_rate(loss, back(jnp.zeros(len(flat))), None, optax.adam)

    def frozen(lr, steps=3000):
        x, m = np.full(len(g), 1e-3), np.zeros(len(g))
        for _ in range(steps):
            m = 0.9 * m + 0.1 * (hessian @ x)
            x = x - lr * m / (np.abs(g) + 1e-8)
            if np.abs(x).max() > 1e6:
                break
        return np.abs(x).max()

    assert frozen(1.02 * rate) > 1e5
    assert frozen(0.98 * rate) < 1e-3


def test_a_net_at_its_minimum_leaves_it_above_the_rate_and_stays_below(net):
    params, batch = net
    adam = optax.adam(0.01)

    def step(carry, _):
        params, state = carry
        updates, state = adam.update(jax.grad(_net)(params, batch), state)
        return (optax.apply_updates(params, updates), state), None

    trained = jax.lax.scan(step, (params, adam.init(params)), length=4000)[0][0]
    rate = max_stable_learning_rate(_net, trained, batch, optax.sgd(0.1))
    noise = jax.tree.map(
        lambda p: p + 1e-3 * jax.random.normal(jax.random.key(1), p.shape), trained
    )

    def losses(c):
        def descend(p, _):
            value, g = jax.value_and_grad(_net)(p, batch)
            return jax.tree.map(lambda p, g: p - c * rate * g, p, g), value

        return jax.lax.scan(descend, noise, length=300)[1]

    above, below = losses(1.1), losses(0.9)
    assert jnp.max(above) > 10 * above[0], jnp.max(above) / above[0]
    assert jnp.max(below) == below[0] and below[-1] < 0.5 * below[0]


def test_downward_curvature_bounds_nothing_and_a_mixed_one_counts_upward():
    def bowl(p, sign):
        return jnp.sum(sign * p**2)

    with pytest.warns(UserWarning, match="no direction curves upward"):
        rate = max_stable_learning_rate(bowl, jnp.ones(3), jnp.array([-1.0, -9.0, 0.0]), optax.sgd)
    assert rate == math.inf
    rate = max_stable_learning_rate(bowl, jnp.ones(3), jnp.array([-50.0, 1.0, 0.5]), optax.sgd)
    np.testing.assert_allclose(rate, 1.0, rtol=1e-4)


def test_a_custom_vjp_and_static_leaves_are_no_obstacle():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))
    params = {"x": jnp.ones(3), "name": "static", "count": jnp.arange(2), "none": None}

    def loss(p, batch):
        return jnp.sum(batch * square(p["x"]))

    rate = max_stable_learning_rate(loss, params, jnp.array([1.0, 2.0, 4.0]), optax.sgd)
    np.testing.assert_allclose(rate, 0.25, rtol=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (optax.lion(1e-3), "do not depend on the gradient's size"),
        (optax.lamb(1e-3), "not elementwise"),
        (optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation(), "no update at some steps"),
        (optax.sgd(optax.linear_schedule(0.1, 0.01, 300)), "cannot be told apart"),
        (optax.scale(0.1), "adds the gradient"),
        (optax.sgd(0.0), "changes no parameter"),
    ],
)
def test_rules_without_a_threshold_say_why(optimizer, message):
    with pytest.raises(ValueError, match=message):
        _ = max_stable_learning_rate(quadratic, PARAMS, CURVATURES, optimizer)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="optax transformation or a function"):
        _ = max_stable_learning_rate(quadratic, PARAMS, CURVATURES, 0.1)
    with pytest.raises(TypeError, match="real floating-point arrays"):
        _ = max_stable_learning_rate(lambda p, b: 0.0, {"n": jnp.arange(3)}, None, optax.sgd)
    with pytest.raises(TypeError, match=r"one real scalar, got float32\[3\]"):
        _ = max_stable_learning_rate(lambda p, b: p, jnp.ones(3), None, optax.sgd)
    with pytest.raises(ValueError, match="gradient of the loss is not finite"):
        _ = max_stable_learning_rate(
            lambda p, b: jnp.sum(jnp.log(p)), jnp.zeros(3), None, optax.sgd
        )
