"""What types lose, against the casts themselves."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgrad import precision

TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("name", TYPES)
@given(exponent=st.floats(-35, 35), seed=st.integers(0, 10))
def test_shares_are_those_of_the_cast_itself(name, exponent, seed):
    x = np.random.default_rng(seed).standard_normal(64) * 10.0**exponent
    with np.errstate(all="ignore"):
        x = x.astype(np.float32)
        cast = x.astype(TYPES[name]).astype(np.float64)
    found = precision.losses({"g": x}, name)["g"]
    real = x != 0
    total = max(int(real.sum()), 1)
    assert found.underflow == np.sum((cast == 0) & real) / total
    assert found.overflow == np.sum(np.isinf(cast)) / total


def test_a_scale_brings_back_what_underflows():
    x = np.full(8, 1e-9, np.float32)
    assert precision.losses([x], "float16")["[0]"].underflow == 1
    scale = precision.suggested_scale([x], "float16")
    after = precision.losses([x], "float16", scale)["[0]"]
    assert after == precision.Loss(0, 0, 0)
    assert np.log2(scale) == np.floor(np.log2(scale))
    assert 65504 / 16 < scale * 1e-9 * 8 <= 65504


def test_exponents_count_every_finite_element_once():
    x = np.array([0.0, 1.0, 1.5, 2.0, -0.25, np.inf, np.nan], np.float32)
    values, counts = precision.exponents({"x": x})
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {-2: 1, -1: 0, 0: 2, 1: 1}


def test_zeros_and_integers_lose_nothing():
    tree = {"i": np.arange(3), "z": np.zeros(4, np.float32)}
    assert precision.losses(tree, "float16") == {"z": precision.Loss(0, 0, 0)}
    assert precision.suggested_scale(tree, "float16") == 1
    with pytest.raises(ValueError, match="scale"):
        _ = precision.losses(tree, "float16", 0.0)
