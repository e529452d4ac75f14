"""Intervals of shares, against scipy."""

import pytest
from scipy.stats import binomtest

from pysteer.intervals import CONFIDENCE, wilson


@pytest.mark.parametrize("n", [1, 2, 7, 60, 10_000])
def test_wilson_equals_scipy(n):
    for k in sorted({0, 1, n // 3, n - 1, n}):
        known = binomtest(k, n).proportion_ci(CONFIDENCE, method="wilson")
        assert wilson(k, n) == pytest.approx((known.low, known.high), abs=1e-12)
