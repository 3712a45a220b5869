"""Four models on real data: one that does not learn, three that do, and the reason visible.

They are written as users write models, without a line for jaxgrad in them: the multilayer
perceptrons in plain JAX (the parameters' paths name their layers), the transformer in flax linen
(its modules do).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from jaxgrad import data

WIDTH = 64
DEPTH = 16
CLASSES = 10
CONTEXT = 48


@dataclass(frozen=True)
class Task:
    """A loss to study, with what it takes.

    Attributes:
        name: the folder that its report goes to.
        title: what the model is.
        description: one or two sentences for a reader who has not seen it.
        loss: `loss(params, batch)`, a scalar.
        params: at initialization.
        batches: a new iterator over batches at every call.
        learning_rate: of Adam.
        steps: to train; 0 measures the initialization only.
        evaluate: parameters -> (what was measured, the number in words), or None.
        facts: short facts for the report.
        optimizer: an optax transformation; None: Adam at `learning_rate`.
    """

    name: str
    title: str
    description: str
    loss: Callable[[PyTree, PyTree], Array]
    params: PyTree
    batches: Callable[[], Iterator[PyTree]]
    learning_rate: float = 1e-3
    steps: int = 300
    evaluate: Callable[[PyTree], tuple[str, str]] | None = None
    facts: tuple[tuple[str, str], ...] = ()
    optimizer: Any = None


def all_tasks(*, steps: int | None = None, seed: int = 0) -> Iterator[Callable[[], Task]]:
    """The four tasks, each as a function that makes it: data are read and parameters drawn then."""
    changes = {} if steps is None else {"steps": steps}
    for make in (sigmoid_mlp, he_relu_mlp, residual_mlp, transformer):
        yield partial(make, seed=seed, **changes)


def sigmoid_mlp(*, seed: int = 0, steps: int = 300) -> Task:
    """A deep sigmoid perceptron: every layer takes most of the gradient that is left."""
    params = _mlp_params(jax.random.key(seed), jax.nn.initializers.glorot_normal())
    return _digits_task(
        (
            "sigmoid-mlp", f"Deep sigmoid MLP, {DEPTH} hidden layers",
            f"{DEPTH} sigmoid layers of {WIDTH} units on 8 by 8 digits, Glorot's initialization. "
            "A sigmoid's slope is a quarter at most: the gradient is gone where the data enter.",
        ),
        partial(_mlp, jax.nn.sigmoid), params, seed=seed, steps=steps,
    )  # fmt: skip


def he_relu_mlp(*, seed: int = 0, steps: int = 300) -> Task:
    """The same depth and width with ReLU in He's initialization: the gradient keeps its scale."""
    params = _mlp_params(jax.random.key(seed), jax.nn.initializers.he_normal())
    return _digits_task(
        (
            "he-relu-mlp", f"ReLU MLP, He initialization, {DEPTH} hidden layers",
            "The same depth and width with ReLU, and weights of variance 2 / fan_in, which keeps "
            "the mean square of activations and gradients from layer to layer.",
        ),
        partial(_mlp, jax.nn.relu), params, seed=seed, steps=steps,
    )  # fmt: skip


def residual_mlp(*, seed: int = 0, steps: int = 300) -> Task:
    """Pre-norm residual blocks: the identity path carries the gradient past every block."""
    return _digits_task(
        (
            "residual-mlp", f"Residual MLP with LayerNorm, {DEPTH // 2} blocks",
            f"{DEPTH // 2} blocks h + W2 relu(W1 LayerNorm(h)) of the same width. The path around "
            "each block has a derivative of one, so the gradient arrives whatever the block does.",
        ),
        _residual, _residual_params(jax.random.key(seed)), seed=seed, steps=steps,
    )  # fmt: skip


def transformer(*, seed: int = 0, steps: int = 200) -> Task:
    """A small Pre-LN transformer in flax linen, predicting the next character of English."""
    from flax import linen

    text = data.english_text()
    held_back = len(text.ids) // 10
    train, test = text.ids[:-held_back], text.ids[-held_back:]
    model = _transformer_module(linen, len(text.vocabulary))
    example = jnp.zeros((1, CONTEXT), jnp.int32)
    params = model.init(jax.random.key(seed), example)

    def loss(params: PyTree, windows: Int[Array, "batch time"]) -> Float[Array, ""]:
        logits = model.apply(params, windows[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return losses.mean()

    def batches() -> Iterator[Any]:
        step = 0
        while True:
            yield data.text_windows(train, seed + step, batch_size=16, length=CONTEXT)
            step += 1

    def evaluate(params: PyTree) -> tuple[str, str]:
        windows = data.text_windows(test, 10**6, batch_size=128, length=CONTEXT)
        nats = float(jax.jit(loss)(params, windows))
        return "test loss", f"{nats:.2f} nats a character"

    return Task(
        name="transformer", title="Pre-LN transformer in flax, 4 blocks",
        description="A character model of English text: 4 Pre-LN blocks of width 64 with 4 heads, "
        "in flax linen. The norms stand inside the residual branches, so the sum carries the "
        "gradient.",
        loss=loss, params=params, batches=batches, steps=steps, evaluate=evaluate,
        facts=(
            ("data", f"English text, {len(text.ids):,} characters"), ("batch", f"16 x {CONTEXT}"),
        ),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ digits


def _digits_task(
    names: tuple[str, str, str], apply: Callable[[PyTree, Any], Array], params: PyTree,
    *, seed: int, steps: int,
) -> Task:  # fmt: skip
    split = data.digits(seed=seed)
    name, title, description = names

    def loss(params: PyTree, batch: data.Examples) -> Float[Array, ""]:
        logits = apply(params, batch.x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.y).mean()

    def evaluate(params: PyTree) -> tuple[str, str]:
        predicted = jax.jit(apply)(params, split.test.x).argmax(-1)
        return "test accuracy", f"{100 * float((predicted == split.test.y).mean()):.1f} %"

    return Task(
        name, title, description, loss, params,
        lambda: data.minibatches(split.train, batch_size=128, seed=seed),
        steps=steps, evaluate=evaluate,
        facts=(("data", "1,797 handwritten digits"), ("batch", "128")),
    )  # fmt: skip


def _dense(key: Array, initializer: Any, n_in: int, n_out: int) -> dict[str, Array]:
    return {"kernel": initializer(key, (n_in, n_out)), "bias": jnp.zeros(n_out)}


def _mlp_params(key: Array, initializer: Any) -> PyTree:
    *keys, last = jax.random.split(key, DEPTH + 1)
    params = {
        f"hidden_{k:02d}": _dense(subkey, initializer, WIDTH, WIDTH)
        for k, subkey in enumerate(keys)
    }
    return params | {"output": _dense(last, initializer, WIDTH, CLASSES)}


def _mlp(
    activation: Callable[[Array], Array], params: PyTree, x: Float[Array, "batch features"]
) -> Float[Array, "batch classes"]:
    h = x
    for k in range(DEPTH):
        layer = params[f"hidden_{k:02d}"]
        h = activation(h @ layer["kernel"] + layer["bias"])
    return h @ params["output"]["kernel"] + params["output"]["bias"]


def _residual_params(key: Array) -> PyTree:
    initializer = jax.nn.initializers.he_normal()
    *keys, last = jax.random.split(key, DEPTH + 1)
    params = {}
    for k in range(DEPTH // 2):
        params[f"block_{k}"] = {
            "norm": {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)},
            "up": _dense(keys[2 * k], initializer, WIDTH, WIDTH),
            "down": _dense(keys[2 * k + 1], initializer, WIDTH, WIDTH),
        }
    return params | {"output": _dense(last, initializer, WIDTH, CLASSES)}


def _residual(params: PyTree, x: Float[Array, "batch features"]) -> Float[Array, "batch classes"]:
    h = x
    for k in range(DEPTH // 2):
        with jax.named_scope(f"block_{k}"):
            h = h + _branch(params[f"block_{k}"], h)
    return h @ params["output"]["kernel"] + params["output"]["bias"]


def _branch(block: PyTree, h: Float[Array, "batch width"]) -> Float[Array, "batch width"]:
    centered = h - h.mean(-1, keepdims=True)
    normed = centered * jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-6)
    normed = normed * block["norm"]["scale"] + block["norm"]["bias"]
    inner = jax.nn.relu(normed @ block["up"]["kernel"] + block["up"]["bias"])
    return inner @ block["down"]["kernel"] + block["down"]["bias"]


# ------------------------------------------------------------------------------------ transformer


def _transformer_module(linen: Any, vocabulary: int) -> Any:
    """The linen module, made here so that flax is imported only by whoever asks for it."""

    class Block(linen.Module):
        @linen.compact
        def __call__(self, h: Array) -> Array:
            mask = linen.make_causal_mask(jnp.ones(h.shape[:2]))
            attention = linen.MultiHeadDotProductAttention(num_heads=4, name="attention")
            h = h + attention(linen.LayerNorm(name="norm_1")(h), mask=mask)
            inner = linen.Dense(4 * h.shape[-1], name="up")(linen.LayerNorm(name="norm_2")(h))
            return h + linen.Dense(h.shape[-1], name="down")(linen.gelu(inner))

    class Transformer(linen.Module):
        @linen.compact
        def __call__(self, tokens: Array) -> Array:
            places = jnp.arange(tokens.shape[1])
            h = linen.Embed(vocabulary, WIDTH, name="embed")(tokens)
            h = h + linen.Embed(CONTEXT, WIDTH, name="positions")(places)
            for k in range(4):
                h = Block(name=f"block_{k}")(h)
            return linen.Dense(vocabulary, name="output")(linen.LayerNorm(name="norm")(h))

    return Transformer()
