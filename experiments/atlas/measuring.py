"""Measurements that several experiments share."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from experiments.atlas import deep, frame
from jaxgrad import nn
from jaxgrad.nn import mlp

Block = Callable[[PyTree, Array], Array]


def log_gains(
    block: Block, layers: PyTree, h: Float[Array, " n"], g: Float[Array, " n"]
) -> Float[Array, " layers"]:
    """Logarithm of the factor by which each layer multiplies the norm of the gradient.

    The gradient is scaled to norm one after each layer, so depth cannot underflow.

    Args:
        block: (params, h) -> h.
        layers: parameters with a leading axis of layers.
        h: input of the first layer.
        g: gradient at the output of the last.

    Returns:
        One number a layer, in forward order.
    """

    def forward(h: Array, params: PyTree) -> tuple[Array, Array]:
        return block(params, h), h

    def backward(g: Array, both: tuple[PyTree, Array]) -> tuple[Array, Array]:
        params, h = both
        _, pull = jax.vjp(lambda h: block(params, h), h)
        (g,) = pull(g)
        norm = jnp.linalg.norm(g)
        return g / norm, jnp.log(norm)

    _, inputs = lax.scan(forward, h, layers)
    _, gains = lax.scan(backward, g / jnp.linalg.norm(g), (layers, inputs), reverse=True)
    return gains


def deep_mlp(key: Array, config: mlp.Config) -> dict[str, Any]:
    """Parameters of a scanned perceptron, its blocks drawn in one vmapped call.

    `mlp.init` draws block after block, which takes longer to compile than a deep net to train.

    Args:
        key: PRNG key; the draws are not those of `mlp.init`.
        config: the model; `scan` must be set.

    Returns:
        As `mlp.init`.

    Raises:
        ValueError: for a model that is not scanned, and for Fixup, whose last layers are zero.
    """
    if not config.scan or config.residual == "fixup":
        raise ValueError("config: expected a scanned model without Fixup")
    norm, for_ends, for_blocks = nn.NORMS[config.norm], *jax.random.split(key)
    single = replace(config, depth=1)
    blocks = deep.blocks(lambda k: mlp.init(k, single)["blocks"], for_blocks, config.depth)
    ends = mlp.init(for_ends, replace(config, depth=0))
    if config.residual == "none":
        return {**ends, "blocks": blocks}
    # the rule's factors and first scalars depend on the depth
    one, all_of = (nn.branch_gains(config.residual, nn.Site(n, norm)) for n in (1, config.depth))
    for name, gain in (("inner", all_of.inner / one.inner), ("outer", all_of.last / one.last)):
        blocks[name]["kernel"] *= gain
    own = nn.residual_init(config.residual, config.width, nn.Site(config.depth, norm))
    blocks["residual"] = nn.stack((own,) * config.depth)
    return {**ends, "blocks": blocks}


@functools.cache
def _drawing(config: mlp.Config) -> Callable[[Array], Any]:
    # LLVM optimizes random draws for longer than a deep net takes to train; level 1 is a fifth
    options = {"xla_backend_optimization_level": 1}
    return jax.jit(jax.vmap(lambda key: deep_mlp(key, config)), compiler_options=options)


def over_nets(
    function: Callable[[Array, Any], Any], configs: Sequence[mlp.Config], seeds: int
) -> Any:
    """`frame.over_seeds` of a function of (key, nets), the nets drawn by a program of their own.

    Args:
        function: (key, parameters of `deep_mlp` with a leading axis of the configs) -> pytree.
        configs: scanned models of equal shapes.
        seeds: how many keys.

    Returns:
        numpy arrays with a leading axis of seeds.
    """
    keys = jax.random.split(jax.random.key(0), seeds)
    drawn = [_drawing(config)(keys) for config in configs]
    nets = jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *drawn)
    return frame.mapped(function, keys, nets)
