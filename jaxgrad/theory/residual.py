"""Residual networks: how much a block adds to the gradient, and when it takes from it.

Yang and Schoenholz 2017 (arXiv 1712.08969); Zhang et al. 2019 (Fixup, arXiv 1901.09321).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.scipy.special import gammainc
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxgrad.theory.activations import activation
from jaxgrad.theory.gaussian import gaussian_mean, real
from jaxgrad.theory.mean_field import Phi, slope_moment, variance_map


class ResidualProfile(NamedTuple):
    """Predictions by depth; index l is the stream after l blocks, from 0 to L.

    Attributes:
        q: mean square of the residual stream.
        log_gain: ln of the root mean square of dh_L / dh_l applied to a random gradient.
    """

    q: Array
    log_gain: Array


def residual_profile(
    phi: Phi, depth: int, sigma_w: ArrayLike, sigma_b: ArrayLike = 0.0, q_0: ArrayLike = 1.0
) -> ResidualProfile:
    """Mean-field recursion of `h' = h + W phi(h) + b`.

    `q' = q + sigma_w^2 E phi^2 + sigma_b^2`; the squared gradient grows by
    `1 + sigma_w^2 E phi'^2` a block: Yang and Schoenholz 2017, theorems 5 and 6. For tanh
    `q ~ l` and the log gain grows like sqrt(L); for ReLU both are exponential. Measured by
    `flow.activation_rms**2` and `ln(flow.gradient_rms)` relative to the last block's.

    Args:
        phi: activation.
        depth: number of blocks L.
        sigma_w: weights have variance sigma_w^2 / n.
        sigma_b: standard deviation of the biases.
        q_0: mean square of the stream before the first block, a scalar.

    Returns:
        Arrays (L + 1,).
    """
    phi = activation(phi)

    def block(q: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        factor = jnp.log1p(real(sigma_w) ** 2 * slope_moment(phi, q, 2)) / 2
        after = q + variance_map(phi, q, sigma_w, sigma_b)
        return after, (after, factor)

    start = real(q_0)
    _, (q, factors) = lax.scan(block, start, length=depth)
    gains = jnp.concatenate([jnp.cumsum(factors[::-1])[::-1], jnp.zeros(1, start.dtype)])
    return ResidualProfile(jnp.concatenate([start[None], q]), gains)


def branch_log_gain(scale: ArrayLike, depth: ArrayLike) -> Array:
    """`L ln(1 + s^2) / 2`: log root-mean-square gain of L blocks `I + s A` with zero-mean random A.

    `E ||(I + s A)^T g||^2 = (1 + s^2) ||g||^2` where A keeps mean squares; with s = 1 / sqrt(L) the
    squared gain tends to e. Measured by `jacobian_product(chain, x).log_norm()`, less that of the
    identity, ln(n) / 2.

    Args:
        scale: s, root-mean-square gain of a branch: 1 for He ReLU branches, sqrt(1/2) for a Xavier
            square ReLU one.
        depth: number of blocks.

    Returns:
        Nats.
    """
    return real(depth) * jnp.log1p(real(scale) ** 2) / 2


def shrink_probability(width: ArrayLike, scale: ArrayLike) -> Array:
    """Probability that a block `I + A`, A_ij ~ N(0, s^2 / n), shrinks a fixed gradient.

    `||g + A^T g||^2 / ||g||^2` is `s^2 / n` times a noncentral chi-squared of n degrees of freedom
    and noncentrality n / s^2; its distribution function at n / s^2, integrated over the component
    along g. It tends to Phi(-s sqrt(n) / 2), to 1/2 as s goes to zero: a residual path keeps a
    gradient from shrinking in mean square only. Measured by the share of blocks with
    `flow.gradient_rms[l] < flow.gradient_rms[l + 1]`.

    Args:
        width: n, at least 2.
        scale: s.

    Returns:
        Probability.
    """
    n, s = jnp.broadcast_arrays(real(width), real(scale))
    # the step along g is s z / sqrt(n); it shrinks between -2 and 0
    unit = s / jnp.sqrt(n)

    def below(along: Array) -> Array:
        room = n[..., None] * jnp.maximum(1 - (1 + along) ** 2, 0) / s[..., None] ** 2
        return gammainc((n[..., None] - 1) / 2 * jnp.ones_like(room), room / 2)

    turn = jnp.sqrt(jnp.maximum(1 - s**2, 0)) - 1  # there the room is n
    return gaussian_mean(below, unit**2, kinks=(-2.0, -1.0, turn))
