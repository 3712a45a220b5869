"""Mean and variance of the squared singular values, from products with random vectors."""

import functools
import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.chain import Chain
from jaxgrad.graded import scale
from jaxgrad.graph.compat import Tracer
from jaxgrad.spectrum.krylov import orthonormalized
from jaxgrad.spectrum.operator import Operator, linearized
from jaxgrad.spectrum.plan import Arrays, Plan, is_batched, plan_of

_CHUNK_BYTES = 2**26
_LN2 = math.log(2)
# Rounding errors of a product through L layers, relative: 1.7 eps sqrt(L) were measured.
_ROUNDING = 4.0


class SingularMoments(NamedTuple):
    """Moments of the squared singular values, each of shape () or (examples,).

    Attributes:
        mean: their mean.
        variance: their variance, `mean(s^4) - mean(s^2)^2`.
        mean_se: standard error of the mean; of rounding alone where no sampling was needed.
        variance_se: standard error of the variance.
    """

    mean: Float[Array, "*batch"]
    variance: Float[Array, "*batch"]
    mean_se: Float[Array, "*batch"]
    variance_se: Float[Array, "*batch"]


class ScaledMoments(NamedTuple):
    """Moments in units that no depth overflows.

    Attributes:
        moments: the moments of `s^2 / e^log_unit`: the mean and its error are to be multiplied by
            `e^log_unit`, the variance and its error by `e^(2 log_unit)`.
        log_unit: natural logarithm of the unit.
    """

    moments: SingularMoments
    log_unit: Float[Array, "*batch"]


def singular_moments(chain: Chain, x: PyTree, *, key: Array, probes: int = 64) -> SingularMoments:
    """Mean and variance of the squared singular values of `J_L ... J_1`, with standard errors.

    With `G = J^T J` (or `J J^T`, whichever is smaller, of size n) the mean is `tr G / n`, and the
    variance `tr (G - mean)^2 / n`, which does not cancel for near-isometries. A quarter of the
    products finds the dominant vectors of G and a quarter evaluates both traces on them exactly;
    the rest is sampled on the complement (Hutch++, R. Meyer et al. 2021), with vectors uniform on
    its sphere: for a multiple of an isometry they have no variance. Both estimates are unbiased:
    the square of the estimated mean is corrected by its variance. The errors are those of the
    samples, to first order (the delta method) for the variance. If n is at most `probes`, all unit
    vectors are taken and nothing is sampled.

    Args:
        chain: the chain; with `batch_axis` every example has its own moments.
        x: its input.
        key: a PRNG key.
        probes: products with G, at least 4.

    Returns:
        The moments over all min(n_0, n_L) values, zeros included. Beyond the dtype's range, as in
        chains of hundreds of layers, they are 0 or inf, and outside of `jit` a warning says so:
        `scaled_singular_moments` has them all the same.

    Raises:
        ValueError: if there are too few probes.
    """
    (mean, variance, *errors), unit = scaled_singular_moments(chain, x, key=key, probes=probes)
    moments = SingularMoments(
        mean * jnp.exp(unit),
        variance * jnp.exp(unit) * jnp.exp(unit),
        errors[0] * jnp.exp(unit),
        errors[1] * jnp.exp(unit) * jnp.exp(unit),
    )
    if not isinstance(unit, Tracer):
        pairs = ((mean, moments.mean), (variance, moments.variance))
        lost = [jnp.any((a > 0) & ((b == 0) | jnp.isinf(b))) for a, b in pairs]
        if any(bool(flag) for flag in lost):
            warnings.warn(
                "singular_moments: the squared singular values are of the order of "
                f"e^{float(jnp.max(jnp.abs(unit))):.0f} or its inverse, and {unit.dtype} returns 0 "
                "or inf. Use scaled_singular_moments.",
                RuntimeWarning,
                stacklevel=2,
            )
    return moments


def scaled_singular_moments(
    chain: Chain, x: PyTree, *, key: Array, probes: int = 64
) -> ScaledMoments:
    """As `singular_moments`, for chains of any depth; see there."""
    run = chain.run(x)
    plan, arrays = plan_of(run, "singular_moments")
    if plan.smaller == 0:
        raise ValueError("singular_moments: the Jacobian has no elements, so it has no moments")
    if probes < min(4, plan.smaller):
        raise ValueError(
            f"singular_moments(probes=): expected at least 4, got {probes}: one to find the "
            "dominant vectors, one to evaluate them, and two samples for a standard error"
        )
    found = _moments(plan, len(run.links), probes, arrays, key)
    return found if is_batched(run) else jax.tree.map(lambda a: a[0], found)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _moments(plan: Plan, layers: int, probes: int, arrays: Arrays, key: Array) -> ScaledMoments:
    gram = _Gram(linearized(plan, arrays))
    exact = plan.smaller <= probes
    mean, variance, mean_se, variance_se, power = (
        _by_unit_vectors(gram) if exact else _by_samples(gram, probes, key)
    )
    rounding = _ROUNDING * float(jnp.finfo(plan.dtype).eps) * math.sqrt(layers + 1) * mean
    spread = jnp.sqrt(jnp.maximum(variance, 0))
    mean_se = jnp.hypot(mean_se, rounding)
    variance_se = jnp.hypot(variance_se, 2 * rounding * spread + rounding**2)
    unit = scale.log_of(jnp.full_like(mean, 0.5), 2 * power + 1)
    return ScaledMoments(SingularMoments(mean, variance, mean_se, variance_se), unit)


class _Gram:
    """Products with `J^T J` or `J J^T`, whichever is smaller, in units of `4**power`."""

    def __init__(self, operator: Operator) -> None:
        plan = operator.plan
        self.plan, self.n = plan, plan.smaller
        flipped = plan.size_out < plan.size_in
        self.first = operator.pull if flipped else operator.push
        self.second = operator.push if flipped else operator.pull

    def half(self, vectors: Array) -> tuple[Array, Array]:
        """`J v`, and its exponents."""
        return self.first(vectors)

    def __call__(self, vectors: Array, power: Array) -> tuple[Array, Array]:
        """`v^T G v` (count, examples) and `G v`."""
        half, low = self.first(vectors)
        whole, high = self.second(half)
        quadratic = scale.shifted(jnp.sum(half**2, axis=-1), 2 * (low - power))
        return quadratic, scale.shifted(whole, (low + high - 2 * power)[..., None])


def _power(exponents: Array, vectors: Array) -> Array:
    """The exponent of the largest product of each example; 0 for a zero Jacobian."""
    lowest = jnp.iinfo(jnp.int32).min // 4
    top = jnp.max(jnp.where(jnp.any(vectors != 0, axis=-1), exponents, lowest), axis=0)
    return jnp.where(top == lowest, 0, top)


def _by_unit_vectors(gram: _Gram) -> tuple:
    n, examples = gram.n, gram.plan.examples
    eye = jnp.broadcast_to(jnp.eye(n, dtype=gram.plan.dtype)[:, None], (n, examples, n))
    rows, exponents = gram.half(eye)
    power = _power(exponents, rows)
    rows = scale.shifted(rows, (exponents - power)[..., None])
    matrix = jnp.einsum("ien,jen->eij", rows, rows, precision="highest")
    mean = jnp.trace(matrix, axis1=1, axis2=2) / n
    centered = matrix - mean[:, None, None] * jnp.eye(n, dtype=matrix.dtype)
    variance = jnp.sum(centered**2, axis=(1, 2)) / n
    return mean, variance, jnp.zeros_like(mean), jnp.zeros_like(mean), power


def _by_samples(gram: _Gram, probes: int, key: Array) -> tuple:
    n, dtype = gram.n, gram.plan.dtype
    dominant = probes // 4
    samples = probes - 2 * dominant
    of_sketch, of_fill, of_samples = jax.random.split(key, 3)
    shape = (dominant, gram.plan.examples, n)
    sketch = jax.random.normal(of_sketch, shape, dtype)
    half, exponents = gram.half(sketch)
    power = _power(exponents, half)
    _, sketch = gram(sketch, power)
    basis = jnp.swapaxes(sketch, 0, 1)
    basis, _, _ = orthonormalized(basis, jnp.zeros_like(basis), of_fill)
    # A reference near the mean, so that squares of differences do not cancel.
    about = jnp.mean(scale.shifted(jnp.sum(half**2, -1), 2 * (exponents - power)), 0) / n
    inside, product = gram(jnp.swapaxes(basis, 0, 1), power)
    centered = product - about[:, None] * jnp.swapaxes(basis, 0, 1)
    inside, inside_square = jnp.sum(inside, 0), jnp.sum(centered**2, (0, 2))

    def sample(own: Array) -> tuple[Array, Array]:
        vector = jax.random.normal(own, (gram.plan.examples, n), dtype)
        for _ in range(2):
            shadow = jnp.einsum("en,emn->em", vector, basis, precision="highest")
            vector = vector - jnp.einsum("em,emn->en", shadow, basis, precision="highest")
        length = jnp.sqrt(jnp.sum(vector**2, axis=-1, keepdims=True))
        vector = vector * (math.sqrt(n - dominant) / length)
        quadratic, product = gram(vector[None], power)
        centered = product[0] - about[:, None] * vector
        return quadratic[0], jnp.sum(centered**2, axis=-1)

    bytes_each = 4 * gram.plan.examples * max(gram.plan.size_in, gram.plan.size_out)
    chunk = max(1, min(samples, _CHUNK_BYTES // bytes_each))
    keys = jax.random.split(of_samples, samples)
    outside, outside_square = jax.lax.map(sample, keys, batch_size=chunk)
    mean = (inside + jnp.mean(outside, 0)) / n
    mean_se = jnp.std(outside, axis=0, ddof=1) / math.sqrt(samples) / n
    # About the estimated mean instead of the reference; then the bias of its square is taken out.
    variance = (inside_square + jnp.mean(outside_square, 0)) / n - (mean - about) ** 2 + mean_se**2
    influence = outside_square - 2 * (mean - about) * outside
    variance_se = jnp.std(influence, axis=0, ddof=1) / math.sqrt(samples) / n
    return mean, variance, mean_se, variance_se, power
