"""Intervals against explicit formulas and tables."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysteer.evaluate.estimates import mean, share

Z = 1.959963984540054  # the standard normal's 97.5th percentile


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_share_has_wilson_interval(flags):
    k, n = sum(flags), len(flags)
    found = share(flags)
    p, denominator = k / n, 1 + Z**2 / n
    centre = (p + Z**2 / (2 * n)) / denominator
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / denominator
    assert (found.k, found.n, found.value) == (k, n, p)
    assert found.low == pytest.approx(max(0.0, centre - half), abs=1e-9)
    assert found.high == pytest.approx(min(1.0, centre + half), abs=1e-9)
    assert found.low <= p + 1e-12
    assert found.high >= p - 1e-12


def test_share_of_nothing_is_none():
    found = share([])
    assert (found.k, found.n, found.value, found.low, found.high) == (0, 0, None, None, None)


def test_mean_has_student_interval():
    found = mean([1.0, 2.0, 4.0])
    # t of 2 degrees of freedom at 0.975 is 4.302653 in every table.
    half = 4.302653 * math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2) / math.sqrt(3)
    assert (found.n, found.value) == (3, pytest.approx(7 / 3))
    assert found.low == pytest.approx(7 / 3 - half, rel=1e-5)
    assert found.high == pytest.approx(7 / 3 + half, rel=1e-5)


def test_mean_of_too_few_numbers_has_no_interval():
    assert (mean([]).n, mean([]).value, mean([]).low) == (0, None, None)
    assert (mean([3.5]).value, mean([3.5]).low) == (3.5, None)
    assert mean([0.0, 1.0]).low < 0.0
    assert mean([0.0, 1.0], lowest=0.0).low == 0.0
    assert mean([2.0, 2.0]).low == mean([2.0, 2.0]).high == 2.0
