"""Diagnosis of faults as people make them in public code, each beside its mended twin."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diagnosis_cases import CLASSES, WIDTH, cross_entropy, data, dense, examined, net, primary

import jaxgrad as jg
from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.problem import make_problem

pytestmark = pytest.mark.filterwarnings("ignore")


def binary(**how: Any) -> list[Any]:
    return [(x, (y < 2).astype(np.float32)) for x, y in data(**how)]


def guess_of(loss: Any, params: Any, batch: Any) -> float:
    problem = make_problem(
        loss, params, batch, batches=None, has_aux=False, key=None, trainable=None
    )
    found = Evidence(problem, None, None).baseline
    assert found is not None
    return found


# ------------------------------------------------------------------- numbers that are none


def test_a_masks_infinity_times_zero_is_no_matter_of_weights() -> None:
    def loss(layers: Any, batch: Any, low: float) -> Any:
        allowed = jnp.arange(CLASSES)[None] != (batch[1][:, None] + 1) % CLASSES
        logs = jax.nn.log_softmax(jnp.where(allowed, net(layers, batch[0]), low))
        entropy = -(jnp.exp(logs) * logs).sum(-1).mean()
        return -jnp.take_along_axis(logs, batch[1][:, None], 1).mean() - 0.01 * entropy

    report = examined(lambda p, b: loss(p, b, -jnp.inf), dense(), data())
    assert report.primary is not None
    assert report.primary.code == "gradient.nonfinite"
    assert report.primary.evidence["operation"] == "mul"
    assert "writes itself" in report.primary.cause
    assert primary(lambda p, b: loss(p, b, -1e8), dense(), data()) is None


def test_a_constant_column_divided_by_its_deviation_is_found_at_the_division() -> None:
    batches = [(np.concatenate([x, 0 * x[:, :1]], 1), y) for x, y in data()]

    def loss(layers: Any, batch: Any) -> Any:
        x = (batch[0] - batch[0].mean(0)) / batch[0].std(0)
        return cross_entropy(layers, (x, batch[1]))

    report = examined(loss, dense((WIDTH + 1, 16, CLASSES)), batches)
    assert report.primary is not None
    assert report.primary.code == "gradient.nonfinite"
    assert report.primary.evidence["operation"] == "div"
    assert report.primary.where == "layers[0]"  # the layer that reads it: the data have none


def test_an_overflow_behind_usual_weights_is_not_laid_on_them() -> None:
    def loss(layers: Any, batch: Any) -> Any:
        rate = net(layers, batch[0])[:, 0] + 100.0  # of a Poisson distribution
        return jnp.mean(jnp.exp(rate) - batch[1] * rate)

    report = examined(loss, dense(), data())
    assert report.primary is not None
    assert report.primary.code == "gradient.nonfinite"
    assert report.primary.evidence["operation"] == "exp"


def test_a_batch_with_a_missing_value_is_named() -> None:
    batches = data()
    batches[3][0][5, 2] = np.nan
    report = examined(cross_entropy, dense(), batches)
    assert report.primary is not None
    assert report.primary.code == "gradient.nonfinite"
    assert report.primary.where == "batch[0]"
    assert report.primary.evidence["batch"] == 3


def test_missing_labels_that_are_masked_are_healthy() -> None:
    batches = [(x, np.where(np.arange(len(y)) % 5 == 0, np.nan, y)) for x, y in binary()]

    def loss(layers: Any, batch: Any) -> Any:
        known = ~jnp.isnan(batch[1])
        each = optax.sigmoid_binary_cross_entropy(
            net(layers, batch[0])[:, 0], jnp.where(known, batch[1], 0.0)
        )
        return jnp.where(known, each, 0.0).sum() / known.sum()

    assert primary(loss, dense((WIDTH, 16, 1)), batches) is None


def test_float16_parameters_under_adam_are_a_matter_of_precision() -> None:
    half = jax.tree.map(lambda p: p.astype(jnp.float16), dense())

    def loss(layers: Any, batch: Any) -> Any:
        logits = net(layers, batch[0].astype(jnp.float16)).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    assert primary(loss, half, data(), optax.adam(1e-2)) == "precision.underflow"


def test_an_optimizer_that_divides_zero_by_zero_is_named() -> None:
    batches = [(np.concatenate([x, 0 * x[:, :1]], 1), y) for x, y in data()]
    layers = dense((WIDTH + 1, 16, CLASSES))
    report = examined(cross_entropy, layers, batches, optax.adam(1e-2, eps=0.0))
    assert report.primary is not None
    assert (report.primary.code, report.primary.where) == ("gradient.nonfinite", "optimizer")
    assert report.primary.evidence["layers"] == ["layers[0]/w"]


# ------------------------------------------------------------------- losses and labels


def test_the_loss_of_a_guess_is_that_of_equal_logits_however_it_is_reduced() -> None:
    x, y = data()[0]
    mean = guess_of(cross_entropy, dense(), (x, y))
    total = guess_of(lambda p, b: cross_entropy(p, b) * len(y), dense(), (x, y))
    np.testing.assert_allclose(mean, math.log(CLASSES), rtol=1e-6)
    np.testing.assert_allclose(total, len(y) * math.log(CLASSES), rtol=1e-6)
    two = binary()[0]

    def bce(layers: Any, batch: Any) -> Any:
        p = jax.nn.sigmoid(net(layers, batch[0])[:, 0])
        return -jnp.mean(batch[1] * jnp.log(p) + (1 - batch[1]) * jnp.log(1 - p))

    np.testing.assert_allclose(guess_of(bce, dense((WIDTH, 16, 1)), two), math.log(2), rtol=1e-6)

    def mse(layers: Any, batch: Any) -> Any:
        return jnp.mean((net(layers, batch[0])[:, 0] - batch[1]) ** 2)

    expected = float(np.mean(two[1] ** 2))
    np.testing.assert_allclose(guess_of(mse, dense((WIDTH, 16, 1)), two), expected, rtol=1e-6)


def test_a_summed_loss_hides_no_rate_that_is_too_high() -> None:
    def loss(layers: Any, batch: Any) -> Any:
        return len(batch[1]) * 16 * cross_entropy(layers, batch)

    assert primary(loss, dense(), data(), optax.sgd(0.3, 0.9)) == "lr.too_high"
    assert primary(cross_entropy, dense(), data(), optax.sgd(0.3, 0.9)) is None


def test_raw_columns_show_beside_a_binary_cross_entropy_too() -> None:
    """The first loss is so large that falling to a guess looks like learning."""
    scales = np.geomspace(1e-2, 1e3, WIDTH).astype(np.float32)

    def loss(layers: Any, batch: Any) -> Any:
        return optax.sigmoid_binary_cross_entropy(net(layers, batch[0])[:, 0], batch[1]).mean()

    layers = dense((WIDTH, 16, 16, 1))
    raw = [(x * scales + scales, y) for x, y in binary()]
    assert primary(loss, layers, raw, optax.sgd(0.05)) == "data.unnormalized"
    assert primary(loss, layers, binary(), optax.sgd(0.05)) is None


def test_a_binary_cross_entropy_of_a_column_against_a_row_is_a_mismatch() -> None:
    def loss(layers: Any, batch: Any) -> Any:
        return optax.sigmoid_binary_cross_entropy(net(layers, batch[0]), batch[1]).mean()

    report = examined(loss, dense((WIDTH, 16, 1)), binary())
    assert report.primary is not None
    assert report.primary.code == "loss.output_mismatch"
    assert "(32, 1)" in report.primary.cause and "(32,)" in report.primary.cause
    columns = [(x, y[:, None]) for x, y in binary()]
    assert primary(loss, dense((WIDTH, 16, 1)), columns) is None


@pytest.mark.parametrize("change", [lambda y: 2 * y - 1, lambda y: 16 * y])
def test_binary_targets_that_are_no_probabilities_are_out_of_range(change: Any) -> None:
    def loss(layers: Any, batch: Any) -> Any:
        return optax.sigmoid_binary_cross_entropy(net(layers, batch[0])[:, 0], batch[1]).mean()

    wrong = [(x, change(y)) for x, y in binary()]
    assert primary(loss, dense((WIDTH, 16, 1)), wrong) == "data.labels_out_of_range"


def test_advantages_that_weigh_a_log_probability_are_no_labels() -> None:
    batches = [(x, y, x[:, 0] * (2 * y - 1)) for x, y in binary()]

    def loss(layers: Any, batch: Any) -> Any:
        z = net(layers, batch[0])[:, 0]
        logs = jnp.where(batch[1] > 0, jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z))
        return -(logs * jnp.clip(batch[2], -1, 1)).mean() + 0.01 * jnp.square(z).mean()

    assert primary(loss, dense((WIDTH, 16, 1)), batches) is None


@pytest.mark.parametrize(
    ("masked", "expected"), [(False, "data.labels_out_of_range"), (True, None)]
)
def test_padding_labels_are_out_of_range_where_nothing_masks_them(
    masked: bool, expected: str | None
) -> None:
    batches = [(x, np.where(np.arange(len(y)) % 3 == 0, -1, y)) for x, y in data()]

    def loss(layers: Any, batch: Any) -> Any:
        logs = jax.nn.log_softmax(net(layers, batch[0]))
        each = -jnp.take_along_axis(logs, batch[1][:, None], 1)[:, 0]
        known = batch[1] != -1
        return (each * known).sum() / known.sum() if masked else each.mean()

    assert primary(loss, dense(), batches) == expected


def test_the_logarithm_of_clipped_logits_is_a_mismatch() -> None:
    def loss(layers: Any, batch: Any, last: Any) -> Any:
        p = jnp.clip(last(net(layers, batch[0])[:, 0]), 1e-7, 1 - 1e-7)
        return -jnp.mean(batch[1] * jnp.log(p) + (1 - batch[1]) * jnp.log(1 - p))

    layers = dense((WIDTH, 16, 1))
    bare = examined(lambda p, b: loss(p, b, lambda z: z), layers, binary())
    assert bare.primary is not None
    assert bare.primary.code == "loss.output_mismatch" and "clipped" in bare.primary.cause
    assert primary(lambda p, b: loss(p, b, jax.nn.sigmoid), layers, binary()) is None


def test_logarithms_of_what_is_positive_by_its_making_are_healthy() -> None:
    """log(1 - p) as log(-expm1(log p)), and log(1 + x) of a flow: negative, and no probability."""

    def loss(layers: Any, batch: Any) -> Any:
        z = net(layers, batch[0])[:, 0]
        logp = jax.nn.log_sigmoid(z)
        logs = batch[1] * logp + (1 - batch[1]) * jnp.log(-jnp.expm1(logp))
        return -jnp.mean(logs) - 0.01 * jnp.mean(jnp.log(1 + 0.5 * jnp.tanh(z)))

    assert primary(loss, dense((WIDTH, 16, 1)), binary()) is None


def test_values_of_actions_behind_a_rectifier_cannot_be_negative() -> None:
    batches = [(x, y, -1 - np.abs(x[:, 0])) for x, y in data()]

    def loss(layers: Any, batch: Any) -> Any:
        values = jax.nn.relu(net(layers, batch[0]))
        taken = jnp.take_along_axis(values, batch[1][:, None], 1)[:, 0]
        return jnp.mean((taken - batch[2]) ** 2)

    assert primary(loss, dense(), batches) == "loss.output_mismatch"


def test_a_mean_over_the_batch_is_found_and_one_over_time_is_not() -> None:
    rng = np.random.default_rng(0)
    batches = [(rng.standard_normal((5, 32, WIDTH)).astype(np.float32), y) for _, y in data()]

    def loss(layers: Any, batch: Any, axis: Any) -> Any:
        h = jax.nn.relu(batch[0] @ layers[0]["w"])
        pooled = jnp.broadcast_to(h.mean(axis), (32, h.shape[-1]))
        logits = pooled @ layers[1]["w"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    swapped = [(np.swapaxes(x, 0, 1).copy(), y) for x, y in batches]  # (example, time, feature)
    found = examined(lambda p, b: loss(p, b, (0, 1)), dense(), swapped)
    assert found.primary is not None
    assert found.primary.code == "loss.output_mismatch" and "average" in found.primary.cause
    over_time = examined(lambda p, b: loss(p, b, 0), dense(), batches)
    assert all(f.code != "loss.output_mismatch" for f in over_time.findings)


# ------------------------------------------------------------------- data, norms, rates


def test_bytes_that_underflow_a_softmax_are_named_before_the_infinity() -> None:
    def loss(layers: Any, batch: Any) -> Any:
        p = jax.nn.softmax(net(layers, batch[0]))
        return -jnp.mean(jnp.log(jnp.take_along_axis(p, batch[1][:, None], 1)))

    report = examined(loss, dense((WIDTH, 32, 32, CLASSES)), data(scale=120.0))
    assert report.primary is not None and report.primary.code == "data.unnormalized"
    assert any(f.code == "gradient.nonfinite" and f.consequence_of for f in report.findings)


def test_one_corrupt_batch_is_told_from_a_high_rate() -> None:
    batches = data(count=12)
    batches[7] = (batches[7][0] * 300, batches[7][1])
    report = examined(cross_entropy, dense(), batches, optax.sgd(0.05, 0.9))
    assert report.primary is not None
    assert report.primary.code == "loss.spike"
    assert report.primary.evidence["batches"] == [7]


def test_a_norm_over_a_single_unit_is_found_and_a_length_is_not() -> None:
    def loss(layers: Any, batch: Any) -> Any:
        z = net(layers, batch[0])
        z = (z - z.mean(-1, keepdims=True)) * jax.lax.rsqrt(z.var(-1, keepdims=True) + 1e-6)
        return jnp.mean((z[:, 0] - batch[1]) ** 2)

    assert primary(loss, dense((WIDTH, 16, 1)), binary()) == "norm.batch_of_one"

    def length(layers: Any, batch: Any) -> Any:
        z = net(layers, batch[0]) + 0.5
        return jnp.mean((jnp.sqrt(jnp.sum(z**2, -1) + 1e-6) - batch[1]) ** 2)

    assert primary(length, dense((WIDTH, 16, 1)), binary()) is None


@pytest.mark.parametrize(("steps", "expected"), [(1, "lr.too_low"), (100, None)])
def test_a_schedule_that_decays_with_every_step_ends_the_training(
    steps: int, expected: str | None
) -> None:
    schedule = optax.exponential_decay(1e-3, transition_steps=steps, decay_rate=0.5)
    assert primary(cross_entropy, dense(), data(), optax.adam(schedule)) == expected


@pytest.mark.slow
def test_a_run_that_recovers_from_a_bad_start_has_no_high_rate() -> None:
    """A codebook whose vectors must first be found: the loss rises, and falls later."""
    hk = pytest.importorskip("haiku")
    train = jg.data.digits(scale="unit").train
    images = train.x.reshape(-1, 8, 8, 1)
    batches = [(images[64 * i : 64 * i + 64],) for i in range(16)]

    def model(x: Any) -> Any:
        h = hk.Conv2D(32, 3)(jax.nn.relu(hk.Conv2D(32, 4, stride=2)(x)))
        h = h + hk.Conv2D(32, 1)(jax.nn.relu(hk.Conv2D(16, 3)(jax.nn.relu(h))))
        h = hk.Conv2D(16, 1)(jax.nn.relu(h))
        code = hk.nets.VectorQuantizer(16, 64, 0.25)(h, is_training=True)
        y = hk.Conv2DTranspose(1, 4, stride=2)(jax.nn.relu(hk.Conv2D(32, 3)(code["quantize"])))
        return jnp.mean((y - x) ** 2) / 0.14 + code["loss"]

    net_ = hk.without_apply_rng(hk.transform(model))
    params = net_.init(jax.random.PRNGKey(0), batches[0][0])
    loss = lambda p, b: net_.apply(p, b[0])  # noqa: E731
    assert primary(loss, params, batches, optax.adam(1e-3)) is None
    assert primary(loss, params, batches, optax.adam(0.3)) is not None


def test_a_boundary_condition_that_is_met_is_no_penalty_that_dominates() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = ((1, 32), (32, 32), (32, 1))
    params = [
        (jax.random.normal(k, s) / s[0] ** 0.5, jnp.zeros(s[1]))
        for k, s in zip(keys, sizes, strict=True)
    ]

    def solution(params: Any, t: Any) -> Any:
        h = t[None]
        for w, b in params[:-1]:
            h = jnp.tanh(h @ w + b)
        return (h @ params[-1][0] + params[-1][1])[0]

    def loss(params: Any, times: Any) -> Any:
        def residual(t: Any) -> Any:
            return jax.grad(solution, 1)(params, t) + solution(params, t) - jnp.cos(t)

        start = solution(params, jnp.float32(0)) - 1
        return jnp.mean(jax.vmap(residual)(times) ** 2) + 10 * start**2

    times = 4 * jax.random.uniform(keys[0], (64,))
    assert jg.diagnose(loss, params, times, optimizer=optax.adam(2e-3)).primary is None
