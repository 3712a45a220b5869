"""Singular values of the input-output Jacobian of wide networks, by free probability.

Pennington, Schoenholz and Ganguli 2017 (arXiv 1711.04735) and 2018 (arXiv 1802.09979). All layers
are square, at the fixed point q*; width goes to infinity at fixed depth.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxgrad.theory.gaussian import bisect, real
from jaxgrad.theory.mean_field import Phi, slope_moment

Weights = Literal["gaussian", "orthogonal"]


class SquaredSingularValues(NamedTuple):
    """Mean and variance over the spectrum of J J^T."""

    mean: Array
    variance: Array


def _s1(weights: str) -> int:
    """First coefficient of the S-transform of W W^T; Pennington et al. 2018, table 1."""
    if weights not in ("gaussian", "orthogonal"):
        raise ValueError(f"weights: expected 'gaussian' or 'orthogonal', got {weights!r}")
    return -1 if weights == "gaussian" else 0


def squared_singular_values(
    phi: Phi, q: ArrayLike, sigma_w: ArrayLike, depth: ArrayLike, weights: Weights = "gaussian"
) -> SquaredSingularValues:
    """Mean and variance of the squared singular values of `depth` layers together.

    `m_1 = (sigma_w^2 mu_1)^L` and `variance / m_1^2 = L (mu_2 / mu_1^2 - 1 - s_1)`, with
    `mu_k = E phi'^(2k)`; Pennington et al. 2018, equations 15 and 16. Measured by
    `exp(2 * log_singular_values(chain, x))`, or `singular_moments(chain, x)`.

    Args:
        phi: activation; "linear" has mu_k = 1.
        q: fixed point of the variance map.
        sigma_w: weights have variance sigma_w^2 / n, orthogonal ones are sigma_w times orthogonal.
        depth: number of layers.
        weights: "gaussian" or "orthogonal".

    Returns:
        (mean, variance).
    """
    depth = real(depth)
    mu_1, mu_2 = slope_moment(phi, q, 2), slope_moment(phi, q, 4)
    mean = (real(sigma_w) ** 2 * mu_1) ** depth
    spread = depth * (mu_2 / mu_1**2 - 1 - _s1(weights))
    return SquaredSingularValues(mean, spread * mean**2)


def largest_squared_singular_value(
    depth: ArrayLike, active: ArrayLike = 1.0, weights: Weights = "gaussian"
) -> Array:
    """Edge of the spectrum of J J^T where phi' is 0 or 1 and the mean is one.

    The edge is the minimum over z > 0 of the inverse moment function `(1 + z) / (z S(z))` with
    `1 / S = ((1 + z / active)^L` for Gaussian weights and `((1 + z / active) / (1 + z))^L` for
    orthogonal ones; Pennington et al. 2018, section 3. Measured by the first of
    `2 * log_singular_values(chain, x)`; at finite width it lies some percent lower.

    Args:
        depth: number of layers.
        active: probability that phi' is one, 1 / sigma_w^2: 1 for linear nets, 1/2 for ReLU,
            P(|h| < 1) for the hard tanh.
        weights: "gaussian" or "orthogonal".

    Returns:
        Array of the common shape; inf for L orthogonal layers where one unit alone is no bound.
    """
    gaussian = _s1(weights) == -1
    depth, active = jnp.broadcast_arrays(real(depth), real(active))

    def log_inverse(t: Array) -> Array:
        z = jnp.exp(t)
        layer = jnp.log1p(z / active) - (0 if gaussian else jnp.log1p(z))
        return jnp.log1p(z) - t + depth * layer

    def slope(t: Array) -> Array:
        z = jnp.exp(t)
        layer = 1 / (active + z) - (0 if gaussian else 1 / (1 + z))
        return 1 / (1 + z) - 1 / z + depth * layer

    low, high = jnp.full_like(depth, -40.0), jnp.full_like(depth, 40.0)
    return jnp.exp(log_inverse(bisect(slope, low, high, steps=80)))


def second_moment_at_width(width: ArrayLike, depth: int, phi: str = "linear") -> Array:
    """`E tr(J J^T J J^T) / N` at finite width, exactly, for Gaussian weights of mean gain one.

    With `a = E tr(G^2) / N`, `b = E (tr G / N)^2`, `G = J J^T`, a further layer gives, by Wick's
    theorem, `a' = (1 + 1/N) a + b`, `b' = b + 2 a / N^2` for linear layers and
    `a' = (1 + 3/N) a + 2 b`, `b' = (1 + 1/N) b + 4 a / N^2` for ReLU ones with Var W = 2 / N. As N
    goes to infinity the variance of Pennington et al. 2018 comes out: L, and 2 L.

    Args:
        width: N, the size of all layers.
        depth: number of layers.
        phi: "linear" or "relu".

    Returns:
        Array of the shape of `width`.
    """
    n = real(width)
    if phi == "linear":
        rows = ((1 + 1 / n, jnp.ones_like(n)), (2 / n**2, jnp.ones_like(n)))
    elif phi == "relu":
        rows = ((1 + 3 / n, 2 * jnp.ones_like(n)), (4 / n**2, 1 + 1 / n))
    else:
        raise ValueError(f"second_moment_at_width: expected 'linear' or 'relu', got {phi!r}")

    def layer(_: ArrayLike, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        a, b = pair
        return rows[0][0] * a + rows[0][1] * b, rows[1][0] * a + rows[1][1] * b

    return lax.fori_loop(0, depth, layer, (jnp.ones_like(n), jnp.ones_like(n)))[0]
