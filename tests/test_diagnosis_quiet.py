"""Diagnosis of faults that let the loss fall a little and raise no alarm, each beside its twin."""

import functools
import math
from types import SimpleNamespace
from typing import Any

import diagnosis_cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diagnosis_cases import CLASSES, WIDTH, cross_entropy, dense, examined, net, primary

import experiments.diagnosis_models as models
from jaxgrad.diagnosis import rates
from jaxgrad.diagnosis.causes import judge
from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.finding import Finding
from jaxgrad.diagnosis.problem import make_problem

pytestmark = pytest.mark.filterwarnings("ignore")

data = functools.partial(diagnosis_cases.data, count=16)


# --------------------------------------------------------------------------- the optimizer


@pytest.mark.parametrize(("steps", "expected"), [(300_000, "lr.too_low"), (1_000, None)])
def test_a_warm_up_that_never_gets_anywhere_is_too_low_a_rate(steps: int, expected: Any) -> None:
    tx = optax.adamw(optax.linear_schedule(0.0, 3e-3, steps))
    assert primary(cross_entropy, dense((WIDTH, 32, CLASSES)), data(), tx) == expected


@pytest.mark.parametrize(("peak", "expected"), [(1e-5, "lr.too_low"), (3e-3, None)])
def test_a_warm_up_that_is_over_does_not_excuse_the_rate_it_came_to(
    peak: float, expected: Any
) -> None:
    tx = optax.adam(optax.linear_schedule(0.0, peak, 40))
    report = examined(cross_entropy, dense((WIDTH, 32, CLASSES)), data(), tx)
    assert (report.primary and report.primary.code) == expected
    assert report.primary is None or "warms up" not in report.primary.cause


@pytest.mark.parametrize("clips", [(), (optax.clip_by_global_norm(5.0),)])
@pytest.mark.parametrize(("eps", "expected"), [(5.0, "lr.too_low"), (1e-8, None)])
def test_an_epsilon_far_above_the_gradients_is_found(eps: float, expected: Any, clips: Any) -> None:
    tx = optax.chain(*clips, optax.adam(3e-3, eps=eps))
    report = examined(cross_entropy, dense((WIDTH, 64, CLASSES)), data(), tx)
    assert (report.primary and report.primary.code) == expected
    if report.primary is not None:
        assert "epsilon" in report.primary.cause


@pytest.mark.parametrize(("steps", "expected"), [(5, "lr.too_low"), (400, None)])
def test_a_schedule_that_ends_after_a_few_large_steps_is_found(steps: int, expected: Any) -> None:
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    assert primary(cross_entropy, dense((WIDTH, 32, CLASSES)), data(), tx) == expected


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.chain(optax.apply_every(16), optax.sgd(0.4, momentum=0.9)), "accumulation.sums"),
        (optax.chain(optax.apply_every(16), optax.sgd(0.02, momentum=0.9)), None),
        (optax.MultiSteps(optax.sgd(0.2, momentum=0.9), 4), None),
        (optax.MultiSteps(optax.sgd(0.2), 16), None),
    ],
)
def test_a_sum_that_momentum_hides_is_found_where_its_mean_learns(tx: Any, expected: Any) -> None:
    assert primary(cross_entropy, dense((WIDTH, 32, CLASSES)), data(), tx) == expected


@pytest.mark.parametrize(("size", "expected"), [(1, "batch.too_small"), (32, None)])
def test_single_examples_are_not_learned_by_heart(size: int, expected: Any) -> None:
    batches = data(size, count=128 if size == 1 else 16, noise=1.0)
    assert primary(cross_entropy, dense((WIDTH, 64, CLASSES)), batches, optax.sgd(0.5)) == expected


def test_more_batches_are_taken_where_each_holds_next_to_nothing() -> None:
    def count(size: int) -> int:
        batches = data(size, count=200)
        return len(
            make_problem(
                cross_entropy, dense((WIDTH, CLASSES)), batches[0], batches=batches, has_aux=False,
                key=None, trainable=None,
            ).batches
        )  # fmt: skip

    assert [count(size) for size in (1, 2, 8, 16, 64)] == [160, 128, 32, 16, 16]


# --------------------------------------------------------------------------- the parameters


@pytest.mark.parametrize(("second", "expected"), [(0.0, "init.symmetric"), (0.3, None)])
def test_two_tables_of_zeros_never_move(second: float, expected: Any) -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((50, 3))
    batches = []
    for _ in range(8):
        i, j = rng.integers(0, 50, (2, 64)).astype(np.int32)
        batches.append((i, j, (truth[i] * truth[j]).sum(1).astype(np.float32)))

    def loss(tables: Any, batch: Any) -> Any:
        i, j, wanted = batch
        return jnp.mean(((tables["left"][i] * tables["right"][j]).sum(-1) - wanted) ** 2)

    tables = {
        "left": jnp.zeros((50, 4)),
        "right": second * jax.random.normal(jax.random.key(0), (50, 4)),
    }
    assert primary(loss, tables, batches, optax.adam(3e-2)) == expected


@pytest.mark.parametrize(("gain", "expected"), [(4.0, "init.too_large"), (1.0, None)])
def test_a_recurrent_matrix_that_enlarges_its_state_is_named(gain: float, expected: Any) -> None:
    width = 48
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((64, 20, 2)).astype(np.float32) for _ in range(16)]
    batches = [(x, x[:, -4:, 0].sum(1)) for x in xs]
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "into": jax.random.normal(keys[0], (2, width)) * 0.5,
        "again": gain * jax.random.orthogonal(keys[1], width),
        "out": jax.random.normal(keys[2], (width,)) / math.sqrt(width),
    }

    def loss(params: Any, batch: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            return jnp.tanh(x @ params["into"] + h @ params["again"]), None

        first = jnp.zeros((batch[0].shape[0], width))
        last, _ = jax.lax.scan(step, first, batch[0].swapaxes(0, 1))
        return jnp.mean((last @ params["out"] - batch[1]) ** 2)

    report = examined(loss, params, batches, optax.adam(2e-3))
    assert (report.primary and report.primary.code) == expected
    if report.primary is not None:
        assert report.primary.where == "again"


# --------------------------------------------------------------------------- loss and data


@pytest.mark.parametrize(("sign", "expected"), [(1.0, "optimizer.ascent"), (-1.0, None)])
def test_a_binary_likelihood_that_is_minimized_is_found(sign: float, expected: Any) -> None:
    batches = [(x, (y < 2).astype(np.float32)) for x, y in data()]

    def loss(layers: Any, batch: Any) -> Any:
        p = jnp.clip(jax.nn.sigmoid(net(layers, batch[0])[:, 0]), 1e-6, 1 - 1e-6)
        return sign * (batch[1] * jnp.log(p) + (1 - batch[1]) * jnp.log(1 - p)).mean()

    assert primary(loss, dense((WIDTH, 32, 1)), batches, optax.adam(3e-3)) == expected


@pytest.mark.parametrize(("raw", "expected"), [(True, "data.unnormalized"), (False, None)])
def test_raw_columns_and_raw_targets_are_found_together(raw: bool, expected: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((512, 4)).astype(np.float32)
    y = (x[:, 0] + 0.5 * x[:, 1] ** 2).astype(np.float32)
    if raw:
        x = x * np.float32([600, 1, 20, 5000]) + np.float32([2000, 3, 1980, 9000])
        y = 1e5 * y + 4e5
    batches = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 512, 64)]

    def loss(layers: Any, batch: Any) -> Any:
        return jnp.mean((net(layers, batch[0])[:, 0] - batch[1]) ** 2)

    assert primary(loss, dense((4, 32, 32, 1)), batches, optax.adam(2e-3)) == expected


@pytest.mark.parametrize(("weight", "expected"), [(100.0, "regularization.dominates"), (1.0, None)])
def test_a_divergence_that_empties_the_code_dominates(weight: float, expected: Any) -> None:
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((3, 16))
    xs = [(rng.standard_normal((64, 3)) @ mix).astype(np.float32) for _ in range(16)]
    batches = [(x, rng.standard_normal((64, 4)).astype(np.float32)) for x in xs]
    params = {"in": dense((16, 32, 8), gain=1.0), "out": dense((4, 32, 16))}

    def loss(params: Any, batch: Any) -> Any:
        mean, log_var = jnp.split(net(params["in"], batch[0]), 2, -1)
        z = mean + jnp.exp(0.5 * log_var) * batch[1]
        fit = jnp.square(net(params["out"], z) - batch[0]).sum(-1).mean()
        return fit + weight * 0.5 * (jnp.exp(log_var) + mean**2 - 1 - log_var).sum(-1).mean()

    assert primary(loss, params, batches, optax.adam(5e-3)) == expected


# ------------------------------------------------------------------------------------- deep stacks


@pytest.mark.parametrize(
    ("kept", "at_a_tenth", "at_a_third", "found"),
    [(0.004, 0.2, 0.04, True), (0.13, 0.18, 0.04, False), (0.004, 0.01, 0.04, False),
     (0.004, 0.2, 0.004, False)],
    ids=["stalls", "keeps its input", "loses it at any rate", "stalls at any rate"],
)  # fmt: skip
def test_a_stall_is_told_by_what_gentler_steps_get_to_in_the_long_run(
    kept: float, at_a_tenth: float, at_a_third: float, found: bool
) -> None:
    given, third = SimpleNamespace(last=3.47), SimpleNamespace(last=3.3)
    known = {
        "__init__": lambda _: None, "main": given, "longer": given, "steps": 80,
        "run": lambda _, **__: third, "patient": SimpleNamespace(run=lambda **_: third),
        "kept": lambda _, run: kept if run is given else at_a_tenth,
        "progress": lambda _, run: 0.001 if run is given else at_a_third,
    }  # fmt: skip
    kind: Any = type("Known", (Evidence,), known)
    assert bool(rates._stall(kind())) is found


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "expected"), [(12, "norm.post_ln_without_warmup"), (6, None)])
def test_twelve_post_ln_blocks_stall_at_a_rate_at_which_six_train(
    depth: int, expected: Any
) -> None:
    """The copy task of 32 tokens, at Adam 1e-3 (Xiong et al. 2020 on why)."""
    batches = [models.copies(i, count=32, length=32, vocabulary=32) for i in range(16)]

    def loss(params: Any, tokens: Any) -> Any:
        return models.language_loss(params, tokens, placement="post")

    params = models.transformer_params(0, depth=depth, width=64, length=32, vocabulary=32)
    assert primary(loss, params, batches, optax.adam(1e-3)) == expected


# ------------------------------------------------------------------------------- what comes first


@pytest.mark.parametrize(
    ("cured", "first"), [(0.6, "norm.post_ln_without_warmup"), (0.0, "attention.rank_collapse")]
)
def test_tokens_that_are_alike_are_no_cause_where_gentler_steps_train(cured, first):
    collapse = Finding("attention.rank_collapse", "error", "initial", "a", "", {}, "", 0.9)
    post_ln = Finding(
        "norm.post_ln_without_warmup", "error", "counterfactual", "b", "",
        {"taken_off_with_warmup": cured, "taken_off_at_lower_rates": 0.0}, "", 0.85,
    )  # fmt: skip
    chosen, findings = judge([collapse, post_ln])
    assert chosen is not None
    assert chosen.code == first
    assert sum(f.is_alarm for f in findings) == 1
