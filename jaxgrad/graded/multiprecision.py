"""The same singular values with as many digits as they need, where no float can know them."""

import math
from collections.abc import Iterable

import numpy as np


def log_singular_values_mp(matrices: Iterable, *, digits: int | None = None) -> np.ndarray:
    """Natural log singular values of `matrices[-1] @ ... @ matrices[0]`, by mpmath.

    For products whose certificate does not vouch for them: modes that overtook each other, a chain
    followed by its inverses. Slow: the digits grow with the length, and Python multiplies them.

    Args:
        matrices: Matrices (n_out, n_in) without batch axes, the first layer first.
        digits: Decimal digits to compute with. By default the sum of the digits that each layer's
            conditioning can cost, and forty more.

    Returns:
        float64, descending, min(n_out, n_in) of them; -inf beyond the rank.

    Raises:
        ImportError: mpmath is not installed.
        ValueError: No matrix, or a NaN or inf in one.
    """
    try:
        import mpmath
    except ImportError as error:
        raise ImportError(
            "log_singular_values_mp computes with mpmath: install it with `pip install mpmath`."
        ) from error
    arrays = [np.asarray(matrix, np.float64) for matrix in matrices]
    if not arrays:
        raise ValueError("at least one matrix is needed, got none.")
    for index, array in enumerate(arrays):
        if array.ndim != 2 or not np.all(np.isfinite(array)):
            raise ValueError(
                f"finite matrices are needed; layer {index} has the shape {array.shape} and "
                f"{np.sum(~np.isfinite(array))} entries that are not finite."
            )
    count = min(arrays[0].shape[1], arrays[-1].shape[0])
    if count == 0 or any(0 in array.shape for array in arrays):
        return np.full(count, -np.inf)
    digits = digits or 40 + math.ceil(sum(_lost_digits(array) for array in arrays))
    with mpmath.workdps(digits):
        product = mpmath.matrix(arrays[0].tolist())
        for array in arrays[1:]:
            product = mpmath.matrix(array.tolist()) * product
        if product.rows < product.cols:
            product = product.T
        values = mpmath.svd_r(product, compute_uv=False)
        # Below this a value is the rounding of a larger one.
        floor = max(values) * mpmath.mpf(10) ** (20 - digits)
        logs = [float(mpmath.log(value)) if value > floor else -math.inf for value in values]
    return np.sort(np.array(logs))[::-1]


def _lost_digits(array: np.ndarray) -> float:
    """Decimal digits between the largest and the smallest non-zero singular value."""
    values = np.linalg.svd(array / max(np.max(np.abs(array)), 1e-300), compute_uv=False)
    values = values[values > 0]
    return math.log10(values[0] / values[-1]) if values.size else 0.0
