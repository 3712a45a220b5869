"""An assertion that the gradient reaches every layer of a model."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import PyTree

from jaxgrad.diagnosis import diagnose


def assert_gradients_flow(
    loss: Callable[..., Any],
    params: PyTree,
    batch: PyTree,
    *,
    key: Any = None,
    trainable: Any = None,
    ignore: Sequence[str] = (),
) -> None:
    """Asserts that `jaxgrad.diagnose` finds no error and no warning in a model at initialization.

    Args:
        loss: `loss(params, batch)`, or `loss(params, batch, key)` if a key is given.
        params: the parameters.
        batch: one batch, as the loss takes it.
        key: a JAX random key, for a loss that draws.
        trainable: which parameters are trained, as `diagnose` takes it.
        ignore: findings that are known and meant, such as `"gradient.blocked:target/*"`.

    Raises:
        AssertionError: with the report, if there is an error or a warning.
    """
    report = diagnose(loss, params, batch, key=key, trainable=trainable, ignore=ignore)
    if report.primary is not None:
        raise AssertionError(f"the gradient does not flow as it should: {report}")
