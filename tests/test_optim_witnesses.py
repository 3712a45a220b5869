"""Third witnesses: torch in double precision, Keras's and torch's goldens, optax's own tests."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgrad import optim
from tests.optim_cases import RULES, sample, train

torch = pytest.importorskip("torch", reason="torch (the extra 'peers') is not installed")


def torch_path(make, p, grads, clip=None):
    leaf = torch.nn.Parameter(torch.tensor(np.asarray(p)))
    opt, path = make([leaf]), []
    for g in np.asarray(grads):
        leaf.grad = torch.tensor(g)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([leaf], clip)
        opt.step()
        path.append(leaf.detach().numpy().copy())
    return np.stack(path)


def ours(tx, p, grads):
    return np.asarray(jax.jit(lambda p, g: train(tx, p, g))(p, grads)[0][1])


AGREE = {
    "sgd": (optim.sgd(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": (optim.momentum(0.1), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "nesterov": (
        optim.nesterov(0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    ),
    "adam": (optim.adam(0.1), lambda p: torch.optim.Adam(p, 0.1)),
    "adamw": (
        optim.adamw(0.1, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.01),
    ),
    "adam-l2": (
        optim.chain(optim.add_decayed_weights(0.01), optim.adam(0.1)),
        lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.01),
    ),
    "rmsprop": (
        optim.rmsprop(0.1, decay=0.99, eps_in_sqrt=False),
        lambda p: torch.optim.RMSprop(p, 0.1),
    ),
    "adagrad": (
        optim.adagrad(0.1, initial_accumulator_value=0.0, eps=0.0),
        lambda p: torch.optim.Adagrad(p, 0.1, eps=0.0),
    ),
}


@pytest.mark.parametrize("name", AGREE)
def test_rules_agree_with_torch_in_double_precision_where_conventions_agree(name, x64):
    p, grads = sample((64,), 1, dtype=np.float64)
    tx, make = AGREE[name]
    wanted = torch_path(make, p, grads)
    scale = np.maximum(np.abs(wanted).max(axis=0), 0.1)
    assert np.max(np.abs(ours(tx, p, grads) - wanted) / scale) < 1e-13


def test_adam_in_float32_is_closer_to_torch_than_optax_is():
    g = np.float32(np.random.default_rng(0).standard_normal(1000))
    right = torch_path(lambda p: torch.optim.Adam(p, 1.0), np.zeros(1000), g[None].astype(float))[0]

    def error(tx):
        update = jax.jit(lambda g: tx.update(g, tx.init(g))[0])(g)
        return np.median(np.abs(np.float64(update) - right) / np.abs(right))

    for b2, least in ((0.999, 30), (0.99999, 1000)):
        make = lambda p, b2=b2: torch.optim.Adam(p, 1.0, betas=(0.9, b2))  # noqa: E731
        right = torch_path(make, np.zeros(1000), g[None].astype(float))[0]
        assert error(optim.adam(1.0, b2=b2)) < 2e-7
        assert error(optax.adam(1.0, b2=b2)) > least * error(optim.adam(1.0, b2=b2))


DIFFER = {  # documented differences, at the first step
    "adamw's default decay": (
        optim.adamw(0.1),
        lambda p: torch.optim.AdamW(p, 0.1),
        lambda p, g: 0.1 * (1e-2 - 1e-4) * np.abs(p),
    ),
    "rmsprop's decay and eps": (
        optim.rmsprop(0.1),
        lambda p: torch.optim.RMSprop(p, 0.1),
        lambda p, g: np.abs(0.1 / np.sqrt(0.01) - 0.1 / np.sqrt(0.1)) + 0 * g,
    ),
    "adagrad's start": (
        optim.adagrad(0.1),
        lambda p: torch.optim.Adagrad(p, 0.1),
        lambda p, g: 0.1 * (1 - np.abs(g) / np.sqrt(g * g + 0.1)),
    ),
}


@pytest.mark.parametrize("name", DIFFER)
def test_where_torch_has_other_conventions_the_difference_is_the_documented_one(name, x64):
    rng = np.random.default_rng(0)
    p, g = rng.standard_normal((2, 16))
    tx, make, gap = DIFFER[name]
    got = np.abs(ours(tx, p, g[None])[0] - torch_path(make, p, g[None])[0])
    np.testing.assert_allclose(got, gap(p, g), rtol=1e-4, atol=1e-9)


def test_torch_clips_a_little_more_by_its_1e_minus_6(x64):
    g = np.array([3e-6, 4e-6])
    theirs = -torch_path(lambda p: torch.optim.SGD(p, 1.0), np.zeros(2), g[None], clip=1e-6)[0]
    tx = optim.clip_by_global_norm(1e-6)
    mine, _ = tx.update(jnp.asarray(g), tx.init(g))
    np.testing.assert_allclose(theirs / mine, 5e-6 / (5e-6 + 1e-6), rtol=1e-12)


# ---------------------------------------------------------------------------------- goldens

START = {
    "w1": [[-0.21089885683388707, -0.4975560466422629], [-0.1412921620247176, -0.3420288967865903],
           [-0.2523635082803723, 0.6975570255493778]],
    "b1": [-0.10853121966252376, -0.297948499687533, 0.6892015099955718],
    "w2": [[-0.05080313011597654, -0.3941351875105899, -0.28433759745928844]],
    "b2": [-0.07113812430174121],
}  # fmt: skip
GOLDEN = {  # w1[0] of torch 2.13 at step index 100 and 1000
    "sgd": (optim.sgd(0.1), -0.1554313154022401, -0.07583232846497832),
    "sgd-momentum-l2": (
        optim.chain(optim.add_decayed_weights(0.01), optim.momentum(0.1)),
        0.0056118487251954705,
        0.17948886155124505,
    ),
    "nesterov-l2": (
        optim.chain(optim.add_decayed_weights(1e-6), optim.nesterov(0.1)),
        -0.1262387113548655,
        -0.07326215742204906,
    ),
    "adam": (optim.adam(1.0), 8.23303931323183, 8.233424610733328),
    "adam-l2": (
        optim.chain(optim.add_decayed_weights(0.01), optim.adam(1.0)),
        0.17835734655765348,
        0.17963666098406997,
    ),
    "adamw": (optim.adamw(1.0, weight_decay=0.01), 3.3165329599188507, 2.057678483682531),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_training_torchs_golden_network_gives_torchs_numbers(name, x64):
    tx, at_100, at_1000 = GOLDEN[name]
    inputs = jnp.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    params = jax.tree.map(jnp.array, START, is_leaf=lambda x: isinstance(x, list))

    def loss(p):
        h = jax.nn.sigmoid(inputs @ p["w1"].T + p["b1"])
        return jnp.sum(jax.nn.sigmoid(h @ p["w2"].T + p["b2"]))

    @jax.jit
    def run(params):
        def body(carry, _):
            p, state = carry
            updates, state = tx.update(jax.grad(loss)(p), state, p)
            p = optax.apply_updates(p, updates)
            return (p, state), p["w1"][0, 0]

        return jax.lax.scan(body, (params, tx.init(params)), length=1001)[1]

    path = run(params)
    np.testing.assert_allclose([path[100], path[1000]], [at_100, at_1000], rtol=1e-11)


def test_single_steps_of_keras():
    g, p = jnp.array([1.0, 6, 7, 2]), jnp.array([1.0, 2, 3, 4])
    for tx, wanted in (
        (optim.sgd(0.5), (0.5, -1, -0.5, 3)),
        (optim.adam(0.5), (0.5, 1.5, 2.5, 3.5)),
        (optim.lion(0.5, weight_decay=0.0), (0.5, 1.5, 2.5, 3.5)),
        (optim.adamw(0.5, weight_decay=0.004), (0.498, 1.496, 2.494, 3.492)),
    ):
        np.testing.assert_allclose(p + tx.update(g, tx.init(p), p)[0], wanted, atol=1e-5)


def test_three_decays_without_a_gradient():
    p, tx = jnp.array([2.0]), optim.adamw(1.0, weight_decay=0.004)
    state = tx.init(p)
    for _ in range(3):
        u, state = tx.update(jnp.zeros(1), state, p)
        p = p + u
    np.testing.assert_allclose(p, [2 * 0.996**3], rtol=1e-6)


def test_eps_stands_outside_the_corrected_root_unlike_in_keras():
    tx, p = optim.adamw(1.0, weight_decay=0.5, eps=2.0), jnp.array([1.0])
    u, _ = tx.update(jnp.array([0.01]), tx.init(p), p)
    np.testing.assert_allclose(p + u, [0.4950], atol=5e-5)  # Keras: 0.4998


# ---------------------------------------------------------- optax's common tests, rewritten

RATES = {"sgd": 1e-2, "momentum": 1e-2, "nesterov": 1e-2, "adam": 1e-1, "adamw": 1e-1,
         "lion": 1e-2, "rmsprop": 5e-3, "adagrad": 1.0, "adafactor": 5e-3, "muon": 1e-2,
         "schedule_free_adamw": 1e-2}  # fmt: skip
EXTRA = {"lion": {"b1": 0.99, "weight_decay": 0.0}, "adamw": {"weight_decay": 0.0}}


def parabola(p):
    return jnp.sum(jnp.abs(p - jnp.array([1.0, -1.0, 1.0])) ** 2)


def rosenbrock(p):
    return jnp.abs(1.0 - p[0]) ** 2 + 100.0 * jnp.abs(p[1] - p[0] ** 2) ** 2


PROBLEMS = {
    "parabola": (parabola, [-1.0, 10.0, 1.0], [1.0, -1.0, 1.0]),
    "rosenbrock": (rosenbrock, [0.0, 0.0], [1.0, 1.0]),
}


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", RATES)
def test_every_rule_minimizes_the_problems_of_optax(name, problem, dtype):
    if dtype == "complex64" and name in ("lion", "schedule_free_adamw", "muon", "adafactor"):
        pytest.skip("optax does not train these on complex parameters either")
    loss, start, optimum = PROBLEMS[problem]
    rate = (
        2e-3 if name in ("sgd", "momentum", "nesterov") and problem == "rosenbrock" else RATES[name]
    )
    steps = 10_000
    rate = {"momentum": 3e-4, "nesterov": 3e-4}.get(name, rate) if problem == "rosenbrock" else rate
    schedule = optim.warmup_cosine(0.0, rate, 10, steps, rate / 100)
    lr = rate if name == "schedule_free_adamw" else schedule
    tx = getattr(optim, name)(lr, **EXTRA.get(name, {}))

    @jax.jit
    def solve(p):
        def body(_, carry):
            p, state = carry
            g = jnp.conj(jax.grad(lambda p: loss(p).real)(p))
            u, state = tx.update(g, state, p)
            return optax.apply_updates(p, u), state

        p, state = jax.lax.fori_loop(0, steps, body, (p, tx.init(p)))
        from jaxgrad.optim import schedule_free_eval_params

        return schedule_free_eval_params(state, p) if name.startswith("schedule") else p

    np.testing.assert_allclose(solve(jnp.array(start, dtype)), optimum, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("key", RULES)
def test_a_second_call_compiles_nothing_anew(key):
    tx, p = RULES[key].hand(0.1), {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}
    update = jax.jit(tx.update)
    _, state = update(p, tx.init(p), p)
    _, state = update(p, state, p)
    update(p, state, p)
    assert update._cache_size() == 1
