"""Confidence intervals of shares."""

from __future__ import annotations

import math
from statistics import NormalDist

CONFIDENCE = 0.95
"""Confidence level of every interval."""

_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def wilson(k: int, n: int) -> tuple[float, float]:
    """Return the ends of Wilson's score interval of a share k / n, for n of at least 1.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference". The
    interval holds for small n and for shares of 0 and 1, where the textbook interval has no width.

    Examples:
        >>> [round(end, 3) for end in wilson(0, 6)]
        [0.0, 0.39]
    """
    share = k / n
    middle = share + _Z**2 / (2 * n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    low = 0.0 if k == 0 else (middle - half) / scale
    high = 1.0 if k == n else (middle + half) / scale
    return low, high
