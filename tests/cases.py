"""The table of test models: what real users write, tiny, in plain JAX and in four frameworks.

    for case in CASES:
        f, x = case.build()                       # float32
        with jax.enable_x64(True):
            f, x = case.build(jnp.float64)        # parameters and input in float64; call f in here
            too

`build`, `build_batched` and `build_loss` make everything anew, in milliseconds and without
compiling. What is known beforehand about a model (its least number of layers, names, flags) is on
the `Case`; see `zoo_base.py`.
"""

import pytest
import zoo_equinox
import zoo_haiku
import zoo_jax
import zoo_jax_inputs
import zoo_jax_sequence
import zoo_jax_special
import zoo_jax_transformer
import zoo_linen
import zoo_linen_sequence
import zoo_nnx
from zoo_base import FLAGS, Case
from zoo_errors import ERROR_CASES, ErrorCase

__all__ = [
    "BY_NAME",
    "CASES",
    "ERROR_CASES",
    "FLAGS",
    "Case",
    "ErrorCase",
    "one_of_a_kind_first",
    "select",
]

CASES: tuple[Case, ...] = (
    *zoo_jax.CASES,
    *zoo_jax_transformer.CASES,
    *zoo_jax_sequence.CASES,
    *zoo_jax_special.CASES,
    *zoo_jax_inputs.CASES,
    *zoo_linen.CASES,
    *zoo_linen_sequence.CASES,
    *zoo_nnx.CASES,
    *zoo_equinox.CASES,
    *zoo_haiku.CASES,
)
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES), "two cases share a name"


def select(
    *, framework: str = "", kind: str = "", having: str = "", without: str = ""
) -> tuple[Case, ...]:
    """The cases of a framework and kind, with every flag in `having`, none in `without`."""
    for flag in (having + " " + without).split():
        if flag not in FLAGS:
            raise ValueError(f"unknown flag {flag!r}, expected one of {sorted(FLAGS)}")
    return tuple(
        c
        for c in CASES
        if framework in ("", c.framework)
        and kind in ("", c.kind)
        and set(having.split()) <= c.flags
        and not set(without.split()) & c.flags
    )


def one_of_a_kind_first(cases):
    """All cases; the fast run has the first of each framework and kind, the long one all."""
    seen, marked = set(), []
    for case in cases:
        kind = (case.framework, case.kind)
        marks = [pytest.mark.slow] if kind in seen else []
        marked.append(pytest.param(case, id=case.name, marks=marks))
        seen.add(kind)
    return marked
