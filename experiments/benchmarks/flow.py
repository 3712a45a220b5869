"""What does watching the gradient cost? `value_and_grad_flow` over `jax.value_and_grad`.

A 12-block Pre-LN transformer in flax linen, small (width 256, 8 heads, 128 characters) and of
GPT-2's width (768, 12 heads, 256 characters), 4 sequences, unrolled, `nn.scan` and `nn.scan` with
`nn.remat`; every scope is tapped. Beside the small one what else gives
the same rows: flax's own `perturb` and `capture_intermediates` on every module, and PyTorch with
forward hooks and full backward hooks on every module, over its own plain step.
Run: `./scripts/bench flow`; PyTorch's cases need `JAXGRAD_EXTRAS=test,peers`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxgrad as jg
from experiments.benchmarks import harness
from jaxgrad import statistics

BLOCKS, WIDTH, HEADS, LENGTH, BATCH, VOCABULARY = 12, 256, 8, 128, 4, 256
TITLES = {
    "unrolled": "12 blocks, unrolled",
    "scan": "12 blocks, nn.scan",
    "scan + remat": "12 blocks, nn.scan of nn.remat",
}


@dataclass(frozen=True)
class Size:
    """Width of the blocks, number of heads, and number of characters of a sequence."""

    width: int = WIDTH
    heads: int = HEADS
    length: int = LENGTH


SMALL, WIDE = Size(), Size(768, 12, 256)

# ------------------------------------------------------------------------------------ flax linen


class _Attention(nn.Module):
    size: Size

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, heads = self.size.width, self.size.heads
        split = (*x.shape[:-1], heads, width // heads)
        q, k, v = (nn.Dense(width, name=name)(x).reshape(split) for name in "qkv")
        scores = jnp.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(width // heads)
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        shares = jax.nn.softmax(jnp.where(causal, scores, -1e9))
        mixed = jnp.einsum("bhij,bjhd->bihd", shares, v).reshape(x.shape)
        return nn.Dense(width, name="out")(mixed)


class _Block(nn.Module):
    size: Size

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        x = x + _Attention(self.size, name="attention")(nn.LayerNorm(name="norm1")(x))
        h = nn.Dense(4 * self.size.width, name="up")(nn.LayerNorm(name="norm2")(x))
        return x + nn.Dense(self.size.width, name="down")(nn.gelu(h)), None


class _Transformer(nn.Module):
    kind: str
    size: Size = SMALL

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        width = self.size.width
        x = nn.Embed(VOCABULARY, width, name="characters")(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), (self.size.length, width))
        if self.kind == "unrolled":
            for k in range(BLOCKS):
                x, _ = _Block(self.size, name=f"block{k}")(x)
        else:
            block = nn.remat(_Block, prevent_cse=False) if "remat" in self.kind else _Block
            stack = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, length=BLOCKS
            )
            x, _ = stack(self.size, name="blocks")(x, None)
        return nn.Dense(VOCABULARY, name="logits")(nn.LayerNorm(name="norm")(x))


def problem(kind: str, size: Size = SMALL) -> tuple[Callable[..., Any], Any, Any]:
    """The loss of one kind of stack, its parameters, and a batch."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, size.length + 1))
    batch = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    model = _Transformer(kind, size)
    params = jax.jit(model.init)(jax.random.key(0), batch[0])

    def loss(params: Any, batch: Any) -> jax.Array:
        return cross_entropy(model.apply(params, batch[0]), batch[1])

    return loss, params, batch


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_p, targets[..., None], -1))


def flax_own(params: Any, batch: Any) -> Any:
    """The same rows by flax alone: `perturb` and `capture_intermediates` on every module."""
    model = _Transformer("unrolled")

    def perturbed(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        if context.method_name != "__call__" or context.module.scope is None:
            return y
        if isinstance(y, tuple):
            return context.module.perturb("output", y[0]), *y[1:]
        return context.module.perturb("output", y)

    with nn.intercept_methods(perturbed):
        shapes = jax.eval_shape(model.init, jax.random.key(0), batch[0])["perturbations"]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def loss(params: Any, zeros: Any) -> tuple[jax.Array, Any]:
            logits, state = model.apply(
                {**params, "perturbations": zeros},
                batch[0],
                capture_intermediates=True,
                mutable=["intermediates"],
            )
            return cross_entropy(logits, batch[1]), state["intermediates"]

        pull = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, states), (grads, gradients) = pull(params, zeros)
    rows = [
        jax.tree.map(lambda a: statistics.sums(a, statistics.ACTIVATION), states),
        jax.tree.map(lambda a: statistics.sums(a, statistics.GRADIENT), gradients),
        jax.tree.map(statistics.rms, (params, grads)),
        jax.tree.map(statistics.nonfinite_count, grads),
    ]
    return (value, rows), grads


# --------------------------------------------------------------------------------------- PyTorch


def torch_steps() -> tuple[Callable[[], Any], Callable[[], Any]] | None:
    """The plain step and the one with hooks, each on its own copy of the model."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return _torch_step(torch, hooks=False), _torch_step(torch, hooks=True)


def _torch_model(torch: Any) -> Any:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x: Any) -> Any:
            q, k, v = (
                f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
            )
            scores = q @ k.transpose(-1, -2) / np.sqrt(WIDTH // HEADS)
            causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
            shares = scores.masked_fill(~causal, -1e9).softmax(-1)
            return self.out((shares @ v).transpose(1, 2).flatten(-2))

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
            self.attention = Attention()
            self.up = torch.nn.Linear(WIDTH, 4 * WIDTH)
            self.down = torch.nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x: Any) -> Any:
            x = x + self.attention(self.norm1(x))
            hidden = torch.nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh")
            return x + self.down(hidden)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.characters = torch.nn.Embedding(VOCABULARY, WIDTH)
            self.positions = torch.nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
            self.blocks = torch.nn.ModuleList(Block() for _ in range(BLOCKS))
            self.norm, self.logits = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, VOCABULARY)

        def forward(self, tokens: Any) -> Any:
            x = self.characters(tokens) + self.positions
            for block in self.blocks:
                x = block(x)
            return self.logits(self.norm(x))

    return Model()


def _torch_statistics(torch: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What a row holds, as one would write it in PyTorch: each a tensor, nothing is waited for."""
    info = torch.finfo

    def activation(x: Any) -> list[Any]:
        return [rms(x), x.mean(), x.abs().max(), (x == 0).float().mean(), nonfinite(x)]

    def gradient(x: Any) -> list[Any]:
        size = x.abs()
        below = [
            ((size > 0) & (size < info(d).tiny)).float().mean()
            for d in (torch.float16, torch.bfloat16)
        ]
        return [rms(x), size.max(), nonfinite(x), *below]

    def rms(x: Any) -> Any:
        largest = x.abs().max()
        scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
        return scale * (x / scale).square().mean().sqrt()

    def nonfinite(x: Any) -> Any:
        return (~torch.isfinite(x)).sum()

    return activation, gradient


def _torch_step(torch: Any, hooks: bool) -> Callable[[], Any]:
    _ = torch.manual_seed(0)
    model = _torch_model(torch)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1))
    activation, gradient = _torch_statistics(torch)
    rows: dict[str, list[Any]] = {}

    def watch(name: str, module: Any) -> None:
        def forward(_: Any, _inputs: Any, output: Any) -> None:
            with torch.no_grad():
                rows["forward " + name] = activation(output)

        def backward(_: Any, _inputs: Any, outputs: Any) -> None:
            rows["backward " + name] = gradient(outputs[0])

        module.register_forward_hook(forward)
        module.register_full_backward_hook(backward)

    if hooks:
        for name, module in model.named_modules():
            if name and not isinstance(module, torch.nn.ModuleList):
                watch(name, module)

    def step() -> Any:
        model.zero_grad(set_to_none=True)
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        if hooks:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    rows["weight " + name] = [activation(p)[0], *gradient(p.grad)[:3:2]]
        return loss.item()

    return step


# ---------------------------------------------------------------------------------------- running


def compare(kind: str, options: harness.Options, size: Size) -> dict[str, harness.Result]:
    loss, params, batch = problem(kind, size)
    cases = [
        harness.Case("value_and_grad", jax.value_and_grad(loss), (params, batch)),
        harness.Case("value_and_grad_flow", jg.value_and_grad_flow(loss), (params, batch)),
    ]
    if kind == "unrolled" and size == SMALL:
        cases.append(harness.Case("flax perturb + capture", flax_own, (params, batch)))
    return harness.compare(cases, baseline="value_and_grad", options=options)


def compare_torch(options: harness.Options) -> dict[str, harness.Result] | None:
    steps = torch_steps()
    if steps is None:
        return None
    cases = [
        harness.Case("PyTorch", steps[0], jit=False),
        harness.Case("PyTorch, all hooks", steps[1], jit=False),
    ]
    return harness.compare(cases, baseline="PyTorch", options=options)


def main() -> int:
    options = harness.options(__doc__)
    tables = {
        f"{title}, width {size.width}": compare(kind, options, size)
        for size in (SMALL, WIDE)
        for kind, title in TITLES.items()
    }
    claims = []
    for title, results in tables.items():
        flow = results["value_and_grad_flow"]
        claims += [
            harness.Claim(f"{title}: step time over value_and_grad", flow.time_ratio, at_most=1.03),
            harness.Claim(f"{title}: temporary memory", flow.memory_ratio, at_most=1.01),
            harness.Claim(f"{title}: compile time", flow.compile_ratio, at_most=1.5),
        ]
    torch_table = compare_torch(options)
    if torch_table is not None:
        tables["the same transformer in PyTorch"] = torch_table
    return harness.finish("flow", tables, claims, options)


if __name__ == "__main__":
    raise SystemExit(main())
