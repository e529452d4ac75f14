"""Each scope's factor against its formula."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysteer.pack.scope import Scope
from pysteer.runtime.native import native_scope

FORMULAS = {
    "all": lambda p, r: 1.0,
    "prompt": lambda p, r: float(r <= 0),
    "response": lambda p, r: float(r >= 0),
    "first 5": lambda p, r: float(0 <= r < 5),
    "range 3 9": lambda p, r: float(3 <= p < 9),
    "range 4": lambda p, r: float(p >= 4),
    "linear 8": lambda p, r: 1 - r / 8 if 0 <= r < 8 else 0.0,
    "cosine 8": lambda p, r: 0.5 * (1 + math.cos(math.pi * r / 8)) if 0 <= r < 8 else 0.0,
    "values 1 -0.5 0 2": lambda p, r: [1, -0.5, 0, 2][r] if 0 <= r < 4 else 0.0,
}


@pytest.mark.parametrize("text", FORMULAS)
@given(position=st.integers(0, 40), n_prompt=st.integers(1, 30))
def test_scope_factor_equals_its_formula(text, position, n_prompt):
    r = position - (n_prompt - 1)
    factor = native_scope(Scope.parse(text)).factor(position, n_prompt)
    assert factor == pytest.approx(FORMULAS[text](position, r), abs=1e-7)
