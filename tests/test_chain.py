"""`factorize` on every model of the table: exact, named, and compiled once for equal layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, one_of_a_kind_first, select
from reference import full_jacobian
from reference_cuts import count_layers

import jaxgrad as jg
from jaxgrad.graph import flatten, links

# The derivative is not the gradient, or jacrev does not apply: checked one by one below.
SPECIAL = "nonlinear-vjp nonfinite-gradient forward-only"


def arguments(case, x):
    return x if "several-inputs" in case.flags else (x,)


def made(case, dtype=jnp.float32, **options):
    f, x = case.build(dtype)
    args = arguments(case, x)
    return jg.factorize(f, *args, argnum=case.argnum, **options), f, args


def multiplied(jacobians, chain, x):
    n = sum(np.size(a) for a in jax.tree.leaves(chain.states(x)[0]))
    product = np.eye(n)
    for jacobian in jacobians:
        product = np.asarray(jacobian, np.float64) @ product
    return product


def oracle(case, f, args):
    """The function's Jacobian, in the columns that belong to floating-point leaves."""
    leaves = jax.tree.leaves(args[case.argnum])
    if "low-precision" in case.flags and jnp.asarray(leaves[0]).dtype != jnp.float64:
        (x,) = leaves
        return np.asarray(jax.jacrev(f)(x), np.float64).reshape(-1, x.size)
    columns = full_jacobian(f, *args, argnum=case.argnum)
    keep = [np.full(np.size(a), jnp.issubdtype(jnp.asarray(a).dtype, jnp.floating)) for a in leaves]
    return columns[:, np.concatenate(keep)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_chain_is_the_function_and_is_named(case):
    for mode, least in (("scopes", case.scopes), ("cuts", case.cuts)):
        chain, f, args = made(case, layers=mode)
        assert len(chain) >= least, chain.names
        assert len(set(chain.names)) == len(chain)
        for part in case.names if mode == "scopes" else ():
            assert any(part in name for name in chain.names), (part, chain.names)
    chain, f, args = made(case)
    for mine, theirs in zip(
        jax.tree.leaves(chain(args[case.argnum])),
        jax.tree.leaves(jax.jit(lambda *a: f(*a))(*args)),
        strict=True,
    ):
        scale = np.max(np.abs(np.asarray(theirs, np.float64)), initial=1e-30)
        rounding = 0.02 if "low-precision" in case.flags else 3e-5
        np.testing.assert_allclose(
            np.asarray(mine, np.float64),
            np.asarray(theirs, np.float64),
            rtol=0,
            atol=rounding * scale,
        )


@pytest.mark.parametrize("case", one_of_a_kind_first(select(without=SPECIAL + " integer-input")))
def test_the_product_of_the_layers_jacobians_is_the_functions(case, x64):
    chain, f, args = made(case, jnp.float64)
    x = args[case.argnum]
    product = multiplied(jg.layer_jacobians(chain, x), chain, x)
    expected = oracle(case, f, args)
    assert product.shape == expected.shape
    scale = np.max(np.abs(expected), initial=0.0)
    np.testing.assert_allclose(product, expected, rtol=0, atol=case.rounding * scale)


@pytest.mark.slow
@pytest.mark.parametrize("case", select(without=SPECIAL + " integer-input"), ids=lambda c: c.name)
def test_the_product_over_all_cuts_is_the_functions_too(case, x64):
    chain, f, args = made(case, jnp.float64, layers="cuts")
    x = args[case.argnum]
    product = multiplied(jg.layer_jacobians(chain, x), chain, x)
    expected = oracle(case, f, args)
    scale = np.max(np.abs(expected), initial=0.0)
    np.testing.assert_allclose(product, expected, rtol=0, atol=case.rounding * scale)


@pytest.mark.parametrize("case", one_of_a_kind_first(select(having="integer-input")))
def test_an_integer_input_starts_at_the_first_float_cut(case, x64):
    chain, f, args = made(case, jnp.float64)
    x = args[case.argnum]
    assert "first float cut" in chain.graph.start
    start, *_ = chain.states(x)

    def rest(h):
        for layer in chain.layers:
            h = layer(h)
        return h

    y = np.asarray(f(*args), np.float64)
    np.testing.assert_allclose(
        np.asarray(rest(start), np.float64), y, rtol=0, atol=case.rounding * np.max(np.abs(y))
    )
    product = multiplied(jg.layer_jacobians(chain, x), chain, x)
    expected = np.asarray(jax.jacrev(rest)(start), np.float64).reshape(product.shape)
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(product, expected, rtol=0, atol=case.rounding * scale)


@pytest.mark.parametrize(
    "case",
    select(without="scan integer-input surrogate-gradient zero-jacobian complex empty effects"),
    ids=lambda c: c.name,
)
def test_the_cuts_are_those_of_a_brute_force_search(case):
    chain, f, args = made(case, layers="cuts")
    assert len(chain) == count_layers(f, *args, argnum=case.argnum)


def deep(count, width=6):
    keys = jax.random.split(jax.random.key(0), count)
    return [jax.random.normal(k, (width, width)) / np.sqrt(width) for k in keys]


def test_equal_layers_are_compiled_once():
    weights = deep(96)

    def f(x):
        for w in weights:
            x = x + jnp.tanh(x @ w)
        return x

    before = links._jitted_run._cache_size()
    chain = jg.factorize(f, jnp.ones(6))
    chain(jnp.ones(6))
    assert len(chain) == 96
    assert len({layer.link.program for layer in chain.layers}) == 1
    assert links._jitted_run._cache_size() - before <= 2  # the prelude and the layer


def test_layers_that_differ_in_more_than_constants_are_told_apart():
    w = deep(1)[0]

    @jax.custom_jvp
    def straight(x):
        return jnp.tanh(x)

    straight.defjvp(lambda primals, tangents: (straight(primals[0]), tangents[0]))
    chain = jg.Chain.from_layers(
        [
            ("tanh", lambda h: jnp.tanh(h @ w)),
            ("sin", lambda h: jnp.sin(h @ w)),
            ("straight", lambda h: straight(h @ w)),
            ("scaled", lambda h: 0.5 * jnp.tanh(h @ w)),
            ("less", lambda h: 0.25 * jnp.tanh(h @ w)),
        ]
    )
    run = chain.run(jnp.ones(6))
    programs = [link.program for link in run.links]
    assert len(set(programs)) == 4  # the last two differ in a constant only
    x = jnp.ones(6)
    for layer, jacobian in zip(chain.layers, jg.layer_jacobians(chain, x), strict=True):
        expected = jax.jacrev(layer)(x)
        np.testing.assert_allclose(jacobian, expected, rtol=1e-6, atol=0)
        x = layer(x)


def test_from_layers_is_compiled_once_for_distinct_closures():
    weights = deep(300, width=9)
    layers = [(f"layer{k}", lambda h, w=w: jnp.tanh(h @ w)) for k, w in enumerate(weights)]
    chain = jg.Chain.from_layers(layers)
    before = links._jitted_run._cache_size()
    y = chain(jnp.ones(9))
    assert links._jitted_run._cache_size() - before == 1
    expected = jnp.ones(9)
    for _, f in layers:
        expected = f(expected)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_scanned_layers_are_the_scan():
    stacked = {"w": jnp.stack(deep(7)), "b": jnp.linspace(-1, 1, 7)}

    def block(params, h):
        return h + jnp.tanh(h @ params["w"] + params["b"])

    chain = jg.Chain.scanned(block, stacked, name="block")
    x = jnp.arange(6.0)
    expected, _ = jax.lax.scan(lambda h, p: (block(p, h), None), x, stacked)
    np.testing.assert_allclose(chain(x), expected, rtol=1e-6)
    assert chain.names[:2] == ("block[0]", "block[1]")
    np.testing.assert_allclose(
        chain[3](x), block(jax.tree.map(lambda a: a[3], stacked), x), rtol=1e-6
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_no_iteration_of_a_scan_is_skipped(reverse, x64):
    stacked = jnp.stack([w.astype(jnp.float64) for w in deep(5)])

    def f(x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stacked, reverse=reverse)
        return h

    chain = jg.factorize(f, jnp.ones(6))
    assert len(chain) == 5
    expected = jnp.ones(6)
    for layer, k in zip(chain.layers, range(4, -1, -1) if reverse else range(5), strict=True):
        assert layer.name.endswith(f"[{k}]")
        found = layer(expected)
        expected = jnp.tanh(expected @ stacked[k])
        np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_a_scan_that_loses_an_iteration_is_seen(monkeypatch, x64):
    stacked = jnp.stack([w.astype(jnp.float64) for w in deep(4)])

    def f(x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stacked)
        return h

    unrolled = flatten._unrolled

    def one_short(scan, *rest):
        object.__setattr__(scan, "length", scan.length - 1)
        return unrolled(scan, *rest)

    x = jnp.linspace(-1, 1, 6)
    for lost, tolerance in ((False, 1e-12), (True, 1e-3)):
        if lost:
            monkeypatch.setattr(flatten, "_unrolled", one_short)
        chain = jg.factorize(f, x)
        product = multiplied(jg.layer_jacobians(chain, x), chain, x)
        wrong = np.max(np.abs(product - full_jacobian(f, x)))
        assert wrong > tolerance if lost else wrong < tolerance


def test_side_inputs_are_recomputed_by_the_chain_and_held_by_a_layer():
    w = deep(2)

    def f(x):
        gate = x > 0  # a boolean that lives through the first layer
        h = jnp.tanh(x @ w[0])
        return jnp.where(gate, h @ w[1], 0.0)

    x = jnp.array([1.0, -1, 1, -1, 1, -1])
    chain = jg.factorize(f, x)
    assert chain.graph.side_inputs
    np.testing.assert_allclose(chain(-x), f(-x), rtol=1e-6)
    h = chain.states(x)[-2]
    held = chain[len(chain) - 1](h)
    np.testing.assert_allclose(held, f(x), rtol=1e-6)


def test_what_stands_behind_stop_gradient_is_a_side_input(x64):
    w = [a.astype(jnp.float64) for a in deep(2)]

    def f(x):
        target = jax.lax.stop_gradient(jnp.sin(x @ w[0]))
        h = jnp.tanh(x @ w[0])
        return (h @ w[1]) * target

    x = jnp.linspace(-1, 1, 6)
    chain = jg.factorize(f, x)
    product = multiplied(jg.layer_jacobians(chain, x), chain, x)
    np.testing.assert_allclose(product, full_jacobian(f, x), rtol=1e-12, atol=0)


def test_the_chain_can_be_made_and_used_under_jit():
    w = deep(3)

    def gain(x):
        def f(x):
            for a in w:
                x = jnp.tanh(x @ a)
            return x

        chain = jg.factorize(f, x)
        return jnp.linalg.norm(jg.layer_jacobians(chain, x)[1])

    x = jnp.ones(6)
    np.testing.assert_allclose(jax.jit(gain)(x), gain(x), rtol=1e-5)


def test_depth_merges_by_scope():
    w = deep(4)

    def f(x):
        for stage in range(2):
            with jax.named_scope(f"stage{stage}"):
                for k in range(2):
                    with jax.named_scope(f"dense{k}"):
                        x = jnp.tanh(x @ w[2 * stage + k])
        return x

    assert jg.factorize(f, jnp.ones(6), layers=1).names == ("stage0", "stage1")
    assert len(jg.factorize(f, jnp.ones(6), layers=2)) == 4


def test_taps_name_and_separate_layers():
    w = deep(2)

    def f(x):
        h = jg.tap(jnp.tanh(x @ w[0]), "middle")
        return jnp.tanh(h @ w[1])

    assert jg.factorize(f, jnp.ones(6)).names[0] == "middle"


def test_what_was_not_seen_or_not_named_is_listed():
    w = deep(2)
    unused = {"used": w[0], "unused": w[1]}

    def f(x):
        h = jax.lax.while_loop(lambda h: jnp.max(h) > 1, lambda h: h / 2, x)
        return jnp.sin(h @ unused["used"] + jnp.sum(unused["unused"] * 0, dtype=jnp.float32) * 0)

    graph = jg.factorize(lambda x: jnp.sin(jnp.cos(x)), jnp.ones(3)).graph
    assert len(graph.made_up_names) == 2
    graph = jg.factorize(f, jnp.ones(6)).graph
    assert any("while" in region for region in graph.opaque)


def test_a_long_skip_leaves_few_cuts():
    w = deep(3)

    def f(x):
        h = jnp.tanh(x @ w[0])
        deep_part = jnp.tanh(jnp.tanh(h @ w[1]) @ w[2])
        return jnp.concatenate([h, deep_part])

    chain = jg.factorize(f, jnp.ones(6))
    assert len(chain) == 2


class TestErrors:
    """Bad input gets a clear error."""

    def test_no_gradient_path(self):
        with pytest.raises(ValueError, match=r"(?s)argument 'x'.*ends at .*stop_gradient"):
            jg.factorize(lambda x: jax.lax.stop_gradient(x) * 2, jnp.ones(3))

    def test_argmax(self):
        with pytest.raises(ValueError, match="argmax"):
            jg.factorize(lambda x: jnp.argmax(x).astype(jnp.float32), jnp.ones(3))

    def test_integers_without_a_float_path(self):
        with pytest.raises(ValueError, match="Pass the float"):
            jg.factorize(lambda x: x + 1, jnp.arange(3))

    def test_wrong_state_names_the_layer(self):
        chain = jg.factorize(lambda x: jnp.sin(x), jnp.ones(3))
        with pytest.raises(ValueError, match=r"layer 'sin\[0\]': expected a state of shape \(3,\)"):
            chain[0](jnp.ones(4))

    def test_wrong_input(self):
        chain = jg.factorize(lambda x: jnp.sin(x), jnp.ones(3))
        with pytest.raises(ValueError, match="factorize the function again"):
            chain(jnp.ones(4))

    def test_unknown_mode(self):
        with pytest.raises(ValueError, match="'scopes', 'cuts' or an integer"):
            jg.factorize(jnp.sin, jnp.ones(3), layers="modules")

    def test_argnum_out_of_range(self):
        with pytest.raises(TypeError, match="argnum=1"):
            jg.factorize(jnp.sin, jnp.ones(3), argnum=1)

    def test_repeated_names(self):
        with pytest.raises(ValueError, match="distinct"):
            jg.Chain.from_layers([("a", jnp.sin), ("a", jnp.cos)])

    def test_a_layer_that_fails_is_named(self):
        chain = jg.Chain.from_layers([("good", jnp.sin), ("bad", lambda h: h @ jnp.ones((5, 2)))])
        with pytest.raises(ValueError, match="layer 'bad' fails"):
            chain(jnp.ones(3))

    def test_scanned_shapes(self):
        with pytest.raises(ValueError, match="one leading axis"):
            jg.Chain.scanned(lambda p, h: h, {"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2))})
        chain = jg.Chain.scanned(lambda p, h: jnp.concatenate([h, h]), jnp.ones((2, 1)))
        with pytest.raises(ValueError, match="keeps the state's shape"):
            chain(jnp.ones(3))


@pytest.mark.parametrize("inside", ["plain", "cond", "jit", "scan"])
@pytest.mark.parametrize("kind", ["jvp", "vjp"])
def test_layers_that_differ_in_their_derivative_rule_only_are_not_confused(kind, inside):
    def layer(slope):
        if kind == "jvp":
            f = jax.custom_jvp(lambda x: x * 1.0)
            f.defjvp(lambda x, t: (f(x[0]), slope * t[0]))
        else:
            f = jax.custom_vjp(lambda x: x * 1.0)
            f.defvjp(lambda x: (f(x), None), lambda _, g: (slope * g,))
        return {
            "plain": f,
            "cond": lambda h: jax.lax.cond(h[0] > 0, f, f, h),
            "jit": jax.jit(f),
            "scan": lambda h: jax.lax.scan(lambda c, _: (f(c), None), h, None, length=1)[0],
        }[inside]

    chain = jg.Chain.from_layers([("twice", layer(2.0)), ("thrice", layer(3.0))])
    first, second = jg.layer_jacobians(chain, jnp.ones(2))
    np.testing.assert_array_equal(first, 2 * np.eye(2))
    np.testing.assert_array_equal(second, 3 * np.eye(2))


def test_a_long_scan_does_not_compile_once_an_iteration():
    xs = jnp.linspace(-1, 1, 41 * 3).reshape(41, 3)
    compiled = []

    def listen(event, seconds, **_):
        compiled.extend([seconds] if event.endswith("backend_compile_duration") else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    chain = jg.factorize(
        lambda h: jax.lax.scan(lambda h, x: (jnp.tanh(h + x), None), h, xs)[0], jnp.ones(3)
    )
    assert len(chain) >= 41
    assert 0 < len(compiled) < 20


# ------------------------------------------------------------------- what a critical reader found


def test_the_identity_is_the_empty_chain():
    x = jnp.linspace(-1, 1, 6).reshape(2, 3)
    chain = jg.factorize(lambda x: x, x)
    assert len(chain) == 0 and chain.graph.cuts == 1
    (only,) = chain.states(x)
    np.testing.assert_array_equal(only, x)
    np.testing.assert_array_equal(chain(2 * x), 2 * x)
    assert jg.layer_jacobians(chain, x) == ()
    np.testing.assert_array_equal(jg.jacobian_product(chain, x).to_dense(), np.eye(6))


def test_a_negative_argnum_counts_from_the_end():
    w, x = deep(1)[0], jnp.linspace(-1, 1, 6)

    def f(w, x):
        return jnp.tanh(x @ w)

    last, same = jg.factorize(f, w, x, argnum=-1), jg.factorize(f, w, x, argnum=1)
    assert last.names == same.names == ("w",)
    np.testing.assert_array_equal(last(2 * x), same(2 * x))
    with pytest.raises(TypeError, match="argnum=-3"):
        jg.factorize(f, w, x, argnum=-3)


def test_a_leaf_that_is_no_array_is_named():
    with pytest.raises(TypeError, match=r"leaf 'kind' of argument 'a' is 'fast', of type str"):
        jg.factorize(lambda a: a["x"] * 2, {"x": jnp.ones(3), "kind": "fast"})
    with pytest.raises(TypeError, match=r"argument 'a' is 'fast', of type str.*argnum="):
        jg.factorize(lambda a, x: x * 2, "fast", jnp.ones(3))


def test_python_without_a_derivative_is_listed_and_its_layer_named_by_the_error():
    w = deep(2)
    params = {"first": {"w": w[0]}, "last": {"w": w[1]}}

    def f(x):
        h = x @ params["first"]["w"]
        h = jax.pure_callback(np.sin, jax.ShapeDtypeStruct(h.shape, h.dtype), h)
        return h @ params["last"]["w"]

    x = jnp.linspace(-1, 1, 6)
    chain = jg.factorize(f, x)
    assert [text for text in chain.graph.opaque if text.startswith("pure_callback")]
    np.testing.assert_allclose(chain(x), f(x), rtol=1e-6)
    with pytest.raises(ValueError, match=r"layer 'first' calls Python by pure_callback"):
        jg.layer_jacobians(chain, x)


def test_nested_scans_are_read_in_one_pass_a_level():
    """Counted, not timed: 16 times the layers take 16 times the looks, not 256 times."""
    counts = []
    for n in (4, 16):
        w = jnp.ones((n, n, 3, 3)) / 3

        def f(x, w=w):
            step = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
            return jax.lax.scan(lambda h, w: (jax.lax.scan(step, h, w)[0], None), x, w)[0]

        calls = 0

        def counted(op, original=flatten.value_inputs):
            nonlocal calls
            calls += 1
            return original(op)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flatten, "value_inputs", counted)
            chain = jg.factorize(f, jnp.ones(3))
        assert len(chain) == n * n
        counts.append(calls)
    assert counts[1] < 20 * counts[0]


def test_a_layer_of_many_modules_has_a_short_name():
    w = deep(9)

    def f(x):
        return sum(jnp.tanh(x @ params[f"w{k}"]) * (k + 1) for k in range(9))

    params = {f"w{k}": a for k, a in enumerate(w)}
    assert jg.factorize(f, jnp.ones(6)).names == ("w0+w1+6 more+w8",)
