"""The steering that each cached token was computed under, as fingerprints."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Keys: TypeAlias = npt.NDArray[np.uint64]
"""Fingerprint of each token's steering; 0 means no steering."""


class CachedSteering(NamedTuple):
    """The steering of the tokens in a context: the bytes of their keys, and the logits' key.

    Attributes:
        keys: bytes of `CacheLedger.keys()`.
        images: bytes of `CacheLedger.images()`.
        logits_key: fingerprint of the whole steering of the last token decoded.
    """

    keys: bytes
    images: bytes
    logits_key: int


def matching(keys: Keys, others: Keys) -> int:
    """Return the number of keys from the start that are the same in both arrays."""
    n = min(len(keys), len(others))
    differ = np.flatnonzero(keys[:n] != others[:n])
    return int(differ[0]) if len(differ) else n


class CacheLedger:
    """One key per token of a KV cache, and the image that stands in the place of a token.

    Positions count from 0. Positions beyond the recorded ones are unknown and never reused.

    Args:
        keys: keys of the first tokens, uint64, as `keys()` returns them.
        images: their images, uint64, as `images()` returns them; None: tokens alone.
    """

    def __init__(self, keys: Keys | None = None, images: Keys | None = None) -> None:
        self._rows = np.zeros((2, 256), np.uint64)  # keys, images
        self._known = 0
        if keys is not None:
            self.record(0, keys, 0 if images is None else images)

    def keys(self) -> Keys:
        """Return a copy of the keys of the recorded tokens, uint64."""
        return self._rows[0, : self._known].copy()

    def images(self) -> Keys:
        """Return for each recorded position the number of its image, uint64; 0: a token."""
        return self._rows[1, : self._known].copy()

    def record(self, start: int, keys: Keys, images: Keys | int = 0) -> None:
        """Record that tokens from `start` on were computed under `keys`; forget all after them.

        Args:
            start: position of the first.
            keys: fingerprint of each token's steering.
            images: number of the image at each position, or at all of them; 0: a token.
        """
        if start > self._known:
            raise ValueError(f"tokens {self._known} to {start} are not recorded")
        self._known = start + len(keys)
        if self._known > self._rows.shape[1]:
            grown = np.zeros((2, max(self._known, 2 * self._rows.shape[1])), np.uint64)
            grown[:, :start] = self._rows[:, :start]
            self._rows = grown
        self._rows[0, start : self._known] = keys
        self._rows[1, start : self._known] = images

    @property
    def known(self) -> int:
        """Number of recorded tokens."""
        return self._known

    def forget(self, start: int) -> None:
        """Forget the tokens from `start` on."""
        self._known = min(self._known, start)

    def reusable(self, keys: Keys) -> int:
        """Return the number of tokens from the start that were computed under `keys`."""
        return matching(self._rows[0, : self._known], keys)
