"""Bad input gets an error that says what came, where, and what to do."""

import pytest
from cases import ERROR_CASES

import jaxgrad as jg


@pytest.mark.parametrize("case", ERROR_CASES, ids=lambda c: c.name)
def test_a_bad_call_gets_a_clear_error(case, untyped):
    with pytest.raises(case.errors) as caught:
        case.trigger(jg)
    assert not case.missing(str(caught.value)), str(caught.value)
