"""The layouts of a batch in a chain; rules of the user's own; probes; models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME, CASES
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from reference_batching import W, assert_independent, of_shape, read

from jaxgrad.graph import batching


def while_inside(x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1] @ W)), (0, x))[1]


# -------------------------------------------------------------------------- rules of the user's own


def vjp_pair(backward):
    @jax.custom_vjp
    def f(x):
        return jnp.sin(x)

    f.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (backward(x, g),))
    return f


def test_a_custom_backward_pass_that_keeps_examples_apart_is_proved():
    assert_independent(lambda x: vjp_pair(lambda x, g: g / (1 + jnp.abs(g)))(x) @ W, of_shape(3, 4))


def test_a_custom_backward_pass_that_normalizes_over_the_batch_is_coupled():
    f = vjp_pair(lambda x, g: g - g.mean(0))
    with pytest.raises(ValueError, match=r"`custom_vjp_call`.*derivative rule mixes|`reduce_sum`"):
        read(lambda x: f(x) @ W, of_shape(3, 4))


def test_a_custom_jvp_that_mixes_tangents_is_coupled():
    @jax.custom_jvp
    def f(x):
        return jnp.sin(x)

    f.defjvp(lambda primals, tangents: (jnp.sin(primals[0]), tangents[0].sum(0) * primals[0]))
    with pytest.raises(ValueError, match="derivative rule mixes"):
        read(f, of_shape(3, 4))


@pytest.mark.parametrize("apart", [True, False])
def test_a_backward_pass_that_no_rule_follows_is_probed(apart):
    def call(x):
        function = (lambda v: v) if apart else (lambda v: v - v.mean(0))
        return jax.pure_callback(function, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    f = vjp_pair(lambda x, g: call(g) * jnp.cos(x))
    if apart:
        assert read(lambda x: f(x) @ W, of_shape(3, 4))[2] == "probed"
        return
    with pytest.raises(ValueError, match=r"derivative rule mixes the examples \(probed\)"):
        read(lambda x: f(x) @ W, of_shape(3, 4))


def test_a_coupling_that_needs_several_iterations_to_reach_the_output_is_seen():
    def f(x):
        def step(carry, _):
            h, memory = carry
            return (h + memory + x, jnp.cumsum(jnp.sin(h), 0)), None

        return lax.scan(step, (x, jnp.zeros_like(W[:3])), None, length=3)[0][0]

    with pytest.raises(ValueError, match="coupled by `cumsum`"):
        read(f, of_shape(3, 4))


# ----------------------------------------------------------------------- where there is no rule


def unknown(name, fun):
    """A primitive that jaxgrad has never heard of."""
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape, x.dtype))
    mlir.register_lowering(primitive, mlir.lower_fun(fun, multiple_results=False))
    return primitive.bind


def test_an_unknown_primitive_is_probed_and_found_independent():
    apart = unknown("unheard_of", lambda x: x - x.max(-1, keepdims=True))
    before, after, verdict, _ = read(lambda x: jnp.tanh(apart(x @ W).T), of_shape(3, 4))
    assert verdict == "probed"
    assert (before.strides, after.strides) == ((4,), (1,))


@pytest.mark.parametrize("mix", [lambda x: x + 1e-3 * x.mean(0), lambda x: jnp.roll(x, 1, 0)])
def test_an_unknown_primitive_that_mixes_examples_is_caught(mix):
    bind = unknown("unheard_of", mix)
    with pytest.raises(ValueError, match=r"coupled by `unheard_of`.*\(probed\)"):
        read(lambda x: jnp.tanh(bind(x)), of_shape(3, 4))


def test_a_callback_is_probed_at_the_values_that_reach_it():
    def log(x):
        assert np.all(x > 0), "a random input of the probe left the function's domain"
        return np.log(x)

    def f(x):
        y = jnp.exp(x @ W)
        return jax.pure_callback(log, jax.ShapeDtypeStruct(y.shape, y.dtype), y).sum(-1)

    with pytest.raises(Exception, match="domain"):  # shifted numbers leave it: the probe is honest
        read(f, of_shape(3, 4))


def test_examples_numbered_by_hand_are_probed():
    def f(x):
        return jnp.tanh(x)[jnp.arange(3), jnp.array([1, 0, 2])]

    assert_independent(f, of_shape(3, 4), verdict="probed")
    with pytest.raises(ValueError, match="coupled by `gather`"):
        read(lambda x: x[jnp.array([1, 0, 2]), jnp.arange(3)], of_shape(3, 4))


def test_a_loop_over_the_batch_is_probed():
    assert_independent(
        lambda x: lax.map(lambda v: jnp.tanh(v @ W), x), of_shape(3, 4), verdict="probed"
    )
    with pytest.raises(ValueError, match="coupled by `scan`"):
        read(
            lambda x: lax.scan(lambda c, v: (c + v, jnp.sin(c)), jnp.zeros(4), x)[1], of_shape(3, 4)
        )


def test_a_while_loop_is_followed_whatever_decides_how_long_it_runs():
    before, after, verdict, _ = read(while_inside, of_shape(3, 4))
    assert verdict == "proved"
    assert (before.strides, after.strides) == ((4,), (4,))


# ------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("shape", [(3, 5, 4), (5, 3, 4), (5, 4, 3), (3,)])
def test_examples_come_out_row_major_and_go_back(shape):
    axis = shape.index(3)
    stride = int(np.prod(shape[axis + 1 :]))
    layout = batching.Layout((shape,), (stride,), (np.dtype(np.float16),), 3)
    x = of_shape(*shape).astype(jnp.float16)
    rows = layout.to_examples((x,))
    assert np.array_equal(rows, np.moveaxis(np.asarray(x), axis, 0).reshape(3, -1))
    assert rows.shape == (3, layout.size)
    (back,) = layout.from_examples(rows.astype(jnp.float32))
    assert back.dtype == jnp.float16 and np.array_equal(back, x)


def test_several_arrays_stand_in_a_row_and_the_first_axis_costs_a_reshape_only():
    several = batching.Layout(((3, 2), (5, 3)), (2, 1), (np.dtype("f4"),) * 2, 3)
    state = (of_shape(3, 2), of_shape(5, 3, seed=1))
    rows = several.to_examples(state)
    assert np.array_equal(rows, np.concatenate([state[0], state[1].T], axis=1))
    for a, b in zip(several.from_examples(rows), state, strict=True):
        assert np.array_equal(a, b)
    one = batching.Layout(((3, 5, 4),), (20,), (np.dtype("f4"),), 3)
    jaxpr = jax.make_jaxpr(lambda x: one.from_examples(one.to_examples((x,))))(of_shape(3, 5, 4))
    assert {e.primitive.name for e in jaxpr.eqns} <= {"reshape"}
    assert hash(one) == hash(batching.Layout(((3, 5, 4),), (20,), (np.dtype("f4"),), 3))


def test_a_batch_of_one_needs_no_proof():
    before, after, verdict, _ = read(lambda x: (x - x.mean(0)) @ W, of_shape(1, 4))
    assert verdict == "proved" and before.size == after.size == 4


def test_a_batch_merged_with_time_is_still_found_in_the_states_between():
    _, _, _, found = read(
        lambda x: jnp.tanh(x.reshape(15, 4) @ W).reshape(3, 20), of_shape(3, 5, 4)
    )
    assert {(layout.shapes[0], layout.strides[0]) for layout in found} == {
        ((3, 5, 4), 20), ((15, 4), 20), ((3, 20), 20)
    }  # fmt: skip


def test_bad_batches_are_refused_with_their_shapes():
    with pytest.raises(ValueError, match=r"batch_axis=2: expected every array.*\(3, 4\)"):
        read(lambda x: x @ W, of_shape(3, 4), 2)
    with pytest.raises(ValueError, match=r"one number of examples.*\[2, 3\]"):
        read(lambda x: x[0].sum() + x[1], (of_shape(2), of_shape(3)))
    with pytest.raises(ValueError, match=r"at least 1, got \[0\]"):
        read(lambda x: x @ W, of_shape(0, 4))


def test_embedded_tokens_begin_the_chain_with_their_examples():
    table = of_shape(7, 4)
    before, after, verdict, _ = read(
        lambda t: table[t].sum(1) @ W, jnp.array([[1, 2], [3, 4], [5, 6]])
    )
    assert verdict == "proved"
    assert (before.shapes, before.strides, after.strides) == (((3, 2, 4),), (8,), (4,))


# ------------------------------------------------------------------------------------- models

BATCHED = ["haiku_transformer_pre_ln", "nnx_resnet_inference", "jax_moe_argmax", "jax_rnn_inputs"]
BATCHED += ["jax_scan_transformer_remat", "linen_moe_argmax", "equinox_cnn", "nnx_lstm_inputs"]


@pytest.mark.parametrize(
    "name",
    [
        case.name if case.name in BATCHED else pytest.param(case.name, marks=pytest.mark.slow)
        for case in CASES
        if case.name != "jax_identity"  # no layers, no layouts
    ],
)
def test_models_are_proved_independent_unless_they_are_known_to_be_coupled(name):
    case = BY_NAME[name]
    batched = case.build_batched()
    if batched is None:
        pytest.skip("no batch")
    if "coupled-batch" in case.flags:
        with pytest.raises(ValueError, match="are coupled by `reduce_"):
            read(*batched)
        return
    before, after, verdict, _ = read(*batched)
    assert verdict == "proved"
    count = jax.tree.leaves(batched[1])[0].shape[0]
    assert before.count == after.count == count
    f, xs = batched
    if all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(xs)):
        assert_examples_apart(f, xs, after)


def assert_examples_apart(f, xs, after):
    """Change one example: nothing but its own rows of the output change."""
    run = jax.jit(lambda xs: [leaf for leaf in jax.tree.leaves(f(xs)) if leaf.ndim])
    other = jax.tree.map(lambda a: a.at[1].set(a[1] * 0.5 + 0.25), xs)
    old, new = (np.asarray(after.to_examples(tuple(run(v))), np.float32) for v in (xs, other))
    changed = (old != new).any(1)
    assert not changed[0] and not changed[2:].any()


def test_batch_normalization_names_its_layer_in_training_and_is_proved_in_inference():
    f, xs = BY_NAME["linen_resnet_train"].build_batched()
    with pytest.raises(
        ValueError, match=r"coupled by `reduce_sum` in layer bn_init .*running stat"
    ):
        read(f, xs)
    before, _, verdict, _ = read(*BY_NAME["linen_resnet_inference"].build_batched())
    assert verdict == "proved" and before.count == 3
