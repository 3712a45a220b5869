"""Networks with layer normalization: what it does to gradients without and with a residual path.

Xiong et al. 2020 (arXiv 2002.04745) for Post-LN and Pre-LN; Dong et al. 2021 (arXiv 2103.03404) for
the collapse of tokens that attention brings about.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxgrad.theory.activations import activation
from jaxgrad.theory.gaussian import gaussian_mean, real
from jaxgrad.theory.mean_field import Phi, slope_moment


def norm_then_activation_chi(phi: Phi, width: ArrayLike = jnp.inf) -> Array:
    """Factor of the squared gradient by a layer `h' = W phi(LN(h))`: `E phi'^2 / E phi^2` at q = 1.

    The norm divides by sigma_w sqrt(E phi^2), so the weights' scale cancels; its projection takes
    two of n directions. Measured by `(J**2).sum() / n` of `layer_jacobians`.

    Args:
        phi: activation.
        width: n.

    Returns:
        Array of the shape of `width`.
    """
    phi = activation(phi)
    mean_square = gaussian_mean(lambda x: phi.function(x) ** 2, 1.0, phi.kinks)
    return slope_moment(phi, 1.0, 2) / mean_square * (1 - 2 / real(width))


def activation_then_norm_chi(phi: Phi, sigma_w: ArrayLike = 1.0) -> Array:
    """Factor of the squared gradient by `h' = LN(phi(W h))`: `sigma_w^2 E phi'^2 / Var phi`.

    For ReLU pi / (pi - 1): it explodes by 1.2112 in norm a layer, as batch normalization does (Yang
    et al. 2019, arXiv 1902.08129). Measured as for `norm_then_activation_chi`, at large width.

    Args:
        phi: activation.
        sigma_w: weights have variance sigma_w^2 / fan_in; the input has mean square one.

    Returns:
        Array of the shape of `sigma_w`.
    """
    known, q = activation(phi), real(sigma_w) ** 2
    mean, square = (
        gaussian_mean(lambda x, p=p: known.function(x) ** p, q, known.kinks) for p in (1, 2)
    )
    return q * slope_moment(known, q, 2) / (square - mean**2)


class StreamProfile(NamedTuple):
    """Predictions by depth; index l is the residual stream after l blocks, from 0 to L.

    Attributes:
        q: mean square of the stream (before the norm for Post-LN).
        gradient: norm of dLoss/dh_l relative to that at h_L.
    """

    q: Array
    gradient: Array


def pre_ln_profile(depth: int, branch: ArrayLike = 0.5, q_0: ArrayLike = 1.0) -> StreamProfile:
    """Pre-LN blocks `h + F(LN(h))`: `q_l = q_0 + l b`, gradients like `sqrt(q_L / q_l)`.

    Each branch adds `b`, its mean square for a normalized input; its Jacobian is F's over sqrt(q),
    so the squared gradient grows by `1 + b / q_l` going down. For Xavier ReLU feed-forward blocks
    b = 1/2, between the bounds of Xiong et al. 2020, lemma 2. Measured by `flow.activation_rms**2`
    and `flow.gradient_rms` (relative to the last) at the blocks' outputs.

    Args:
        depth: number of blocks L.
        branch: b.
        q_0: mean square of the stream before the first block.

    Returns:
        Arrays (L + 1,).
    """
    q = real(q_0) + real(branch) * jnp.arange(depth + 1)
    return StreamProfile(q, jnp.sqrt(q[-1] / q))


def post_ln_profile(depth: int, branch: ArrayLike = 0.5) -> StreamProfile:
    """Post-LN blocks `LN(h + F(h))` of positions that do not mix: gradients keep their size.

    The norm divides the squared gradient by `1 + b`, and the block's Jacobian `I + J_F` multiplies
    it by the same: the decay of Xiong et al. 2020 counts the first alone. Measured as for
    `pre_ln_profile`.

    Args:
        depth: number of blocks L.
        branch: b, mean square and squared gain of F.

    Returns:
        Arrays (L + 1,).
    """
    ones = jnp.ones(depth + 1, real(branch).dtype)
    return StreamProfile((1 + real(branch)) * ones, ones)


def last_weight_gradient(width: ArrayLike, depth: ArrayLike, norm: str) -> Array:
    """Frobenius norm of the gradient of the last block's second matrix, at Xavier initialization.

    For a random linear readout of unit gradient a coordinate: `d / sqrt(2)` over the root mean
    square that the last norm divides by: sqrt(3/2) for "post", sqrt(1 + L/2) for "pre". It is what
    Xiong et al. 2020, theorem 1, bounds by O(d sqrt(ln d)) and O(d sqrt(ln d / L)), with the
    constants. Measured by `jnp.linalg.norm` of `jax.grad`'s leaf.

    Args:
        width: d, of the stream and of the hidden layer.
        depth: number of feed-forward blocks L.
        norm: "pre" or "post".

    Returns:
        Norm.
    """
    if norm not in ("pre", "post"):
        raise ValueError(f"last_weight_gradient: expected norm 'pre' or 'post', got {norm!r}")
    depth = real(depth)
    square = 1 + depth / 2 if norm == "pre" else jnp.full_like(depth, 1.5)
    return real(width) / jnp.sqrt(2 * square)


class AttentionProfile(NamedTuple):
    """Predictions by depth; index l is the stream after l blocks, from 0 to L.

    Attributes:
        cosine: mean cosine between two tokens.
        gradient: norm of dLoss/dh_l relative to that at h_L.
    """

    cosine: Array
    gradient: Array


def post_ln_attention_profile(
    depth: int, tokens: ArrayLike, cosine: ArrayLike = 0.0, *, feed_forward: bool = True
) -> AttentionProfile:
    """Post-LN transformer blocks with uniform attention, Xavier values and ReLU feed-forward.

    The mean over T tokens of cosine c has mean square `m = (1 + (T - 1) c) / T`; adding it to all
    tokens takes c to `(c + m) / (1 + m)`, and the norm divides by 1 + m. Going down, the gradient's
    part that is common to all tokens is multiplied by `2 / (1 + m)` in square, the rest by
    `1 / (1 + m)`: after the collapse (m = 1) the rest halves a layer and the common part, a share
    of 1 / T at the top, stays. The feed-forward block keeps the gradient (`post_ln_profile`) and
    brings tokens closer, to `(c + k(c) / 2) / 1.5` with k the ReLU map of Cho and Saul 2009. (The
    collapse is that of Dong et al. 2021.) Measured by `flow.gradient_rms` at the blocks' outputs.

    Args:
        depth: number of blocks L.
        tokens: T.
        cosine: mean cosine between two tokens of the input.
        feed_forward: whether a feed-forward sublayer follows each attention.

    Returns:
        Arrays (L + 1, ...) with the common shape of `tokens` and `cosine`.
    """
    t, start = jnp.broadcast_arrays(real(tokens), real(cosine))

    def block(c: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        m = (1 + (t - 1) * c) / t
        after = (c + m) / (1 + m)
        if feed_forward:
            after = (after + _relu_cosine(after) / 2) / 1.5
        return after, (after, m)

    _, (cosines, m) = lax.scan(block, start, length=depth)
    log_common = jnp.cumsum(jnp.log(2 / (1 + m))[::-1], axis=0)[::-1]
    log_rest = jnp.cumsum(-jnp.log1p(m)[::-1], axis=0)[::-1]
    square = jnp.exp(log_common) / t + jnp.exp(log_rest) * (1 - 1 / t)
    gradient = jnp.concatenate([jnp.sqrt(square), jnp.ones((1, *t.shape), square.dtype)])
    return AttentionProfile(jnp.concatenate([start[None], cosines]), gradient)


def _relu_cosine(c: Array) -> Array:
    """`E relu(u) relu(v) / E relu(u)^2` at correlation c."""
    c = jnp.clip(c, -1, 1)
    return (jnp.sqrt(1 - c**2) + (jnp.pi - jnp.arccos(c)) * c) / jnp.pi
