"""Slow, obvious oracles for products of many matrices."""

import math
from fractions import Fraction

import mpmath
import numpy as np


def exact_product(matrices) -> tuple[list[list[int]], int]:
    """The product as Python integers and a power of two: `integers * 2**exponent`, no rounding.

    Every float is an integer times a power of two.
    """
    total, product = 0, None
    for matrix in matrices:
        entries = [[Fraction(float(value)) for value in row] for row in matrix]
        power = max(value.denominator for row in entries for value in row)
        factor = [[int(value * power) for value in row] for row in entries]
        total -= power.bit_length() - 1
        product = factor if product is None else _multiplied(factor, product)
    return product, total


def _multiplied(a, b):
    columns = list(zip(*b, strict=True))
    return [[sum(x * y for x, y in zip(row, col, strict=True)) for col in columns] for row in a]


def log_singular_values(matrices) -> np.ndarray:
    """Natural logs from the exact product, with digits for all of its range; -inf beyond the rank.

    The smallest non-zero singular value of a matrix of integers with rank r is at least
    1 / largest**(r - 1), so that the digits below are enough whatever the matrices are.
    """
    integers, exponent = exact_product(matrices)
    bits = max(abs(value) for row in integers for value in row).bit_length()
    if bits == 0:
        return np.full(min(len(integers), len(integers[0])), -np.inf)
    log2_sizes = sum(max(1.0, np.log2(np.linalg.cond(m) + 1)) for m in matrices)
    digits = 60 + math.ceil(min(len(integers) * bits, log2_sizes) * math.log10(2))
    with mpmath.workdps(digits):
        matrix = mpmath.matrix(integers) * mpmath.mpf(2) ** exponent
        if matrix.rows < matrix.cols:
            matrix = matrix.T
        values = mpmath.svd_r(matrix, compute_uv=False)
        floor = max(values) * mpmath.mpf(10) ** (25 - digits)
        logs = [float(mpmath.log(value)) if value > floor else -np.inf for value in values]
    return np.sort(logs)[::-1]
