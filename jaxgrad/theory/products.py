"""Products of Gaussian matrices: Lyapunov exponents, and the law of their log singular values.

Newman 1986 (Commun. Math. Phys. 103, 121); Forrester 2013 (J. Stat. Phys. 151, 796), equation 1.5.
In the QR decomposition of a product of real N x N matrices with entries of variance sigma^2 / N the
i-th diagonal entry squared, times N / sigma^2, is chi-squared with N - i + 1 degrees of freedom,
independently of all others and of all other layers.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.special import digamma, polygamma
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxgrad.theory.gaussian import real


class LogSingularValues(NamedTuple):
    """Mean and standard deviation of each, largest first."""

    mean: Float[Array, " n"]
    standard_deviation: Float[Array, " n"]


def _degrees(width: int) -> Array:
    if width < 1:
        raise ValueError(f"width: expected at least 1, got {width}")
    return real(jnp.arange(width, 0, -1))


def gaussian_lyapunov_exponents(width: int, sigma_w: ArrayLike = 1.0) -> Float[Array, " n"]:
    """`(psi((N - i + 1) / 2) + ln(2 / N)) / 2 + ln sigma_w`: nats a layer, largest first.

    Measured by `log_singular_values(chain, x) / len(chain)` of deep linear chains.

    Args:
        width: N.
        sigma_w: entries have variance sigma_w^2 / N.

    Returns:
        N exponents.
    """
    half = _degrees(width) / 2
    return (digamma(half) + jnp.log(2 / width)) / 2 + jnp.log(real(sigma_w))


def gaussian_log_singular_values(
    width: int, depth: ArrayLike, sigma_w: ArrayLike = 1.0
) -> LogSingularValues:
    """The log singular values of `depth` Gaussian layers: normal, and independent at great depth.

    The law of `sum_l ln |R_ii|`, exact at every depth, of variance `L psi_1((N - i + 1) / 2) / 4`;
    the log singular values themselves come to it as the gaps between the exponents, times L,
    exceed one. Their sum, ln |det J|, has it exactly. Measured by `log_singular_values(chain, x)`.

    Args:
        width: N.
        depth: L.
        sigma_w: entries have variance sigma_w^2 / N.

    Returns:
        (mean, standard_deviation), N each.
    """
    depth = real(depth)
    variance = depth * polygamma(1, _degrees(width) / 2) / 4
    mean = depth * gaussian_lyapunov_exponents(width, sigma_w)
    return LogSingularValues(mean, jnp.sqrt(variance))
