"""Mean-field theory of wide networks `h' = W phi(h) + b`, Var W = sigma_w^2 / n, Var b = sigma_b^2.

Signal: Poole et al. 2016 (arXiv 1606.05340); gradients and depth scales: Schoenholz et al. 2017
(arXiv 1611.01232). The state is the pre-activation h; `q = E h^2` is its mean square.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxgrad.theory.activations import Activation, activation
from jaxgrad.theory.gaussian import bisect, gaussian_mean, gaussian_pair_mean, real

# The activation is static: it is compiled in.
_compiled = functools.partial(jax.jit, static_argnums=0)

Phi = str | Activation | Callable[[Array], Array]

# Fixed points are looked for up to this factor above or below the start.
_RANGE = 1e12
_GRID = 128
# Stands for a mean square of zero where a limit is meant.
_TINY = 1e-20


def _moment(phi: Activation, q: ArrayLike, power: int) -> Array:
    return gaussian_mean(lambda x: phi.function(x) ** power, q, phi.kinks)


@functools.partial(jax.jit, static_argnums=(0, 2))
def slope_moment(phi: Phi, q: ArrayLike, power: int) -> Array:
    """`E phi'(sqrt(q) z)^power`; with power 2k this is mu_k of Pennington et al. 2018."""
    phi = activation(phi)
    return gaussian_mean(lambda x: phi.derivative(x) ** power, q, phi.kinks)


@_compiled
def variance_map(phi: Phi, q: ArrayLike, sigma_w: ArrayLike, sigma_b: ArrayLike = 0.0) -> Array:
    """Mean square of the next pre-activation, `q' = sigma_w^2 E phi(sqrt(q) z)^2 + sigma_b^2`.

    Poole et al. 2016, equation 3. Measured by `flow.activation_rms**2` at a dense layer's output.

    Args:
        phi: activation, by name or as a function.
        q: mean square of the pre-activation.
        sigma_w: weights have variance sigma_w^2 / fan_in.
        sigma_b: standard deviation of the biases.

    Returns:
        Array of the common shape.
    """
    phi = activation(phi)
    return real(sigma_w) ** 2 * _moment(phi, q, 2) + real(sigma_b) ** 2


@_compiled
def variance_slope(phi: Phi, q: ArrayLike, sigma_w: ArrayLike) -> Array:
    """Derivative of the variance map, `sigma_w^2 E phi phi' x / q` with `x = sqrt(q) z`.

    Schoenholz et al. 2017, equation 8, integrated by parts so that it needs no second derivative.
    """
    phi, q = activation(phi), real(q)
    mean = gaussian_mean(lambda x: phi.function(x) * phi.derivative(x) * x, q, phi.kinks)
    return real(sigma_w) ** 2 * mean / q


@_compiled
def chi_1(phi: Phi, q: ArrayLike, sigma_w: ArrayLike) -> Array:
    """Factor of the gradient's mean square from layer to layer, `sigma_w^2 E phi'(sqrt(q) z)^2`.

    Poole et al. 2016, equation 6; Schoenholz et al. 2017, equation 15. Measured by the mean squared
    singular value of a layer, `(J**2).sum() / n_out` for `J` of `layer_jacobians`.

    Args:
        phi: activation.
        q: mean square of the pre-activation.
        sigma_w: as in `variance_map`.

    Returns:
        Array of the common shape.
    """
    return real(sigma_w) ** 2 * slope_moment(phi, q, 2)


@_compiled
def correlation_map(
    phi: Phi, c: ArrayLike, q: ArrayLike, sigma_w: ArrayLike, sigma_b: ArrayLike = 0.0
) -> Array:
    """Correlation of two inputs' pre-activations one layer on, at the fixed point q.

    Poole et al. 2016, equation 5: `(sigma_w^2 E phi(u) phi(v) + sigma_b^2) / q`.

    Args:
        phi: activation.
        c: correlation before.
        q: mean square of both pre-activations, a fixed point of the variance map.
        sigma_w: as in `variance_map`.
        sigma_b: as in `variance_map`.

    Returns:
        Array of the common shape.
    """
    phi, q = activation(phi), real(q)
    mean = gaussian_pair_mean(phi.function, phi.function, c, q, phi.kinks)
    return (real(sigma_w) ** 2 * mean + real(sigma_b) ** 2) / q


@_compiled
def chi(phi: Phi, c: ArrayLike, q: ArrayLike, sigma_w: ArrayLike) -> Array:
    """Slope of the correlation map, `sigma_w^2 E phi'(u) phi'(v)`; `chi_1` at c = 1.

    Poole et al. 2016, equation 6; Schoenholz et al. 2017, equation 10.
    """
    phi = activation(phi)
    mean = gaussian_pair_mean(phi.derivative, phi.derivative, c, q, phi.kinks)
    return real(sigma_w) ** 2 * mean


@_compiled
def variance_fixed_point(
    phi: Phi, sigma_w: ArrayLike, sigma_b: ArrayLike = 0.0, start: ArrayLike = 1.0
) -> Array:
    """The mean square q* that deep layers' pre-activations come to.

    The variance map is increasing, so its iterates from `start` move one way, to the first fixed
    point there.

    Args:
        phi: activation.
        sigma_w: as in `variance_map`.
        sigma_b: as in `variance_map`.
        start: mean square of the first pre-activation.

    Returns:
        q*, of the common shape; 0 or inf where the iterates leave [1e-12, 1e12] times `start`;
        `start` itself where the map does not move it (He ReLU: every q is fixed).
    """
    phi = activation(phi)
    sigma_w, sigma_b, start = jnp.broadcast_arrays(real(sigma_w), real(sigma_b), real(start))
    noise = 64 * jnp.finfo(start.dtype).eps

    def growth(log_q: Array, w: Array = sigma_w, b: Array = sigma_b) -> Array:
        q = jnp.exp(log_q)
        return variance_map(phi, q, w, b) / q - 1

    first = jnp.log(start)
    move = growth(first)
    direction = jnp.where(move > 0, 1, -1)
    steps = jnp.linspace(0, jnp.log(_RANGE), _GRID, dtype=start.dtype)
    path = first[..., None] + direction[..., None] * steps
    seen = direction[..., None] * growth(path, sigma_w[..., None], sigma_b[..., None])
    crossed = seen < -noise
    k = jnp.maximum(jnp.argmax(crossed, axis=-1), 1)[..., None]
    low, high = (jnp.take_along_axis(path, at, axis=-1)[..., 0] for at in (k - 1, k))
    q = jnp.exp(bisect(lambda x: direction * growth(x), low, high))
    q = jnp.where(jnp.any(crossed, axis=-1), q, jnp.where(direction > 0, jnp.inf, 0))
    return jnp.where(jnp.abs(move) <= noise, start, q)


@_compiled
def correlation_fixed_point(
    phi: Phi, q: ArrayLike, sigma_w: ArrayLike, sigma_b: ArrayLike = 0.0
) -> Array:
    """The correlation c* that two inputs come to: 1 in the ordered phase, less in the chaotic one.

    Args:
        phi: activation.
        q: fixed point of the variance map.
        sigma_w: as in `variance_map`.
        sigma_b: as in `variance_map`.

    Returns:
        c*, of the common shape.
    """
    phi = activation(phi)
    q, sigma_w, sigma_b = jnp.broadcast_arrays(real(q), real(sigma_w), real(sigma_b))
    near_one = 1 - jnp.sqrt(jnp.finfo(q.dtype).eps)

    def move(c: Array) -> Array:
        return correlation_map(phi, c, q, sigma_w, sigma_b) - c

    root = bisect(move, jnp.full_like(q, near_one), jnp.zeros_like(q), steps=50)
    ordered = chi_1(phi, q, sigma_w) <= 1 + 8 * jnp.finfo(q.dtype).eps
    return jnp.where(ordered | (move(jnp.full_like(q, near_one)) >= 0), 1.0, root)


def depth_scale(factor: ArrayLike) -> Array:
    """Layers over which a quantity that is multiplied by `factor` a layer changes e-fold.

    `1 / |ln factor|`: xi_q, xi_c and the gradient's scale of Schoenholz et al. 2017, equations 9
    and 16; infinite at a factor of one.
    """
    return 1 / jnp.abs(jnp.log(real(factor)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MeanField:
    """What mean-field theory predicts for deep layers; arrays of one shape.

    Attributes:
        q: mean square of the pre-activations.
        c: correlation of the pre-activations of two inputs.
        chi_1: factor of the gradient's mean square a layer.
        chi_q: factor of a deviation from q a layer.
        chi_c: factor of a deviation from c a layer.
        xi_q: layers over which q is forgotten.
        xi_c: layers over which c is forgotten; nets of more than about 6 xi_c do not train.
        xi_gradient: layers over which the gradient's mean square changes e-fold.
    """

    q: Array
    c: Array
    chi_1: Array
    chi_q: Array
    chi_c: Array
    xi_q: Array
    xi_c: Array
    xi_gradient: Array


@_compiled
def mean_field(
    phi: Phi, sigma_w: ArrayLike, sigma_b: ArrayLike = 0.0, start: ArrayLike = 1.0
) -> MeanField:
    """Fixed points, factors and depth scales of a point, or of a whole plane, of initializations.

    Args:
        phi: activation.
        sigma_w: weights have variance sigma_w^2 / fan_in.
        sigma_b: standard deviation of the biases; broadcast against sigma_w: shapes (m, 1) and
            (1, n) give a plane.
        start: see `variance_fixed_point`.

    Returns:
        A `MeanField` of arrays of the common shape. At q* = 0 the factors are their limits; at
        q* = inf they are NaN.
    """
    sigma_w, sigma_b, start = jnp.broadcast_arrays(real(sigma_w), real(sigma_b), real(start))
    q = variance_fixed_point(phi, sigma_w, sigma_b, start)
    at = jnp.where(q > 0, jnp.where(jnp.isinf(q), jnp.nan, q), _TINY)
    factor, slope = chi_1(phi, at, sigma_w), variance_slope(phi, at, sigma_w)
    c = correlation_fixed_point(phi, at, sigma_w, sigma_b)
    c = jnp.where(jnp.isnan(at), jnp.nan, c)
    chi_c = jnp.where(c == 1, factor, chi(phi, c, at, sigma_w))
    scales = (depth_scale(x) for x in (slope, chi_c, factor))
    return MeanField(q, c, factor, slope, chi_c, *scales)


@_compiled
def edge_of_chaos(phi: Phi, sigma_b: ArrayLike = 0.0) -> tuple[Array, Array]:
    """The critical line: the sigma_w at which `chi_1 = 1` for a given sigma_b.

    On the line `sigma_w^2 = 1 / E phi'^2` and so `sigma_b^2 = q - E phi^2 / E phi'^2`: one equation
    in q. Schoenholz et al. 2017, section 3.

    Args:
        phi: activation.
        sigma_b: standard deviation of the biases, any shape.

    Returns:
        (sigma_w, q*); NaN where no sigma_w is critical (ReLU with biases).
    """
    phi, sigma_b = activation(phi), real(sigma_b)
    grid = jnp.linspace(jnp.log(1e-8), jnp.log(1e6), 4 * _GRID, dtype=sigma_b.dtype)

    def excess(log_q: Array, b: Array) -> Array:
        q = jnp.exp(log_q)
        return 1 - (_moment(phi, q, 2) / slope_moment(phi, q, 2) + b**2) / q

    noise = 64 * jnp.finfo(sigma_b.dtype).eps
    above = excess(grid, sigma_b[..., None]) > noise
    k = jnp.maximum(jnp.argmax(above, axis=-1), 1)
    q = jnp.exp(bisect(lambda x: excess(x, sigma_b), grid[k - 1], grid[k]))
    # without biases a function through the origin is critical as q goes to zero
    through_zero = phi.function(jnp.zeros_like(sigma_b)) == 0
    q = jnp.where(through_zero & (sigma_b == 0), 0.0, q)
    q = jnp.where(jnp.any(above, axis=-1) | (q == 0), q, jnp.nan)
    limit = jnp.where(q == 0, _TINY, q)
    return 1 / jnp.sqrt(slope_moment(phi, limit, 2)), q
