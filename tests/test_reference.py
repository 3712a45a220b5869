"""The oracles are right where the answer is known in closed form."""

import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from cases import BY_NAME
from jax import lax
from reference import (
    HAS_LOGS,
    finite_difference_jacobian,
    full_jacobian,
    hidden_state_gradients,
    hidden_states,
    linen_output_gradients,
    log_singular_values,
    log_singular_values_of_product,
    logged_gradients,
    product_entries,
    statistics,
)
from reference_cuts import count_layers

close = np.testing.assert_allclose
needs_logs = pytest.mark.skipif(not HAS_LOGS, reason="backward logs came with jax 0.12")


def test_the_jacobian_of_a_linear_map_is_its_matrix_and_not_the_transpose(x64):
    a = np.arange(6.0).reshape(2, 3)
    close(full_jacobian(lambda x: a @ x, jnp.ones(3)), a, rtol=0)
    close(full_jacobian(lambda x: a @ x, jnp.ones(3), mode="forward"), a, rtol=0)
    close(finite_difference_jacobian(lambda x: a @ x, jnp.ones(3)), a, atol=1e-11)


def test_jacobians_of_trees_lie_leaf_after_leaf_and_the_other_arguments_are_held(x64):
    def f(scale, x):
        return {"first": scale * x["a"], "second": x["b"] ** 2}

    x = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[3.0]])}
    close(full_jacobian(f, 5.0, x, argnum=1), np.diag([5.0, 5.0, 6.0]), rtol=0)
    close(finite_difference_jacobian(f, 5.0, x, argnum=1), np.diag([5.0, 5.0, 6.0]), rtol=1e-9)


@pytest.mark.parametrize("name", ["jax_logistic", "jax_softmax"])
def test_differences_agree_with_closed_forms_to_nine_digits(x64, name):
    x = jnp.array([0.3, -1.2, 0.7])
    if name == "jax_logistic":
        s = 1 / (1 + np.exp(-np.asarray(x)))
        f, expected = jax.nn.sigmoid, np.diag(s * (1 - s))
    else:
        p = np.exp(x) / np.exp(x).sum()
        f, expected = jax.nn.softmax, np.diag(p) - np.outer(p, p)
    close(finite_difference_jacobian(f, x), expected, rtol=0, atol=1e-9)
    close(full_jacobian(f, x), expected, rtol=1e-14, atol=1e-16)


def test_float32_is_refused_where_float64_is_meant():
    with pytest.raises(TypeError, match="float64, not float32"):
        full_jacobian(jnp.sin, jnp.ones(2))


# ------------------------------------------------------------------------------ hidden states


def chain(probe, weights, x):
    """h_k = w_k h_{k-1}, elementwise; the value is the sum of the last."""
    for k, w in enumerate(weights):
        x = probe(f"h{k}", w * x)
    return x.sum()


WEIGHTS = [jnp.full(3, 2.0), jnp.full(3, -3.0), jnp.full(3, 5.0)]
# d sum(h_2) / d h_k is the product of the weights that follow, exactly
EXPECTED = {"h0": np.full(3, -15.0), "h1": np.full(3, 5.0), "h2": np.ones(3)}
RECORDERS = [hidden_state_gradients, pytest.param(logged_gradients, marks=needs_logs)]


@pytest.mark.parametrize("gradients", RECORDERS)
def test_hidden_gradients_of_a_linear_chain_are_the_products_of_the_weights_that_follow(gradients):
    result = gradients(chain, WEIGHTS, jnp.ones(3))
    assert result.keys() == EXPECTED.keys()
    for name, expected in EXPECTED.items():
        close(result[name], expected, rtol=0)
    close(hidden_states(chain, WEIGHTS, jnp.ones(3))["h1"], np.full(3, -6.0), rtol=0)


@needs_logs
def test_logs_of_a_scan_are_those_of_the_unrolled_loop_iteration_by_iteration():
    def scanned(probe, weights, x):
        step = lambda h, w: (probe("h", jnp.tanh(w * h)), None)  # noqa: E731
        return lax.scan(step, x, weights)[0].sum()

    def unrolled(probe, weights, x):
        for k in range(3):
            x = probe(f"h{k}", jnp.tanh(weights[k] * x))
        return x.sum()

    weights = jnp.stack(WEIGHTS) / 4
    logs = logged_gradients(scanned, weights, jnp.ones(3))["h"]
    by_hand = hidden_state_gradients(unrolled, weights, jnp.ones(3))
    close(logs, np.stack([by_hand[f"h{k}"] for k in range(3)]), rtol=1e-6, atol=0)


def test_two_hidden_states_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two hidden states are called 'h'"):
        hidden_state_gradients(lambda probe, x: (probe("h", x) + probe("h", x)).sum(), jnp.ones(2))


def test_gradients_at_linen_modules_are_those_of_the_backward_recursion_by_hand(x64):
    loss, params, batch = BY_NAME["linen_mlp_sigmoid"].build_loss(jnp.float64)
    gradients = linen_output_gradients(loss, params, batch)
    p = {name: {k: np.asarray(v) for k, v in q.items()} for name, q in params["params"].items()}
    h, sigmoids = np.asarray(batch["x"]), []
    for k in range(3):
        z = h @ p[f"Dense_{k}"]["kernel"] + p[f"Dense_{k}"]["bias"]
        h = 1 / (1 + np.exp(-z))
        sigmoids.append(h)
    g = 2 * (z - np.asarray(batch["y"])) / z.size
    for k in (2, 1, 0):
        close(gradients[f"Dense_{k}"], g, rtol=1e-11, atol=0)
        s = sigmoids[k - 1]
        g = (g @ p[f"Dense_{k}"]["kernel"].T) * s * (1 - s) if k else g


# ------------------------------------------------------------------------------ statistics


def test_statistics_of_three_and_four_are_those_of_school():
    row = statistics(np.array([3.0, -4.0, 0.0, 0.0]))
    assert row["rms"] == 2.5
    assert row["mean"] == -0.25
    assert row["max_abs"] == 4
    assert row["zero_share"] == 0.5
    assert row["nonfinite"] == row["below_float16"] == row["below_bfloat16"] == 0


def test_statistics_neither_underflow_nor_overflow():
    assert statistics(np.full(7, 1e-200))["rms"] == 1e-200
    assert statistics(np.full(7, 1e200))["rms"] == 1e200
    assert statistics(np.full(7, 3e38, np.float32))["rms"] == float(np.float32(3e38))


def test_shares_below_the_smallest_normal_number_do_not_count_zeros_or_the_number_itself():
    values = np.array([0.0, 2.0**-14, 2.0**-15, 2.0**-127, 1.0, -(2.0**-20)])
    row = statistics(values)
    assert row["below_float16"] == 3 / 6
    assert row["below_bfloat16"] == 1 / 6


def test_statistics_count_what_is_not_finite_and_let_it_show():
    row = statistics(np.array([1.0, np.nan, np.inf, -np.inf]))
    assert row["nonfinite"] == 3
    assert math.isnan(row["rms"])
    assert math.isnan(row["mean"])
    assert statistics(np.array([1.0, np.inf]))["rms"] == math.inf
    assert set(statistics(np.zeros((0, 3))).values()) == {0.0}


# ------------------------------------------------------------------------------ spectra


def test_singular_values_of_a_long_product_of_rotations_and_scales_are_exact():
    rng = np.random.default_rng(0)
    rotations = [np.linalg.qr(rng.standard_normal((4, 4)))[0] for _ in range(6)]
    close(log_singular_values_of_product(rotations), np.zeros(4), atol=1e-14)
    scales = np.array([1e5, 1.0, 1e-60, 1e-200])
    # U S, then S V: the middle is diagonal, and known
    factors = [np.diag(scales) @ rotations[0], rotations[1] @ np.diag(scales)]
    close(log_singular_values_of_product(factors), 2 * np.log(scales), rtol=1e-12, atol=1e-12)


def test_a_product_is_taken_from_the_last_factor_to_the_first():
    first, second = np.array([[1.0, 2.0]]), np.array([[3.0], [4.0]])
    entries = product_entries([first, second])
    assert (entries.rows, entries.cols) == (2, 2)
    assert entries == mpmath.matrix([[3, 6], [4, 8]])


def test_logs_of_singular_values_descend_and_zero_is_minus_infinity():
    logs = log_singular_values(np.diag([1.0, 0.0, math.e]))
    close(logs[:2], [1.0, 0.0], atol=1e-15)
    assert logs[2] == -math.inf


# ------------------------------------------------------------------------------ cuts


def test_cuts_are_counted_as_by_eye():
    x = jnp.ones(3)
    assert count_layers(lambda x: x, x) == 0
    assert count_layers(jnp.sin, x) == 1
    assert count_layers(lambda x: jnp.cos(jnp.sin(x)), x) == 2
    # a residual branch is one layer, whatever is in it
    assert count_layers(lambda x: jnp.cos(x + jnp.sin(jnp.exp(x))), x) == 2
    # what hangs on no x, or on x through stop_gradient or integers only, widens no cut
    assert count_layers(lambda x: jnp.sin(jnp.cos(x) + lax.stop_gradient(jnp.exp(x))), x) == 3
    assert count_layers(lambda x: jnp.sin(x) * jnp.argmax(x).astype(x.dtype), x) == 2
    # integers at the input: the first float cut is h_0
    assert count_layers(lambda i: jnp.sin(jnp.cos(x[i])), jnp.array([0, 1])) == 2
    # complex numbers lie within a layer
    assert count_layers(lambda x: jnp.fft.irfft(1j * jnp.fft.rfft(jnp.sin(x)), n=3), x) == 2
    # two outputs are one last state
    assert count_layers(lambda x: (jnp.cos(h := jnp.sin(x)), jnp.tan(h)), x) == 2
    assert count_layers(lambda x: (jnp.cos(jnp.sin(x)), jnp.tan(jnp.sin(x))), x) == 1
