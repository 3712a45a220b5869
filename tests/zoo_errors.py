"""Calls that must fail, and what the message must say: what came, where, and what to do.

`ErrorCase.trigger` makes the call on the library that it is given; the message is matched, each
pattern on its own, without regard to case, so that wording stays free and content does not.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from zoo_base import floats
from zoo_jax import batch_norm_train, mlp_tanh_no_bias
from zoo_linen import resnet_train


@dataclasses.dataclass(frozen=True)
class ErrorCase:
    """A call, and regular expressions that its error's message must each match somewhere."""

    name: str
    trigger: Callable[[Any], Any]
    words: tuple[str, ...]
    errors: tuple[type[Exception], ...] = (ValueError, TypeError)

    def missing(self, message: str) -> list[str]:
        """The patterns that the message does not match."""
        return [word for word in self.words if not re.search(word, message, re.IGNORECASE)]


X = floats(4)
W = floats(4, 4, seed=1)


def _factorize(f: Callable[..., Any], *args: Any, **options: Any) -> Callable[[Any], Any]:
    return lambda jg: jg.factorize(f, *args, **options)


def _batched(case: Any, **options: Any) -> Callable[[Any], Any]:
    f, xs = case.build_batched()
    return lambda jg: jg.factorize(f, xs, **options)


def _callback(x: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda x: x, shape, x @ W) @ W


def _wide(jg: Any) -> Any:
    """A dense layer whose Jacobian, a million squared of float32, has 4 TB."""
    x = jnp.ones(1_000_000)
    return jg.layer_jacobians(jg.factorize(lambda x: jnp.cumsum(jnp.sin(x)), x), x)


def _chain_with_wrong_shape(jg: Any) -> Any:
    f, x = mlp_tanh_no_bias.build()
    return jg.factorize(f, x)(jnp.ones(x.size + 1))


def _layers_that_do_not_fit(jg: Any) -> Any:
    first, second = lambda x: x @ jnp.ones((4, 3)), lambda h: h @ jnp.ones((4, 2))
    return jg.Chain.from_layers([("embed", first), ("block0", second)]).states(jnp.ones(4))


def _unequal_stack(jg: Any) -> Any:
    params = {"w": jnp.ones((3, 4, 4)), "b": jnp.ones((2, 4))}
    return jg.Chain.scanned(lambda p, h: jnp.tanh(h @ p["w"] + p["b"]), params)


def _flow(loss: Callable[..., Any], *args: Any) -> Callable[[Any], Any]:
    return lambda jg: jg.value_and_grad_flow(loss)(*args)


def _fixed_point(x: jax.Array) -> jax.Array:
    return jax.lax.while_loop(lambda h: jnp.sum(h**2) > 1, lambda h: jnp.tanh(W @ h), x)


FACTORIZE = (
    ErrorCase(
        "integers all the way",
        _factorize(lambda ids: ids * 2 + 1, jnp.arange(4)),
        (r"int", r"float"),
    ),
    ErrorCase(
        "an output of integers",
        _factorize(lambda x: jnp.argmax(W @ x), X),
        (r"output", r"int32|integer|argmax"),
    ),
    ErrorCase(
        "an output that does not depend on x",
        _factorize(lambda x: jnp.ones(3), X),
        (r"output", r"depend", r"arg|x"),
    ),
    ErrorCase(
        "every path stopped",
        _factorize(lambda x: jax.lax.stop_gradient(jnp.tanh(W @ x)) * 2, X),
        (r"stop_gradient",),
    ),
    ErrorCase(
        "complex input",
        _factorize(lambda z: jnp.abs(z), jnp.ones(3, jnp.complex64)),
        (r"complex64", r"real|imag"),
    ),
    ErrorCase("no argument", _factorize(lambda: X), (r"argument|args",)),
    ErrorCase("None for x", _factorize(lambda x: X, None), (r"None|empty|no array",)),
    ErrorCase(
        "argnum out of range",
        _factorize(lambda a, b: a + b, X, X, argnum=2),
        (r"argnum", r"\b2\b", r"argument"),
        (ValueError, TypeError, IndexError),
    ),
    ErrorCase(
        "an unknown way to cut",
        _factorize(lambda x: jnp.tanh(W @ x), X, layers="blocks"),
        (r"layers", r"'?blocks'?", r"scopes", r"cuts"),
    ),
    ErrorCase(
        "a batch that is coupled",
        _batched(batch_norm_train, batch_axis=0),
        (r"batch_axis", r"independent|coupled", r"reduce|mean|layer"),
    ),
    ErrorCase(
        "BatchNorm in training mode",
        _batched(resnet_train, batch_axis=0),
        (r"batch_axis", r"independent|coupled", r"bn_init|BatchNorm"),
    ),
    ErrorCase(
        "a batch axis that x does not have",
        _factorize(lambda x: jnp.tanh(W @ x), X, batch_axis=1),
        (r"batch_axis", r"\b1\b", r"\(4,\)"),
        (ValueError, TypeError, IndexError),
    ),
    ErrorCase(
        "a batch axis that the output has lost",
        _factorize(lambda xs: jnp.tanh(xs @ W).sum(axis=1).mean(), floats(3, 4), batch_axis=0),
        (r"batch_axis", r"batch|example"),
    ),
)

LATER = (
    ErrorCase(
        "a Jacobian larger than memory",
        _wide,
        (r"[TG]i?B", r"matrix-free|without the matrix|top_singular_values|singular_moments"),
        (ValueError, TypeError, MemoryError),
    ),
    ErrorCase(
        "a callback without a derivative",
        lambda jg: jg.layer_jacobians(jg.factorize(_callback, X), X),
        (r"callback",),
    ),
    ErrorCase("a chain on another shape", _chain_with_wrong_shape, (r"\(5,\)", r"\(6,\)")),
    ErrorCase("layers that do not fit", _layers_that_do_not_fit, (r"block0",)),
    ErrorCase(
        "a stack of unequal heights", _unequal_stack, (r"\b3\b", r"\b2\b", r"\['?b'?\]|\bb\b")
    ),
    ErrorCase(
        "a loss that is no scalar",
        _flow(lambda w, x: w @ x, jnp.asarray(W), jnp.asarray(X)),
        (r"scalar", r"\(4,\)|\[4\]"),
    ),
    ErrorCase(
        "a loss of integers",
        _flow(lambda w, x: jnp.argmax(w @ x), jnp.asarray(W), jnp.asarray(X)),
        (r"int32",),
    ),
    ErrorCase(
        "reverse mode through a while_loop",
        _flow(lambda w, x: _fixed_point(w * x).sum(), jnp.ones(4), jnp.asarray(X)),
        (r"while",),
    ),
)

ERROR_CASES: tuple[ErrorCase, ...] = FACTORIZE + LATER
