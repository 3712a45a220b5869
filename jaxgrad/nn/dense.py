"""Linear maps and convolutions, and how equal layers follow each other.

The stream's dtype is the compute dtype: every parameter is cast to it where it is used, and
parameters stay what they are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from jaxgrad.nn.initializers import Initializer, fans, initializer

Block = Callable[[Any, Any], Any]


def weights_init(
    key: Array, shape: tuple[int, ...], rule: str | Initializer, gain: float = 1.0
) -> dict[str, Array]:
    """{"kernel": shape, "bias": (fan_out's features,)}, float32.

    Args:
        key: PRNG key.
        shape: (n_in, n_out), or (height, width, n_in, n_out) of a convolution.
        rule: an initializer or its name.
        gain: factor of the kernel.
    """
    chosen = initializer(rule, gain)
    for_kernel, for_bias = jax.random.split(key)
    return {
        "kernel": chosen.weight(for_kernel, shape, jnp.float32),
        "bias": chosen.bias(for_bias, shape[-1:], fans(shape)[0], jnp.float32),
    }


def linear(params: PyTree, x: Float[Array, "... n_in"]) -> Float[Array, "... n_out"]:
    """`x @ kernel + bias`; the bias may be missing."""
    y = x @ params["kernel"].astype(x.dtype)
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def conv(
    params: PyTree, x: Float[Array, "batch height width n_in"], stride: int = 1
) -> Float[Array, "batch _ _ n_out"]:
    """A convolution with zeros around the image, "SAME"; the bias may be missing.

    Args:
        params: {"kernel": (side, side, n_in, n_out), "bias": (n_out,)}.
        x: images, channels last.
        stride: in both directions.
    """
    y = lax.conv_general_dilated(
        x, params["kernel"].astype(x.dtype), (stride, stride), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def compute_dtype(params: PyTree, dtype: str | None) -> Any:
    """The named dtype, or for None that of the parameters."""
    return jnp.dtype(dtype) if dtype is not None else jnp.result_type(*jax.tree.leaves(params))


def stack(layers: tuple[PyTree, ...]) -> PyTree:
    """Equal trees as one with a leading axis of layers: what `through` scans."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def unstack(layers: PyTree) -> tuple[PyTree, ...]:
    """A stacked tree as a tuple of trees: what `through` unrolls."""
    count = len(jax.tree.leaves(layers)[0])
    return tuple(jax.tree.map(lambda leaf, k=k: leaf[k], layers) for k in range(count))


def through(block: Block, layers: PyTree, h: Any, remat: bool = False, name: str = "block") -> Any:
    """Carries `h` through layers: `(h, out) = block(params, h)` for each.

    Args:
        block: one layer; `out` is what it returns beside the stream, None for nothing.
        layers: a tuple of parameter trees, unrolled as name0, name1, ..., or one tree with a
            leading axis of layers, scanned as `name`.
        h: what the first layer takes.
        remat: whether the backward pass recomputes each layer.
        name: of the layers' scopes.

    Returns:
        (the last h, the outs: a tuple where unrolled, stacked where scanned).
    """
    if remat:
        # in a scan the barrier against common subexpressions is not needed, and costs time
        block = jax.checkpoint(block, prevent_cse=isinstance(layers, tuple))
    if isinstance(layers, tuple):
        outs = []
        for k, params in enumerate(layers):
            with jax.named_scope(f"{name}{k}"):
                h, out = block(params, h)
            outs.append(out)
        return h, tuple(outs)

    def step(h: Any, params: Any) -> tuple[Any, Any]:
        with jax.named_scope(name):
            return block(params, h)

    return lax.scan(step, h, layers)
