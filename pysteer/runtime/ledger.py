"""Which steering each cached token was computed under."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Keys: TypeAlias = npt.NDArray[np.uint64]
"""Per token, a fingerprint of its steering; 0 is none."""


class CacheLedger:
    """One key per token of a KV cache.

    Positions count from 0. What lies beyond the recorded positions is unknown and never reused.

    Args:
        keys: those of the first tokens, uint64, as `keys()` gives them.
    """

    def __init__(self, keys: Keys | None = None) -> None:
        self._keys: Keys = np.zeros(256, np.uint64)
        self._known = 0
        if keys is not None:
            self.record(0, keys)

    def keys(self) -> Keys:
        """The keys of the tokens recorded, uint64; a copy."""
        return self._keys[: self._known].copy()

    def record(self, start: int, keys: Keys) -> None:
        """Tokens from `start` on were computed under `keys`; what was known after is forgotten."""
        if start > self._known:
            raise ValueError(f"tokens {self._known} to {start} have never been recorded")
        self._known = start + len(keys)
        if self._known > len(self._keys):
            grown = np.zeros(max(self._known, 2 * len(self._keys)), np.uint64)
            grown[:start] = self._keys[:start]
            self._keys = grown
        self._keys[start : self._known] = keys

    def reusable(self, keys: Keys) -> int:
        """How many tokens from the start were computed under the first of `keys`."""
        n = min(self._known, len(keys))
        differ = np.flatnonzero(self._keys[:n] != keys[:n])
        return int(differ[0]) if len(differ) else n
