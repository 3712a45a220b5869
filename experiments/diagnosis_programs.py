"""Programs of the diagnosis benchmark: each faulty in one known way, or healthy."""

# ruff: noqa: E501, E731, E741, PLW0108 (programs as their users write them)
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import diagnosis_models as m


@dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
        name: unique.
        make: seed -> keyword arguments of `jaxgrad.diagnose`.
        codes: the codes that name its fault, the preferred one first; empty for a healthy one.
        where: substrings of the right layer's name, any of which will do; empty where there is none.
        kind: family of the model.
        part: "tune" or "report".
    """

    name: str
    make: Callable[[int], dict[str, Any]]
    codes: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    kind: str = "mlp"
    part: str = "tune"


PROGRAMS: list[Program] = []


def program(
    *codes: str, where: tuple[str, ...] = (), kind: str = "mlp", part: str = "tune"
) -> Callable[[Any], Any]:
    """Registers a program under its function's name."""

    def add(make: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
        PROGRAMS.append(Program(make.__name__, make, codes, where, kind, part))
        return make

    return add


def classify(
    params: Any,
    apply: Callable,
    data: tuple[Any, Any],
    tx: Any,
    loss: Any = m.cross_entropy,
    **more: Any,
) -> dict[str, Any]:
    """The arguments for a classifier."""
    return {
        "loss": lambda params, batch: loss(apply(params, batch[0]), batch[1]),
        "params": params, "batch": data, "optimizer": tx, **more,
    }  # fmt: skip


def digits_mlp(
    seed: int, tx: Any, depth: int = 4, act: Any = jax.nn.relu, **init: Any
) -> dict[str, Any]:
    widths = [64, *[32] * depth, 10]
    params = m.mlp_params(seed, widths, **init)
    return classify(params, lambda p, x: m.mlp(p, x, act), m.digits(seed), tx)


def pre_ln_transformer(seed: int, tx: Any) -> dict[str, Any]:
    return {"loss": m.language_loss, "params": m.transformer_params(seed), "batch": m.copies(seed),
            "optimizer": tx}  # fmt: skip


def adam(rate: float = 1e-3) -> Any:
    return optax.adam(rate)


# ----------------------------------------------------------------------------------------- healthy


@program()
def relu_he_adam(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, adam())


@program()
def relu_he_sgd(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, optax.sgd(0.1))


@program()
def relu_momentum_clip(seed: int) -> dict[str, Any]:
    return digits_mlp(
        seed, optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.02, momentum=0.9))
    )


@program()
def tanh_glorot_deep(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, adam(), depth=8, act=jnp.tanh, init=m.glorot)


@program()
def gelu_adamw_warmup(seed: int) -> dict[str, Any]:
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 50, 1000)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))
    return digits_mlp(seed, tx, act=jax.nn.gelu)


@program()
def lion_small(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, optax.lion(3e-4), act=jax.nn.silu)


@program()
def narrow_circle(seed: int) -> dict[str, Any]:
    params = m.mlp_params(seed, [2, 16, 16, 16, 2])
    return classify(params, m.mlp, m.circle(seed), adam(1e-2))


@program(kind="cnn")
def cnn_he(seed: int) -> dict[str, Any]:
    return classify(m.cnn_params(seed), m.cnn, m.digits(seed), adam())


@program(kind="rnn")
def rnn_orthogonal(seed: int) -> dict[str, Any]:
    ortho = jax.nn.initializers.orthogonal()
    params = m.rnn_params(seed, 4, 16, 2, recurrent=lambda key, shape: ortho(key, shape))
    return classify(params, m.rnn, m.parity(seed), adam(3e-3))


@program(kind="rnn")
def lstm_plain(seed: int) -> dict[str, Any]:
    return classify(m.lstm_params(seed, 4, 16, 2), m.lstm, m.parity(seed), adam(1e-2))


@program(kind="transformer")
def pre_ln(seed: int) -> dict[str, Any]:
    return pre_ln_transformer(seed, adam())


@program(kind="transformer")
def post_ln_shallow(seed: int) -> dict[str, Any]:
    return {"loss": lambda p, b: m.language_loss(p, b, placement="post"),
            "params": m.transformer_params(seed), "batch": m.copies(seed), "optimizer": adam()}  # fmt: skip


@program(kind="transformer")
def remat_tied(seed: int) -> dict[str, Any]:
    params = m.transformer_params(seed)
    del params["out"]
    return {"loss": lambda p, b: m.language_loss(p, b, remat=True, tied=True), "params": params,
            "batch": m.copies(seed), "optimizer": optax.adamw(1e-3)}  # fmt: skip


@program()
def regression_small_targets(seed: int) -> dict[str, Any]:
    params = m.mlp_params(seed, [8, 32, 32, 1])
    mse = lambda out, y: jnp.square(out - y).mean()
    return classify(params, m.mlp, m.regression(seed, scale=0.01), adam(), mse)


@program()
def label_noise(seed: int) -> dict[str, Any]:
    x, _ = m.digits(seed)
    y = jnp.asarray(np.random.default_rng(seed).integers(0, 10, len(x)))
    params = m.mlp_params(seed, [64, 32, 32, 10])
    many = [(m.digits(seed + k)[0], jnp.roll(y, k)) for k in range(8)]
    return classify(params, m.mlp, (x, y), adam(), batches=many)


@program()
def small_batches(seed: int) -> dict[str, Any]:
    params = m.mlp_params(seed, [64, 32, 32, 10])
    many = [m.digits(100 * seed + k, 8) for k in range(16)]
    return classify(params, m.mlp, many[0], optax.sgd(0.03), batches=many)


@program()
def frozen_backbone(seed: int) -> dict[str, Any]:
    params = {
        "backbone": m.mlp_params(seed, [64, 32, 32]),
        "head": m.mlp_params(seed + 1, [32, 10]),
    }
    apply = lambda p, x: m.mlp(
        p["head"], jax.nn.relu(m.mlp(jax.lax.stop_gradient(p["backbone"]), x))
    )
    return classify(params, apply, m.digits(seed), adam(1e-2))


@program()
def lora(seed: int) -> dict[str, Any]:
    base = m.mlp_params(seed, [64, 32, 10])
    key = jax.random.key(seed)
    params = [
        {"a": m.lecun(key, (l["w"].shape[0], 4)), "b": jnp.zeros((4, l["w"].shape[1]))}
        for l in base
    ]

    def apply(params: Any, x: Any) -> Any:
        merged = [
            {"w": l["w"] + p["a"] @ p["b"], "b": l["b"]} for l, p in zip(base, params, strict=True)
        ]
        return m.mlp(merged, x)

    return classify(params, apply, m.digits(seed), adam(1e-2))


@program()
def rezero(seed: int) -> dict[str, Any]:
    layers = m.mlp_params(seed, [64, 32, 32, 32, 32, 10])
    for layer in layers[1:-1]:
        layer["alpha"] = jnp.zeros(())

    def apply(params: Any, x: Any) -> Any:
        x = x @ params[0]["w"] + params[0]["b"]
        for p in params[1:-1]:
            x = x + p["alpha"] * jax.nn.relu(x @ p["w"] + p["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    return classify(layers, apply, m.digits(seed), adam(3e-3))


@program()
def target_network(seed: int) -> dict[str, Any]:
    online = m.mlp_params(seed, [8, 32, 32, 4])
    params = {"online": online, "target": m.mlp_params(seed + 1, [8, 32, 32, 4])}
    x, reward = m.regression(seed)

    def loss(params: Any, batch: Any) -> Any:
        x, reward = batch
        goal = reward[:, 0] + 0.9 * jax.lax.stop_gradient(m.mlp(params["target"], x[::-1])).max(-1)
        return jnp.square(m.mlp(params["online"], x)[:, 0] - goal).mean()

    return {"loss": loss, "params": params, "batch": (x, reward), "optimizer": adam()}


@program()
def converged(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, adam())
    tx, params = made["optimizer"], made["params"]

    @jax.jit
    def train(params: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            p, s = carry
            u, s = tx.update(jax.grad(made["loss"])(p, made["batch"]), s, p)
            return (optax.apply_updates(p, u), s), None

        return jax.lax.scan(step, (params, tx.init(params)), length=1500)[0][0]

    return made | {"params": train(params)}


@program()
def bfloat16(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, adam(3e-3))
    half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
    x, y = made["batch"]
    return made | {"loss": lambda p, b: m.cross_entropy(m.mlp(half(p), b[0].astype(jnp.bfloat16)).astype(jnp.float32), b[1]),
                   "batch": (x, y)}  # fmt: skip


@program()
def multi_steps(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, optax.MultiSteps(optax.adam(3e-3), 4))


def with_dropout(seed: int, keep_rate: float) -> dict[str, Any]:
    """A ReLU network on the digits whose units are kept at a rate."""
    params = m.mlp_params(seed, [64, 64, 64, 10])

    def loss(params: Any, batch: Any, key: Any) -> Any:
        x = batch[0]
        for i, p in enumerate(params[:-1]):
            x = jax.nn.relu(x @ p["w"] + p["b"])
            keep = jax.random.bernoulli(jax.random.fold_in(key, i), keep_rate, x.shape)
            x = jnp.where(keep, x / keep_rate, 0.0)
        return m.cross_entropy(x @ params[-1]["w"] + params[-1]["b"], batch[1])

    return {"loss": loss, "params": params, "batch": m.digits(seed), "optimizer": adam(3e-3),
            "key": jax.random.key(seed)}  # fmt: skip


@program()
def dropout_mild(seed: int) -> dict[str, Any]:
    return with_dropout(seed, 0.8)


# ------------------------------------------------------------------------------------------ faulty


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


def _erasing(tx: Any, every: int) -> Any:
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
    return digits_mlp(seed, _erasing(optax.sgd(0.2), 4))


@program("accumulation.sums")
def accumulation_sums(seed: int) -> dict[str, Any]:
    return digits_mlp(seed, optax.MultiSteps(optax.sgd(0.3), 8, use_grad_mean=False))


@program("norm.post_ln_without_warmup", kind="transformer")
def post_ln_deep(seed: int) -> dict[str, Any]:
    return {"loss": lambda p, b: m.language_loss(p, b, placement="post"),
            "params": m.transformer_params(seed, depth=12), "batch": m.copies(seed),
            "optimizer": adam(3e-3)}  # fmt: skip


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


@program("gradient.blocked", where=("[1]",))
def stopped(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, adam())

    def loss(p: Any, b: Any) -> Any:
        x = b[0]
        for i, layer in enumerate(p[:-1]):
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
            x = jax.lax.stop_gradient(x) if i == 1 else x
        return m.cross_entropy(x @ p[-1]["w"] + p[-1]["b"], b[1])

    return made | {"loss": loss}


@program("gradient.blocked", where=("[2]",))
def rounded(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, adam())

    def loss(p: Any, b: Any) -> Any:
        x = b[0]
        for i, layer in enumerate(p[:-1]):
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
            x = jnp.round(8 * x) / 8 if i == 2 else x
        return m.cross_entropy(x @ p[-1]["w"] + p[-1]["b"], b[1])

    return made | {"loss": loss}


@program("gradient.nonfinite", where=("[1]",))
def where_sqrt(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, adam())

    def loss(p: Any, b: Any) -> Any:
        x = b[0]
        for i, layer in enumerate(p[:-1]):
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
            if i == 1:
                squares = jnp.square(x[:, None] - x[None]).sum(-1)
                distance = jnp.where(squares > 0, jnp.sqrt(squares), 0.0)
                x = x + distance.mean(1, keepdims=True)
        return m.cross_entropy(x @ p[-1]["w"] + p[-1]["b"], b[1])

    return made | {"loss": loss}


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
