"""What every hand-written rule refuses: hyperparameters, parameters and gradients that do not fit.

What is only known inside jit passes here; clips turn a bad threshold into NaN there.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from jaxgrad.tree import inexact_leaves, is_array, is_inexact_array, leaf_names, map_inexact


def concrete(value: Any) -> float | None:
    """The value of a number that is known now; None for a tracer, a schedule or no number."""
    if value is None or callable(value) or isinstance(value, str):
        return None
    try:
        return float(value)
    except TypeError:  # JAX's tracer errors are TypeErrors
        return None


def check_nonnegative(**values: Any) -> None:
    """Refuses negative and NaN hyperparameters; what is only known inside jit passes.

    Args:
        **values: hyperparameters by name.

    Raises:
        ValueError: naming the argument and the value.
    """
    _check_each(values, lambda number: number >= 0, "a number >= 0")


def check_decay(**values: Any) -> None:
    """Refuses decay rates outside [0, 1).

    Args:
        **values: decay rates by name.

    Raises:
        ValueError: naming the argument and the value.
    """
    advice = "; in bfloat16 0.999 rounds to 1: give it as a Python float or in float32"
    _check_each(values, lambda number: 0 <= number < 1, "a decay rate in [0, 1)", advice)


def _check_each(
    values: dict[str, Any], fits: Callable[[float], bool], expected: str, advice: str = ""
) -> None:
    for name, value in values.items():
        number = concrete(value)
        if number is not None and not fits(number):
            raise ValueError(f"{name}: expected {expected}, got {number}{advice}")


def check_rate(learning_rate: Any) -> None:
    """Refuses a learning rate that is no number: without one, a rule would go uphill.

    Args:
        learning_rate: number or schedule.

    Raises:
        TypeError: for None and text.
    """
    if learning_rate is None or isinstance(learning_rate, str):
        raise TypeError(f"learning_rate: expected a number or a schedule, got {learning_rate!r}")


def check_trainable(params: PyTree) -> None:
    """Refuses parameters of which none can be trained.

    Args:
        params: parameters; a tree without arrays passes.

    Raises:
        TypeError: naming the dtypes.
    """
    leaves = [leaf for leaf in jax.tree.leaves(params) if is_array(leaf)]
    if leaves and not inexact_leaves(params):
        found = sorted({str(leaf.dtype) for leaf in leaves})
        raise TypeError(
            f"expected floating-point or complex parameters, got only {', '.join(found)}; integers "
            "have no gradient"
        )


def check_update(grads: PyTree, params: PyTree) -> None:
    """Refuses gradients for what is no array of inexact numbers, or is of another shape.

    Args:
        grads: gradients.
        params: parameters.

    Raises:
        TypeError: for integer parameters and Python numbers.
        ValueError: for other shapes or structures.
    """

    def check(g: Any, p: Any) -> Any:
        if not is_array(p):
            if isinstance(p, int | float | complex):
                raise TypeError(
                    f"a gradient for the Python number {p!r}, for which no state is kept: make it "
                    "an array with jnp.asarray before init"
                )
            return g
        if not is_inexact_array(p):
            raise TypeError(
                f"a {g.dtype} gradient for a parameter of dtype {p.dtype}: integers cannot be "
                "trained; convert the parameter to a float, or pass None as its gradient. "
                f"Integer parameters: {_integer_names(params)}"
            )
        return g

    _ = map_inexact(check, grads, params)


def _integer_names(params: PyTree) -> str:
    leaves = jax.tree.leaves(params)
    names = leaf_names(params, root="(root)")
    pairs = zip(names, leaves, strict=True)
    return ", ".join(n for n, leaf in pairs if is_array(leaf) and not is_inexact_array(leaf))
