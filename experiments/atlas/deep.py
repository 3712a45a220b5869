"""Deep stacks: drawn in a few calls, and what mean-field theory says of them.

A model's own `init` under jit compiles one random draw a layer: 7 s for 50 layers, where `draw`,
which is not jitted, compiles one for each shape and distribution in the process.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from jaxgrad import nn, theory

# Variance of the weights times fan_in, of square matrices; and of the biases times fan_in.
SIGMA_W2 = {
    "xavier_normal": 1.0, "xavier_uniform": 1.0, "he_normal": 2.0, "he_uniform": 2.0,
    "lecun_normal": 1.0, "orthogonal": 1.0, "torch_linear": 1 / 3,
}  # fmt: skip
SIGMA_B2 = {"torch_linear": 1 / 3}


def draw(
    rule: str | nn.Initializer, key: Array, shape: tuple[int, int], *axes: int
) -> dict[str, Array]:
    """Layers of one shape: {"kernel": (*axes, *shape), "bias": (*axes, shape[1])}.

    Args:
        rule: an initializer or its name.
        key: PRNG key.
        shape: (n_in, n_out).
        *axes: leading axes, such as seeds and layers; every layer has a key of its own.
    """
    one: Callable[[Array], Any] = partial(nn.weights_init, shape=shape, rule=rule)
    for _ in axes:
        one = jax.vmap(one)
    return one(jax.random.split(key, axes))


def stacked(trees: Sequence[PyTree], axis: int = 0) -> PyTree:
    """Equal trees as one with a new axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *trees)


def blocks(init: Callable[[Array], PyTree], key: Array, depth: int) -> PyTree:
    """Blocks drawn in one vmapped call; `init` gives one block, stacked along an axis of one."""
    return jax.tree.map(lambda leaf: leaf[:, 0], jax.vmap(init)(jax.random.split(key, depth)))


def sigmas(rule: str, width: int) -> tuple[float, float]:
    """(sigma_w, sigma_b) of square layers drawn by a named rule."""
    return SIGMA_W2[rule] ** 0.5, (SIGMA_B2.get(rule, 0.0) / width) ** 0.5


def mean_field(
    phi: str, depth: int, sigma_w: Any, sigma_b: Any
) -> tuple[Float[Array, "*b depth"], Float[Array, "*b depth"]]:
    """What layers `h' = phi(W h + b)` do to inputs of mean square one, in wide networks.

    Args:
        phi: name of the activation; "identity" is linear.
        depth: number of layers.
        sigma_w: any shape `*b`.
        sigma_b: of that shape.

    Returns:
        (ln of the factor of the gradient's norm by layer: half of ln chi_1, mean square of the
        pre-activations by layer).
    """
    name = "linear" if phi == "identity" else phi
    sigma_w, sigma_b = jnp.asarray(sigma_w, float), jnp.asarray(sigma_b, float)

    def layer(q: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        # stands for the limit of zero, where a kink's derivative is no number
        q = jnp.maximum(q, 1e-36)
        factor = jnp.log(theory.chi_1(name, q, sigma_w)) / 2
        return theory.variance_map(name, q, sigma_w, sigma_b), (factor, q)

    _, (factors, squares) = lax.scan(layer, sigma_w**2 + sigma_b**2, length=depth)
    return jnp.moveaxis(factors, 0, -1), jnp.moveaxis(squares, 0, -1)
