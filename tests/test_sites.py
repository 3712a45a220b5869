"""Which rows a Flow has, and what they are called: activations of the forward pass, layer by layer.

The functions here are traced only, unless a test compares numbers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import jaxgrad as jg
from jaxgrad.graph import capture, following, ir, names, paths, roles, sites, visits


def normal(*shape):
    seed = sum((k + 1) * n for k, n in enumerate(shape))
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / 2, jnp.float32)


def flow_of(loss, *args, **options):
    """The Flow of a loss, traced only: its names are known, its numbers are not."""
    return jax.eval_shape(lambda: jg.value_and_grad_flow(loss, **options)(*args)[0][-1])


def checked(loss, *args):
    """The Flow of a loss whose gradients are those of JAX."""
    (value, flow), grads = jax.jit(jg.value_and_grad_flow(loss))(*args)
    expected_value, expected = jax.jit(jax.value_and_grad(loss))(*args)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    for mine, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        scale = float(np.max(np.abs(theirs)))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6 * scale)
    return flow


def rms(x):
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))


P = {"l1": {"w": normal(3, 4), "b": normal(4)}, "l2": {"w": normal(4, 1), "b": normal(1)}}
X, Y = normal(5, 3), normal(5, 1)
LEAVES = (("l1/b", "l1/w"), ("l2/b", "l2/w"))


def hidden(p, x):
    return x @ p["l1"]["w"] + p["l1"]["b"]


def mlp(p, x):
    return jnp.tanh(hidden(p, x)) @ p["l2"]["w"] + p["l2"]["b"]


def error(p, x, y):
    return jnp.mean((mlp(p, x) - y) ** 2)


# ------------------------------------------------------------------- losses that differentiate


def one_inner_step(p, x, y):
    return jax.tree.map(lambda a, g: a - 0.1 * g, p, jax.grad(error)(p, x, y))


def clipped_inner_step(p, x, y):
    g = jax.grad(error)(p, x, y)
    size = jnp.sqrt(sum(jnp.sum(a**2) for a in jax.tree.leaves(g)))
    return jax.tree.map(lambda a, g: a - 0.1 * g * jnp.minimum(1, 1 / size), p, g)


def scanned_inner_steps(p, x, y):
    return jax.lax.scan(lambda q, _: (one_inner_step(q, x, y), None), p, None, length=3)[0]


def scanned_momentum(p, x, y):
    def step(state, _):
        q, m = state
        m = jax.tree.map(lambda m, g: 0.9 * m + g, m, jax.grad(error)(q, x, y))
        return (jax.tree.map(lambda a, m: a - 0.1 * m, q, m), m), None

    return jax.lax.scan(step, (p, jax.tree.map(jnp.zeros_like, p)), None, length=2)[0][0]


@pytest.mark.parametrize(
    "adapt",
    [one_inner_step, clipped_inner_step, scanned_inner_steps, scanned_momentum],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
def test_updated_parameters_and_inner_gradients_are_no_rows(adapt, wrap):
    flow = flow_of(lambda p, x, y: error(wrap(adapt)(p, x, y), x + 1, y), P, X, Y)
    assert flow.names == ("l1", "l2")
    assert flow.site_parameters == LEAVES and flow.uncovered == ()


def test_the_rows_of_an_inner_training_step_are_the_outer_forward_pass():
    def loss(p, x, y):
        return error(one_inner_step(p, x, y), x + 1, y)

    flow = checked(loss, P, X, Y)
    adapted = one_inner_step(P, X, Y)
    np.testing.assert_allclose(flow.activation_rms, [rms(hidden(adapted, X + 1)),
                               rms(mlp(adapted, X + 1))], rtol=1e-5)  # fmt: skip
    at_output = 2 / 5 * (mlp(adapted, X + 1) - Y)
    np.testing.assert_allclose(flow.gradient_rms[1], rms(at_output), rtol=1e-5)


def test_inner_training_over_tasks_has_the_rows_of_one():
    def loss(p, x, y):
        tasks = jax.vmap(lambda x: error(one_inner_step(p, x, y), x + 1, y))
        return jnp.mean(tasks(jnp.stack([x, 2 * x])))

    assert flow_of(loss, P, X, Y).names == ("l1", "l2")


def test_a_learned_rate_of_an_inner_step_is_no_activation():
    def loss(p, x, y):
        g = jax.grad(error)(p["net"], x, y)
        return error(jax.tree.map(lambda a, r, g: a - r * g, p["net"], p["rate"], g), x, y)

    flow = flow_of(loss, {"net": P, "rate": jax.tree.map(jnp.ones_like, P)}, X, Y)
    assert flow.names == ("net/l1", "net/l2")
    assert all(name.startswith("rate") for name in flow.uncovered)


def test_a_gradient_penalty_adds_no_row_to_the_critics_two_passes():
    def loss(p, real, fake):
        slopes = jax.vmap(jax.grad(lambda x: mlp(p, x)[0]))(0.5 * (real + fake))
        penalty = jnp.mean((jnp.linalg.norm(slopes, axis=-1) - 1) ** 2)
        return jnp.mean(mlp(p, fake)) - jnp.mean(mlp(p, real)) + 10 * penalty

    flow = checked(loss, P, X, X + 1)
    assert flow.names == ("l1", "l2", "l1#2", "l2#2")
    assert flow.site_parameters == LEAVES * 2
    wanted = [f(P, x) for x in (X + 1, X) for f in (hidden, mlp)]
    np.testing.assert_allclose(flow.activation_rms, [rms(h) for h in wanted], rtol=1e-5)


class Critic(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="out")(nn.tanh(nn.Dense(4, name="body")(x)))


def test_scoped_modules_have_rows_of_the_forward_pass_only():
    net = Critic()
    params = jax.tree.map(
        lambda a: normal(*a.shape), jax.eval_shape(net.init, jax.random.key(0), X)
    )

    def penalized(params, x):
        slopes = jax.grad(lambda x: net.apply(params, x).sum())(x)
        return net.apply(params, x).mean() + jnp.mean(slopes**2)

    def trained(params, x):
        square = lambda q: jnp.mean(net.apply(q, x) ** 2)  # noqa: E731
        return square(jax.tree.map(lambda a, g: a - 0.1 * g, params, jax.grad(square)(params)))

    assert flow_of(penalized, params, X).names == ("body", "out")
    assert flow_of(trained, params, X).names == ("body", "out")


def u(p, x):
    return mlp(p, x)[0]


def u_xx(p, x):
    return jax.grad(lambda x: jax.grad(u, 1)(p, x)[0])(x)[0]


@pytest.mark.parametrize(
    "second",
    [u_xx, lambda p, x: jax.hessian(u, 1)(p, x)[0, 0],
     lambda p, x: jax.jvp(lambda x: jax.grad(u, 1)(p, x)[0], (x,), (jnp.eye(3)[0],))[1]],
    ids=["grad of grad", "hessian", "forward over reverse"],
)  # fmt: skip
def test_a_pinn_has_the_rows_of_its_forward_pass(second):
    def loss(p, x):
        u_t = jax.vmap(lambda x: jax.grad(u, 1)(p, x)[1])(x)
        residual = u_t - 0.1 * jax.vmap(lambda x: second(p, x))(x)
        return jnp.mean(residual**2) + jnp.mean(mlp(p, x) ** 2)

    flow = checked(loss, P, X)
    assert flow.names == ("l1", "l2") and flow.site_parameters == LEAVES
    np.testing.assert_allclose(flow.activation_rms, [rms(hidden(P, X)), rms(mlp(P, X))], rtol=1e-5)


@pytest.mark.parametrize(
    "slope",
    [lambda p, x: jax.grad(u, 1)(p, x)[0],
     lambda p, x: jax.jvp(lambda x: u(p, x), (x,), (jnp.eye(3)[0],))[1]],
    ids=["reverse", "forward"],
)  # fmt: skip
def test_a_layer_that_runs_inside_a_derivative_only_has_the_row_of_its_values(slope):
    flow = checked(lambda p, x: jnp.mean(jax.vmap(lambda x: slope(p, x))(x) ** 2), P | {}, X)
    assert flow.names == ("l1",)  # u itself, the output of l2, is not read by the loss
    np.testing.assert_allclose(flow.activation_rms, [rms(hidden(P, X))], rtol=1e-5)
    assert flow.uncovered == ("l2/b", "l2/w")


def test_a_perturbed_pass_has_the_rows_and_the_first_pass_none():
    """Sharpness-aware training of a weight-tied network whose biases lie at the root."""
    params = {"e": {"w": normal(3, 4), "b": normal(4)}, "d": normal(3)}

    def error(p, x):
        return jnp.mean((jnp.tanh(x @ p["e"]["w"] + p["e"]["b"]) @ p["e"]["w"].T + p["d"] - x) ** 2)

    def loss(p, x):
        g = jax.lax.stop_gradient(jax.grad(error)(p, x))
        return error(jax.tree.map(lambda a, b: a + 0.05 * b, p, g), x)

    flow = checked(loss, params, X)
    assert flow.names == ("e", "e#2") and np.all(flow.gradient_reached == 1)


def test_weights_of_an_inner_problem_are_no_rows():
    def loss(p, x, y):
        fit = lambda w: jnp.mean((jnp.tanh(hidden(p, x)) @ w - y) ** 2)  # noqa: E731
        step = lambda _, w: w - 0.1 * jax.grad(fit)(w)  # noqa: E731
        w = jax.lax.fori_loop(0, 5, step, jnp.zeros((4, 1)))
        return jnp.mean((jnp.tanh(hidden(p, x + 1)) @ w - y) ** 2)

    assert checked(loss, {"l1": P["l1"]}, X, Y).names == ("l1",)


def test_a_learned_initial_state_is_covered_by_the_rows_of_its_loop():
    params = {"h0": normal(4), "cell": {"w": normal(3, 4), "u": normal(4, 4)}, "idle": normal(2)}

    def loss(p, xs):
        def step(h, x):
            return jnp.tanh(x @ p["cell"]["w"] + h @ p["cell"]["u"]), None

        return jnp.sum(jax.lax.scan(step, p["h0"], xs)[0] ** 2)

    assert checked(loss, params, X).uncovered == ("idle (unused)",)


def test_a_bias_belongs_to_its_layer_however_the_derivatives_arrange_the_product():
    @jax.jit
    def u(p, x):
        return jnp.sum(jnp.tanh(p["l2"]["w"] @ jnp.tanh(p["l1"]["w"] @ x + p["l1"]["b"])))

    def loss(p, x):
        return jnp.mean(jax.vmap(lambda x: jnp.trace(jax.hessian(u, 1)(p, x)))(x) ** 2)

    params = {"l1": {"w": normal(4, 3), "b": normal(4)}, "l2": {"w": normal(2, 4)}}
    flow = checked(loss, params, X)
    assert flow.names[0] == "l1" and flow.site_parameters[0] == ("l1/b", "l1/w")
    expected = rms(X @ params["l1"]["w"].T + params["l1"]["b"])
    np.testing.assert_allclose(flow.activation_rms[0], expected, rtol=1e-5)


def test_the_state_of_a_solver_is_its_scans_row():
    def loss(p, x):
        step = lambda h, _: (h + 0.1 * (jnp.tanh(h) @ p["f"]["w"]), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(step, x, None, length=2)[0] ** 2)

    flow = flow_of(loss, {"f": {"w": normal(3, 3)}}, X)
    assert not [name for name in flow.names if "+" in name] and len(flow.names) == 2


def test_names_stay_when_the_flow_itself_is_differentiated_or_mapped():
    def size(p):
        (_, flow), grads = jg.value_and_grad_flow(error)(p, X, Y)
        assert flow.names == ("l1", "l2")
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))

    jax.eval_shape(jax.grad(size), P)
    jax.eval_shape(lambda p: jax.jvp(size, (p,), (p,)), P)
    jax.eval_shape(jax.vmap(size), jax.tree.map(lambda a: a[None], P))


# ------------------------------------------------------------------- parameters as data


PERCEIVER = {
    "latents": normal(2, 4),
    "ln": {"scale": normal(4), "bias": normal(4)},
    "q": {"w": normal(4, 4)},
    "k": {"w": normal(3, 4)},
    "v": {"w": normal(3, 4)},
    "out": {"w": normal(4, 1)},
}


def standardized(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)


def perceiver(p, x):
    latents = standardized(p["latents"]) * p["ln"]["scale"] + p["ln"]["bias"]
    q, k, v = latents @ p["q"]["w"], x @ p["k"]["w"], x @ p["v"]["w"]
    return (jax.nn.softmax(q @ k.T) @ v) @ p["out"]["w"]


def test_modules_that_run_on_parameters_alone_have_rows():
    flow = checked(lambda p, x: jnp.mean(perceiver(p, x) ** 2), PERCEIVER, X)
    assert dict(zip(flow.names, flow.site_parameters, strict=True)) == {
        "ln": ("latents", "ln/bias", "ln/scale"),
        "q": ("q/w",),
        "k": ("k/w",),
        "v": ("v/w",),
        "out": ("out/w",),
    }
    assert flow.uncovered == ()
    ln = standardized(PERCEIVER["latents"]) * PERCEIVER["ln"]["scale"] + PERCEIVER["ln"]["bias"]
    found = flow.activation_rms[flow.names.index("ln")]
    np.testing.assert_allclose(found, rms(ln), rtol=1e-5)
    chain = jg.factorize(lambda x: perceiver(PERCEIVER, x), X)
    assert chain.names == ("k+v", "out") and chain.graph.uncovered == ()


class Perceiver(nnx.Module):
    def __init__(self, rngs):
        self.latents = nnx.Param(normal(2, 4))
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.q, self.kv = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(3, 8, rngs=rngs)

    def __call__(self, x):
        q = self.q(self.norm(self.latents[...]))
        k, v = jnp.split(self.kv(x), 2, axis=-1)
        return jax.nn.softmax(q @ k.T) @ v


def test_a_layer_norm_of_learned_queries_in_nnx_has_a_row():
    graph, params = nnx.split(Perceiver(nnx.Rngs(0)))
    flow = flow_of(lambda p, x: nnx.merge(graph, p)(x).mean(), params, X)
    assert flow.names == ("norm", "q", "kv") and flow.uncovered == ()


@pytest.mark.parametrize(
    "weight",
    [lambda p: p["l"]["w"] + p["lora"]["a"] @ p["lora"]["b"],
     lambda p: p["l"]["w"] + 0.5 * (p["down"]["a"] @ p["up"]["b"]),
     lambda p: p["l"]["w"] / jnp.linalg.norm(p["l"]["w"], axis=0) * p["wn"]["scale"],
     lambda p: jax.lax.stop_gradient(p["l"]["w"]) + p["lora"]["a"] @ p["lora"]["b"]],
    ids=["lora", "lora over modules", "weight norm", "frozen"],
)  # fmt: skip
def test_a_weight_made_of_several_parameters_is_a_weight(weight):
    pair = {"a": normal(3, 2), "b": normal(2, 4)}
    params = {"l": {"w": normal(3, 4)}, "lora": pair, "wn": {"scale": normal(4)}}
    params |= {"down": {"a": pair["a"]}, "up": {"b": pair["b"]}}
    flow = flow_of(lambda p, x: jnp.mean(jnp.tanh(x @ weight(p))), params, X)
    assert len(flow.names) == 1


# ------------------------------------------------------------------- residual sums


def bernoulli(h):
    return jax.random.bernoulli(jax.random.key(1), 0.9, h.shape)


DROPOUTS = {
    "where": lambda h: jnp.where(bernoulli(h), h / 0.9, 0.0),
    "select": lambda h: jax.lax.select(bernoulli(h), h / 0.9, jnp.zeros_like(h)),
    "mask": lambda h: bernoulli(h) * h / 0.9,
    "cast": lambda h: h.astype(jnp.bfloat16).astype(jnp.float32),
    "half": lambda h: 0.5 * h,
    "none": lambda h: h,
}


@pytest.mark.parametrize("drop", DROPOUTS)
def test_a_residual_sum_is_a_row_also_after_a_dropout(drop):
    def loss(p, x):
        for block in p["blocks"]:
            h = standardized(x) * block["norm"]["scale"]
            x = x + DROPOUTS[drop](jnp.tanh(h @ block["up"]["w"]) @ block["down"]["w"])
        return jnp.mean(x @ p["head"])

    block = {"norm": {"scale": normal(3)}, "up": {"w": normal(3, 6)}, "down": {"w": normal(6, 3)}}
    flow = flow_of(loss, {"blocks": [block, block], "head": normal(3, 1)}, X)
    parts = ("norm", "up", "down")
    expected = [f"blocks[{k}]{part}" for k in (0, 1) for part in (*[f"/{p}" for p in parts], "")]
    assert flow.names == (*expected, "head")


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.mlp = nnx.LayerNorm(3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.1)

    def __call__(self, x, rngs):
        return x + self.dropout(self.mlp(self.norm(x)), rngs=rngs)


def test_an_nnx_block_with_dropout_has_its_residual_row():
    graph, params = nnx.split(nnx.List([Block(nnx.Rngs(0)), Block(nnx.Rngs(1))]))

    def loss(params, x):
        rngs = nnx.Rngs(dropout=2)
        for block in nnx.merge(graph, params):
            x = block(x, rngs)
        return x.mean()

    expected = tuple(f"[{k}]{part}" for k in (0, 1) for part in ("/norm", "/mlp", ""))
    found = tuple(name[name.index("[") :] for name in flow_of(loss, params, X).names)
    assert found == expected


@pytest.mark.parametrize(
    "add",
    [lambda p, h: h + jax.random.normal(jax.random.key(0), h.shape),
     lambda p, h: h + jnp.exp(h[:, :1]) * 0 + jnp.ones_like(h),
     lambda p, h: h + jnp.exp(X @ p["s"]) * jax.random.normal(jax.random.key(0), h.shape)],
    ids=["noise", "constants", "reparameterization"],
)  # fmt: skip
def test_a_sum_that_closes_no_branch_is_no_row(add):
    params = {"w": normal(3, 4), "s": normal(3, 4), "v": normal(4, 1)}
    flow = flow_of(lambda p, x: jnp.mean(add(p, x @ p["w"]) @ p["v"]), params, X)
    assert not [name for name in flow.names if "+" in name]


def test_a_blocks_own_leaf_is_a_part_of_it_and_the_residual_sum_is_the_block():
    def loss(p, x):
        for b in p["blocks"]:
            x = x + b["scale"] * jnp.tanh(x @ b["mlp"]["w"])
        return jnp.mean(x**2)

    block = {"mlp": {"w": normal(3, 3)}, "scale": normal(3)}
    flow = flow_of(loss, {"blocks": [block, block]}, X)
    parts = ("/mlp", "/scale", "")
    assert flow.names == tuple(f"blocks[{k}]{part}" for k in (0, 1) for part in parts)


# ------------------------------------------------------------------- what is not looked into


def test_sums_over_segments_and_updates_at_indices_are_looked_into():
    def loss(p, x):
        h = jax.ops.segment_sum(x @ p["w"], jnp.array([0, 1, 1, 0, 2]), 3)
        return jnp.mean(h.at[1].set(0) ** 2 + jax.lax.reduce(h, 0.0, jax.lax.add, (0,)))

    assert checked(loss, {"w": normal(3, 4)}, X).opaque == ()


def test_a_shard_map_is_listed_with_what_it_means():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("data")
    spread = jax.shard_map(mlp, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows)
    flow = flow_of(lambda p, x, y: jnp.mean((spread(p, x) - y) ** 2), P, X, Y)
    chain = jg.factorize(lambda x: spread(P, x), X)
    for opaque in (flow.opaque, chain.graph.opaque):
        assert len(opaque) == 1
        assert opaque[0].startswith("shard_map") and "one layer, without rows" in opaque[0]
    assert flow.uncovered == () and chain.graph.uncovered == ()


def test_a_call_to_python_without_a_derivative_is_located():
    def loss(p, x):
        h = x @ p["l1"]["w"]
        h = jax.pure_callback(np.sin, jax.ShapeDtypeStruct(h.shape, h.dtype), h)
        return jnp.mean(h @ p["l2"]["w"])

    with pytest.raises(ValueError, match=r"calls Python in or after layer 'l1' \(.*custom_jvp"):
        flow_of(loss, P, X)
    stopped = flow_of(lambda p, x: loss(P, x) + mlp(p, x).mean(), P, X)
    assert [text for text in stopped.opaque if text.startswith("pure_callback")]


# ------------------------------------------------------------------- what was not run


def branches(p, x):
    def other(x):
        return jg.tap(x * p["l1"]["w"][0, 0], "other")

    return jnp.mean(jax.lax.cond(x[0, 0] > 1e6, other, lambda x: jnp.tanh(x), mlp(p, x)))


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_a_branch_not_taken_does_not_trip_the_search_for_nans(wrap):
    run = wrap(jg.value_and_grad_flow(branches))
    with jax.debug_nans(True):
        (_, flow), _ = run(P, X)
    other = flow.names.index("other")
    for statistic in ("rms", "max", "zero_share"):
        assert getattr(flow, f"activation_{statistic}")[other] == -1
    assert flow.gradient_rms[other] == flow.gradient_max[other] == -1
    assert flow.nonfinite == 0 and flow.gradient_reached[other] == 0
    (_, plain), _ = jg.value_and_grad_flow(branches)(P, X)
    assert np.isnan(plain.activation_rms[other]) and np.isnan(plain.gradient_rms[other])


# ------------------------------------------------------------------- cost


def transformer(blocks):
    width = 8
    one = {n: normal(width, width) for n in "qkvo"} | {"up": normal(width, 16)}
    one |= {"down": normal(16, width), "g1": jnp.ones(width), "g2": jnp.ones(width)}
    params = {"blocks": [one] * blocks, "head": normal(width, 3)}

    def loss(p, x):
        for b in p["blocks"]:
            h = standardized(x) * b["g1"]
            x = x + jax.nn.softmax((h @ b["q"]) @ (h @ b["k"]).T) @ (h @ b["v"]) @ b["o"]
            x = x + jax.nn.gelu((standardized(x) * b["g2"]) @ b["up"]) @ b["down"]
        return jnp.mean((x @ p["head"]) ** 2)

    return loss, params, normal(6, width)


def test_taps_of_one_shape_are_traced_once():
    loss, params, x = transformer(blocks=6)
    traced = jax.make_jaxpr(jg.value_and_grad_flow(loss))(params, x)
    seen = {}

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            inner = [v for v in eqn.params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
            for closed in inner:
                body = getattr(closed, "jaxpr", closed)
                if eqn.params.get("name") == "_measure":
                    key = str([v.aval for v in body.invars])
                    seen.setdefault(key, set()).add(id(body))
                else:
                    walk(body)

    walk(traced.jaxpr)
    assert seen and all(len(bodies) <= 2 for bodies in seen.values())  # forward and backward


def test_the_work_of_reading_a_program_grows_as_the_program():
    """Counted, not timed: how often the planning looks at an operation's inputs."""
    counts = []
    for blocks in (4, 16):
        loss, params, x = transformer(blocks)
        counts.append(_looks_at_inputs(loss, params, x))
    assert counts[1] < 5 * counts[0]  # 4 where it is linear, 16 where it is quadratic


def _looks_at_inputs(loss, params, x):
    leaves, tree = jax.tree.flatten(params)
    traced = capture.capture(lambda *a: loss(jax.tree.unflatten(tree, a[:-1]), a[-1]), [*leaves, x])
    calls = 0

    def counted(op, original=ir.value_inputs):
        nonlocal calls
        calls += 1
        return original(op)

    modules = (following, ir, roles, sites, visits)
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "value_inputs", counted)
        parameters = {v: f"p/{k}" for k, v in enumerate(traced.block.inputs[: len(leaves)])}
        labels = names.label(traced.block, traced.table, parameters)
        _ = sites.plan_sites(traced.block, traced.table, labels)
    return calls


def test_paths_of_leaves():
    assert paths.module_of("params/block/mlp/kernel") == ("block", "mlp")
    assert paths.module_of("[0][1]") == ("[0]",) and paths.module_of("w") == ("w",)
    assert paths.common_prefix([("a", "b"), ("a", "c")]) == ("a",)
    assert paths.unique(["x", "y", "x"]) == ["x", "y", "x#2"]
