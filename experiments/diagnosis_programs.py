"""Programs of the diagnosis benchmark, and its healthy ones of the first round."""

# ruff: noqa: E501, E731, PLW0108 (programs as their users write them)
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
    apply = lambda adapters, x: m.mlp(m.adapted(base, adapters), x)
    return classify(m.adapters(seed, base), apply, m.digits(seed), adam(1e-2))


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
