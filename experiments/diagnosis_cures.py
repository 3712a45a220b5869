"""Each reported fix, applied to its program: does it train then?

Where the fix is a change of optimizer, parameters, data or precision, it is applied to the program
by `AUTOMATIC`, from the finding alone. Where it is a line inside the loss or the model, the line
was pasted by hand, in `BY_HAND`, as the fix gives it; the program is otherwise the same.
"""

# ruff: noqa: E501, E731, ARG001, PLW0108 (programs as their users write them)
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import diagnosis_models as m
from experiments import diagnosis_modules as modules
from experiments import diagnosis_programs as programs
from experiments.diagnosis_faults_more import PROGRAMS
from experiments.diagnosis_programs import adam, classify, digits_mlp, pre_ln_transformer
from jaxgrad.diagnosis import Finding
from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.problem import make_problem
from jaxgrad.diagnosis.training import Run, Trainer
from jaxgrad.optim.reading import chain_parts, flattened, read_steps
from jaxgrad.tree import is_inexact_array, leaf_names

Made = dict[str, Any]
STEPS, LONG = 300, 1000


def _transformation(tx: Any) -> Any:
    return tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx


def _is_clip(part: Any) -> bool:
    steps = flattened(read_steps(part))
    return bool(steps) and all(step.kind == "clip" for step in steps)


def _scaled(made: Made, finding: Finding) -> Made:
    factor = float(finding.evidence["scale"])
    return made | {
        "optimizer": optax.chain(_transformation(made["optimizer"]), optax.scale(factor))
    }


def _clip_first(made: Made, finding: Finding) -> Made:
    parts = chain_parts(made["optimizer"])
    clips = [p for p in parts if _is_clip(p)]
    return made | {"optimizer": optax.chain(*clips, *(p for p in parts if not _is_clip(p)))}


def _looser_clip(made: Made, finding: Finding) -> Made:
    clip = optax.clip_by_global_norm(finding.evidence["raw_norm_90th_percentile"])
    parts = chain_parts(made["optimizer"])
    return made | {"optimizer": optax.chain(clip, *(p for p in parts if not _is_clip(p)))}


def _other_sign(made: Made, finding: Finding) -> Made:
    if finding.where == "optimizer":
        return made | {"optimizer": optax.chain(made["optimizer"], optax.scale(-1.0))}
    plain = made["loss"]
    return made | {"loss": lambda *args: -plain(*args)}


def _mean_of_micro_batches(made: Made, finding: Finding) -> Made:
    held: Any = made["optimizer"]
    return made | {"optimizer": optax.MultiSteps(held._opt, finding.evidence["every"])}


def _accumulated(made: Made, finding: Finding) -> Made:
    every = max(len(made["batches"]), 2)
    return made | {"optimizer": optax.MultiSteps(_transformation(made["optimizer"]), every)}


def _redrawn(made: Made, draw: Callable[[], Any], *, biases: bool) -> Made:
    """Matrices drawn anew by an initializer, biases zero; embeddings and positions stay."""
    init, key = draw(), jax.random.key(0)
    leaves, treedef = jax.tree.flatten(made["params"])
    names = leaf_names(made["params"])
    new = []
    for k, (leaf, name) in enumerate(zip(leaves, names, strict=True)):
        if not is_inexact_array(leaf) or any(w in name for w in ("embed", "pos", "scale")):
            new.append(leaf)
        elif leaf.ndim >= 2:
            # equinox keeps (out, in)
            shape = leaf.shape[::-1] if name.endswith("weight") else leaf.shape
            drawn = init(jax.random.fold_in(key, k), shape, jnp.float32)
            new.append(jnp.reshape(drawn.T if name.endswith("weight") else drawn, leaf.shape))
        else:
            new.append(jnp.zeros_like(leaf) if biases else leaf)
    return made | {"params": jax.tree.unflatten(treedef, new)}


def _variance_scaling(made: Made, finding: Finding) -> Made:
    gain = float(finding.evidence.get("needed", 2.0))
    mode = "fan_avg" if "fan_avg" in finding.fix else "fan_in"
    make = lambda: jax.nn.initializers.variance_scaling(gain, mode, "normal")
    return _redrawn(made, make, biases=False)


def _standardized(made: Made, finding: Finding) -> Made:
    targets = "target_rms" in finding.evidence
    both = list(made.get("batches") or [made["batch"]])
    x = jnp.concatenate([jnp.asarray(b[targets]) for b in both])
    mean, std = x.mean(0), x.std(0) + 1e-6

    def move(batch: Any) -> Any:
        new = (batch[targets] - mean) / std
        return (batch[0], new) if targets else (new, *batch[1:])

    moved = [move(b) for b in both]
    return made | {"batch": moved[0]} | ({"batches": moved} if made.get("batches") else {})


def _loss_scaled(made: Made, finding: Finding) -> Made:
    plain = made["loss"]
    tx = optax.chain(optax.scale(2.0**-15), made["optimizer"])
    return made | {"loss": lambda *args: 2.0**15 * plain(*args), "optimizer": tx}


def _wide_parameters(made: Made, finding: Finding) -> Made:
    plain, dtype = made["loss"], finding.evidence["dtype"]
    cast = lambda tree, d: jax.tree.map(lambda p: p.astype(d), tree)
    return made | {
        "params": cast(made["params"], jnp.float32),
        "loss": lambda params, *rest: plain(cast(params, dtype), *rest),
    }


def _warmed_up(made: Made, finding: Finding) -> Made:
    ramp = optax.linear_schedule(0.0, 1.0, STEPS // 2)
    return made | {"optimizer": optax.chain(made["optimizer"], optax.scale_by_schedule(ramp))}


def _clipped(made: Made, finding: Finding) -> Made:
    return made | {"optimizer": optax.chain(optax.clip_by_global_norm(1.0), made["optimizer"])}


_HE = lambda: jax.nn.initializers.he_normal()
AUTOMATIC: dict[str, Callable[[Made, Finding], Made]] = {
    "lr.too_high": _scaled, "lr.too_low": _scaled,
    "optimizer.clip_after_update": _clip_first, "optimizer.clip_always": _looser_clip,
    "optimizer.ascent": _other_sign, "accumulation.sums": _mean_of_micro_batches,
    "batch.too_small": _accumulated,
    "init.too_small": _variance_scaling, "init.too_large": _variance_scaling,
    "init.activation_mismatch": _variance_scaling,
    "init.symmetric": lambda made, _: _redrawn(made, _HE, biases=False),
    "unit.dead": lambda made, _: _redrawn(made, _HE, biases=True),
    "unit.saturated": lambda made, _: _redrawn(made, jax.nn.initializers.glorot_normal, biases=True),
    "data.unnormalized": _standardized, "precision.underflow": _loss_scaled,
    "precision.lost_updates": _wide_parameters,
    "norm.post_ln_without_warmup": _warmed_up, "loss.spike": _clipped,
}  # fmt: skip


# ------------------------------------------------------------------------------------- by hand


def _safe_root(squares: Any) -> Any:
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def _safe_norm(h: Any) -> Any:
    return _safe_root(jnp.square(h).sum(-1, keepdims=True))


def _safe_distances(seed: int) -> Made:
    return digits_mlp(seed, adam()) | {"loss": m.distance_loss(_safe_root)}


def _zero_norm(seed: int) -> Made:
    made = digits_mlp(seed, adam())
    x, y = made["batch"]
    plain = made["loss"]
    unit = lambda h: h / jnp.maximum(_safe_norm(h), 1e-6)
    loss = lambda p, b: plain(p[1:], (unit(b[0] @ p[0]["w"] @ p[0]["w"].T[:, :32]), b[1]))
    return made | {"loss": loss, "batch": (x.at[0].set(0.0), y)}


def _rnn_norm(seed: int) -> Made:
    x, y = m.parity(seed)
    act = lambda z: jnp.tanh(z) / (1.0 + _safe_norm(z - z.mean(0)))
    return classify(m.rnn_params(seed, 4, 16, 2), lambda p, x: m.rnn(p, x, act),
                    (x.at[:, 0].set(0.0), y), adam())  # fmt: skip


def _rounded(seed: int) -> Made:
    def loss(p: Any, b: Any) -> Any:
        x = b[0]
        for i, layer in enumerate(p[:-1]):
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
            x = x + jax.lax.stop_gradient(jnp.round(8 * x) / 8 - x) if i == 2 else x
        return m.cross_entropy(x @ p[-1]["w"] + p[-1]["b"], b[1])

    return digits_mlp(seed, adam()) | {"loss": loss}


def _argmax(seed: int) -> Made:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            soft = nn.softmax(nn.Dense(16)(nn.relu(nn.Dense(32)(x))))
            hard = jax.nn.one_hot(soft.argmax(-1), 16)
            return nn.Dense(10)(soft + jax.lax.stop_gradient(hard - soft))

    return modules.linen(seed, Model(), m.digits(seed), adam())


def _layer_norm(seed: int) -> Made:
    params = m.mlp_params(seed, [64, 32, 32, 10])

    def apply(params: Any, x: Any) -> Any:
        for p in params[:-1]:
            x = x @ p["w"] + p["b"]
            x = jax.nn.relu(
                (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
            )
        return x @ params[-1]["w"] + params[-1]["b"]

    return classify(params, apply, m.digits(seed, 1), adam())


def _penalty(seed: int) -> Made:
    made = digits_mlp(seed, adam())
    plain = made["loss"]
    squares = lambda p: sum(jnp.square(w).sum() for w in jax.tree.leaves(p))
    factor = _PENALTY_FACTOR.get(seed, 100.0)
    return made | {"loss": lambda p, b: plain(p, b) + 10.0 / factor * squares(p)}


_PENALTY_FACTOR: dict[int, float] = {}


def _tokens(seed: int) -> Made:
    made = next(p for p in PROGRAMS if p.name == "unequal_tokens").make(seed)
    mean = float(np.mean([b[2].sum() for b in made["batches"]]))

    def loss(p: Any, b: Any) -> Any:
        each = optax.softmax_cross_entropy_with_integer_labels(m.mlp(p, b[0]), b[1])
        return (each * b[2]).sum() / mean

    return made | {"loss": loss}


def _bfloat16(seed: int) -> Made:
    half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
    loss = lambda p, b: m.cross_entropy(
        m.mlp(half(p), (16000 * b[0]).astype(jnp.bfloat16)).astype(jnp.float32) / 16000, b[1]
    )
    return digits_mlp(seed, adam()) | {"loss": loss}


def _circle(seed: int, widths: list[int], rate: float) -> Made:
    loss = lambda z, y: optax.sigmoid_binary_cross_entropy(z[:, 0], y).mean()
    return classify(m.mlp_params(seed, widths), m.mlp, m.circle(seed), adam(rate), loss)


def _regression(seed: int, column: bool) -> Made:
    x, y = m.regression(seed)
    params = m.mlp_params(seed, [8, 32, 32, 1])
    squares = lambda out, y: jnp.square((out[:, 0] if column else out) - y).mean()
    return classify(params, m.mlp, (x, y[:, 0] if column else y), adam(), squares)


def _orthogonal(seed: int) -> Made:
    ortho = jax.nn.initializers.orthogonal()
    params = m.rnn_params(seed, 4, 16, 2, recurrent=lambda key, shape: ortho(key, shape))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    return classify(params, lambda p, x: m.rnn(p, x, lambda z: z), m.parity(seed, length=40), tx)


def _rnn(seed: int, act: Any, tx: Any, **data: Any) -> Made:
    ortho = jax.nn.initializers.orthogonal()
    params = m.rnn_params(seed, 4, 16, 2, recurrent=lambda key, shape: ortho(key, shape))
    return classify(params, lambda p, x: m.rnn(p, x, act), m.parity(seed, **data), tx)


# Programs whose fix is a line of the loss or the model, with the line.
BY_HAND: dict[str, Callable[[int], Made]] = {
    "stopped": lambda s: digits_mlp(s, adam()), "rounded": _rounded, "linen_argmax": _argmax,
    "nnx_cast": lambda s: modules.nnx_mlp(s, m.digits(s), adam()),
    "where_sqrt": _safe_distances, "zero_norm": _zero_norm, "rnn_norm_nan": _rnn_norm,
    "softmax_twice": lambda s: digits_mlp(s, adam()),
    "nnx_softmax_twice": lambda s: modules.nnx_mlp(s, m.digits(s), adam()),
    "softmax_of_one": lambda s: _circle(s, [2, 16, 16, 16, 1], 1e-3),
    "relu_logits": lambda s: digits_mlp(s, adam()),
    "sigmoid_regression": lambda s: _regression(s, False),
    "broadcast_targets": lambda s: _regression(s, True),
    "double_sigmoid": lambda s: _circle(s, [2, 32, 32, 1], 1e-2),
    "log_of_linear": lambda s: _circle(s, [2, 32, 32, 1], 1e-3),
    "labels_from_one": lambda s: digits_mlp(s, adam()),
    "negative_labels": lambda s: digits_mlp(s, adam()),
    "penalty_strong": _penalty,
    "decay_strong": lambda s: digits_mlp(s, optax.adamw(3e-3, weight_decay=1e-4)),
    "dropout_strong": lambda s: programs.with_dropout(s, 0.9),
    "linen_dropout_strong": lambda s: modules.keyed(
        s, modules.LinenMLP(rate=0.1, widths=(64, 64, 10)), m.digits(s), adam(3e-3)
    ),
    "batch_norm_one": _layer_norm,
    "linen_batch_of_one": lambda s: modules.linen(
        s, modules.LinenMLP(norm=nn.LayerNorm), m.digits(s, 1), adam()
    ),
    "unscaled_attention": lambda s: pre_ln_transformer(s, adam()),
    "attention_only": lambda s: pre_ln_transformer(s, adam()) | {
        "params": m.transformer_params(s, depth=20)
    },
    "float16_overflow": _bfloat16, "unequal_tokens": _tokens,
    "accumulation_erased": lambda s: digits_mlp(s, optax.MultiSteps(optax.sgd(0.2), 4)),
    "sigmoid_deep": lambda s: digits_mlp(s, adam(), depth=10, init=m.he),
    "rnn_exploding": _orthogonal,
    "rnn_vanishing": lambda s: _rnn(s, jnp.tanh, adam(), length=50),
}  # fmt: skip


def cured(name: str, seed: int, made: Made, finding: Finding) -> tuple[Made | None, str]:
    """The program with the reported fix, and how it was applied; None where it cannot be."""
    if name in BY_HAND and finding.code not in AUTOMATIC:
        if finding.code == "regularization.dominates" and "penalty" in finding.cause:
            _PENALTY_FACTOR[seed] = 10 * float(finding.evidence["penalty_over_data"])
        return BY_HAND[name](seed), "by hand"
    if finding.code in AUTOMATIC:
        return AUTOMATIC[finding.code](made, finding), "automatic"
    return None, "none"


def trains(made: Made) -> tuple[bool, float, float]:
    """Whether a program takes 30 % off its loss, or off a guess's; first and last loss.

    Within a thousand steps, within 300 of a large model.
    """
    problem = make_problem(
        made["loss"], made["params"], made["batch"], batches=made.get("batches"), has_aux=False,
        key=made.get("key"), trainable=made.get("trainable"),
    )  # fmt: skip
    evidence = Evidence(problem, None, None)
    steps = LONG if evidence.steps >= 160 else STEPS
    run: Run = Trainer(problem, made.get("optimizer"), steps).run()
    base, chance = run.first, evidence.chance
    if chance is not None and base > 0:
        base = min(base, chance)
    taken = (base - run.last) / max(abs(base), 1e-12)
    return bool(np.isfinite(run.last) and taken >= 0.3), run.first, run.last
