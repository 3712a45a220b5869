"""The largest stable learning rate: the Hessian's top eigenvalue, as the optimizer sees it.

Gradient descent on a quadratic diverges exactly if its learning rate exceeds 2 / lambda; momentum
and Adam have their own constants (Cohen et al. 2021, arXiv 2103.00065; 2022, arXiv 2207.14484). All
are one statement about how the rule answers to a gradient that changes sign at every step, and that
answer is measured.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from jaxgrad.rule_response import read_rule
from jaxgrad.tree import inexact_leaves, replace_inexact


class Eigenvalue(NamedTuple):
    """The top of a spectrum.

    Attributes:
        value: largest Ritz value, a lower bound of the largest eigenvalue.
        residual: norm of `A v - value v`: some eigenvalue lies this close.
        smallest: smallest Ritz value.
        iterations: products with the matrix.
    """

    value: float
    residual: float
    smallest: float
    iterations: int


class Stability(NamedTuple):
    """How `max_stable_learning_rate` came to its answer.

    Attributes:
        learning_rate: the answer.
        eigenvalue: of `D^(1/2) H D^(1/2)`, where D is the rule's answer to a gradient that changes
            sign at every step, per unit of learning rate.
        kind: "linear" (SGD, momentum) or "adaptive" (Adam).
        nominal: the learning rate that the optimizer was made with, as found; 1 for a factory.
    """

    learning_rate: float
    eigenvalue: Eigenvalue
    kind: str
    nominal: float


def max_stable_learning_rate(  # noqa: PLR0913
    loss: Callable[..., Array],
    params: PyTree,
    batch: PyTree,
    optimizer: Any,
    *,
    iterations: int = 96,
    tolerance: float = 1e-4,
    key: Array | None = None,
    return_report: bool = False,
) -> Any:
    """The learning rate above which an optimizer diverges in the direction of largest curvature.

    2 / lambda for gradient descent, 2 (1 + b) / lambda for momentum, 2 (1 + b) / (1 + 2 b) / lambda
    for Nesterov's, (2 + 2 b1) / (1 - b1) / lambda_P for Adam (38 / lambda_P at b1 = 0.9), where
    lambda_P is the top eigenvalue of the Hessian preconditioned by P = |g| + eps, Adam's second
    moment under this batch's gradient: Cohen et al. 2021, appendix B, and 2022, equation 3. The
    optimizer is not asked for its name: a gradient that changes sign at every step is fed to it,
    and the amplitude of its updates gives the constant and the preconditioner of any elementwise
    rule. Clipping that only large gradients meet, and weight decay, are left out.

    Args:
        loss: `loss(params, batch)`, a real scalar.
        params: any pytree; leaves that are no floating-point arrays are held fixed.
        batch: the batch; the stability meant is that of full-batch steps on it.
        optimizer: an optax transformation at a constant learning rate, or a function from a
            learning rate to one, such as `optax.adam`.
        iterations: most Lanczos steps; a step is one Hessian-vector product and one row of memory
            of the parameters' size.
        tolerance: relative residual at which Lanczos stops.
        key: for its first vector.
        return_report: whether to return the `Stability` too.

    Returns:
        The learning rate, in the optimizer's own convention (for a rule that is neither SGD,
        momentum nor Nesterov's but linear: the one in which the first step is -lr * g); inf, with a
        warning, where no direction curves upward. With `return_report`, `(learning_rate, report)`.

    Raises:
        ValueError: for rules that have no such threshold (sign descent), are not elementwise (LAMB,
            Adafactor, Muon), emit no update at some steps, or do not settle (a schedule).
        TypeError: if the parameters hold no real floating-point array.
    """
    flat, unravel = _floats(params, "max_stable_learning_rate")
    gradient = _gradient(loss, params, batch)
    g = jax.jit(gradient)(flat)
    if not bool(jnp.all(jnp.isfinite(g))):
        raise ValueError(
            "max_stable_learning_rate: the gradient of the loss is not finite at these parameters"
        )
    rule = read_rule(optimizer, unravel, g)
    found = _top_eigenvalue(gradient, flat, rule.response, iterations, tolerance, key)
    noise = max(found.residual, 1e-6 * abs(found.smallest))
    if found.value <= noise:
        warnings.warn(
            "max_stable_learning_rate: no direction curves upward here (largest eigenvalue "
            f"{found.value:.3g}, smallest {found.smallest:.3g}): curvature bounds no learning rate",
            stacklevel=2,
        )
        rate = math.inf
    else:
        rate = 2.0 * rule.nominal / found.value
    unit = 1 / rule.nominal
    scaled = found._replace(
        value=unit * found.value, residual=unit * found.residual, smallest=unit * found.smallest
    )
    report = Stability(rate, scaled, rule.kind, rule.nominal)
    return (rate, report) if return_report else rate


def top_hessian_eigenvalue(  # noqa: PLR0913
    loss: Callable[..., Array],
    params: PyTree,
    batch: PyTree,
    *,
    scale: PyTree | None = None,
    iterations: int = 96,
    tolerance: float = 1e-4,
    key: Array | None = None,
) -> Eigenvalue:
    """The largest eigenvalue of the loss's Hessian, matrix-free, by Lanczos.

    Krylov vectors are kept and orthogonalized against all earlier ones twice, so that rounding
    makes no copies of converged eigenvalues (Parlett 1998, The Symmetric Eigenvalue Problem, 13.8).
    Works in the parameters' precision, float32 at least.

    Args:
        loss: `loss(params, batch)`, a real scalar.
        params: any pytree.
        batch: the batch.
        scale: None, or a pytree like the parameters with D >= 0: the eigenvalue is then that of
            `D^(1/2) H D^(1/2)`.
        iterations: most steps.
        tolerance: relative residual at which to stop.
        key: for the first vector.

    Returns:
        The top Ritz value with its residual.

    Raises:
        TypeError: if the parameters hold no real floating-point array.
    """
    flat, _ = _floats(params, "top_hessian_eigenvalue")
    diagonal = jnp.ones_like(flat) if scale is None else _floats(scale, "scale")[0]
    gradient = _gradient(loss, params, batch)
    return _top_eigenvalue(gradient, flat, diagonal, iterations, tolerance, key)


def _floats(params: PyTree, where: str) -> tuple[Array, Callable[[Array], PyTree]]:
    """The floating-point leaves as one vector, and the way back: a tree with None elsewhere."""
    kept = inexact_leaves(params)
    if not kept or any(jnp.iscomplexobj(leaf) for leaf in kept):
        leaves = jax.tree.leaves(params)
        raise TypeError(
            f"{where}: expected parameters with real floating-point arrays, got leaves of type "
            f"{sorted({getattr(x, 'dtype', type(x).__name__) for x in leaves}, key=str)}"
        )
    arrays = [jnp.asarray(leaf) for leaf in kept]
    wide = [a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in arrays]
    flat, unravel = ravel_pytree(wide)

    return flat, lambda vector: replace_inexact(params, unravel(vector), keep=False)


def _gradient(loss: Callable[..., Array], params: PyTree, batch: PyTree) -> Callable:
    leaves, treedef = jax.tree.flatten(params)
    _, back = _floats(params, "gradient")

    def of(flat: Array) -> Array:
        new = treedef.flatten_up_to(back(flat))
        merged = [
            old if leaf is None else leaf.astype(old.dtype)
            for old, leaf in zip(leaves, new, strict=True)
        ]
        value = loss(jax.tree.unflatten(treedef, merged), batch)
        if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise TypeError(
                "expected loss(params, batch) to return one real scalar, got "
                f"{jnp.result_type(value)}{list(jnp.shape(value))}; reduce it with .mean()"
            )
        return value

    return jax.grad(of)


def _hessian_vector(gradient: Callable, flat: Array) -> Callable[[Array], Array]:
    """Forward over reverse; reverse over reverse where a custom_vjp has no forward rule."""

    def forward(v: Array) -> Array:
        return jax.jvp(gradient, (flat,), (v,))[1]

    def backward(v: Array) -> Array:
        return jax.grad(lambda p: jnp.vdot(gradient(p), v))(flat)

    try:
        _ = jax.eval_shape(forward, flat)
    except TypeError:
        return backward
    return forward


def _top_eigenvalue(
    gradient: Callable, flat: Array, diagonal: Array, iterations: int, tolerance: float,
    key: Array | None,
) -> Eigenvalue:  # fmt: skip
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    root = jnp.sqrt(diagonal)
    count = min(iterations, flat.size)

    @jax.jit
    def step(basis: Float[Array, "m n"], k: Array, flat: Array) -> tuple[Array, Array, Array]:
        product = _hessian_vector(gradient, flat)
        with jax.default_matmul_precision("highest"):
            w = root * product(root * basis[k])
            along = basis @ w
            w = w - along @ basis
            again = basis @ w
            w = w - again @ basis
        length = jnp.linalg.norm(w)
        following = jnp.where(length > 0, w / jnp.where(length > 0, length, 1), 0)
        return basis.at[k + 1].set(following), (along + again)[k], length

    first = jax.random.normal(jax.random.key(0) if key is None else key, flat.shape, flat.dtype)
    # parameters that the rule does not move have no part in it
    first = jnp.where(root > 0, first, 0)
    basis = jnp.zeros((count + 1, flat.size), flat.dtype)
    basis = basis.at[0].set(first / jnp.maximum(jnp.linalg.norm(first), 1e-30))
    diagonals, lengths, best = [], [], Eigenvalue(0.0, 0.0, 0.0, 0)
    eps = float(jnp.finfo(flat.dtype).eps)
    for k in range(count):
        basis, alpha, beta = step(basis, jnp.asarray(k), flat)
        diagonals.append(float(alpha))
        lengths.append(float(beta))
        if not (math.isfinite(diagonals[-1]) and math.isfinite(lengths[-1])):
            raise ValueError(
                "the Hessian's product with a vector is not finite: the loss has no second "
                "derivative here (a norm at zero, a square root at zero?)"
            )
        matrix = np.diag(diagonals) + np.diag(lengths[:-1], 1) + np.diag(lengths[:-1], -1)
        values, vectors = np.linalg.eigh(matrix)
        residual = abs(lengths[-1] * vectors[-1, -1])
        best = Eigenvalue(float(values[-1]), float(residual), float(values[0]), k + 1)
        size = max(abs(values[0]), abs(values[-1]))
        if lengths[-1] <= 8 * eps * size or (k > 1 and residual <= tolerance * abs(values[-1])):
            break
    return best
