"""Diagnosis of weights of the wrong scale, and of penalties, each beside its healthy twin."""

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diagnosis_cases import CLASSES, WIDTH, cross_entropy, data, dense, examined, net, primary

from jaxgrad.diagnosis import events, weights
from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.problem import make_problem

pytestmark = pytest.mark.filterwarnings("ignore")

ACTIVATIONS = {
    "relu": (jax.nn.relu, "relu"),
    "where": (lambda x: jnp.where(x > 0, x, 0.0), "relu"),
    "leaky": (jax.nn.leaky_relu, "leaky_relu"),
    "elu": (jax.nn.elu, "elu"),
    "selu": (jax.nn.selu, "elu"),
    "elu by hand": (lambda x: jnp.where(x > 0, x, jnp.exp(x) - 1), "elu"),
    "gelu": (jax.nn.gelu, "gelu"),
    "exact gelu": (lambda x: jax.nn.gelu(x, approximate=False), "gelu"),
    "gelu by hand": (lambda x: 0.5 * x * (1 + jax.lax.erf(x / 2**0.5)), "gelu"),
    "gelu by tanh": (lambda x: 0.5 * x * (1 + jnp.tanh(0.8 * (x + 0.0447 * x * x * x))), "gelu"),
    "gelu by sigmoid": (lambda x: x * jax.nn.sigmoid(1.702 * x), "silu"),
    "silu": (jax.nn.silu, "silu"),
    "tanh": (jnp.tanh, "tanh"),
    "erf": (jax.lax.erf, "erf"),
    "sigmoid": (jax.nn.sigmoid, "sigmoid"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_read_once_with_the_weights_before_it(name: str) -> None:
    function, kind = ACTIVATIONS[name]

    def loss(params: Any, batch: Any) -> Any:
        logits = function(batch[0] @ params["a"] + params["b"]) @ params["c"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    params = {"a": jnp.ones((WIDTH, 5)), "b": jnp.ones(5), "c": jnp.ones((5, CLASSES))}
    problem = make_problem(
        loss, params, data()[0], batches=None, has_aux=False, key=None, trainable=None
    )
    hidden = Evidence(problem, None, None).hidden()
    assert [(a.kind, [f.leaf for f in a.affine]) for a in hidden] == [(kind, ["a"])]
    assert not hidden[0].gate


def _net(function: Any) -> Any:
    def net(layers: Any, x: Any) -> Any:
        for layer in layers[:-1]:
            x = function(x @ layer["w"] + layer["b"])
        return x @ layers[-1]["w"] + layers[-1]["b"]

    return net


def _classify(function: Any) -> Any:
    def loss(layers: Any, batch: Any) -> Any:
        logits = _net(function)(layers, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return loss


@pytest.mark.parametrize(("scale", "expected"), [(0.02, "init.too_small"), (1.0, None)])
@pytest.mark.parametrize("function", [jax.nn.gelu, jax.nn.elu], ids=["gelu", "elu"])
def test_small_weights_before_smooth_rectifiers_are_found(
    function: Any, scale: float, expected: Any
) -> None:
    layers = dense((WIDTH, *[32] * 6, CLASSES), gain=2.0 if function is jax.nn.gelu else 1.5)
    small = [layer | {"w": scale * layer["w"]} for layer in layers]
    assert primary(_classify(function), small, data(), optax.sgd(0.1)) == expected


@pytest.mark.parametrize(("gain", "expected"), [(8.0, "init.too_large"), (1.5, None)])
def test_predictions_far_above_the_targets_are_found_by_what_smaller_weights_get_to(
    gain: float, expected: Any
) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal(WIDTH) / math.sqrt(WIDTH)
    xs = [rng.standard_normal((32, WIDTH)).astype(np.float32) for _ in range(8)]
    batches = [(x, np.tanh(x @ w).astype(np.float32)) for x in xs]

    def loss(layers: Any, batch: Any) -> Any:
        return jnp.mean((_net(jax.nn.elu)(layers, batch[0])[:, 0] - batch[1]) ** 2)

    layers = dense((WIDTH, 16, 16, 16, 1), gain=gain)
    report = examined(loss, layers, batches, optax.adagrad(0.03))
    assert (report.primary and report.primary.code) == expected
    if report.primary is not None:
        facts = report.primary.evidence
        assert facts["loss_with_the_needed_scale"] < 0.1 * facts["loss_as_given"]


@pytest.mark.parametrize(("scale", "expected"), [(30.0, "init.too_large"), (1.0, None)])
def test_a_last_layer_alone_may_be_too_large(scale: float, expected: Any) -> None:
    layers = dense((WIDTH, 32, CLASSES))
    layers[-1] = layers[-1] | {"w": scale * layers[-1]["w"]}
    report = examined(cross_entropy, layers, data(noise=1.0), optax.adam(1e-3))
    assert (report.primary and report.primary.code) == expected
    if report.primary is not None:
        assert report.primary.where == "layers[1]"


@pytest.mark.parametrize(
    ("factor", "expected"), [(0.1, "regularization.dominates"), (1e-4, None), (0.0, None)]
)
def test_a_penalty_at_whose_cost_nothing_is_learned_dominates(factor: float, expected: Any) -> None:
    def loss(layers: Any, batch: Any) -> Any:
        penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(layers))
        return cross_entropy(layers, batch) + factor * penalty

    layers = dense((WIDTH, 64, 64, CLASSES), gain=1.0)
    assert primary(loss, layers, data(), optax.adam(5e-3)) == expected


@pytest.mark.parametrize("depth", [5, 8])
@pytest.mark.parametrize(
    ("function", "expected"), [(jax.nn.sigmoid, "gradient.vanishing"), (jnp.tanh, None)]
)
def test_sigmoids_that_let_a_deep_net_crawl_are_found_by_tanh_in_their_place(
    function: Any, expected: Any, depth: int
) -> None:
    layers = dense((WIDTH, *[64] * depth, CLASSES), gain=1.0)
    assert primary(_classify(function), layers, data(), optax.adam(1e-3)) == expected


def test_tanh_is_a_function_of_its_sigmoid() -> None:
    from jaxgrad.diagnosis.gradients import _tanh_of_sigmoid

    z = jnp.linspace(-6.0, 6.0, 101)
    both = [
        jax.vmap(jax.value_and_grad(f))(z)
        for f in (jnp.tanh, lambda x: _tanh_of_sigmoid(jax.nn.sigmoid(x)))
    ]
    np.testing.assert_allclose(both[1], both[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("level", "expected"), [(1e-5, 0), (0.1, 1)])
def test_a_jump_of_a_loss_that_is_known_by_heart_is_no_spike(level: float, expected: int) -> None:
    losses = np.where(np.arange(80) < 20, 1.0, level * (1 + 0.01 * np.sin(np.arange(80))))
    losses[60] = 4.0
    norms = np.where(np.arange(80) == 60, 50.0, 1.0)
    run = SimpleNamespace(
        stopped=None, levels=None, losses=losses, gradient_norms=norms, first=float(losses[0])
    )
    problem = SimpleNamespace(batches=[None] * 16)
    known = {"__init__": lambda _: None, "main": run, "problem": problem, "improves": True}
    kind: Any = type("Known", (Evidence,), known)
    assert len(events.spike(kind())) == expected


def test_the_needed_scale_of_a_last_layer_is_that_of_a_linear_one() -> None:
    layers = dense((WIDTH, 32, CLASSES), gain=4.0)
    problem = make_problem(
        cross_entropy, layers, data()[0], batches=None, has_aux=False, key=None, trainable=None
    )
    (last,) = weights._last_scales(Evidence(problem, None, None))
    variance = float(np.var(np.asarray(layers[-1]["w"], np.float64)))
    assert (last.kind, last.needed) == ("", 1.0)
    assert last.ratio == pytest.approx(math.sqrt(32 * variance), rel=1e-12)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [(optax.adam(3e-6), "lr.too_low"), (optax.sgd(0.1), "optimizer.clip_always")],
    ids=["adam", "sgd"],
)
def test_a_clip_explains_small_steps_only_of_a_rule_that_keeps_them_small(
    rule: Any, expected: str
) -> None:
    tx = optax.chain(optax.clip_by_global_norm(0.003), rule)
    report = examined(cross_entropy, dense((WIDTH, 32, CLASSES)), data(), tx)
    clips = [f for f in report.findings if f.code == "optimizer.clip_always"]
    assert [f.evidence["steps_keep_their_size"] for f in clips] == [expected == "lr.too_low"]
    assert report.primary is not None
    assert report.primary.code == expected


@pytest.mark.parametrize(
    ("rule", "keeps"),
    [
        (optax.adam(1e-2), True),
        (optax.adamw(optax.linear_schedule(0.0, 2e-2, 20)), True),
        (optax.sgd(30.0), False),
    ],
    ids=["adam", "adamw from a rate of zero", "sgd"],
)
def test_a_clip_at_every_step_of_a_training_that_learns_is_no_alarm(rule: Any, keeps: bool) -> None:
    """Adam normalizes what the clip leaves, and the rate of the other is one for such steps."""
    tx = optax.chain(optax.clip_by_global_norm(0.003), rule)
    report = examined(cross_entropy, dense((WIDTH, 32, CLASSES)), data(), tx)
    (clip,) = (f for f in report.findings if f.code == "optimizer.clip_always")
    assert report.primary is None
    assert (clip.severity, clip.evidence["steps_keep_their_size"]) == ("info", keeps)
    if keeps:
        assert abs(clip.evidence["loss_as_given"] - clip.evidence["loss_without"]) < 0.1


def test_a_clip_before_adam_that_makes_all_batches_count_alike_is_an_alarm() -> None:
    """Every other batch weighs next to nothing, and points the other way."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 32, WIDTH)).astype(np.float32)
    w = rng.normal(size=WIDTH).astype(np.float32)
    size = np.where(np.arange(16) % 2 == 0, 1.0, 1e-3).astype(np.float32)
    y = np.where(size[:, None] == 1.0, x @ w, -(x @ w))
    batches = [(x[k], y[k], size[k] * np.ones(32, np.float32)) for k in range(16)]

    def loss(p: Any, batch: Any) -> Any:
        return (batch[2] * (batch[0] @ p["w"] - batch[1]) ** 2).mean()

    tx = optax.chain(optax.clip_by_global_norm(1e-4), optax.adam(3e-2))
    report = examined(loss, {"w": jnp.zeros(WIDTH)}, batches, tx)
    assert report.primary is not None
    assert report.primary.code == "optimizer.clip_always"
    assert report.primary.evidence["loss_without"] < report.primary.evidence["loss_as_given"]


def test_the_rounding_of_an_averaged_start_is_no_decay() -> None:
    """Schedule-free's first step, at a rate of zero, is the rounding of an average, with any data.

    Without the bar the decay pulled 1e23 times as hard as the data.
    """
    tx = optax.contrib.schedule_free_adamw(5e-3, warmup_steps=20)
    report = examined(cross_entropy, dense((WIDTH, 32, CLASSES)), data(), tx)
    assert report.primary is None


@pytest.mark.parametrize("fresh", [False, True])
def test_a_ratio_of_a_probability_with_itself_has_no_gradient(fresh: bool) -> None:
    """PPO's ratio is one at the first step of a round, and has a gradient all the same."""
    layers = dense((WIDTH, 32, CLASSES))

    def loss(p: Any, batch: Any) -> Any:
        chosen = -optax.softmax_cross_entropy_with_integer_labels(net(p, batch[0]), batch[1])
        old = jax.lax.stop_gradient(chosen) if fresh else chosen
        return -jnp.exp(chosen - old).mean()

    report = examined(loss, layers, data())
    assert (report.primary and report.primary.code) == (None if fresh else "gradient.blocked")
