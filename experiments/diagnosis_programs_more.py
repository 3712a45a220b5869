"""Programs that the rules were not written beside: other frameworks, losses and optimizers."""

# ruff: noqa: E501, E731 (programs as their users write them)
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments import diagnosis_models as m
from experiments.diagnosis_programs import (
    PROGRAMS,
    adam,
    classify,
    digits_mlp,
    pre_ln_transformer,
    program,
)

__all__ = ["PROGRAMS"]

mse = lambda out, y: jnp.square(out - y).mean()


class LinenMLP(nn.Module):
    widths: tuple = (32, 32, 10)
    rate: float = 0.0
    act: Any = nn.relu
    kernel: Any = nn.initializers.lecun_normal()
    norm: Any = None
    bias: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for width in self.widths[:-1]:
            x = nn.Dense(width, kernel_init=self.kernel, bias_init=self.bias)(x)
            x = self.norm()(x) if self.norm else x
            x = self.act(x)
            x = nn.Dropout(self.rate, deterministic=False)(x) if self.rate else x
        return nn.Dense(self.widths[-1])(x)


class LinenCNN(nn.Module):
    norm: bool = True
    depth: int = 3
    kernel: Any = nn.initializers.he_normal()
    bias: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = x.reshape(-1, 8, 8, 1)
        for i in range(self.depth):
            x = nn.Conv(
                8, (3, 3), strides=2 if i < 2 else 1, kernel_init=self.kernel, bias_init=self.bias
            )(x)
            x = nn.BatchNorm(use_running_average=False)(x) if self.norm else x
            x = nn.relu(x)
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def linen(
    seed: int, model: Any, data: Any, tx: Any, loss: Any = m.cross_entropy, **more: Any
) -> dict[str, Any]:
    """A linen model; batch statistics, if any, are updated and thrown away."""
    rngs = {"params": jax.random.key(seed), "dropout": jax.random.key(1)}
    variables = model.init(rngs, data[0])
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def objective(params: Any, batch: Any, key: Any = None) -> Any:
        rngs = None if key is None else {"dropout": key}
        out = model.apply(
            {"params": params, **rest}, batch[0], rngs=rngs, mutable=list(rest) or False
        )
        return loss(out[0] if rest else out, batch[1])

    return {"loss": objective, "params": params, "batch": data, "optimizer": tx, **more}


def keyed(seed: int, model: Any, data: Any, tx: Any) -> dict[str, Any]:
    return linen(seed, model, data, tx, key=jax.random.key(seed))


# ----------------------------------------------------------------------------------------- healthy


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


def nnx_mlp(
    seed: int, data: Any, tx: Any, wrap: Any = lambda z: z, act: Any = nnx.relu
) -> dict[str, Any]:
    class Model(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.one, self.two = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 32, rngs=rngs)
            self.out = nnx.Linear(32, 10, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.out(act(self.two(act(self.one(x)))))

    graph, state = nnx.split(Model(nnx.Rngs(seed)))
    loss = lambda state, b: m.cross_entropy(wrap(nnx.merge(graph, state)(b[0])), b[1])
    return {"loss": loss, "params": state, "batch": data, "optimizer": tx}


@program(part="report")
def nnx_plain(seed: int) -> dict[str, Any]:
    return nnx_mlp(seed, m.digits(seed), optax.rmsprop(1e-3))


def eqx_mlp(seed: int, tx: Any, edit: Any = lambda w: w, wrap: Any = lambda z: z) -> dict[str, Any]:
    model = eqx.nn.MLP(64, 10, 32, 3, activation=jax.nn.silu, key=jax.random.key(seed))
    weights = lambda t: [layer.weight for layer in t.layers[:-1]]
    model = eqx.tree_at(weights, model, [edit(w) for w in weights(model)])
    biases = lambda t: [layer.bias for layer in t.layers]
    model = eqx.tree_at(biases, model, [jnp.zeros_like(b) for b in biases(model)])

    def loss(model: Any, batch: Any) -> Any:
        return m.cross_entropy(wrap(jax.vmap(model)(batch[0])), batch[1])

    return {"loss": loss, "params": model, "batch": m.digits(seed), "optimizer": tx}


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


# ------------------------------------------------------------------------------------------ faulty


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
