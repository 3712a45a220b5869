"""Models as public code writes them, where something went wrong at first sight."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad as jg


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


# ----------------------------------------------------------------------------- an implicit layer


def solved(step, start):
    """The fixed point of `step`, by a loop of unknown length."""

    def unfinished(state):
        before, now, count = state
        return (jnp.max(jnp.abs(before - now)) > 1e-15) & (count < 100)

    def advanced(state):
        _, now, count = state
        return now, step(now), count + 1

    return jax.lax.while_loop(unfinished, advanced, (start, start + 1, 0))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fixed_point(cell, params, x):
    return solved(functools.partial(cell, params, x), jnp.zeros(5))


def fixed_point_forward(cell, params, x):
    z = fixed_point(cell, params, x)
    return z, (params, x, z)


def fixed_point_backward(cell, kept, g):
    params, x, z = kept
    _, pull_z = jax.vjp(lambda z: cell(params, x, z), z)
    _, pull = jax.vjp(lambda params, x: cell(params, x, z), params, x)
    return pull(solved(lambda u: pull_z(u)[0] + g, jnp.zeros(5)))


fixed_point.defvjp(fixed_point_forward, fixed_point_backward)


def equilibrium(params, x):
    def cell(p, x, z):
        return jnp.tanh(z @ p["recurrent"] + x @ p["inject"])

    return fixed_point(cell, params["deq"], jnp.tanh(x @ params["encoder"])) @ params["head"]


def equilibrium_params():
    return {
        "encoder": normal(3, 4),
        "deq": {"recurrent": normal(5, 5, seed=1) / 10, "inject": normal(4, 5, seed=2) / 2},
        "head": normal(5, 2, seed=3),
    }


def test_an_implicit_layer_has_the_jacobian_that_its_rule_gives(x64):
    """A while_loop inside of a custom_vjp: reverse mode by the rule, no forward mode."""
    params, x = equilibrium_params(), normal(3, seed=4)
    chain = jg.factorize(functools.partial(equilibrium, params), x)
    assert len(chain) == 3
    assert "custom_vjp" in chain.graph.opaque[0]
    expected = jax.jacrev(functools.partial(equilibrium, params))(x)
    scale = np.max(np.abs(expected))
    product = np.linalg.multi_dot(jg.layer_jacobians(chain, x)[::-1])
    np.testing.assert_allclose(product, expected, rtol=0, atol=1e-12 * scale)
    np.testing.assert_allclose(
        jg.log_singular_values(chain, x),
        np.log(np.linalg.svd(expected, compute_uv=False)),
        rtol=0,
        atol=1e-10,
    )
    with pytest.raises(ValueError, match=r"top_singular_values: layer 'deq.* no transpose"):
        jg.top_singular_values(chain, x, 1, key=jax.random.key(0))


def test_an_implicit_layer_is_calibrated_with_the_others(x64):
    def loss(params, xs):
        return jnp.mean(jax.vmap(functools.partial(equilibrium, params))(xs) ** 2)

    params, xs = equilibrium_params(), normal(8, 3, seed=5)
    _, report = jg.calibrate(loss, params, xs, return_report=True)
    status = {layer.name: layer.status for layer in report.layers}
    assert status["head"] == "scaled"


# ------------------------------------------------------------------------------ rules that refuse


@eqx.filter_custom_vjp
def halved(x, scale):
    return x * scale


@halved.def_fwd
def _(perturbed, x, scale):
    del perturbed
    return halved(x, scale), scale


@halved.def_bwd
def _(scale, g, perturbed, x, scale_again):
    del perturbed, x, scale_again
    return g * scale


def test_a_rule_that_asserts_what_may_be_differentiated_is_not_asked_for_the_rest(x64):
    """Equinox asserts, in the rule, that no argument but the first is differentiated."""
    weights = [normal(4, 4, seed=k) for k in range(3)]
    scales = jnp.asarray([0.5, 2.0, 3.0])

    def f(x):
        for weight, scale in zip(weights, scales, strict=True):
            x = halved(jnp.sin(x @ weight), scale)
        return x

    x = normal(4, seed=9)
    chain = jg.factorize(f, x)
    expected = jax.jacrev(f)(x)
    product = np.linalg.multi_dot(jg.layer_jacobians(chain, x)[::-1])
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(product, expected, rtol=0, atol=1e-12 * scale)


# ------------------------------------------------------------------------- a loop inside a branch


@pytest.mark.parametrize("taken", [True, False])
def test_a_scan_inside_a_branch_has_its_rows_whether_it_is_taken_or_not(taken, x64):
    """As an adaptive solver has it: a loop over stages in one branch, nothing in the other."""
    params = {
        "in": normal(3, 4),
        "stages": normal(3, 4, 4, seed=1) / 2,
        "out": normal(4, 2, seed=2),
    }

    def loss(params, x, taken):
        h = jnp.tanh(x @ params["in"])

        def stages(h):
            return jax.lax.scan(lambda h, w: (jnp.sin(h @ w), None), h, params["stages"])[0]

        return jnp.sum((jax.lax.cond(taken, stages, lambda h: h, h) @ params["out"]) ** 2)

    x = normal(5, 3, seed=3)
    flowing = jax.jit(jg.value_and_grad_flow(loss))
    (value, flow), grads = flowing(params, x, taken)
    expected, expected_grads = jax.jit(jax.value_and_grad(loss))(params, x, taken)
    np.testing.assert_allclose(value, expected, rtol=1e-14)
    for mine, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-13 * np.max(np.abs(theirs)))
    rows = [k for k, name in enumerate(flow.names) if "stages" in name]
    assert len(rows) >= 3
    assert np.all(np.isnan(flow.gradient_rms[np.array(rows[:3])])) == (not taken)
