"""A small pre-activation ResNet for images; BatchNorm's running averages are an explicit state."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.nn.activations import activation
from jaxgrad.nn.dense import compute_dtype, conv, linear, stack, through, weights_init
from jaxgrad.nn.normalization import (
    batch_norm,
    batch_norm_init,
    batch_norm_training,
    norm_of,
)
from jaxgrad.nn.residual_rules import Site, branch_gains, residual, residual_init, rule_of


@dataclass(frozen=True)
class Config:
    """A ResNet after He et al. 2016 (arXiv 1603.05027): `h + conv(phi(N(conv(phi(N(h))))))`.

    A stage begins, from the second on, with a convolution of stride 2 to its width; all blocks of a
    stage are equal, so their Jacobians are I + J_F, and they can be scanned.

    Attributes:
        n_in: channels of the images.
        n_out: features of an output.
        widths: channels of the stages.
        blocks: residual blocks of each stage.
        activation: a name in `ACTIVATIONS`.
        initializer: a name in `INITIALIZERS`, of all kernels.
        norm: "batch", or a name in `NORMS` (over the channels of each pixel).
        residual: a rule whose formula has no norm, as the norms are inside the branch: "none",
            "plain", "rezero", "skip_init" or "fixup".
        scan: whether the blocks of a stage are scanned or unrolled.
        remat: whether the backward pass recomputes the blocks.
        dtype: of the computation; None is the parameters'. Outputs are float32 at least.
    """

    n_in: int
    n_out: int
    widths: tuple[int, ...] = (16, 32)
    blocks: int = 2
    activation: str = "relu"
    initializer: str = "he_normal"
    norm: str = "batch"
    residual: str = "plain"
    scan: bool = False
    remat: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        if rule_of(self.residual).norms:
            raise ValueError(
                f"residual: {self.residual!r} places norms around the branch; a ResNet has them "
                "inside: expected 'none', 'plain', 'rezero', 'skip_init' or 'fixup'"
            )
        if self.norm != "batch":
            _ = norm_of(self.norm)


def _site(config: Config) -> Site:
    return Site(max(config.blocks * len(config.widths), 1), norm_of("none"))


def _norm_init(width: int, config: Config) -> tuple[Any, Any]:
    """(parameters, state) of one norm."""
    if config.norm == "batch":
        return batch_norm_init(width)
    return norm_of(config.norm).init(width), {}


def init(key: Array, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and running averages, float32.

    Args:
        key: PRNG key.
        config: the model. `scan` stacks the same draws.

    Returns:
        ({"embed", "stages": a tuple of {"blocks"[, "down"]}, "norm", "readout"}, the averages by
        the same names; empty trees where the norm has none).
    """
    for_embed, for_readout, *for_stages = jax.random.split(key, 2 + len(config.widths))
    rule, widths = config.initializer, config.widths
    stages = [
        _init_stage(k, before, width, config)
        for k, before, width in zip(for_stages, (None, *widths), widths, strict=False)
    ]
    norm, averages = _norm_init(widths[-1], config)
    params = {
        "embed": weights_init(for_embed, (3, 3, config.n_in, widths[0]), rule),
        "stages": tuple(p for p, _ in stages),
        "norm": norm,
        "readout": weights_init(for_readout, (widths[-1], config.n_out), rule),
    }
    return params, {"stages": tuple(s for _, s in stages), "norm": averages}


def _init_stage(key: Array, before: int | None, width: int, config: Config) -> tuple[Any, Any]:
    keys = jax.random.split(key, config.blocks + 1)
    blocks = [_init_block(k, width, config) for k in keys[1:]]
    both = tuple(p for p, _ in blocks), tuple(s for _, s in blocks)
    if config.scan and blocks:
        both = stack(both[0]), stack(both[1])
    stage = {"blocks": both[0]}
    if before is not None:
        stage["down"] = weights_init(keys[0], (3, 3, before, width), config.initializer)
    return stage, both[1]


def _init_block(key: Array, width: int, config: Config) -> tuple[Any, Any]:
    first, second = jax.random.split(key)
    shape, gains = (3, 3, width, width), branch_gains(config.residual, _site(config))
    norms = [_norm_init(width, config) for _ in range(2)]
    params = {
        "norm0": norms[0][0],
        "conv0": weights_init(first, shape, config.initializer, gains.inner),
        "norm1": norms[1][0],
        "conv1": weights_init(second, shape, config.initializer, gains.last),
        "residual": residual_init(config.residual, width, _site(config)),
    }
    return params, {"norm0": norms[0][1], "norm1": norms[1][1]}


def _normalize(params: PyTree, state: PyTree, x: Array, config: Config, running: bool) -> Any:
    """(y, the new averages)."""
    if config.norm != "batch":
        return norm_of(config.norm).apply(params, x), state
    if running:
        return batch_norm(params, state, x), state
    return batch_norm_training(params, state, x)


def block(
    params: PyTree, state: PyTree, h: Array, config: Config, running: bool = False
) -> tuple[Array, PyTree]:
    """One block of the stream.

    Args:
        params: one of a stage's blocks.
        state: its running averages.
        h: the stream, (batch, height, width, channels).
        config: the model.
        running: whether BatchNorm takes the averages instead of the batch's statistics.

    Returns:
        (the stream after the block, the new averages).
    """
    phi, new = activation(config.activation), {}

    def branch(x: Array) -> Array:
        for k in range(2):
            name = f"norm{k}"
            x, new[name] = _normalize(params[name], state[name], x, config, running)
            x = conv(params[f"conv{k}"], phi(x))
        return x

    return residual(config.residual, branch, params["residual"], h, _site(config)), new


def _forward(
    params: PyTree, state: PyTree, x: Array, config: Config, running: bool
) -> tuple[Array, PyTree]:
    h = jnp.asarray(x, compute_dtype(params, config.dtype))
    with jax.named_scope("embed"):
        h = conv(params["embed"], h)

    def one(both: PyTree, h: Array) -> tuple[Array, PyTree]:
        weights, averages = both
        return block(weights, averages, h, config, running)

    averages = []
    for k, (stage, before) in enumerate(zip(params["stages"], state["stages"], strict=True)):
        if "down" in stage:
            with jax.named_scope(f"stage{k}_down"):
                h = conv(stage["down"], h, stride=2)
        blocks = stage["blocks"]
        unrolled = isinstance(blocks, tuple)  # else a list of two stacks, which scans
        layers = tuple(zip(blocks, before, strict=True)) if unrolled else [blocks, before]
        h, after = through(one, layers, h, config.remat, f"stage{k}_block")
        averages.append(after)
    with jax.named_scope("readout"):
        h, last = _normalize(params["norm"], state["norm"], h, config, running)
        h = jnp.mean(activation(config.activation)(h), axis=(1, 2))
        y = linear(params["readout"], h)
        y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    return y, {"stages": tuple(averages), "norm": last}


def apply(
    params: PyTree,
    x: Float[Array, "batch height width n_in"],
    config: Config,
    state: PyTree | None = None,
) -> Float[Array, "batch n_out"]:
    """The network's outputs.

    Args:
        params: of `init`.
        x: images, channels last.
        config: the model.
        state: running averages, for evaluation: each example then stands alone. None takes the
            statistics of the batch, as in training.

    Returns:
        Outputs, float32 at least.
    """
    if state is not None:
        return _forward(params, state, x, config, running=True)[0]
    return _forward(params, _blank(config), x, config, running=False)[0]


def _blank(config: Config) -> PyTree:
    """Averages that are updated and thrown away."""
    shapes = jax.eval_shape(partial(init, config=config), jax.random.key(0))[1]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def apply_training(
    params: PyTree, state: PyTree, x: Float[Array, "batch height width n_in"], config: Config
) -> tuple[Float[Array, "batch n_out"], PyTree]:
    """(outputs with the statistics of the batch, the updated running averages).

    Args:
        params: of `init`.
        state: running averages, of `init` or the last step.
        x: images, channels last.
        config: the model.
    """
    return _forward(params, state, x, config, running=False)
