"""`value_and_grad_flow` against `jax.value_and_grad`, zero perturbations and native logs."""

import functools
import os
import subprocess
import sys

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, one_of_a_kind_first
from reference import HAS_LOGS, hidden_state_gradients, hidden_states, logged_gradients, statistics

import jaxgrad as jg
from jaxgrad.graph import rewrite
from jaxgrad.tree import is_inexact_array

COLUMNS = {
    "activation_rms": "rms",
    "activation_mean": "mean",
    "activation_max": "max_abs",
    "activation_zero_share": "zero_share",
    "activation_nonfinite": "nonfinite",
}
GRADIENT_COLUMNS = {
    "gradient_rms": "rms",
    "gradient_max": "max_abs",
    "gradient_nonfinite": "nonfinite",
    "gradient_below_float16": "below_float16",
    "gradient_below_bfloat16": "below_bfloat16",
}

LOSSES = [c for c in CASES if not c.flags & {"forward-only", "nonfinite-gradient"}]


def max_difference(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max((float(jnp.max(jnp.abs(x - y), initial=0)) for x, y in pairs), default=0.0)


@pytest.mark.parametrize("case", one_of_a_kind_first(LOSSES))
def test_value_and_gradients_are_those_of_jax(case):
    built = case.build_loss()
    if built is None:
        pytest.skip("a model without parameters to train")
    loss, params, batch = built
    leaves, treedef = jax.tree.flatten(params)
    is_float = [is_inexact_array(leaf) for leaf in leaves]
    floats = [jnp.asarray(leaf) for leaf, wanted in zip(leaves, is_float, strict=True) if wanted]

    def of_floats(loss_of, floats):
        """What is no float array (the functions in an equinox module) stays as it is."""
        rest = iter(floats)
        full = [next(rest) if w else leaf for leaf, w in zip(leaves, is_float, strict=True)]
        return loss_of(jax.tree.unflatten(treedef, full))

    flowing = jg.value_and_grad_flow(loss)
    (value, flow), grads = jax.jit(lambda f, b: of_floats(lambda p: flowing(p, b), f))(
        floats, batch
    )
    plain = jax.value_and_grad(lambda f, b: of_floats(lambda p: loss(p, b), f))
    expected_value, expected = jax.jit(plain)(floats, batch)
    grads = jax.tree.leaves(grads)  # None where there is no gradient
    scale = max(float(jnp.max(jnp.abs(g), initial=0)) for g in jax.tree.leaves(expected))
    rounding = 0.02 if "low-precision" in case.flags else 2e-6
    np.testing.assert_allclose(value, expected_value, rtol=rounding)
    assert max_difference(grads, expected) <= rounding * max(scale, 1e-30)
    assert len(flow.names) == len(flow.gradient_rms) >= case.scopes
    assert len(set(flow.names)) == len(flow.names)
    assert flow.gradient_rms.dtype == jnp.float32
    assert len(flow.parameter_names) == len(jax.tree.leaves(grads))


# ------------------------------------------------------------------- statistics against oracles


def by_hand(probe, params, x):
    """A model with a hidden state that dies, one that explodes and one in half precision."""
    h = probe("first", x @ params["first"])
    h = probe("small", 1e-25 * jax.nn.relu(h))
    h = probe("large", 1e30 * h)
    half = probe("half", (1e-6 * h).astype(jnp.float16))
    return jnp.sum(1e-4 * half.astype(jnp.float32) ** 2) * 1e-3


def tapped(params, x):
    return by_hand(lambda name, h: jg.tap(h, name), params, x)


def example():
    rng = np.random.default_rng(0)
    params = {"first": jnp.asarray(rng.standard_normal((5, 6)), jnp.float32)}
    return params, jnp.asarray(rng.standard_normal((4, 5)), jnp.float32)


def expect_rows(flow, states, gradients, rtol=2e-6):
    for name, state in states.items():
        k = flow.names.index(name)
        for columns, tensor in ((COLUMNS, state), (GRADIENT_COLUMNS, gradients[name])):
            facts = statistics(tensor)
            for column, fact in columns.items():
                found = np.asarray(getattr(flow, column))[k]
                np.testing.assert_allclose(
                    found, facts[fact], rtol=rtol, atol=0, err_msg=f"{name}: {column}"
                )


def test_statistics_against_zero_perturbations():
    params, x = example()
    (_, flow), _ = jax.jit(jg.value_and_grad_flow(tapped))(params, x)
    states = hidden_states(by_hand, params, x)
    expect_rows(flow, states, hidden_state_gradients(by_hand, params, x), rtol=1e-5)


@pytest.mark.skipif(not HAS_LOGS, reason="native backward logs need jax >= 0.12")
def test_statistics_against_native_logs():
    params, x = example()
    (_, flow), _ = jax.jit(jg.value_and_grad_flow(tapped))(params, x)
    states = hidden_states(by_hand, params, x)
    expect_rows(flow, states, logged_gradients(by_hand, params, x), rtol=1e-5)


def test_a_tap_off_by_one_site_is_seen(monkeypatch):
    params, x = example()
    run = rewrite.Tapped.run

    def shifted(self, block, args, slots):
        known = sorted(self.sites.values())
        if len(known) > 1:
            self.sites = {v: (s + 1) % len(known) for v, s in self.sites.items()}
        return run(self, block, args, slots)

    monkeypatch.setattr(rewrite.Tapped, "run", shifted)
    (_, flow), _ = jg.value_and_grad_flow(tapped)(params, x)
    states = hidden_states(by_hand, params, x)
    with pytest.raises(AssertionError):
        expect_rows(flow, states, hidden_state_gradients(by_hand, params, x), rtol=1e-3)


# ------------------------------------------------------------------- control flow


def stack(params, x, transform=lambda f: f, unrolled=False):
    def block(h, p):
        return h + jnp.tanh(h @ p["w"] + p["b"]), None

    block = transform(block)
    if unrolled:
        for k in range(4):
            h = jg.tap(block(x, jax.tree.map(lambda a, k=k: a[k], params["blocks"]))[0], f"b{k}")
            x = h
    else:
        x, _ = jax.lax.scan(block, x, params["blocks"])
    return jnp.mean((x @ params["head"]) ** 2)


def stacked():
    rng = np.random.default_rng(1)
    blocks = {"w": rng.standard_normal((4, 5, 5)) / 3, "b": rng.standard_normal((4, 5))}
    params = {"blocks": blocks, "head": rng.standard_normal((5, 2))}
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params), jnp.ones((3, 5))


@pytest.mark.parametrize(
    "transform",
    [lambda f: f, jax.checkpoint, jax.jit, lambda f: jax.checkpoint(jax.jit(f), prevent_cse=False)],
    ids=["plain", "remat", "jit", "remat of jit"],
)
def test_a_scan_gives_the_rows_of_the_unrolled_loop(transform):
    params, x = stacked()
    scanned = jax.jit(jg.value_and_grad_flow(functools.partial(stack, transform=transform)))
    (_, flow), grads = scanned(params, x)
    unrolled = jax.jit(jg.value_and_grad_flow(functools.partial(stack, unrolled=True)))
    (_, expected), _ = unrolled(params, x)
    rows = [flow.names.index(f"blocks[{k}]") for k in range(4)]
    taps = [expected.names.index(f"b{k}") for k in range(4)]
    for column in (*COLUMNS, *GRADIENT_COLUMNS):
        mine, theirs = (np.asarray(getattr(f, column)) for f in (flow, expected))
        np.testing.assert_allclose(mine[rows], theirs[taps], rtol=1e-5, atol=1e-7, err_msg=column)
    plain = jax.jit(jax.grad(functools.partial(stack, transform=transform)))(params, x)
    assert max_difference(grads, plain) < 1e-6


def test_rows_of_a_reversed_scan_are_in_forward_order():
    params, x = stacked()

    def loss(params, x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params, reverse=True)
        return jnp.sum(h)

    (_, flow), _ = jg.value_and_grad_flow(loss)(params["blocks"]["w"], x)
    assert flow.names == ("params[3]", "params[2]", "params[1]", "params[0]")


def test_the_branch_not_taken_says_so():
    def loss(params, x):
        return jax.lax.cond(
            x[0] > 0,
            lambda p: jnp.sum(jg.tap(jnp.sin(p), "taken when positive")),
            lambda p: jnp.sum(jg.tap(jnp.cos(p), "taken when negative")),
            params,
        )

    (_, flow), grads = jax.jit(jg.value_and_grad_flow(loss))(jnp.ones(3), jnp.ones(2))
    k, other = (flow.names.index(f"taken when {s}") for s in ("positive", "negative"))
    np.testing.assert_allclose(flow.activation_rms[k], np.sin(1.0), rtol=1e-6)
    np.testing.assert_allclose(flow.gradient_rms[k], 1.0, rtol=1e-6)
    assert np.isnan(flow.activation_rms[other]) and np.isnan(flow.gradient_rms[other])
    assert flow.nonfinite == 0
    np.testing.assert_allclose(grads, np.cos(1.0) * np.ones(3), rtol=1e-6)


def test_a_gradient_that_is_blocked_is_not_one_that_is_small():
    def loss(params, x):
        h = jg.tap(x @ params["a"], "blocked")
        h = jax.lax.stop_gradient(h)
        return jnp.sum(jg.tap(h @ params["b"], "open"))

    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    (_, flow), _ = jg.value_and_grad_flow(loss)(params, jnp.ones((1, 2)))
    blocked, through = flow.names.index("blocked"), flow.names.index("open")
    assert flow.gradient_reached[blocked] == 0 and flow.gradient_rms[blocked] == 0
    assert flow.activation_rms[blocked] == 2
    assert flow.gradient_reached[through] == 1 and flow.gradient_rms[through] == 1


def test_nonfinite_values_are_counted_where_they_are_born():
    def loss(params, x):
        h = jg.tap(x * params, "before")
        h = jg.tap(jnp.where(h > 0, jnp.sqrt(h), 0.0), "after")
        return jnp.sum(h)

    (value, flow), _ = jg.value_and_grad_flow(loss)(jnp.ones(3), jnp.array([0.0, 1.0, 4.0]))
    before, after = flow.names.index("before"), flow.names.index("after")
    assert np.isfinite(value)
    assert flow.gradient_nonfinite[before] == 1 and flow.gradient_nonfinite[after] == 0
    assert flow.nonfinite == 1 and flow.weight_gradient_nonfinite[0] == 1


# ------------------------------------------------------------------- transformations


def test_vmap_gives_a_flow_an_example():
    params, x = stacked()
    flows = jax.vmap(jg.value_and_grad_flow(stack), in_axes=(None, 0))
    (_, flow), _ = flows(params, x[:, None, :] * jnp.arange(1.0, 4)[:, None, None])
    assert flow.gradient_rms.shape == (3, len(flow.names))
    (_, one), _ = jg.value_and_grad_flow(stack)(params, 2 * x[:1])
    np.testing.assert_allclose(flow.gradient_rms[1], one.gradient_rms, rtol=1e-5)


def test_it_runs_inside_a_scanned_training_loop_with_donation():
    params, x = stacked()

    @functools.partial(jax.jit, donate_argnums=0)
    def train(params, x):
        def step(params, _):
            (value, flow), grads = jg.value_and_grad_flow(stack)(params, x)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
            return params, (value, flow)

        return jax.lax.scan(step, params, None, length=20)

    params, (values, flows) = train(params, x)
    assert values[-1] < values[0]
    assert flows.gradient_rms.shape == (20, len(flows.names))


def test_it_is_differentiable_itself():
    params, x = stacked()

    def gradient_size(params):
        (_, _), grads = jg.value_and_grad_flow(stack)(params, x)
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))

    def expected(params):
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(stack)(params, x)))

    mine, theirs = jax.grad(gradient_size)(params), jax.grad(expected)(params)
    assert max_difference(mine, theirs) < 1e-5


def test_argnums_aux_and_keywords_are_those_of_jax():
    def loss(a, b, *, scale):
        return scale * jnp.sum(a["x"] * b), {"twice": 2 * b, "label": "text"}

    a, b = {"x": jnp.arange(3.0)}, jnp.ones(3)
    (value, aux, flow), grads = jg.value_and_grad_flow(loss, argnums=(0, 1), has_aux=True)(
        a, b, scale=2.0
    )
    assert value == 6 and aux["label"] == "text"
    np.testing.assert_array_equal(aux["twice"], 2 * b)
    np.testing.assert_array_equal(grads[0]["x"], 2 * b)
    np.testing.assert_array_equal(grads[1], 2 * jnp.arange(3.0))
    (_, _), last = jg.value_and_grad_flow(lambda a, b: jnp.sum(a * b), argnums=-1)(b, b)
    np.testing.assert_array_equal(last, b)
    assert flow.parameter_names == ("a/x", "b")


def test_leaves_without_a_gradient_come_back_as_none():
    params = {
        "w": jnp.ones(2),
        "steps": jnp.array(3),
        "name": "layer",
        "act": jnp.tanh,
        "none": None,
    }

    def loss(params, x):
        return jnp.sum(params["act"](params["w"] * x)) * params["steps"]

    (_, flow), grads = jg.value_and_grad_flow(loss)(params, jnp.ones(2))
    assert grads["steps"] is None and grads["name"] is None and grads["act"] is None
    assert flow.parameter_names == ("w",)
    np.testing.assert_allclose(grads["w"], 3 * (1 - np.tanh(1.0) ** 2) * np.ones(2), rtol=1e-6)


def test_python_floats_are_parameters_as_in_jax():
    (value, _), grad = jg.value_and_grad_flow(lambda p: p**2)(3.0)
    assert value == 9 and grad == 6


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, jaxgrad as jg
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
rng = np.random.default_rng(0)
params = {k: jnp.asarray(rng.standard_normal((8, 8)), jnp.float32) for k in ("a", "b")}
x = jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)
loss = lambda p, x: jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"]) ** 2)
(_, one), grads = jax.jit(jg.value_and_grad_flow(loss))(params, x)
sharded = {"a": place(params["a"], None, "data"), "b": place(params["b"], "data", None)}
(_, four), spread = jax.jit(jg.value_and_grad_flow(loss))(sharded, place(x, "data"))
_, plain = jax.jit(jax.value_and_grad(loss))(sharded, place(x, "data"))
for k in ("a", "b"):
    np.testing.assert_allclose(spread[k], grads[k], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(spread[k], plain[k])
    assert len(spread[k].sharding.device_set) == 4
np.testing.assert_allclose(four.gradient_rms, one.gradient_rms, rtol=1e-5)
np.testing.assert_allclose(four.activation_max, one.activation_max, rtol=1e-5)
"""


def test_sharded_parameters_give_the_same_flow_and_keep_their_sharding():
    flags = "--xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_an_eager_call_equals_jaxs_eager_call():
    params, x = stacked()
    (value, _), grads = jg.value_and_grad_flow(stack)(params, x)
    expected_value, expected = jax.value_and_grad(stack)(params, x)
    assert value == expected_value and max_difference(grads, expected) == 0


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="first")(x)
        for k in range(2):
            x = x + nn.Dense(6, name=f"block{k}")(nn.LayerNorm(name=f"norm{k}")(nn.relu(x)))
        return nn.Dense(3, name="logits")(x)


def test_the_last_layers_row_is_the_gradient_at_the_logits():
    net, x = Net(), jnp.linspace(-1, 1, 8).reshape(2, 4)
    params = net.init(jax.random.key(0), x)

    def loss(params, x):
        logits = net.apply(params, x)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

    (_, flow), _ = jax.jit(jg.value_and_grad_flow(loss))(params, x)
    assert flow.names == ("first", "norm0", "block0", "norm1", "block1", "logits")
    p = jax.nn.softmax(net.apply(params, x))
    expected = (p - jnp.eye(3)[0]) / 2
    np.testing.assert_allclose(flow.gradient_rms[-1], np.sqrt(np.mean(expected**2)), rtol=1e-5)
    rows = flow.to_rows()
    assert [p["name"] for p in rows[0]["parameters"]] == [
        "params/first/bias",
        "params/first/kernel",
    ]
    assert flow.uncovered == ()


class TestErrors:
    def test_a_vector_is_no_loss(self):
        with pytest.raises(TypeError, match=r"real scalar, got float32\[3\].*\.mean\(\)"):
            jg.value_and_grad_flow(lambda p: p)(jnp.ones(3))

    def test_a_pair_needs_has_aux(self):
        with pytest.raises(TypeError, match="has_aux=True"):
            jg.value_and_grad_flow(lambda p: (jnp.sum(p), 1))(jnp.ones(3))

    def test_aux_needs_a_pair(self):
        with pytest.raises(TypeError, match=r"\(value, aux\)"):
            jg.value_and_grad_flow(lambda p: jnp.sum(p), has_aux=True)(jnp.ones(3))

    def test_nothing_to_differentiate(self):
        with pytest.raises(TypeError, match="argument 'params' has no floating-point array"):
            jg.value_and_grad_flow(lambda params: 1.0)({"n": jnp.arange(3)})
        with pytest.raises(TypeError, match="the tree is empty"):
            jg.value_and_grad_flow(lambda params: 1.0)({})

    def test_argnums_out_of_range(self):
        with pytest.raises(TypeError, match="at least 2 positional"):
            jg.value_and_grad_flow(lambda p: jnp.sum(p), argnums=1)(jnp.ones(3))

    def test_batched_rows(self):
        flows = jax.vmap(lambda p: jg.value_and_grad_flow(lambda p: jnp.sum(jnp.sin(p)))(p)[0][1])
        with pytest.raises(ValueError, match="select one"):
            flows(jnp.ones((2, 3))).to_rows()

    def test_an_empty_name(self):
        with pytest.raises(TypeError, match="non-empty string"):
            jg.tap(jnp.ones(2), "")


def two_layers():
    params, x = {"enc": {"w": jnp.ones((2, 3))}, "dec": {"w": jnp.ones((3, 1))}}, jnp.ones((4, 2))
    return params, x, lambda p, x: jnp.mean((jnp.tanh(x @ p["enc"]["w"]) @ p["dec"]["w"]) ** 2)


@pytest.mark.parametrize("norm", [optax.global_norm, lambda p: optax.global_norm(p) ** 2 / 2])
def test_a_penalty_on_the_weights_is_no_layer(norm):
    params, x, data_loss = two_layers()
    (_, flow), grads = jg.value_and_grad_flow(lambda p, x: data_loss(p, x) + 0.1 * norm(p))(
        params, x
    )
    assert flow.names == ("enc", "dec") and flow.uncovered == ()
    expected = jax.grad(lambda p: data_loss(p, x) + 0.1 * norm(p))(params)
    assert max_difference(grads, expected) == 0


def test_a_parameter_that_only_a_penalty_uses_is_uncovered_but_not_unused():
    params, x, data_loss = two_layers()
    params |= {"extra": jnp.ones(3), "idle": jnp.ones(3)}
    (_, flow), _ = jg.value_and_grad_flow(
        jax.jit(lambda p, x: data_loss(p, x) + jnp.sum(p["extra"] ** 2))
    )(params, x)
    assert flow.uncovered == ("extra", "idle (unused)")


def test_a_key_or_a_step_counter_among_the_parameters_is_no_layer():
    params, x, data_loss = two_layers()
    params |= {"key": jax.random.key(0), "step": jnp.array(3)}

    def loss(p, x):
        noise = jax.random.normal(p["key"], x.shape)
        return data_loss(p, x + noise) * p["step"]

    (_, flow), _ = jg.value_and_grad_flow(loss)(params, x)
    assert flow.names == ("enc", "dec")


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_running_averages_in_aux_are_no_rows(wrap):
    net, x = Normalized(), jnp.linspace(-1, 1, 8).reshape(4, 2)
    variables = net.init(jax.random.key(0), x)
    stats = {"batch_stats": variables["batch_stats"]}

    @wrap
    def loss(params, x):
        y, updates = net.apply({"params": params} | stats, x, mutable=["batch_stats"])
        return jnp.mean(y**2), updates

    (_, _, flow), _ = jg.value_and_grad_flow(loss, has_aux=True)(variables["params"], x)
    assert flow.names == ("Dense_1", "BatchNorm_0", "Dense_0")
    assert np.all(flow.gradient_reached == 1)


@pytest.mark.parametrize("transform", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_a_scanned_layer_is_one_row_an_iteration_with_and_without_remat(transform):
    block = transform(lambda h, w: (jnp.tanh(h @ w), None))
    (_, flow), _ = jg.value_and_grad_flow(lambda p, x: jax.lax.scan(block, x, p)[0].sum())(
        jnp.ones((2, 3, 3)), jnp.ones(3)
    )
    assert flow.names == ("p[0]", "p[1]")


def test_what_a_branch_returns_comes_after_what_is_inside_it():
    def loss(p, x):
        h = jax.lax.cond(x[0] > 0, lambda: jg.tap(x * p, "inside"), lambda: x)
        return jnp.sum(jg.tap(jnp.sin(h), "after"))

    def scanned(p, x):
        def step(h, _):
            return jax.lax.cond(h[0] > 0, lambda h: jg.tap(h * p, "inside"), lambda h: h, h), None

        return jnp.sum(jax.lax.scan(step, x, None, length=2)[0])

    (_, flow), _ = jg.value_and_grad_flow(loss)(jnp.ones(2), jnp.ones(2))
    assert flow.names.index("inside") < flow.names.index("after")
    (_, flow), _ = jg.value_and_grad_flow(scanned)(jnp.ones(2), jnp.ones(2))
    inside = [k for k, name in enumerate(flow.names) if "inside" in name]
    assert inside == [0, 2] and len(flow.names) == 4, flow.names


def test_python_scalars_in_aux_come_back_as_they_were():
    def loss(p):
        return jnp.sum(p), {"count": 3, "rate": 0.5, "done": True}

    (_, aux, _), _ = jg.value_and_grad_flow(loss, has_aux=True)(jnp.ones(2))
    assert aux == {"count": 3, "rate": 0.5, "done": True}
    assert {k: type(v) for k, v in aux.items()} == {"count": int, "rate": float, "done": bool}


def test_haikus_moving_averages_in_state_are_no_rows():
    def forward(x):
        x = hk.Linear(3, name="first")(x)
        return hk.Linear(2, name="last")(hk.BatchNorm(True, True, 0.9, name="norm")(x, True))

    model, x = hk.transform_with_state(forward), jnp.linspace(-1, 1, 8).reshape(4, 2)
    params, state = model.init(jax.random.key(0), x)

    def loss(params, state, x):
        y, state = model.apply(params, state, None, x)
        return jnp.mean(y**2), state

    (_, _, flow), _ = jg.value_and_grad_flow(loss, has_aux=True)(params, state, x)
    assert flow.names == ("first", "norm", "last")
