"""Faulty programs that the rules were not written beside: other frameworks, losses, optimizers."""

# ruff: noqa: E501, E731 (programs as their users write them)
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments import diagnosis_models as m
from experiments.diagnosis_modules import LinenCNN, LinenMLP, eqx_mlp, keyed, linen, mse, nnx_mlp
from experiments.diagnosis_programs import adam, classify, digits_mlp, pre_ln_transformer, program
from experiments.diagnosis_programs_more import PROGRAMS

__all__ = ["PROGRAMS"]


@program("lr.too_high", part="report")
def linen_rate_high(seed: int) -> dict[str, Any]:
    return linen(seed, LinenMLP(), m.digits(seed), adam(1.0))


@program("loss.double_softmax", part="report", where=("out",))
def nnx_softmax_twice(seed: int) -> dict[str, Any]:
    return nnx_mlp(seed, m.digits(seed), adam(), jax.nn.softmax)


@program("optimizer.ascent", part="report")
def eqx_ascent(seed: int) -> dict[str, Any]:
    return eqx_mlp(seed, optax.sgd(-0.05))


@program("optimizer.clip_after_update", part="report", kind="cnn")
def linen_clip_after(seed: int) -> dict[str, Any]:
    tx = optax.chain(optax.adamw(1e-3), optax.clip_by_global_norm(1.0))
    return linen(seed, LinenCNN(), m.digits(seed), tx)


@program(
    "init.activation_mismatch",
    "init.too_small",
    "gradient.vanishing",
    part="report",
    where=("[0]",),
)
def relu_torch_deep(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, optax.sgd(0.05), depth=20, init=m.torch_default)


@program("init.too_small", part="report", where=("Conv_0",), kind="cnn")
def conv_small(seed: int) -> dict[str, Any]:
    model = LinenCNN(norm=False, depth=8, kernel=nn.initializers.normal(0.01))
    return linen(seed, model, m.digits(seed), adam())


@program("init.too_large", part="report", where=("Dense_0",))
def linen_large(seed: int) -> dict[str, Any]:
    return linen(
        seed,
        LinenMLP(widths=(64,) * 5 + (10,), kernel=nn.initializers.normal(0.8)),
        m.digits(seed),
        adam(),
    )


@program("init.symmetric", part="report", where=("layers[0]", "layers[1]"))
def eqx_ones(seed: int) -> dict[str, Any]:
    return eqx_mlp(seed, adam(), edit=lambda w: 0.05 * jnp.ones_like(w))


@program("unit.dead", part="report", where=("Conv_0",), kind="cnn")
def conv_dead(seed: int) -> dict[str, Any]:
    model = LinenCNN(norm=False, bias=nn.initializers.constant(-20.0))
    return linen(seed, model, m.digits(seed), adam())


@program("data.unnormalized", "unit.saturated", part="report", where=("[0]", "batch"))
def tanh_loud_input(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, adam(), act=jnp.tanh, init=m.glorot)
    x, y = made["batch"]
    return made | {"batch": (100 * x, y)}


@program("gradient.exploding", "init.too_large", part="report", where=("cell",), kind="rnn")
def rnn_exploding(seed: int) -> dict[str, Any]:
    params = m.rnn_params(seed, 4, 16, 2, recurrent=m.scaled(9.0))
    return classify(
        params, lambda p, x: m.rnn(p, x, lambda z: z), m.parity(seed, length=40), optax.sgd(0.1)
    )


@program(
    "gradient.vanishing", "init.activation_mismatch", part="report", where=("cell",), kind="rnn"
)
def rnn_vanishing(seed: int) -> dict[str, Any]:
    params = m.rnn_params(seed, 4, 16, 2, recurrent=m.torch_default)
    return classify(params, m.rnn, m.parity(seed, length=50), adam())


@program("regularization.dominates", part="report")
def decay_strong(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, optax.adamw(3e-3, weight_decay=50.0))


@program("accumulation.misweighted", part="report")
def unequal_tokens(seed: int) -> dict[str, Any]:
    params = m.mlp_params(seed, [64, 32, 32, 10])
    rng = np.random.default_rng(seed)

    def loss(p: Any, b: Any) -> Any:
        each = optax.softmax_cross_entropy_with_integer_labels(m.mlp(p, b[0]), b[1])
        return (each * b[2]).sum() / b[2].sum()

    def batch(k: int) -> Any:
        count = (2, 30, 5, 17)[k % 4]
        mask = np.arange(32) < count + rng.integers(0, 2)
        return (*m.digits(10 * seed + k, 32), jnp.asarray(mask, jnp.float32))

    many = [batch(k) for k in range(8)]
    return {
        "loss": loss,
        "params": params,
        "batch": many[0],
        "batches": many,
        "optimizer": optax.MultiSteps(optax.sgd(0.1), 4),
    }


@program("gradient.blocked", part="report", where=("Dense_1",))
def linen_argmax(seed: int) -> dict[str, Any]:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(nn.Dense(32)(x))
            hard = jax.nn.one_hot(nn.Dense(16)(x).argmax(-1), 16)
            return nn.Dense(10)(hard)

    return linen(seed, Model(), m.digits(seed), adam())


@program("gradient.blocked", part="report", where=("one", "two", "out"))
def nnx_cast(seed: int) -> dict[str, Any]:
    return nnx_mlp(
        seed,
        m.digits(seed),
        adam(),
        act=lambda z: nnx.relu(z).astype(jnp.int32).astype(jnp.float32),
    )


@program("gradient.nonfinite", part="report")
def zero_norm(seed: int) -> dict[str, Any]:
    """Normalizes rows, one of which is zero."""
    made = digits_mlp(seed, adam())
    x, y = made["batch"]
    plain = made["loss"]
    unit = lambda h: h / jnp.maximum(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-6)
    return made | {"loss": lambda p, b: plain(p[1:], (unit(b[0] @ p[0]["w"] @ p[0]["w"].T[:, :32]), b[1])),
                   "batch": (x.at[0].set(0.0), y)}  # fmt: skip


@program("gradient.nonfinite", part="report", where=("cell",), kind="rnn")
def rnn_norm_nan(seed: int) -> dict[str, Any]:
    params = m.rnn_params(seed, 4, 16, 2)
    act = lambda z: jnp.tanh(z) / (1.0 + jnp.linalg.norm(z - z.mean(0), axis=-1, keepdims=True))
    x, y = m.parity(seed)
    x = x.at[:, 0].set(0.0)  # at the first step all rows are zero: the norm of zero
    return classify(params, lambda p, x: m.rnn(p, x, act), (x, y), adam())


@program("loss.output_mismatch", part="report")
def double_sigmoid(seed: int) -> dict[str, Any]:
    params = m.mlp_params(seed, [2, 32, 32, 1])
    loss = lambda z, y: optax.sigmoid_binary_cross_entropy(jax.nn.sigmoid(z)[:, 0], y).mean()
    return classify(params, m.mlp, m.circle(seed), adam(1e-2), loss)


@program("loss.output_mismatch", part="report")
def broadcast_targets(seed: int) -> dict[str, Any]:
    params = m.mlp_params(seed, [8, 32, 32, 1])
    x, y = m.regression(seed)
    return classify(params, m.mlp, (x, y[:, 0]), adam(), mse)


@program("loss.output_mismatch", part="report")
def log_of_linear(seed: int) -> dict[str, Any]:
    params = m.mlp_params(seed, [2, 32, 32, 1])
    bce = lambda p, y: -(y * jnp.log(p[:, 0]) + (1 - y) * jnp.log(1 - p[:, 0])).mean()
    return classify(params, m.mlp, m.circle(seed), adam(), bce)


@program("data.labels_out_of_range", part="report")
def negative_labels(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, adam())
    x, y = made["batch"]
    return made | {"batch": (x, y - 1)}


@program("norm.batch_of_one", part="report", where=("BatchNorm_0",))
def linen_batch_of_one(seed: int) -> dict[str, Any]:
    return linen(
        seed,
        LinenMLP(norm=lambda: nn.BatchNorm(use_running_average=False)),
        m.digits(seed, 1),
        adam(),
    )


@program("batch.too_small", "lr.too_high", part="report")
def batch_tiny(seed: int) -> dict[str, Any]:
    params = m.mlp_params(seed, [64, 32, 32, 10])
    many = [m.digits(100 * seed + k, 2) for k in range(16)]
    return classify(params, m.mlp, many[0], optax.sgd(0.7), batches=many)


@program("loss.spike", part="report")
def corrupted_batch(seed: int) -> dict[str, Any]:
    params = m.mlp_params(seed, [64, 32, 32, 10])
    many = [m.digits(100 * seed + k, 64) for k in range(15)]
    x, y = m.digits(seed + 77, 64)
    many.append((300 * x, (y + 3) % 10))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    return classify(params, m.mlp, many[0], tx, batches=many)


@program("optimizer.ascent", part="report")
def loss_flipped(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, adam())
    plain = made["loss"]
    return made | {"loss": lambda p, b: -plain(p, b)}


@program("regularization.dropout_too_strong", part="report")
def linen_dropout_strong(seed: int) -> dict[str, Any]:
    return keyed(seed, LinenMLP(rate=0.95, widths=(64, 64, 10)), m.digits(seed), adam(3e-3))


@program("optimizer.clip_always", part="report")
def clip_tiny_adam(seed: int) -> dict[str, Any]:
    tx = optax.chain(optax.clip_by_global_norm(1e-4), optax.adamw(1e-3))
    return digits_mlp(seed, tx)


@program("lr.too_low", part="report", kind="transformer")
def transformer_rate_low(seed: int) -> dict[str, Any]:
    return pre_ln_transformer(seed, adam(1e-7))


@program("lr.too_high", part="report", kind="transformer")
def transformer_rate_high(seed: int) -> dict[str, Any]:
    return pre_ln_transformer(seed, adam(0.3))


@program("accumulation.sums", part="report")
def linen_sums(seed: int) -> dict[str, Any]:
    return linen(
        seed, LinenMLP(), m.digits(seed), optax.MultiSteps(optax.adam(1e-3), 4, use_grad_mean=False)
    )
