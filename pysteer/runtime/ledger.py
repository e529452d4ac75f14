"""The steering that each cached token was computed under, as fingerprints."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Keys: TypeAlias = npt.NDArray[np.uint64]
"""Fingerprint of each token's steering; 0 means no steering."""


class CachedSteering(NamedTuple):
    """The steering of the tokens in a context: the bytes of their keys, and the logits' key."""

    keys: bytes
    logits_key: int


def matching(keys: Keys, others: Keys) -> int:
    """Return the number of keys from the start that are the same in both arrays."""
    n = min(len(keys), len(others))
    differ = np.flatnonzero(keys[:n] != others[:n])
    return int(differ[0]) if len(differ) else n


class CacheLedger:
    """One key per token of a KV cache.

    Positions count from 0. Positions beyond the recorded ones are unknown and never reused.

    Args:
        keys: keys of the first tokens, uint64, as `keys()` returns them.
    """

    def __init__(self, keys: Keys | None = None) -> None:
        self._keys: Keys = np.zeros(256, np.uint64)
        self._known = 0
        if keys is not None:
            self.record(0, keys)

    def keys(self) -> Keys:
        """Return a copy of the keys of the recorded tokens, uint64."""
        return self._keys[: self._known].copy()

    def record(self, start: int, keys: Keys) -> None:
        """Record that tokens from `start` on were computed under `keys`; forget all after them."""
        if start > self._known:
            raise ValueError(f"tokens {self._known} to {start} are not recorded")
        self._known = start + len(keys)
        if self._known > len(self._keys):
            grown = np.zeros(max(self._known, 2 * len(self._keys)), np.uint64)
            grown[:start] = self._keys[:start]
            self._keys = grown
        self._keys[start : self._known] = keys

    @property
    def known(self) -> int:
        """Number of recorded tokens."""
        return self._known

    def forget(self, start: int) -> None:
        """Forget the tokens from `start` on."""
        self._known = min(self._known, start)

    def reusable(self, keys: Keys) -> int:
        """Return the number of tokens from the start that were computed under `keys`."""
        return matching(self._keys[: self._known], keys)
