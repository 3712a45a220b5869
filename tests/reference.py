"""Slow and obvious oracles: float64, no shortcut, nothing shared with the library.

Derivatives are taken in float64; build the case under `with jax.enable_x64(True):` and call the
oracle in there too.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import mpmath
import numpy as np

HAS_LOGS = hasattr(jax.custom_vjp, "defvjp_with_logs")
"""Whether this JAX can log out of a backward pass (0.12 and later)."""

SMALLEST_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126}


# ------------------------------------------------------------------------------ Jacobians


def flat_function(
    f: Callable[..., Any], *args: Any, argnum: int = 0
) -> tuple[Callable, np.ndarray]:
    """f as a function from the raveled argument to the raveled output, and the raveled argument."""
    x, unravel = jax.flatten_util.ravel_pytree(args[argnum])

    def g(x: jax.Array) -> jax.Array:
        y = f(*args[:argnum], unravel(x), *args[argnum + 1 :])
        return jax.flatten_util.ravel_pytree(y)[0]

    return g, x


def full_jacobian(
    f: Callable[..., Any], *args: Any, argnum: int = 0, mode: str = "reverse"
) -> np.ndarray:
    """df/dx (n_out, n_in), by `jax.jacrev` (or `jax.jacfwd`) of the whole function in float64.

    Leaves of a pytree are laid out one after another in the order of `jax.tree.leaves`, each in C
    order.
    """
    g, x = flat_function(f, *args, argnum=argnum)
    _require_float64(x)
    jacobian = {"reverse": jax.jacrev, "forward": jax.jacfwd}[mode]
    return np.asarray(jax.jit(jacobian(g))(x))


def finite_difference_jacobian(
    f: Callable[..., Any], *args: Any, argnum: int = 0, step: float = 1e-3
) -> np.ndarray:
    """df/dx (n_out, n_in) by central differences, extrapolated twice: 1e-9 where f is smooth."""
    g, x = flat_function(f, *args, argnum=argnum)
    _require_float64(x)
    g = jax.jit(g)
    x = np.asarray(x)
    columns = []
    for direction in np.eye(x.size):
        d1, d2, d4 = (
            (np.asarray(g(x + h * direction)) - np.asarray(g(x - h * direction))) / (2 * h)
            for h in (step, step / 2, step / 4)
        )
        e1, e2 = (4 * d2 - d1) / 3, (4 * d4 - d2) / 3
        columns.append((16 * e2 - e1) / 15)
    return np.stack(columns, axis=1) if columns else np.zeros((np.asarray(g(x)).size, 0))


def _require_float64(x: jax.Array) -> None:
    if x.dtype != jnp.float64:
        raise TypeError(
            f"the oracles differentiate in float64, not {x.dtype}: use jax.enable_x64(True)"
        )


# ------------------------------------------------------------------------------ hidden states

Probe = Callable[[str, jax.Array], jax.Array]
"""`probe(name, h) -> h`: what a hand-written model calls on each hidden state."""


def hidden_states(run: Callable[..., Any], *args: Any) -> dict[str, np.ndarray]:
    """The hidden states of `run(probe, *args)`, by the names it gives them."""

    def record(*args: Any) -> dict[str, jax.Array]:
        seen: dict[str, jax.Array] = {}
        run(_recorder(seen), *args)
        return seen

    return jax.tree.map(np.asarray, jax.jit(record)(*args))


def hidden_state_gradients(run: Callable[..., Any], *args: Any) -> dict[str, np.ndarray]:
    """d run / d h for every hidden state h, by additive zero perturbations.

    Args:
        run: `run(probe, *args) -> scalar`, which calls `h = probe(name, h)` on every hidden state.
            A call inside a scan's body would be summed over the iterations: unroll the model first.
        *args: what `run` takes besides the probe.
    """
    states = hidden_states(run, *args)
    zeros = {name: jnp.zeros(h.shape, h.dtype) for name, h in states.items()}

    def perturbed(zeros: dict[str, jax.Array]) -> jax.Array:
        return run(lambda name, h: h + zeros[name], *args)

    return jax.tree.map(np.asarray, jax.jit(jax.grad(perturbed))(zeros))


def logged_gradients(run: Callable[..., Any], *args: Any) -> dict[str, np.ndarray]:
    """The same by the backward logs of jax >= 0.12; a scan's come stacked, an iteration a row."""
    if not HAS_LOGS:
        raise RuntimeError(
            f"jax {jax.__version__} has no backward logs: use hidden_state_gradients"
        )

    def pull(*args: Any) -> dict[str, jax.Array]:
        value, vjp = jax.vjp(lambda *args: run(_logging_tap, *args), *args)
        _, logs = vjp.with_logs(jnp.ones_like(value))
        return logs

    return jax.tree.map(np.asarray, jax.jit(pull)(*args))


def linen_output_gradients(loss: Callable[..., Any], *args: Any) -> dict[str, np.ndarray]:
    """d loss / d (the output of every linen module's `__call__`), by module path, for models that
    know nothing of it.

    Zero perturbations, added by `flax.linen.intercept_methods`. Not for modules inside `nn.scan` or
    `nn.remat`.
    """
    import flax.linen as nn

    def run(probe: Probe, *args: Any) -> jax.Array:
        def intercept(call: Any, call_args: Any, kwargs: Any, context: Any) -> Any:
            y = call(*call_args, **kwargs)
            inner = context.method_name == "__call__" and isinstance(y, jax.Array)
            return probe("/".join(context.module.path), y) if inner else y

        with nn.intercept_methods(intercept):
            return loss(*args)

    return hidden_state_gradients(run, *args)


def _recorder(seen: dict[str, jax.Array]) -> Probe:
    def probe(name: str, h: jax.Array) -> jax.Array:
        if name in seen:
            raise ValueError(f"two hidden states are called {name!r}")
        seen[name] = h
        return h

    return probe


def _logging_tap(name: str, h: jax.Array) -> jax.Array:
    tap = jax.custom_vjp(lambda h: h)
    tap.defvjp_with_logs(lambda h: (h, None), lambda _, g: ((g,), {name: g}))
    return tap(h)


# ------------------------------------------------------------------------------ statistics


def statistics(values: Any) -> dict[str, float]:
    """What a row of a Flow says of one tensor, over all elements, in float64 without rounding
    between the terms.

    NaN and inf go into rms, mean and max_abs as they would by definition; "nonfinite" counts them.
    The shares below a dtype's smallest normal number count the elements that are not zero, as a
    share of all elements. An empty tensor has rms, mean, max_abs and shares 0.
    """
    flat = np.asarray(values).astype(np.float64).ravel()
    n = max(flat.size, 1)
    finite = bool(np.isfinite(flat).all())
    largest = float(np.max(np.abs(flat), initial=0.0))  # a NaN among them comes out
    if finite:
        # the scale keeps squares of 1e-200 from vanishing
        rms = (
            largest * math.sqrt(math.fsum((v / largest) ** 2 for v in flat) / n) if largest else 0.0
        )
        mean = math.fsum(flat) / n
    else:
        rms = math.inf if not np.isnan(flat).any() else math.nan
        mean = float(flat.sum())  # inf - inf is NaN
    magnitudes = np.abs(flat)
    below = {
        f"below_{name}": float(np.count_nonzero((magnitudes > 0) & (magnitudes < tiny))) / n
        for name, tiny in SMALLEST_NORMAL.items()
    }
    counts = {"zero_share": float(np.count_nonzero(flat == 0)) / n}
    counts["nonfinite"] = float(np.count_nonzero(~np.isfinite(flat)))
    return {"rms": rms, "mean": mean, "max_abs": largest} | counts | below


# ------------------------------------------------------------------------------ spectra


def log_singular_values(jacobian: np.ndarray) -> np.ndarray:
    """Natural logs of a matrix's singular values, descending, by numpy; -inf for zero."""
    with np.errstate(divide="ignore"):
        return np.log(np.linalg.svd(np.asarray(jacobian, np.float64), compute_uv=False))


def log_singular_values_of_product(
    factors: Sequence[np.ndarray], *, digits: int = 60
) -> np.ndarray:
    """The same of `factors[-1] @ ... @ factors[0]`, of any range, by mpmath.

    The precision is doubled until nothing changes in the first 14 digits, so that no digit count
    has to be guessed.
    """
    previous = None
    while digits < 20_000:
        current = _log_singular_values_at(factors, digits)
        if previous is not None and np.allclose(current, previous, rtol=1e-14, atol=1e-14):
            return current
        previous, digits = current, 2 * digits
    raise ArithmeticError("the product has singular values that no 20,000 digits tell from zero")


def product_entries(factors: Sequence[np.ndarray], *, digits: int = 200) -> mpmath.matrix:
    """`factors[-1] @ ... @ factors[0]`, of floats taken as exact, as an mpmath matrix."""
    with mpmath.workdps(digits):
        product = mpmath.matrix(np.asarray(factors[0], np.float64).tolist())
        for factor in factors[1:]:
            product = mpmath.matrix(np.asarray(factor, np.float64).tolist()) * product
        return product


def _log_singular_values_at(factors: Sequence[np.ndarray], digits: int) -> np.ndarray:
    product = product_entries(factors, digits=digits)
    with mpmath.workdps(digits):
        wide = product.rows < product.cols
        values = mpmath.svd_r(product.T if wide else product, compute_uv=False)
        logs = [float(mpmath.log(v)) if v > 0 else -math.inf for v in values]
    return np.sort(np.array(logs))[::-1]
