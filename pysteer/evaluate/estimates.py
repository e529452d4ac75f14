"""Shares and means with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats  # type: ignore[import-untyped]

from pysteer.intervals import CONFIDENCE, wilson


class Share(BaseModel):
    """A share k / n with its 95% interval.

    Attributes:
        k: number of hits.
        n: number of cases.
        value: k / n; None if n is 0.
        low: lower end of the interval; None if n is 0.
        high: upper end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: int
    n: int
    value: float | None = None
    low: float | None = None
    high: float | None = None


class Mean(BaseModel):
    """The mean of n numbers with its 95% interval.

    Attributes:
        n: number of numbers.
        value: the mean; None if n is 0.
        low: lower end of the interval; None if n is below 2.
        high: upper end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    n: int
    value: float | None = None
    low: float | None = None
    high: float | None = None


def share(flags: Iterable[bool]) -> Share:
    """Return the share of set flags, with Wilson's score interval."""
    values = list(flags)
    k, n = sum(values), len(values)
    if n == 0:
        return Share(k=0, n=0)
    low, high = wilson(k, n)
    return Share(k=k, n=n, value=k / n, low=low, high=high)


def mean(values: Iterable[float], *, lowest: float = -math.inf) -> Mean:
    """Return the mean of numbers, with the interval of Student's t.

    Args:
        values: the numbers.
        lowest: smallest possible number, and bound of the interval.
    """
    numbers = np.asarray(list(values), np.float64)
    if numbers.size == 0:
        return Mean(n=0)
    value = float(numbers.mean())
    if numbers.size == 1:
        return Mean(n=1, value=value)
    half = float(stats.sem(numbers) * stats.t.ppf((1 + CONFIDENCE) / 2, numbers.size - 1))
    return Mean(n=int(numbers.size), value=value, low=max(lowest, value - half), high=value + half)
