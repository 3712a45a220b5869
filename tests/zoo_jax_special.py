"""Plain JAX off the beaten track: custom rules, low precision, effects, odd shapes and inputs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from zoo_base import Parts, case, dense, floats, mse, table
from zoo_jax import layer, layers, mlp


def _chain(step: Any, widths: tuple[int, ...] = (5, 5, 5, 5)) -> Parts:
    """`step(p, h)` over dense layers, one example or a batch alike."""

    def apply(params: list, x: jax.Array) -> jax.Array:
        for p in params:
            x = step(p, x)
        return x

    return Parts(apply, layers(*widths), floats(3, widths[0], seed=8), apply_batch=apply, loss=mse)


# ------------------------------------------------------------------------------ wrappers


@case("jax", "jit", scopes=3, cuts=6)
def nested_jit(_: Any) -> Parts:
    """A jitted helper inside a jitted block inside a jitted model; the helper's trace is shared."""
    dense_layer = jax.jit(layer)
    block = jax.jit(lambda p, h, scale: jnp.tanh(dense_layer(p, h)) * scale, static_argnums=2)
    parts = _chain(lambda p, h: block(p, h, 0.9))
    return Parts(jax.jit(parts.apply), parts.params, parts.xs, apply_batch=parts.apply, loss=mse)


@case("jax", "jit", scopes=3, cuts=3, names=("hidden",))
def checkpoint_names(_: Any) -> Parts:
    """`checkpoint_name` marks what remat policies save; here it names the hidden states."""
    return _chain(lambda p, h: checkpoint_name(jnp.sin(layer(p, h)), "hidden"))


@jax.custom_jvp
def _softplus(x: jax.Array) -> jax.Array:
    return jnp.logaddexp(x, jnp.zeros_like(x))


_softplus.defjvps(lambda t, _, x: t * jax.nn.sigmoid(x))


@case("jax", "custom rule", scopes=3, cuts=6)
def custom_jvp(_: Any) -> Parts:
    return _chain(lambda p, h: _softplus(layer(p, h)))


@jax.custom_vjp
def _swish(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(x)


def _swish_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    s = jax.nn.sigmoid(x)
    return (g * (s + x * s * (1 - s)),)


_swish.defvjp(lambda x: (_swish(x), x), _swish_backward)


@case("jax", "custom rule", scopes=3, cuts=6, flags="reverse-only")
def custom_vjp(_: Any) -> Parts:
    """The memory-saving swish: the rule is the true derivative, and only reverse mode has it."""
    return _chain(lambda p, h: _swish(layer(p, h)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _clip_gradient(bound: float, x: jax.Array) -> jax.Array:
    return x


_clip_gradient.defvjp(lambda bound, x: (x, None), lambda bound, _, g: (jnp.clip(g, -bound, bound),))


@case("jax", "custom rule", scopes=3, cuts=6, flags="reverse-only surrogate-gradient nonlinear-vjp")
def gradient_clip_inside(_: Any) -> Parts:
    """An identity that clips the cotangent by element: no linear map, hence no Jacobian."""
    return _chain(lambda p, h: _clip_gradient(0.05, jnp.tanh(layer(p, h))))


# ------------------------------------------------------------------------------ gradients cut or
# bent


@case("jax", "stop gradient", scopes=2, cuts=2, flags="surrogate-gradient")
def stop_gradient_target(_: Any) -> Parts:
    """After BYOL: the online prediction minus a target that no gradient passes."""
    params = {"encoder": dense(5, 6), "predictor": dense(6, 6, seed=1)}

    def apply(params: dict, x: jax.Array) -> jax.Array:
        online = jnp.tanh(layer(params["encoder"], x))
        target = lax.stop_gradient(jnp.tanh(layer(params["encoder"], 0.9 * x)))
        return layer(params["predictor"], online) - target

    return Parts(apply, params, floats(3, 5), apply_batch=apply, loss=mse)


@case("jax", "stop gradient", scopes=3, cuts=6, flags="surrogate-gradient")
def straight_through_rounding(_: Any) -> Parts:
    """x + stop_gradient(round(x) - x): quantized forward, the identity backward."""
    return _chain(
        lambda p, h: (z := 4 * jnp.tanh(layer(p, h))) + lax.stop_gradient(jnp.round(z) - z)
    )


@case("jax", "stop gradient", scopes=1, cuts=1, flags="no-loss zero-jacobian")
def rounding(_: Any) -> Parts:
    """Round without the trick: the derivative is zero everywhere, and JAX says so."""
    params = dense(5, 4)
    apply = lambda p, x: 3.0 * jnp.round(4 * layer(p, x))  # noqa: E731
    return Parts(apply, params, floats(3, 5), apply_batch=apply)


@case("jax", "nonfinite", scopes=1, cuts=2, flags="nonfinite-gradient")
def where_sqrt_trap(_: Any) -> Parts:
    """where(x > 0, sqrt(x), 0) at 0: the value is 0, the gradient 0 * inf."""

    def apply(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.where(x > 0, jnp.sqrt(x), 0.0) @ w

    xs = np.abs(floats(3, 4)) * np.array([1, 0, 1, 0], np.float32)
    return Parts(apply, floats(4, 3), xs, apply_batch=apply, loss=mse)


# ------------------------------------------------------------------------------ control flow and
# effects


@case("jax", "while", scopes=2, cuts=3, flags="no-loss forward-only")
def while_loop(_: Any) -> Parts:
    """An equilibrium layer by fixed-point iteration until it stands still: no reverse mode."""
    params = {"inp": dense(4, 4), "w": 0.3 * floats(4, 4, seed=1), "head": dense(4, 2, seed=2)}

    def apply(params: dict, x: jax.Array) -> jax.Array:
        u = layer(params["inp"], x)
        moving = lambda s: jnp.max(jnp.abs(s[0] - s[1])) > 1e-3  # noqa: E731
        step = lambda s: (jnp.tanh(s[0] @ params["w"] + u), s[0])  # noqa: E731
        z, _ = lax.while_loop(moving, step, (jnp.tanh(u), jnp.zeros_like(u)))
        return layer(params["head"], z)

    return Parts(apply, params, x=floats(4))


@case("jax", "effects", scopes=3, cuts=6, flags="effects")
def debug_callback(_: Any) -> Parts:
    """A callback for people; `jax.debug.print` is one too. The figures are thrown away."""

    def step(p: dict, h: jax.Array) -> jax.Array:
        z = layer(p, h)
        jax.debug.callback(lambda norm: None, jnp.linalg.norm(z))
        return jnp.tanh(z)

    return _chain(step)


@case("jax", "effects", scopes=3, cuts=6, flags="effects")
def debug_print(_: Any) -> Parts:
    def step(p: dict, h: jax.Array) -> jax.Array:
        h = jnp.tanh(layer(p, h))
        jax.debug.print("mean {m}", m=h.mean())
        return h

    return _chain(step)


# ------------------------------------------------------------------------------ dtypes and
# randomness


@case("jax", "precision", scopes=3, cuts=8, flags="low-precision")
def bfloat16_compute(_: Any) -> Parts:
    """Parameters and residual stream in float32, matrix products in bfloat16."""

    def step(p: dict, h: jax.Array) -> jax.Array:
        z = h.astype(jnp.bfloat16) @ p["kernel"].astype(jnp.bfloat16)
        return jnp.tanh(z.astype(h.dtype) + p["bias"])

    return _chain(step)


@case("jax", "precision", scopes=3, cuts=5, flags="low-precision")
def float16_all(_: Any) -> Parts:
    params = jax.tree.map(lambda a: a.astype(np.float16), layers(5, 6, 6, 3))
    apply = partial(mlp, activation=jnp.tanh)
    return Parts(apply, params, floats(3, 5).astype(np.float16), apply_batch=apply, loss=mse)


@case("jax", "dropout", scopes=3, cuts=6)
def dropout_fixed_key(_: Any) -> Parts:
    def apply(params: list, x: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.key(1), len(params))
        for p, key in zip(params, keys, strict=True):
            x = jnp.tanh(layer(p, x))
            x = jnp.where(jax.random.bernoulli(key, 0.7, x.shape[-1:]), x / 0.7, 0.0)
        return x

    return Parts(apply, layers(6, 6, 6, 6), floats(3, 6), apply_batch=apply, loss=mse)


@case("jax", "fft", scopes=1, cuts=3, flags="complex")
def fft_mixing(_: Any) -> Parts:
    """A Fourier layer (Li et al. 2021): rfft, complex weights on the low modes, irfft."""
    params = {"real": floats(5), "imag": floats(5, seed=1), "head": dense(8, 3, seed=2)}

    def apply(params: dict, x: jax.Array) -> jax.Array:
        weights = lax.complex(params["real"], params["imag"])
        h = jnp.fft.irfft(jnp.fft.rfft(x) * weights, n=x.shape[-1])
        return layer(params["head"], jnp.tanh(h))

    return Parts(apply, params, floats(3, 8), apply_batch=apply, loss=mse)


@case("jax", "glu", scopes=2, cuts=2)
def glu(_: Any) -> Parts:
    """Each layer doubles the width and halves it again: `jax.nn.glu` uses both halves."""
    params = [dense(5, 10), dense(5, 10, seed=1)]

    def apply(params: list, x: jax.Array) -> jax.Array:
        for p in params:
            x = jax.nn.glu(layer(p, x))
        return x

    return Parts(apply, params, floats(3, 5), apply_batch=apply, loss=mse)


CASES = table(globals())
