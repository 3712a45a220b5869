"""Programs of the third round: traps for the rules that were added last, and more healthy kinds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import diagnosis_models as m
from experiments.diagnosis_faults_more import PROGRAMS
from experiments.diagnosis_modules import mse
from experiments.diagnosis_programs import adam, classify, digits_mlp, program

__all__ = ["PROGRAMS"]


def _language(seed: int, tx: Any, depth: int, placement: str, tokens: Any = None) -> dict[str, Any]:
    tokens = m.copies(seed) if tokens is None else tokens
    return {"loss": lambda p, b: m.language_loss(p, b, placement=placement),
            "params": m.transformer_params(seed, depth=depth), "batch": tokens,
            "optimizer": tx}  # fmt: skip


def _zipf(seed: int, count: int = 16, length: int = 16) -> Any:
    """Words of a skewed language: the next one is most often the last one plus one."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, 17)
    tokens = rng.choice(16, (count, length), p=share / share.sum())
    follow = rng.random((count, length)) < 0.5
    for t in range(1, length):
        tokens[:, t] = np.where(follow[:, t], (tokens[:, t - 1] + 1) % 16, tokens[:, t])
    return jnp.asarray(tokens, jnp.int32)


# ----------------------------------------------------------------------------------------- healthy


@program(part="late", kind="transformer")
def post_ln_six(seed: int) -> dict[str, Any]:
    return _language(seed, adam(), 6, "post")


@program(part="late", kind="transformer")
def post_ln_twelve_warmed(seed: int) -> dict[str, Any]:
    return _language(
        seed, adam(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 300, 3000)), 12, "post"
    )


@program(part="late", kind="transformer")
def pre_ln_deep(seed: int) -> dict[str, Any]:
    return _language(seed, adam(3e-3), 12, "pre", _zipf(seed))


@program(part="late")
def bfloat16_parameters(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, adam(3e-3))
    return made | {"params": jax.tree.map(lambda p: p.astype(jnp.bfloat16), made["params"])}


@program(part="late")
def lora_inside(seed: int) -> dict[str, Any]:
    """The frozen base stands beside the adapters, behind a stop_gradient."""
    base = m.mlp_params(seed, [64, 32, 10])
    params = {"base": base, "lora": m.adapters(seed, base)}

    def apply(params: Any, x: Any) -> Any:
        return m.mlp(m.adapted(jax.lax.stop_gradient(params["base"]), params["lora"]), x)

    return classify(params, apply, m.digits(seed), adam(1e-2))


@program(part="late")
def constant_targets(seed: int) -> dict[str, Any]:
    """The best prediction does not depend on the input."""
    x, y = m.regression(seed)
    params = m.mlp_params(seed, [8, 32, 32, 1])
    return classify(params, m.mlp, (x, 0 * y + 0.7), adam(3e-3), mse)


@program(part="late")
def skewed_labels(seed: int) -> dict[str, Any]:
    """Nineteen of twenty examples are of one class."""
    x, y = m.digits(seed)
    rare = np.random.default_rng(seed).random(len(y)) < 0.05
    return digits_mlp(seed, adam()) | {"batch": (x, jnp.where(jnp.asarray(rare), y, 0))}


@program(part="late")
def noise_with_decay(seed: int) -> dict[str, Any]:
    """Labels that nothing predicts, new ones in every batch."""
    rng = np.random.default_rng(seed)
    many = [(m.digits(seed + k)[0], jnp.asarray(rng.integers(0, 10, 128))) for k in range(16)]
    params = m.mlp_params(seed, [64, 10])
    return classify(params, m.mlp, many[0], optax.adamw(1e-2, weight_decay=0.1), batches=many)


@program(part="late")
def distillation(seed: int) -> dict[str, Any]:
    teacher = m.mlp_params(seed + 9, [64, 32, 10], head=m.he)
    x, _ = m.digits(seed)
    soft = jax.nn.softmax(2 * m.mlp(teacher, x))
    params = m.mlp_params(seed, [64, 32, 32, 10])
    return classify(params, m.mlp, (x, soft), adam(3e-3),
                    lambda z, y: optax.softmax_cross_entropy(z, y).mean())  # fmt: skip


@program(part="late")
def two_heads(seed: int) -> dict[str, Any]:
    params = {"trunk": m.mlp_params(seed, [64, 32, 32]), "class": m.mlp_params(seed + 1, [32, 10]),
              "ink": m.mlp_params(seed + 2, [32, 1])}  # fmt: skip
    x, y = m.digits(seed)

    def loss(p: Any, b: Any) -> Any:
        h = jax.nn.relu(m.mlp(p["trunk"], b[0]))
        ink = jnp.square(m.mlp(p["ink"], h)[:, 0] - b[0].mean(1)).mean()
        return m.cross_entropy(m.mlp(p["class"], h), b[1]) + 0.1 * ink

    return {"loss": loss, "params": params, "batch": (x, y), "optimizer": optax.adamw(2e-3)}


@program(part="late")
def tied_autoencoder(seed: int) -> dict[str, Any]:
    x, _ = m.digits(seed)
    params = m.mlp_params(seed, [64, 32, 8], m.glorot, head=m.glorot)

    def loss(p: Any, x: Any) -> Any:
        h = jnp.tanh(x @ p[0]["w"] + p[0]["b"]) @ p[1]["w"] + p[1]["b"]
        return jnp.square(jnp.tanh(h @ p[1]["w"].T) @ p[0]["w"].T - x).mean()

    return {"loss": loss, "params": params, "batch": x, "optimizer": adam(3e-3)}


@program(part="late")
def cosine_to_zero(seed: int) -> dict[str, Any]:
    """A schedule that ends within the trial: its last updates are next to nothing."""
    return digits_mlp(seed, adam(optax.cosine_decay_schedule(3e-3, 100)))


# ------------------------------------------------------------------------------------------ faulty


@program("precision.lost_updates", part="late")
def bfloat16_small_steps(seed: int) -> dict[str, Any]:
    made = digits_mlp(seed, adam(3e-4))
    return made | {"params": jax.tree.map(lambda p: p.astype(jnp.bfloat16), made["params"])}


@program("norm.post_ln_without_warmup", part="late", kind="transformer")
def post_ln_forgets(seed: int) -> dict[str, Any]:
    """Stalls at the entropy of the words' own distribution."""
    return _language(seed, adam(1e-2), 12, "post", _zipf(seed))
