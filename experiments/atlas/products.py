"""Products of 1,000 Gaussian layers in float32: multiplied as they come, and by `Graded`."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxgrad as jg
from experiments.atlas import frame
from jaxgrad import theory

# Natural log of 1 / eps: how far below the largest a singular value may lie in a float32 matrix.
RANGE = float(-np.log(np.finfo(np.float32).eps))
TINY, HUGE = (float(np.log(x)) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
CERTIFIED = 0.1  # nats, of values that span thousands


@dataclass(frozen=True)
class Config:
    """The products.

    Attributes:
        width: n of the n x n layers, Gaussian of variance 1 / n.
        depth: number of layers.
        seeds: products.
        factors: scalars that are multiplied by themselves to the same depth.
    """

    width: int = 16
    depth: int = 1000
    seeds: int = 6
    factors: tuple[float, ...] = (0.9, 1.1)


def depths(config: Config) -> np.ndarray:
    """The depths looked at: all of the first 16, then ever fewer."""
    tail = np.geomspace(16, config.depth, 20).astype(int)
    return np.unique([*range(1, min(16, config.depth) + 1), *tail])


def modes(config: Config) -> tuple[int, int, int]:
    """The singular values that are drawn: first, middle, last."""
    return 0, config.width // 2, config.width - 1


def layers(config: Config) -> np.ndarray:
    """(depth, seeds, n, n), float32."""
    rng = np.random.default_rng(0)
    shape = (config.depth, config.seeds, config.width, config.width)
    return (rng.standard_normal(shape) / np.sqrt(config.width)).astype(np.float32)


def _multiplied(stack: jax.Array, factors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All partial products and powers, in float32 as they come."""

    def step(carry: tuple, matrix: jax.Array) -> tuple[tuple, tuple]:
        product, power = carry
        carry = matrix @ product, power * factors
        return carry, carry

    eye = jnp.broadcast_to(jnp.eye(stack.shape[-1]), stack.shape[1:])
    _, (products, powers) = lax.scan(step, (eye, jnp.ones_like(factors)), stack)
    return products, powers


def measure(config: Config) -> frame.Arrays:
    """Log singular values, and where the powers leave float32.

    `right` counts, by depth, the plain product's values that are right to a nat; `lost_at` has the
    first depth at which each is not, inf for never.
    """
    stack, at = layers(config), depths(config)

    def both(stack: jax.Array, factors: jax.Array) -> dict[str, jax.Array]:
        products, powers = _multiplied(stack, factors)
        exact = jax.tree.map(lambda leaf: leaf[at], jg.graded_products(stack, "forward"))
        spectrum = exact.spectrum()
        return {
            "plain": jnp.log(jnp.linalg.svd(products[at - 1], compute_uv=False)),
            "graded": spectrum.log(),
            "error": jnp.max(spectrum.certificate.error[-1], -1),
            "powers": powers.T,
        }

    out = jax.device_get(frame.compiled(both)(jnp.asarray(stack), jnp.asarray(config.factors)))
    plain, graded = (np.swapaxes(np.asarray(out[name]), 0, 1) for name in ("plain", "graded"))
    right = np.abs(plain - graded) < 1.0
    lost = np.where(right.all(1), np.inf, at[(~right).argmax(1)])
    gone = (out["powers"] == 0) | ~np.isfinite(out["powers"])
    law = theory.gaussian_log_singular_values(config.width, config.depth)
    shown = list(modes(config))
    return {
        "right": right.sum(-1),
        "lost_at": lost,
        "plain": np.round(plain[..., shown], 3),
        "graded": np.round(graded[..., shown], 3),
        "plain_end": plain[:, -1],
        "graded_end": graded[:, -1],
        "error": np.asarray(out["error"]),
        "log_determinant": np.linalg.slogdet(stack.astype(np.float64))[1].sum(0),
        "power_left_at": np.where(gone.any(1), gone.argmax(1) + 1, 0),
        "law_mean": np.asarray(law.mean),
        "law_deviation": np.asarray(law.standard_deviation),
    }


def lost_at_predicted(config: Config) -> np.ndarray:
    """(n,): ln(1 / eps) / (lambda_1 - lambda_j); inf for the first."""
    exponents = np.asarray(theory.gaussian_lyapunov_exponents(config.width), np.float64)
    with np.errstate(divide="ignore"):
        return RANGE / (exponents[0] - exponents)


def judge_spectrum(config: Config, arrays: frame.Arrays) -> frame.Verdict:
    """By depth: all of the plain product's singular values are right to a nat, for all seeds."""
    at, count = depths(config), config.width
    whole = np.all(np.asarray(arrays["right"]) == count, 0)
    first = int(at[~whole][0]) if not whole.all() else 0
    # one that is never lost counts as lost after the last layer
    smallest = np.minimum(np.asarray(arrays["lost_at"])[:, -1], config.depth + 1)
    mean, low, high = frame.interval(smallest)
    predicted = float(lost_at_predicted(config)[-1])
    measured = (
        f"the smallest of {count} is lost at layer {mean:.1f} [{low:.1f}, {high:.1f}] (predicted "
        f"{predicted:.1f}); at {config.depth} layers {np.mean(arrays['right'][:, -1]):.2g} of them "
        "are right"
    )
    off = np.abs(arrays["plain_end"] - arrays["graded_end"])
    divergence = float(np.max(off[np.isfinite(off)], initial=0))
    if whole.all():
        return frame.Verdict("holds", measured, divergence=divergence)
    if not whole[0]:
        return frame.Verdict("false", measured, divergence=divergence)
    return frame.Verdict("holds if", measured, f"fewer than {first} layers", divergence)


def judge_range(config: Config, arrays: frame.Arrays) -> frame.Verdict:
    """False where graded float32 is exact, else "holds".

    Exact: the certificate's error of every ln s is at most 0.1 nats, their sum is ln |det| to 1e-4
    relative, and the law of Gaussian products is not refuted (all |z| < 4).
    """
    final = np.asarray(arrays["graded_end"], np.float64)
    determinant = np.abs(final.sum(1) / arrays["log_determinant"] - 1).max()
    z = (final - arrays["law_mean"]) / arrays["law_deviation"]
    exact = {
        "certificate": bool(np.max(arrays["error"]) <= CERTIFIED),
        "determinant": bool(determinant < 1e-4),
        "law": bool(np.abs(z).max() < 4),
    }
    at = ", ".join(
        f"{f}^k at k = {k or 'never'}"
        for f, k in zip(config.factors, arrays["power_left_at"], strict=True)
    )
    measured = (
        f"plain float32 is left by {at}; graded float32 gives s_min = e^{final[:, -1].mean():.0f} "
        f"with sum ln s off ln|det| by {determinant:.0e} relative and |z| <= {np.abs(z).max():.1f} "
        f"against the law, certified to {np.max(arrays['error']):.0e} nats"
    )
    return frame.Verdict("false" if all(exact.values()) else "holds", measured)
