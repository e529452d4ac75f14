"""Parts of forward passes that run only some blocks, or a sequence in two pieces."""

from __future__ import annotations

from typing import Any

from torch import Tensor

MIN_SHARED = 8
"""Fewest tokens of a shared start that is worth a separate pass."""

TOLERANCE = 0.05
"""Largest change of states by a pass in pieces, relative to their size. Sums in another order stay
below; a model that does not support pieces is far above."""


class Done(Exception):
    """Ends a forward pass early, once all results are there."""


def states_of(output: Any) -> Tensor:
    """Return the hidden states in the output of a block's module."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
