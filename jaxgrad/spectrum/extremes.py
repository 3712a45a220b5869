"""The largest and the smallest singular values of a chain's Jacobian, without the matrix."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.chain import Chain
from jaxgrad.graded import scale
from jaxgrad.graph.compat import Tracer
from jaxgrad.spectrum import krylov, sweeps
from jaxgrad.spectrum.inverse import Solve, inverse_factors, solved_products
from jaxgrad.spectrum.krylov import Problem
from jaxgrad.spectrum.operator import linearized
from jaxgrad.spectrum.plan import Arrays, Plan, is_batched, plan_of

_LARGEST_BLOCK = 16
_WIDE = 100.0  # in eps over the tolerance: values this far below the largest one need sweeps


def top_singular_values(  # noqa: PLR0913 - three of them are limits with defaults
    chain: Chain,
    x: PyTree,
    k: int,
    *,
    key: Array,
    tolerance: float | None = None,
    max_products: int = 2000,
    block: int | None = None,
) -> tuple[Float[Array, "*batch k"], Float[Array, "*batch k"]]:
    """The k largest singular values of `J_L ... J_1`, from products with vectors alone.

    Block Golub-Kahan-Lanczos with full reorthogonalization (G. Golub, W. Kahan 1965). Every layer
    is linearized once, and vectors are rescaled at every layer by powers of two, so that depth
    costs no range. Where the wanted values lie further apart than the dtype resolves, as in every
    deep Gaussian product, sweeps that orthogonalize at every layer take over.

    The residuals bound the error. For a triplet `(s, u, v)` with unit vectors let `a = A v - s u`,
    `b = A^T u - s v`. The symmetric matrix `[[0, A], [A^T, 0]]` has the eigenvalues `+-sigma`, and
    `(u, v) / sqrt(2)` is a unit vector whose residual for `s` has the norm
    `r = sqrt((|a|^2 + |b|^2) / 2)`; so an eigenvalue lies within `r` of `s`, and the relative
    residual is `rho = r / s`. The sweeps have a bound of their own (`sweeps.graded_largest`), for
    which the same holds: there is a singular value sigma with `|s - sigma| <= rho s`. With a random
    start it is the one in the same place, with probability one. The rounding of the products is
    part of the residuals, as an estimate: `2 eps sqrt(L + 1)` of the largest value (in the sweeps,
    of each value).

    Args:
        chain: the chain; with `batch_axis` every example is searched, at once.
        x: its input.
        k: how many values, at most min(n_0, n_L).
        key: a PRNG key, for the start.
        tolerance: relative residual to reach; None: the square root of the dtype's eps. The values
            err by about its square, where they are well separated.
        max_products: products with the Jacobian, and as many with its transpose, after which it
            stops. What was not reached shows in the residuals.
        block: how many vectors go through the chain at once; None: k, at most 16. A value of
            multiplicity m is found m times if m is at most `block`. Fewer vectors need fewer
            products, and more time for each where the weights must come from memory.

    Returns:
        `(log_values, relative_residuals)`, each (k,), with a leading axis of examples for a chain
        with `batch_axis`: natural logarithms, descending. Beyond the rank the value is -inf and the
        residual inf; for a non-finite Jacobian both are NaN.

    Raises:
        ValueError: if k is out of range, or a layer has no transposed derivative.
        TypeError: if a state holds integers.
    """
    run = chain.run(x)
    plan, arrays = plan_of(run, "top_singular_values")
    problem = _problem(plan, k, (tolerance, max_products, block), "top_singular_values")
    values, residuals, right, wide = _top(plan, problem, arrays, key)
    if isinstance(wide, Tracer) or bool(jnp.any(wide)):
        values, residuals = _swept(plan, problem, arrays, (values, residuals, right, wide))
    return (values, residuals) if is_batched(run) else (values[0], residuals[0])


def bottom_singular_values(  # noqa: PLR0913 - three of them have defaults
    chain: Chain,
    x: PyTree,
    k: int,
    *,
    key: Array,
    solve: Solve | None = None,
    tolerance: float | None = None,
    max_products: int = 2000,
) -> tuple[Float[Array, "*batch k"], Float[Array, "*batch k"]]:
    """The k smallest singular values, as the largest ones of `J_1^-1 ... J_L^-1`.

    Args:
        chain: the chain; every layer must be square and invertible.
        x: its input.
        k: how many values.
        key: a PRNG key, for the start.
        solve: `solve(layer, state, vectors, transposed)` returns `J^-1 v`, or `J^-T v`, for the
            layer of this number at its incoming state, flattened to (examples, n), and vectors of
            the same shape. None: dense Jacobians, factored once.
        tolerance: see `top_singular_values`.
        max_products: see `top_singular_values`.

    Returns:
        `(log_values, relative_residuals)`, ascending: the smallest first. The residuals bound the
        reciprocals, `|1/s - 1/sigma| <= rho / s`. They do not contain the errors of the solves,
        about eps times the condition number of each layer.

    Raises:
        ValueError: if a layer is not square, or singular to rounding: `log_singular_values` counts
            the zeros then.
    """
    name = "bottom_singular_values"
    run = chain.run(x)
    plan, _ = plan_of(run, name)
    problem = _problem(plan, k, (tolerance, max_products, None), name)
    factors = inverse_factors(chain, run, x, solve)
    values, residuals = _bottom(problem, solve, len(run.links), factors, key)
    return (values, residuals) if is_batched(run) else (values[0], residuals[0])


def _problem(
    plan: Plan, k: int, limits: tuple[float | None, int, int | None], caller: str
) -> Problem:
    tolerance, max_products, block = limits
    layers = sum(len(segment.steps) * segment.repeats for segment in plan.segments)
    if not 1 <= k <= plan.smaller:
        raise ValueError(
            f"{caller}(k=): expected 1 to {plan.smaller} values of a Jacobian of shape "
            f"({plan.size_out}, {plan.size_in}), got {k}"
        )
    if tolerance is None:
        tolerance = math.sqrt(float(jnp.finfo(plan.dtype).eps))
    if not 0 < tolerance < 1:
        raise ValueError(f"{caller}(tolerance=): expected a number in (0, 1), got {tolerance}")
    block = min(k, _LARGEST_BLOCK) if block is None else block
    if not 1 <= block <= k:
        raise ValueError(f"{caller}(block=): expected 1 to k = {k} vectors, got {block}")
    return Problem(
        plan.size_in,
        plan.size_out,
        plan.examples,
        k,
        tolerance,
        max_products,
        plan.dtype,
        layers,
        block,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _top(plan: Plan, problem: Problem, arrays: Arrays, key: Array) -> tuple:
    operator = linearized(plan, arrays)
    found = krylov.largest(operator.push, operator.pull, problem, key)
    values, residuals = _in_logs(found)
    floor = _WIDE * float(jnp.finfo(plan.dtype).eps) / problem.tolerance
    wide = (found.values[:, -1] < floor * found.values[:, 0]) & (found.values[:, 0] > 0)
    return values, residuals, found.right, wide


@functools.partial(jax.jit, static_argnums=(0, 1))
def _swept(plan: Plan, problem: Problem, arrays: Arrays, before: tuple) -> tuple:
    values, residuals, right, wide = before
    right = jnp.where(wide[:, None, None], right, jnp.eye(*right.shape[1:], dtype=right.dtype))
    found = sweeps.graded_largest(linearized(plan, arrays), right, problem.tolerance, wide)
    swept = scale.log_of(found.mantissa, found.exponent)
    wide, rounded = wide[:, None], found.residuals + problem.rounding
    return jnp.where(wide, swept, values), jnp.where(wide, rounded, residuals)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _bottom(problem: Problem, solve: Any, layers: int, factors: Any, key: Array) -> tuple:
    push, pull = solved_products(solve, layers, factors)
    values, residuals = _in_logs(krylov.largest(push, pull, problem, key))
    return -values, residuals


def _in_logs(found: krylov.Triplets) -> tuple[Array, Array]:
    """Natural logarithms, and relative residuals: inf for a zero."""
    values = scale.log_of(*scale.split(found.values, found.power[:, None]))
    zero = found.values == 0
    relative = found.residuals / jnp.where(zero, 1, found.values)
    return values, jnp.where(zero, jnp.inf, relative)
