"""What forward passes have in common that run only part of a model, or a sequence in two parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

MIN_SHARED = 8
"""Tokens: a shorter start of all sequences is not worth a pass of its own."""

TOLERANCE = 0.05
"""By how much a pass in parts may change states, relative to their size. It adds up the same
numbers in another order; a model that misses something is far off."""


class Done(Exception):
    """Ends a forward pass: everything wanted has been computed."""


def states_of(output: Any) -> Tensor:
    """The hidden states in what a module of a block returns."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
