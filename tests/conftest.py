"""What every test runs under.

JAX_PLATFORMS is left alone: the same tests run on whatever device the machine has. Double precision
is off by default, as it is for users; a test that needs it takes the fixture `x64`, or opens
`jax.enable_x64(True)` itself.
"""

import os

# Two workers share two cores: one BLAS thread each, set before anything imports numpy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import hypothesis
import jax
import jaxtyping
import pytest

# Compilation makes the first example slow, shared machines make any of them slow: deadlines flake.
hypothesis.settings.register_profile(
    "jaxgrad",
    deadline=None,
    max_examples=25,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jaxgrad")


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for the length of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def untyped() -> Iterator[None]:
    """No runtime type checks for the length of one test: users meet our own errors for bad input.

    All other tests run with jaxtyping and beartype on (see --jaxtyping-packages in pyproject.toml).
    """
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
