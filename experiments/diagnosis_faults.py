"""Programs of the first round, each faulty in one known way."""

# ruff: noqa: E501, E731 (programs as their users write them)
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import diagnosis_models as m
from experiments.diagnosis_programs import (
    PROGRAMS,
    adam,
    classify,
    digits_mlp,
    program,
    with_dropout,
)

__all__ = ["PROGRAMS"]


@program("optimizer.clip_after_update")
def clip_after_adam(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, optax.chain(optax.adam(1e-2), optax.clip_by_global_norm(0.1)))


@program("optimizer.clip_after_update", kind="rnn")
def clip_after_momentum(seed: int) -> dict[str, Any]:
    params = m.rnn_params(seed, 4, 16, 2)
    tx = optax.chain(optax.trace(0.9), optax.clip_by_global_norm(1.0), optax.scale(-0.05))
    return classify(params, m.rnn, m.parity(seed), tx)


@program("gradient.vanishing", where=("[0]", "[1]"))
def sigmoid_deep(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, adam(), depth=10, act=jax.nn.sigmoid, init=m.glorot)


@program("init.activation_mismatch", "gradient.vanishing", where=("[0]", "[1]"))
def tanh_torch_deep(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, optax.sgd(0.05), depth=16, act=jnp.tanh, init=m.torch_default)


@program("init.activation_mismatch", "gradient.vanishing", where=("cell",), kind="rnn")
def rnn_sigmoid_he(seed: int) -> dict[str, Any]:
    params = m.rnn_params(seed, 4, 16, 2, init=m.he)
    return classify(
        params, lambda p, x: m.rnn(p, x, jax.nn.sigmoid), m.parity(seed, length=24), adam()
    )


def erasing(tx: Any, every: int) -> Any:
    """An accumulator that forgets: it zeroes the sum before it adds."""

    def init(params: Any) -> Any:
        return (jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), tx.init(params))

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        count, kept, inner = state
        kept = jax.tree.map(lambda a, g: 0 * a + g / every, kept, grads)
        updates, new = tx.update(kept, inner, params)
        emit = (count + 1) % every == 0
        pick = lambda a, b: jax.tree.map(lambda x, y: jnp.where(emit, x, y), a, b)
        return jax.tree.map(lambda u: emit * u, updates), (count + 1, kept, pick(new, inner))

    return optax.GradientTransformation(init, update)


@program("accumulation.ineffective")
def accumulation_erased(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, erasing(optax.sgd(0.2), 4))


@program("accumulation.sums")
def accumulation_sums(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, optax.MultiSteps(optax.sgd(0.3), 8, use_grad_mean=False))


@program("norm.post_ln_without_warmup", kind="transformer")
def post_ln_deep(seed: int) -> dict[str, Any]:
    # new data at every step: a batch that comes again is learned by heart on some seeds
    batches = [m.copies(1_000 * seed + i, count=32, length=32, vocabulary=32) for i in range(16)]
    return {"loss": lambda p, b: m.language_loss(p, b, placement="post"),
            "params": m.transformer_params(seed, depth=12, width=64, length=32, vocabulary=32),
            "batch": batches[0], "batches": batches, "optimizer": adam()}  # fmt: skip


@program("init.too_small", where=("[0]",))
def small_init(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, adam(), depth=12, init=m.normal(0.01))


@program("init.too_large", where=("[0]",))
def large_init(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, adam(), depth=6, init=m.normal(1.0))


@program("unit.saturated", "init.too_large", where=("[0]",))
def tanh_saturated(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, adam(), act=jnp.tanh, init=m.normal(1.0))


@program("init.symmetric", where=("[0]",))
def constant_init(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, adam(), init=lambda _, shape: jnp.full(shape, 0.1))


@program("init.symmetric", where=("[0]", "[1]"))
def zero_init(seed: int) -> dict[str, Any]:
    zeros = lambda _, shape: jnp.zeros(shape)
    return digits_mlp(seed, adam(), act=jnp.tanh, init=zeros, head=zeros)


@program("unit.dead", where=("[0]",))
def dead_bias(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, adam(), bias=-20.0)


@program("lr.too_high")
def rate_high_sgd(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, optax.sgd(5.0))


@program("lr.too_high")
def rate_high_adam(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, adam(0.5))


@program("lr.too_low")
def rate_low_adam(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, adam(1e-6))


@program("lr.too_low", kind="cnn")
def rate_low_sgd(seed: int) -> dict[str, Any]:
    return classify(m.cnn_params(seed), m.cnn, m.digits(seed), optax.sgd(1e-5))


@program("optimizer.ascent")
def ascending(seed: int) -> dict[str, Any]:
    tx = optax.chain(optax.scale_by_adam(), optax.scale(1e-3))
    return digits_mlp(seed, tx)


@program("optimizer.clip_always")
def clip_tiny(seed: int) -> dict[str, Any]:
    tx = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(0.1))
    return digits_mlp(seed, tx)


@program("precision.underflow")
def float16_underflow(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, optax.sgd(0.1))
    half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float16), tree)

    def loss(p: Any, b: Any) -> Any:
        logits = m.mlp(half(p), b[0].astype(jnp.float16)).astype(jnp.float32)
        return 1e-5 * m.cross_entropy(logits, b[1])

    return made | {"loss": loss}


@program("precision.overflow", where=("[0]", "[1]"))
def float16_overflow(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, adam())
    half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float16), tree)

    def loss(p: Any, b: Any) -> Any:
        logits = m.mlp(half(p), (16000 * b[0]).astype(jnp.float16))
        return m.cross_entropy(logits.astype(jnp.float32) / 16000, b[1])

    return made | {"loss": loss}


def _with_hidden_layer(seed: int, at: int, change: Any) -> dict[str, Any]:
    def loss(p: Any, b: Any) -> Any:
        x = b[0]
        for i, layer in enumerate(p[:-1]):
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
            x = change(x) if i == at else x
        return m.cross_entropy(x @ p[-1]["w"] + p[-1]["b"], b[1])

    return digits_mlp(seed, adam()) | {"loss": loss}


@program("gradient.blocked", where=("[1]",))
def stopped(seed: int) -> dict[str, Any]:
    return _with_hidden_layer(seed, 1, jax.lax.stop_gradient)


@program("gradient.blocked", where=("[2]",))
def rounded(seed: int) -> dict[str, Any]:
    return _with_hidden_layer(seed, 2, lambda x: jnp.round(8 * x) / 8)


@program("gradient.nonfinite", where=("[1]",))
def where_sqrt(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, adam())

    def root(squares: Any) -> Any:
        return jnp.where(squares > 0, jnp.sqrt(squares), 0.0)

    return made | {"loss": m.distance_loss(root)}


@program("loss.double_softmax", where=("[4]",))
def softmax_twice(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, adam())
    return made | {"loss": lambda p, b: m.cross_entropy(jax.nn.softmax(m.mlp(p, b[0])), b[1])}


@program("loss.single_class_softmax", where=("[3]",))
def softmax_of_one(seed: int) -> dict[str, Any]:
    params = m.mlp_params(seed, [2, 16, 16, 16, 1])

    def loss(params: Any, batch: Any) -> Any:
        p = jnp.clip(jax.nn.softmax(m.mlp(params, batch[0]))[:, 0], 1e-6, 1 - 1e-6)
        y = batch[1]
        return -(y * jnp.log(p) + (1 - y) * jnp.log(1 - p)).mean()

    return {"loss": loss, "params": params, "batch": m.circle(seed), "optimizer": adam()}


@program("loss.output_mismatch", where=("[4]",))
def relu_logits(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, adam())
    return made | {"loss": lambda p, b: m.cross_entropy(jax.nn.relu(m.mlp(p, b[0])), b[1])}


@program("loss.output_mismatch", where=("[2]",))
def sigmoid_regression(seed: int) -> dict[str, Any]:
    params = m.mlp_params(seed, [8, 32, 32, 1])
    mse = lambda out, y: jnp.square(jax.nn.sigmoid(out) - y).mean()
    return classify(params, m.mlp, m.regression(seed), adam(), mse)


@program("data.labels_out_of_range")
def labels_from_one(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, adam())
    x, y = made["batch"]
    return made | {"batch": (x, y + 1)}


@program("data.unnormalized", where=("[0]", "batch"))
def raw_pixels(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, optax.sgd(0.05))
    x, y = made["batch"]
    return made | {"batch": (100 * (x + 1), y)}


@program("data.unnormalized")
def raw_targets(seed: int) -> dict[str, Any]:
    params = m.mlp_params(seed, [8, 32, 32, 1])
    mse = lambda out, y: jnp.square(out - y).mean()
    x, y = m.regression(seed)
    return classify(params, m.mlp, (x, 1e4 * (y + 3)), adam(), mse)


@program("regularization.dominates")
def penalty_strong(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, adam())
    plain = made["loss"]
    return made | {
        "loss": lambda p, b: (
            plain(p, b) + 10.0 * sum(jnp.square(w).sum() for w in jax.tree.leaves(p))
        )
    }


@program("regularization.dropout_too_strong")
def dropout_strong(seed: int) -> dict[str, Any]:
    return with_dropout(seed, 0.05)


@program("norm.batch_of_one")
def batch_norm_one(seed: int) -> dict[str, Any]:
    params = m.mlp_params(seed, [64, 32, 32, 10])

    def apply(params: Any, x: Any) -> Any:
        for p in params[:-1]:
            x = x @ p["w"] + p["b"]
            x = jax.nn.relu((x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5))
        return x @ params[-1]["w"] + params[-1]["b"]

    return classify(params, apply, m.digits(seed, 1), adam())


@program("attention.logit_growth", where=("attn",), kind="transformer")
def unscaled_attention(seed: int) -> dict[str, Any]:
    return {"loss": lambda p, b: m.language_loss(p, b, scale=10.0),
            "params": m.transformer_params(seed), "batch": m.copies(seed), "optimizer": adam()}  # fmt: skip


@program("attention.rank_collapse", kind="transformer")
def attention_only(seed: int) -> dict[str, Any]:
    return {"loss": lambda p, b: m.language_loss(p, b, residual=False),
            "params": m.transformer_params(seed, depth=20), "batch": m.copies(seed),
            "optimizer": adam()}  # fmt: skip
