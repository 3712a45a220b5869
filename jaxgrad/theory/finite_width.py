"""What finite width adds to mean-field theory: the law of the log of a gradient's gain.

Mean-field theory keeps the mean of the squared gain at one; its logarithm drifts down and spreads,
by amounts of order depth / width: Hanin 2018 (arXiv 1801.03744), Hanin and Nica 2019 (arXiv
1812.05994). For Gaussian weights and ReLU or linear units the law is known exactly at every width:
`||J u||^2 = prod_l (sigma_w^2 / n_l) chi^2_{K_l}`, with `K_l` the number of active units.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import digamma, gammaln, polygamma
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxgrad.theory.activations import Activation, activation
from jaxgrad.theory.gaussian import gaussian_mean, real
from jaxgrad.theory.mean_field import Phi, slope_moment, variance_slope


class LogGain(NamedTuple):
    """The law of `ln ||J u||^2` for a fixed unit vector u.

    Attributes:
        mean: its mean, in nats, given that no layer is dead.
        variance: its variance, in nats^2, given the same.
        dead: probability that some layer has no active unit, so that J = 0.
    """

    mean: Array
    variance: Array
    dead: Array


def log_gain(widths: Sequence[int], phi: str = "relu", sigma_w: float | None = None) -> LogGain:
    """The exact law of the log squared gain of a Gaussian net at finite width.

    Per layer `m = E psi(K/2) + ln(2 sigma_w^2 / n)` and `v = E psi_1(K/2) + Var psi(K/2)`, with
    K ~ Binomial(n, 1/2) given K > 0 for ReLU and K = n for linear layers. Layers are independent,
    so both add up. (Hanin and Nica 2019, theorem 1, before its expansion in 1/n.) Measured by
    `2 * ln(||J u||)`, with `J u` from `jax.jvp`, or `J^T g` from `value_and_grad_flow`; a mean over
    S nets has standard error `sqrt(variance / S)`.

    Args:
        widths: output sizes n_l of the layers; weights have variance sigma_w^2 / fan_in, and all
            fan_in but the first equal the n_l before (the first layer's is taken as n_1).
        phi: "relu" or "linear".
        sigma_w: None: sqrt(2) for ReLU (He), 1 for linear.

    Returns:
        The law.
    """
    if phi not in ("relu", "linear"):
        raise ValueError(f"log_gain: expected 'relu' or 'linear', got {phi!r}; see log_gain_of")
    gain = (2.0 if phi == "relu" else 1.0) if sigma_w is None else float(sigma_w) ** 2
    means, variances, alive = [], [], []
    for n in widths:
        psi, psi_1, weights = _digammas(int(n), phi)
        mean = jnp.sum(weights * psi)
        means.append(mean + jnp.log(2 * gain / n))
        variances.append(jnp.sum(weights * psi_1) + jnp.sum(weights * (psi - mean) ** 2))
        alive.append(real(-(2.0 ** -float(n)) if phi == "relu" else 0.0))
    log_alive = jnp.sum(jnp.log1p(jnp.stack(alive))) if alive else real(0.0)
    total = (jnp.sum(jnp.stack(x)) if x else real(0.0) for x in (means, variances))
    return LogGain(*total, dead=-jnp.expm1(log_alive))


def _digammas(n: int, phi: str) -> tuple[Array, Array, Array]:
    """psi(K/2), psi_1(K/2) and the probability of each possible K > 0."""
    if phi == "linear":
        k, weights = real(np.array([float(n)])), real(np.ones(1))
    else:
        k = real(np.arange(1.0, n + 1))
        log_binomial = gammaln(n + 1.0) - gammaln(k + 1) - gammaln(n - k + 1)
        weights = jnp.exp(log_binomial - jnp.max(log_binomial))
        weights = weights / jnp.sum(weights)
    return digamma(k / 2), polygamma(1, k / 2), weights


def gain_kurtosis(widths: ArrayLike, phi: str = "relu") -> Array:
    """`E ||J u||^4 / (E ||J u||^2)^2`, exactly: the product of `1 + 5 / n` (ReLU), `1 + 2 / n`.

    `exp(5 sum 1/n)` to leading order: Hanin 2018, theorem 3.

    Args:
        widths: output sizes of the layers, shape (L,).
        phi: "relu" or "linear".

    Returns:
        Scalar.
    """
    excess = {"relu": 5.0, "linear": 2.0}
    if phi not in excess:
        raise ValueError(f"gain_kurtosis: expected 'relu' or 'linear', got {phi!r}")
    return jnp.exp(jnp.sum(jnp.log1p(excess[phi] / real(widths))))


class Standard(NamedTuple):
    """A prediction with the standard deviation that finite width gives one network."""

    mean: Array
    standard_deviation: Array


def log_gain_of(
    phi: Phi, q: ArrayLike, sigma_w: ArrayLike, width: ArrayLike, depth: ArrayLike
) -> Standard:
    """Log squared gain of `depth` layers at the fixed point, to first order in 1 / width.

    A layer multiplies the squared norm by a mean over n units of `sigma_w^2 phi'^2 z^2`, whose
    relative variance is `v = (3 mu_2 / mu_1^2 - 1) / n`; the log then has mean `ln chi_1 - v / 2`
    and variance v (5/n for ReLU, 2/n for linear: Hanin and Nica 2019, theorem 1). Where chi_1
    depends on q the standard deviation has the fluctuations of q too, which all later layers see
    (linear response, as in `variance_fluctuation`); their effect on the mean, also of order
    depth / n, is left out.

    Args:
        phi: activation.
        q: fixed point of the variance map.
        sigma_w: weights have variance sigma_w^2 / fan_in.
        width: n.
        depth: L.

    Returns:
        (mean, standard deviation between networks), in nats.
    """
    phi, q, n, depth = activation(phi), real(q), real(width), real(depth)
    mu_1, mu_2 = slope_moment(phi, q, 2), slope_moment(phi, q, 4)
    v = (3 * mu_2 / mu_1**2 - 1) / n
    # d ln chi_1 / d ln q by a central difference of an integral
    step = float(np.cbrt(jnp.finfo(q.dtype).eps))
    higher, lower = (jnp.log(slope_moment(phi, q * (1 + s), 2)) for s in (step, -step))
    sensitivity = (higher - lower) / (2 * step)
    memory = sensitivity / (1 - variance_slope(phi, q, sigma_w))
    drive, shared = _noise(phi, q, sigma_w)
    spread = v + (memory**2 * drive + 2 * memory * shared) / n
    mean = depth * (jnp.log(real(sigma_w) ** 2 * mu_1) - v / 2)
    return Standard(mean, jnp.sqrt(depth * spread))


def _noise(phi: Activation, q: Array, sigma_w: ArrayLike) -> tuple[Array, Array]:
    """Relative variance of a layer's noise on q, times n, and its covariance with the slope."""

    def mean(a: int, b: int) -> Array:
        return gaussian_mean(lambda x: phi.function(x) ** a * phi.derivative(x) ** b, q, phi.kinks)

    gain, signal, slope = real(sigma_w) ** 2 / q, mean(2, 0), mean(0, 2)
    return gain**2 * (mean(4, 0) - signal**2), gain * (mean(2, 2) / slope - signal)


def variance_fluctuation(phi: Phi, q: ArrayLike, sigma_w: ArrayLike, width: ArrayLike) -> Array:
    """Relative standard deviation of a layer's mean square pre-activation between networks.

    Given the layer before, pre-activations are Gaussian with a variance q_l that is itself a mean
    over n units: `q_{l+1} - q* = chi_q (q_l - q*) + noise`, with noise of variance
    `sigma_w^4 Var(phi^2) / n`. The stationary variance is the noise's over `1 - chi_q^2`, and the
    sampling of the layer's own n units adds `2 q^2 / n` (linear response of the variance map).

    Args:
        phi: activation.
        q: fixed point of the variance map.
        sigma_w: weights have variance sigma_w^2 / fan_in.
        width: n.

    Returns:
        Relative standard deviation.
    """
    phi, q, n = activation(phi), real(q), real(width)
    drive, _ = _noise(phi, q, sigma_w)
    return jnp.sqrt((drive / (1 - variance_slope(phi, q, sigma_w) ** 2) + 2) / n)
