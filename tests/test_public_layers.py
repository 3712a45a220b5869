"""Layers as public code writes them: which tensor is a layer's row, and what it is called.

Every row that is claimed is compared with an oracle of its own: the model is written with hooks
`at(name, x)`, which record the tensor and add a zero to it, whose gradient JAX computes.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad as jg
from jaxgrad import flow_rows, statistics


def normal(*shape, seed=0, scale=0.5):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape) * scale)


def silent(name, x):
    del name
    return x


def rms(x):
    return np.sqrt(np.mean(np.abs(np.asarray(x)) ** 2))


def recorded(loss, params, batch):
    """Name -> (activation, gradient) of every hook, by additive zeros and `jax.grad`."""
    zeros = {}
    _ = loss(params, batch, lambda name, x: zeros.setdefault(name, jnp.zeros_like(x)) + x)

    def shifted(zeros):
        seen = {}

        def at(name, x):
            seen[name] = x
            return x + zeros[name]

        return loss(params, batch, at), seen

    grads, seen = jax.grad(shifted, has_aux=True)(zeros)
    return {name: (seen[name], grads[name]) for name in zeros}


def checked(loss, params, batch):
    """The flow, after a check of its gradients and of all rows that the loss has hooks for."""
    (value, flow), grads = jax.jit(jg.value_and_grad_flow(functools.partial(loss, at=silent)))(
        params, batch
    )
    plain = jax.jit(jax.value_and_grad(functools.partial(loss, at=silent)))
    expected, expected_grads = plain(params, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-14)
    scale = max(float(np.max(np.abs(g))) for g in jax.tree.leaves(expected_grads))
    for mine, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-13 * scale)
    for name, (activation, gradient) in recorded(loss, params, batch).items():
        k = flow.names.index(name)
        np.testing.assert_allclose(flow.activation_rms[k], rms(activation), rtol=1e-12)
        np.testing.assert_allclose(flow.gradient_rms[k], rms(gradient), rtol=1e-10)
    return flow


# ------------------------------------------------------------------- what comes together


def test_a_complex_layer_has_a_row_and_covers_its_parameters(x64):
    """A Fourier neural operator: complex weights act on the spectrum."""

    def loss(p, x, at):
        for k, block in enumerate(p["blocks"]):
            low = jnp.fft.rfft(x, axis=1)[:, :3]
            low = at(
                f"blocks[{k}]/spectral", jnp.einsum("bkc,kcd->bkd", low, block["spectral"]["w"])
            )
            full = jnp.pad(low, ((0, 0), (0, 2), (0, 0)))
            x = jnp.fft.irfft(full, n=8, axis=1) + x @ block["bypass"]["w"]
            x = jnp.tanh(at(f"blocks[{k}]/bypass+", x)) if k < 0 else jnp.tanh(x)
        return jnp.mean((x @ p["head"]) ** 2)

    block = {
        "spectral": {"w": normal(3, 2, 2) + 1j * normal(3, 2, 2, seed=1)},
        "bypass": {"w": normal(2, 2)},
    }
    flow = checked(loss, {"blocks": [block, block], "head": normal(2, 1)}, normal(3, 8, 2))
    assert flow.uncovered == ()
    parts = ("spectral", "bypass")
    assert flow.names == (*[f"blocks[{k}]/{part}" for k in (0, 1) for part in parts], "head")


def test_gates_of_one_projection_close_a_residual_branch(x64):
    def loss(p, x, at):
        for k, block in enumerate(p["blocks"]):
            a, b = jnp.split(at(f"blocks[{k}]/glu", x @ block["glu"]["w"]), 2, -1)
            x = at(f"blocks[{k}]", x + a * jax.nn.sigmoid(b))
        return jnp.mean(x**2)

    block = {"glu": {"w": normal(3, 6)}}
    flow = checked(loss, {"blocks": [block, block]}, normal(4, 3))
    assert flow.names == ("blocks[0]/glu", "blocks[0]", "blocks[1]/glu", "blocks[1]")


def test_a_branch_that_changes_its_shape_is_still_closed_by_its_sum(x64):
    """Convolutions of one example: a batch axis is added and taken away."""

    def loss(p, x, at):
        for k, w in enumerate(p["convs"]):
            y = jax.lax.conv_general_dilated(
                x[None], w, (1,), [(1, 0)], dimension_numbers=("NWC", "WIO", "NWC")
            )
            x = at(f"convs[{k}]+", x + y[0])
        return jnp.mean(x**2)

    flow = checked(loss, {"convs": [normal(2, 3, 3), normal(2, 3, 3, seed=1)]}, normal(5, 3))
    assert flow.names == ("convs[0]", "convs[0]+", "convs[1]", "convs[1]+")


def test_the_output_of_a_graph_attention_is_what_its_weights_weigh(x64):
    send, receive = jnp.array([0, 1, 2, 3, 0, 2]), jnp.array([1, 2, 3, 0, 2, 0])

    def loss(p, x, at):
        for k, layer in enumerate(p["gat"]):
            z = x @ layer["w"]
            scores = jnp.exp(jax.nn.leaky_relu((z @ layer["a"])[send] + (z @ layer["b"])[receive]))
            total = jax.ops.segment_sum(scores, receive, num_segments=4)
            messages = at(f"gat[{k}]", (scores / total[receive])[:, None] * z[send])
            x = jnp.tanh(jax.ops.segment_sum(messages, receive, num_segments=4))
        return jnp.mean((x @ p["out"]) ** 2)

    layer = {"w": normal(3, 3), "a": normal(3), "b": normal(3, seed=1)}
    flow = checked(loss, {"gat": [layer, layer], "out": normal(3, 1)}, normal(4, 3))
    assert flow.names == ("gat[0]", "gat[1]", "out")


def test_a_mixture_of_experts_with_a_balance_loss_is_one_output(x64):
    """The gates weigh the experts' results after the last weight; the penalty is beside them."""

    def loss(p, x, at):
        gates = jax.nn.softmax(x @ p["moe"]["router"])
        hidden = jnp.tanh(jnp.einsum("td,edf->etf", x, p["moe"]["up"]))
        experts = jnp.einsum("etf,efd->etd", hidden, p["moe"]["down"])
        balance = jnp.sum(gates.mean(0) ** 2)
        y = at("moe", jnp.einsum("te,etd->td", gates, experts))
        return jnp.mean((at("moe+", x + y) @ p["head"]) ** 2) + 0.1 * balance

    moe = {"router": normal(3, 2), "up": normal(2, 3, 4), "down": normal(2, 4, 3)}
    flow = checked(loss, {"moe": moe, "head": normal(3, 1)}, normal(5, 3))
    assert flow.names == ("moe", "moe+", "head")


def test_an_associative_scan_of_a_complex_state_is_one_run_of_its_layer(x64):
    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    def loss(p, x, at):
        q = p["lru"]
        decay = jnp.exp(-jnp.exp(q["nu"]) + 1j * q["theta"])
        inputs = x @ (q["b"] + 0j)
        decays = jnp.repeat(decay[None], len(x), 0)
        _, states = jax.lax.associative_scan(combine, (decays, inputs))
        y = at("lru", (states @ (q["c"] + 0j)).real + x * q["d"])
        return jnp.mean((jnp.tanh(y) @ p["head"]) ** 2)

    lru = {"nu": normal(4), "theta": normal(4, seed=1), "b": normal(3, 4), "c": normal(4, 3)}
    params = {"lru": lru | {"d": normal(3)}, "head": normal(3, 2)}
    flow = checked(loss, params, normal(6, 3))
    assert flow.names == ("lru", "head") and flow.uncovered == ()


def test_steps_of_a_recurrence_stay_apart_though_a_readout_follows(x64):
    def loss(p, x, at):
        h = jnp.zeros(3)
        for k in range(3):
            h = at("rnn" if not k else f"rnn#{k + 1}", x[k] @ p["rnn"]["wi"] + h @ p["rnn"]["wh"])
            h = jnp.tanh(h)
        return jnp.sum((h @ p["rnn"]["out"]) ** 2)

    params = {"rnn": {"wi": normal(2, 3), "wh": normal(3, 3), "out": normal(3, 2)}}
    flow = checked(lambda p, x, at: loss(p, x, silent), params, normal(3, 2))
    assert len(flow.names) == 3


@jax.custom_vjp
def solved(w, x):
    return jnp.tanh(x @ w), jnp.float64(0.5), jnp.sum(x, -1)


_ = solved.defvjp(
    lambda w, x: (solved(w, x), (w, x)),
    lambda kept, g: jax.vjp(lambda w, x: jnp.tanh(x @ w), *kept)[1](g[0]),
)


def test_an_opaque_layer_with_several_results_has_a_row_of_the_tensor_alone(x64):
    """A solver returns where it ended in time too; a blockwise attention its sums."""

    def loss(p, x, at):
        y, time, sums = solved(p["solver"]["w"], x)
        return jnp.mean((at("solver", y) @ p["head"] + time + sums[:, None]) ** 2)

    flow = checked(loss, {"solver": {"w": normal(3, 3)}, "head": normal(3, 2)}, normal(4, 3))
    assert flow.names == ("solver", "head")
    assert "custom_vjp" in flow.opaque[0] and "solver" in flow.opaque[0]


def test_a_loop_that_carries_counters_beside_its_state_has_rows_of_the_state(x64):
    """A solver carries the time and the step's size, a blockwise softmax its maxima."""

    def loss(p, x, at):
        del at

        def step(carry, _):
            h, time, size = carry
            h = h + size * jnp.tanh(h @ p["field"]["w"] + time)
            return (h, time + size, size * p["shrink"]), None

        h, time, _ = jax.lax.scan(step, (x, jnp.zeros(()), jnp.ones(())), None, length=3)[0]
        return jnp.mean((h @ p["head"] + time) ** 2)

    params = {"field": {"w": normal(3, 3)}, "shrink": jnp.float64(0.5), "head": normal(3, 2)}
    flow = checked(loss, params, normal(4, 3))
    assert [name for name in flow.names if "carry" in name] == []
    assert sum("field" in name or "scan" in name for name in flow.names) == 6


def test_a_constant_is_no_row_unless_the_user_named_it(x64):
    """An initial state of zeros, returned by a module that names its scope."""

    def loss(p, x):
        with jax.named_scope("initial_state"):
            h = jnp.zeros(3)
        with jax.named_scope("cell"):
            h = jnp.tanh(x @ p["w"] + jg.tap(jnp.ones(3), "one") + h)
        return jnp.sum(h**2)

    (_, flow), _ = jg.value_and_grad_flow(loss)({"w": normal(2, 3)}, normal(2))
    assert sorted(flow.names) == ["cell", "one"]
    assert flow.activation_rms[flow.names.index("one")] == 1


# ------------------------------------------------------------------- names


def test_a_scan_without_parameters_is_named_by_the_layer_around_it(x64):
    """A selective state space: what the scan mixes was projected before."""

    def loss(p, x, at):
        del at
        for block in p["blocks"]:
            a, b = jnp.split(x @ block["mixer"]["up"], 2, -1)

            def step(h, entry):
                h = jnp.tanh(entry[0]) * h + entry[1]
                return h, h

            _, y = jax.lax.scan(step, jnp.zeros(3), (a, b))
            x = x + y @ block["mixer"]["down"]
        return jnp.mean(x**2)

    block = {"mixer": {"up": normal(3, 6), "down": normal(3, 3)}}
    flow = checked(loss, {"blocks": [block, block]}, normal(2, 3))
    steps = [name for name in flow.names if "scan" in name]
    assert steps == [f"blocks[{k}]/mixer/scan[{t}]" for k in (0, 1) for t in (0, 1)]


def test_a_scan_that_is_one_layer_is_named_by_all_that_is_in_it(x64):
    params = {"cell": normal(3, 3), "mix": normal(3, 3, seed=1), "head": normal(3, 2)}

    def f(x):
        def step(h, entry):
            h = jnp.tanh(h @ params["cell"] + entry)
            return h @ params["mix"], h @ params["head"]

        return jax.lax.scan(step, jnp.zeros(3), x)[1]

    assert jg.factorize(f, normal(4, 3)).names == ("cell+mix+head",)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.SpectralNorm(nn.Dense(4))(x, update_stats=True)
        return nn.Dense(1)(jnp.tanh(x))


def test_the_running_state_of_a_norm_is_no_row_though_the_loss_depends_on_it(x64):
    """Power iteration: the state is used, updated and reported."""
    net, x = Normed(), normal(5, 3)
    variables = jax.tree.map(lambda a: jnp.asarray(a, float), net.init(jax.random.key(0), x))
    state = {"batch_stats": variables["batch_stats"]}

    def loss(params, x):
        y, new = net.apply({"params": params} | state, x, mutable=["batch_stats"])
        return jnp.mean(y**2), new

    (_, _, flow), _ = jg.value_and_grad_flow(loss, has_aux=True)(variables["params"], x)
    assert [name.split("/")[0].partition("_")[0] for name in flow.names] == [
        "SpectralNorm",
        "Dense",
    ]
    assert flow.uncovered == ()


# ------------------------------------------------------------------- nested loops


@pytest.mark.parametrize("taken", [True, False])
def test_loops_that_run_a_layer_very_often_share_rows_which_hold_all_of_their_tensors(taken, x64):
    """A solver's attempts within steps, and layers around them: layers keep rows of their own."""
    steps, attempts, layers = 70, 2, 2

    def loss(p, x, at):
        def layer(x, w):
            def step(x, n):
                def attempt(x, _):
                    moved = jnp.sin(x @ w)
                    return x + 0.1 * moved, moved

                def many(x):
                    return jax.lax.scan(attempt, x, None, length=attempts)[0]

                return jax.lax.cond(n % 2 == 0, many, lambda x: x, x) if not taken else many(
                    x
                ), None

            return jax.lax.scan(step, x, jnp.arange(steps))[0], None

        del at
        return jnp.sum(jax.lax.scan(layer, x, p["w"])[0] ** 2)

    params, x = {"w": normal(layers, 3, 3)}, normal(3)
    flow = checked(loss, params, x)
    rows = [k for k, name in enumerate(flow.names) if name in ("w[0]", "w[1]")]
    assert len(flow.names) <= 128 * 3 and len(rows) == layers
    shares = f"{steps} x {attempts} iterations"
    assert any(note.startswith("w:") and shares in note for note in flow.summarized)

    ran = np.array([[taken or n % 2 == 0] * attempts for n in range(steps)]).ravel()
    layer, at = np.repeat(np.arange(layers), len(ran)), np.tile(ran, layers)

    def in_one_loop(zeros):
        def step(h, entry):
            zero, k, runs = entry
            moved = h + 0.1 * jnp.sin(h @ params["w"][k]) + zero
            return jnp.where(runs, moved, h), moved

        h, seen = jax.lax.scan(step, x, (zeros, layer, at))
        return jnp.sum(h**2), seen

    grads, seen = jax.grad(in_one_loop, has_aux=True)(jnp.zeros((len(layer), 3)))
    for k, row in enumerate(rows):
        mine, gradient = seen[(layer == k) & at], grads[(layer == k) & at]
        np.testing.assert_allclose(flow.activation_rms[row], rms(mine), rtol=1e-12)
        np.testing.assert_allclose(flow.activation_mean[row], np.mean(mine), rtol=1e-10)
        np.testing.assert_allclose(flow.activation_max[row], np.max(np.abs(mine)), rtol=1e-12)
        np.testing.assert_allclose(flow.gradient_rms[row], rms(gradient), rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("odd", ["plain", "nan", "inf", "zero"])
def test_sums_of_parts_are_the_sums_of_the_whole(scale, odd):
    """At extended range in float32, parts that were not measured left out."""
    parts = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    parts *= np.float32(scale) * np.array([[1], [1e-6], [0 if odd == "zero" else 1e3], [1]], "f")
    if odd in ("nan", "inf"):
        parts[1, 2] = float(odd)
    for names in (statistics.ACTIVATION, statistics.GRADIENT):
        table = jnp.stack([statistics.sums(jnp.asarray(part), names) for part in parts])
        table = jnp.concatenate([table, jnp.zeros_like(table[:1])])[None]
        whole, count = flow_rows.together(table, names)
        assert count[0] == 4
        mine = statistics.from_table(whole, parts.size, names)
        direct = statistics.from_table(
            statistics.sums(jnp.asarray(parts), names)[None], parts.size, names
        )
        found = [
            statistics.rms,
            statistics.max_abs,
            statistics.zero_share,
            statistics.nonfinite_count,
        ]
        found += [statistics.mean] if names == statistics.ACTIVATION else [statistics.below_float16]
        for statistic in found:
            np.testing.assert_allclose(statistic(mine), statistic(direct), rtol=2e-6, atol=0)


# ------------------------------------------------------------------- rules that are missing


def test_an_operation_without_a_rule_for_batches_has_its_jacobian_column_by_column(x64):
    """`ragged_dot`: tokens sorted by expert; its derivative cannot be mapped over every axis."""
    w, order, sizes = normal(2, 3, 3), jnp.array([2, 0, 1, 3]), jnp.array([1, 3], jnp.int32)

    def f(x):
        y = jax.lax.ragged_dot(jnp.tanh(x)[order], w, sizes)
        return jnp.zeros_like(y).at[order].set(y)

    x = normal(4, 3)
    chain = jg.factorize(f, x)
    _, push = jax.linearize(f, x)
    expected = np.stack([push(e.reshape(4, 3)).ravel() for e in jnp.eye(12)], -1)
    product = jg.jacobian_product(chain, x).to_dense()
    np.testing.assert_allclose(product, expected, rtol=0, atol=1e-14)
