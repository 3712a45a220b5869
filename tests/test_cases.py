"""The table of test models keeps its promises, and the oracles are right on closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME, CASES, select
from reference_cuts import count_layers
from zoo_base import FLAGS, Case


def _fast_compilation() -> dict[str, bool | int]:
    """Every program here runs a few times at most: most of its time would go into optimizing it."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    # a third of the compile time in jax 0.10; later versions do not have it
    faster = options | {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(jnp.sin).lower(0.0).compile(compiler_options=faster)
    except jax.errors.JaxRuntimeError:
        return options
    return faster


FAST = _fast_compilation()
everything = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def marked(cases, fast):
    """The cases as parameters; those that are not `fast` are left to the long run of the tests."""
    return [pytest.param(c, id=c.name, marks=() if fast(c) else pytest.mark.slow) for c in cases]


def compiled(f, *args):
    """f compiled for args."""

    def call(*args):  # some modules can be called, and cannot be hashed, as jit wants it
        return f(*args)

    return jax.jit(call).lower(*args).compile(compiler_options=FAST)


def arguments(case: Case, x):
    return tuple(x) if "several-inputs" in case.flags else (x,)


def is_float(a):
    return jnp.issubdtype(a.dtype, jnp.inexact)


def normals(tree, seed):
    """A tangent: normal numbers for the leaves, zeros of float0 for the integers among them."""
    rng = np.random.default_rng(seed)

    def leaf(a):
        if is_float(a):
            return jnp.asarray(rng.standard_normal(a.shape), a.dtype)
        return np.zeros(a.shape, jax.dtypes.float0)

    return jax.tree.map(leaf, tree)


def inner(a, b):
    """<a, b>, over the float leaves, in float64."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(np.vdot(as64(p), as64(q)) for p, q in pairs if is_float(p))


def as64(a):
    return np.asarray(a).astype(np.float64)


def assert_close(a, b, tolerance, noise=0.0):
    """Leaf by leaf, relative to the largest element; no comparison is finer than `noise`."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert p.shape == q.shape
        scale = np.max(np.abs(as64(q)), initial=1e-300)
        np.testing.assert_allclose(as64(p), as64(q), rtol=0, atol=tolerance * scale + noise)


def moved(x, direction, step):
    """x + step * direction, integers as they are."""
    return jax.tree.map(lambda a, d: a + step * d if is_float(a) else a, x, direction)


@everything
def test_an_example_alone_gives_what_it_gives_in_a_batch_unless_the_batch_is_coupled(case):
    f, x = case.build()
    args = arguments(case, x)
    batched = case.build_batched()
    if batched is None:
        y = compiled(f, *args)(*args)
        assert all(np.isfinite(as64(leaf)).all() for leaf in jax.tree.leaves(y))
        return
    f_batch, xs = batched
    assert {leaf.shape[0] for leaf in jax.tree.leaves(xs)} <= {3, 4}
    if "coupled-batch" in case.flags:
        run = compiled(f_batch, xs)
        others = jax.tree.map(lambda a: a.at[1:].multiply(1.5), xs)
        ys, changed = run(xs), run(others)
        assert not np.allclose(as64(ys)[0], as64(changed)[0], rtol=1e-3)
        return
    y, ys = compiled(lambda x, xs: (f(x), f_batch(xs)), x, xs)(x, xs)
    assert all(np.isfinite(as64(leaf)).all() for leaf in jax.tree.leaves(ys))
    rounding = 0.05 if "low-precision" in case.flags else 1e-5
    assert_close(jax.tree.map(lambda a: a[0], ys), y, rounding)


@pytest.mark.parametrize(
    "case", marked(select(without="integer-input"), lambda c: c.framework == "jax")
)
def test_forward_mode_reverse_mode_and_differences_agree_in_float64(case, x64):
    f, x = case.build(jnp.float64)
    args = arguments(case, x)
    tangent = normals(args, 1)
    cotangent = normals(jax.eval_shape(f, *args), 2)

    def differentiate(*args):
        forward = jax.jvp(f, args, tangent) if "reverse-only" not in case.flags else (f(*args),)
        pull = jax.vjp(f, *args)[1](cotangent) if "forward-only" not in case.flags else None
        return *forward, pull

    run = compiled(differentiate, *args)
    y, *pushed, pulled = run(*args)
    assert (
        all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(y))
        or "low-precision" in case.flags
    )
    if "nonfinite-gradient" in case.flags:
        assert np.isfinite(as64(y)).all()
        assert not np.isfinite(as64(pulled[case.argnum])).all()
        return
    if pushed and pulled is not None:
        a, b = inner(cotangent, pushed[0]), inner(tangent, pulled)
        norm = np.sqrt(inner(cotangent, cotangent) * inner(pushed[0], pushed[0]))
        assert abs(a - b) <= case.rounding * norm
    if pulled is not None:
        zero = all((as64(leaf) == 0).all() for leaf in jax.tree.leaves(pulled) if is_float(leaf))
        assert zero == ("zero-jacobian" in case.flags)
    if case.rounding < 1e-9 and "surrogate-gradient" not in case.flags:
        h = 1e-6
        ahead, behind = (run(*moved(args, tangent, s))[0] for s in (h, -h))
        slope = jax.tree.map(lambda a, b: (a - b) / (2 * h), ahead, behind)
        noise = 1e-9 * max(np.max(np.abs(as64(leaf)), initial=0) for leaf in jax.tree.leaves(y))
        if pushed:
            assert_close(slope, pushed[0], 1e-6, noise)
        else:
            size = np.sqrt(inner(cotangent, cotangent))
            assert abs(inner(cotangent, slope) - inner(tangent, pulled)) <= (1e-6 + noise) * size


# where x is of integers no other test differentiates; elsewhere this one repeats, with respect to
# the parameters, what the test before it does with respect to x
@pytest.mark.parametrize("case", marked(CASES, lambda c: "integer-input" in c.flags))
def test_a_loss_has_a_finite_gradient_for_every_float_parameter_and_some_are_not_zero(case):
    built = case.build_loss()
    assert (built is None) == ("no-loss" in case.flags)
    if built is None:
        return
    loss, params, batch = built
    leaves, tree = jax.tree.flatten(params)
    followed = [k for k, a in enumerate(leaves) if isinstance(a, jax.Array) and is_float(a)]
    assert followed

    def of_floats(floats, batch):
        every = list(leaves)
        for k, a in zip(followed, floats, strict=True):
            every[k] = a
        return loss(jax.tree.unflatten(tree, every), batch)

    floats = [leaves[k] for k in followed]
    gradient = compiled(jax.grad(of_floats), floats, batch)(floats, batch)
    assert all(np.isfinite(as64(g)).all() for g in gradient)
    assert any(as64(g).any() for g in gradient)


@everything
def test_no_case_claims_more_layers_than_there_are_cuts(case):
    f, x = case.build()
    whole = count_layers(f, *arguments(case, x), argnum=case.argnum)
    # the scan is one layer among those that were counted
    assert case.scopes <= case.cuts <= whole + max(case.iterations - 1, 0)
    assert case.iterations == 0 or "scan" in case.flags


def test_double_precision_is_refused_outside_of_its_context_and_does_not_leak_out_of_it():
    case = BY_NAME["jax_mlp_tanh_no_bias"]
    with pytest.raises(ValueError, match=r"jax_mlp_tanh_no_bias: float64 .* jax.enable_x64"):
        case.build(jnp.float64)
    with jax.enable_x64(True):
        f, x = case.build(jnp.float64)
        assert x.dtype == f(x).dtype == jnp.float64
    f, x = case.build()
    assert x.dtype == f(x).dtype == jnp.float32
    assert jnp.zeros(()).dtype == jnp.float32


def test_the_same_numbers_are_built_every_time_and_in_both_precisions(x64):
    for case in CASES[:12]:
        _, x = case.build()
        _, again = case.build(jnp.float64)
        assert_close(again, x, 0)


def test_every_flag_is_used_and_a_misspelled_one_is_refused():
    assert set().union(*(case.flags for case in CASES)) == set(FLAGS)
    with pytest.raises(ValueError, match="unknown flag 'scann'"):
        select(having="scann")
    with pytest.raises(ValueError, match=r"x: unknown flags \['nonsense'\]"):
        Case("x", "jax", "mlp", lambda _: None, flags=frozenset({"nonsense"}))


def test_the_table_has_every_framework_and_kind_that_was_promised():
    kinds = {"mlp", "cnn", "resnet", "transformer", "lstm", "gru", "scan", "remat", "moe"}
    for framework in ("jax", "linen", "nnx", "equinox", "haiku"):
        missing = kinds - {case.kind for case in select(framework=framework)}
        assert missing <= {"moe"} if framework == "equinox" else not missing, framework
