"""Healthy programs that the rules were not written beside: other frameworks, losses, optimizers."""

# ruff: noqa: E731 (programs as their users write them)
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import diagnosis_models as m
from experiments.diagnosis_faults import PROGRAMS
from experiments.diagnosis_modules import LinenCNN, LinenMLP, eqx_mlp, keyed, linen, nnx_mlp
from experiments.diagnosis_programs import adam, classify, digits_mlp, program

__all__ = ["PROGRAMS"]


@program(part="report")
def linen_dropout(seed: int) -> dict[str, Any]:
    return keyed(seed, LinenMLP(rate=0.3, widths=(64, 64, 10)), m.digits(seed), adam(3e-3))


@program(part="report", kind="cnn")
def linen_batch_norm(seed: int) -> dict[str, Any]:
    return linen(seed, LinenCNN(), m.digits(seed), optax.sgd(0.1, momentum=0.9, nesterov=True))


@program(part="report", kind="rnn")
def linen_gru(seed: int) -> dict[str, Any]:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(2)(nn.RNN(nn.GRUCell(16))(x)[:, -1])

    return linen(seed, Model(), m.parity(seed), adam(1e-2))


@program(part="report", kind="transformer")
def linen_encoder(seed: int) -> dict[str, Any]:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Dense(16)(x)
            for _ in range(2):
                x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
                x = x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))
            return nn.Dense(2)(nn.LayerNorm()(x).mean(1))

    return linen(seed, Model(), m.parity(seed), optax.adamw(2e-3))


@program(part="report")
def nnx_plain(seed: int) -> dict[str, Any]:
    return nnx_mlp(seed, m.digits(seed), optax.rmsprop(1e-3))


@program(part="report")
def eqx_plain(seed: int) -> dict[str, Any]:
    return eqx_mlp(seed, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3)))


@program(part="report", kind="rnn")
def eqx_gru(seed: int) -> dict[str, Any]:
    k1, k2 = jax.random.split(jax.random.key(seed))
    params = (eqx.nn.GRUCell(4, 16, key=k1), eqx.nn.Linear(16, 2, key=k2))

    def loss(params: Any, batch: Any) -> Any:
        def one(xs: Any) -> Any:
            h, _ = jax.lax.scan(lambda h, x: (params[0](x, h), None), jnp.zeros(16), xs)
            return params[1](h)

        return m.cross_entropy(jax.vmap(one)(batch[0]), batch[1])

    return {"loss": loss, "params": params, "batch": m.parity(seed), "optimizer": adam(1e-2)}


@program(part="report")
def autoencoder_bce(seed: int) -> dict[str, Any]:
    x, _ = m.digits(seed)
    x = (x - x.min()) / (x.max() - x.min())
    params = m.mlp_params(seed, [64, 32, 8, 32, 64])
    loss = lambda p, b: optax.sigmoid_binary_cross_entropy(m.mlp(p, b), b).mean()
    return {"loss": loss, "params": params, "batch": x, "optimizer": adam(3e-3)}


@program(part="report")
def vae(seed: int) -> dict[str, Any]:
    x, _ = m.digits(seed)
    params = {"enc": m.mlp_params(seed, [64, 32, 8]), "dec": m.mlp_params(seed + 1, [4, 32, 64])}

    def loss(p: Any, x: Any, key: Any) -> Any:
        mean, log_var = jnp.split(m.mlp(p["enc"], x), 2, axis=-1)
        z = mean + jnp.exp(0.5 * log_var) * jax.random.normal(key, mean.shape)
        kl = 0.5 * (jnp.exp(log_var) + jnp.square(mean) - 1 - log_var).sum(-1).mean()
        return jnp.square(m.mlp(p["dec"], z) - x).sum(-1).mean() + kl

    return {
        "loss": loss,
        "params": params,
        "batch": x,
        "optimizer": adam(),
        "key": jax.random.key(0),
    }


@program(part="report")
def generator_step(seed: int) -> dict[str, Any]:
    params = {"gen": m.mlp_params(seed, [8, 32, 2]), "disc": m.mlp_params(seed + 1, [2, 32, 1])}

    def loss(p: Any, z: Any) -> Any:
        logits = m.mlp(jax.lax.stop_gradient(p["disc"]), m.mlp(p["gen"], z))
        return jax.nn.softplus(-logits).mean()

    return {"loss": loss, "params": params, "batch": m.regression(seed)[0], "optimizer": adam()}


@program(part="report")
def contrastive(seed: int) -> dict[str, Any]:
    x, _ = m.digits(seed, 32)
    params = {"a": m.mlp_params(seed, [32, 32, 16]), "b": m.mlp_params(seed + 1, [32, 32, 16])}

    def loss(p: Any, x: Any) -> Any:
        unit = lambda h: h / jnp.linalg.norm(h, axis=-1, keepdims=True)
        sims = unit(m.mlp(p["a"], x[:, :32])) @ unit(m.mlp(p["b"], x[:, 32:])).T / 0.1
        labels = jnp.arange(len(x))
        return 0.5 * (m.cross_entropy(sims, labels) + m.cross_entropy(sims.T, labels))

    return {"loss": loss, "params": params, "batch": x, "optimizer": adam()}


@program(part="report")
def embedding_bag(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    params = {
        "embed": 0.1 * jax.random.normal(jax.random.key(seed), (500, 16)),
        "head": m.mlp_params(seed, [16, 32, 4]),
    }
    tokens, labels = jnp.asarray(rng.integers(0, 500, (32, 6))), jnp.asarray(rng.integers(0, 4, 32))
    return classify(
        params, lambda p, t: m.mlp(p["head"], p["embed"][t].mean(1)), (tokens, labels), adam(1e-2)
    )


@program(part="report")
def straight_through(seed: int) -> dict[str, Any]:
    def quantized(x: Any) -> Any:
        return x + jax.lax.stop_gradient(jnp.round(4 * x) / 4 - x)

    return digits_mlp(seed, adam(), act=lambda z: quantized(jax.nn.relu(z)))


@program(part="report")
def ridge_penalty(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, optax.sgd(0.1))
    plain = made["loss"]
    return made | {
        "loss": lambda p, b: plain(p, b) + 1e-4 * sum(jnp.square(q["w"]).sum() for q in p)
    }


@program(part="report")
def masked_labels(seed: int) -> dict[str, Any]:
    x, y = m.digits(seed)
    y = y.at[::4].set(-1)
    params = m.mlp_params(seed, [64, 32, 32, 10])

    def loss(p: Any, b: Any) -> Any:
        each = optax.softmax_cross_entropy_with_integer_labels(m.mlp(p, b[0]), jnp.maximum(b[1], 0))
        mask = b[1] >= 0
        return (each * mask).sum() / mask.sum()

    return {"loss": loss, "params": params, "batch": (x, y), "optimizer": adam()}


@program(part="report")
def smoothed_labels(seed: int) -> dict[str, Any]:
    smooth = lambda z, y: optax.softmax_cross_entropy(
        z, optax.smooth_labels(jax.nn.one_hot(y, 10), 0.1)
    ).mean()
    params = m.mlp_params(seed, [64, 32, 32, 10])
    return classify(params, m.mlp, m.digits(seed), optax.lion(1e-3), smooth)


@program(part="report")
def sigmoid_shallow(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, adam(1e-2), depth=2, act=jax.nn.sigmoid, init=m.glorot)


@program(part="report")
def pixels_zero_one(seed: int) -> dict[str, Any]:
    x, y = m.digits(seed)
    x = (x - x.min()) / (x.max() - x.min())
    return digits_mlp(seed, adam(3e-3)) | {"batch": (x, y)}


@program(part="report")
def heteroscedastic(seed: int) -> dict[str, Any]:
    """A Gaussian likelihood: its negative logarithm goes below zero."""
    params = m.mlp_params(seed, [8, 32, 32, 2])

    def loss(p: Any, b: Any) -> Any:
        mean, log_std = jnp.split(m.mlp(p, b[0]), 2, axis=-1)
        return (0.5 * jnp.square((b[1] - mean) / jnp.exp(log_std)) + log_std).mean()

    return {
        "loss": loss,
        "params": params,
        "batch": m.regression(seed, scale=0.1),
        "optimizer": adam(),
    }


@program(part="report")
def policy_gradient(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    params = m.mlp_params(seed, [8, 32, 4])
    batch = (
        m.regression(seed)[0],
        jnp.asarray(rng.integers(0, 4, 128)),
        jnp.asarray(rng.standard_normal(128), jnp.float32),
    )

    def loss(p: Any, b: Any) -> Any:
        logp = jnp.take_along_axis(jax.nn.log_softmax(m.mlp(p, b[0])), b[1][:, None], axis=1)[:, 0]
        return -(logp * b[2]).mean()

    return {"loss": loss, "params": params, "batch": batch, "optimizer": adam()}


@program(part="report")
def physics_informed(seed: int) -> dict[str, Any]:
    params = m.mlp_params(seed, [1, 32, 32, 1], m.glorot)
    x = jnp.linspace(-1, 1, 64)

    def loss(p: Any, x: Any) -> Any:
        u = lambda s: m.mlp(p, s.reshape(1, 1), jnp.tanh)[0, 0]
        residual = jax.vmap(jax.grad(jax.grad(u)))(x) + jnp.pi**2 * jnp.sin(jnp.pi * x)
        return jnp.square(residual).mean() + u(jnp.array(-1.0)) ** 2 + u(jnp.array(1.0)) ** 2

    return {"loss": loss, "params": params, "batch": x, "optimizer": adam(3e-3)}


@program(part="report")
def sum_loss(seed: int) -> dict[str, Any]:
    params = m.mlp_params(seed, [64, 32, 32, 10])
    total = lambda z, y: m.cross_entropy(z, y) * len(y)
    tx = optax.chain(optax.clip_by_global_norm(50.0), optax.adam(1e-3))
    return classify(params, m.mlp, m.digits(seed), tx, total)


@program(part="report")
def frozen_by_optimizer(seed: int) -> dict[str, Any]:
    params = {"embed": m.mlp_params(seed, [64, 32, 32]), "head": m.mlp_params(seed + 1, [32, 10])}
    labels = {"embed": "frozen", "head": "train"}
    tx = optax.multi_transform({"train": adam(1e-2), "frozen": optax.set_to_zero()}, labels)
    return classify(
        params, lambda p, x: m.mlp(p["head"], jax.nn.relu(m.mlp(p["embed"], x))), m.digits(seed), tx
    )


@program(part="report")
def adafactor(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, optax.adafactor(1e-2), act=jax.nn.gelu)


@program(part="report")
def long_warmup(seed: int) -> dict[str, Any]:
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 2000, 20000)
    return digits_mlp(seed, optax.adamw(rate))


@program(part="report", kind="transformer")
def float16_scaled(seed: int) -> dict[str, Any]:
    """Half precision with a loss scale that the gradients are divided by."""
    made = digits_mlp(seed, optax.chain(optax.scale(1 / 1024), optax.sgd(0.1)))
    half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float16), tree)

    def loss(p: Any, b: Any) -> Any:
        logits = m.mlp(half(p), b[0].astype(jnp.float16)).astype(jnp.float32)
        return 1024 * m.cross_entropy(logits, b[1])

    return made | {"loss": loss}
