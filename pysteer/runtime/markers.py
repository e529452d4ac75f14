"""Tokens between two marker strings, such as `<think>` and `</think>`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt


class MarkerTracker:
    """Follows a text token by token.

    A marker may begin and end anywhere inside tokens. The token that completes the start marker is
    the first between the markers. The last is the token before the token that completes the end
    marker: the row of a token decides the next token, so these rows decide the text between the
    markers.

    Args:
        pairs: start and end markers, at most 32 pairs.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._pairs = [(start.encode(), end.encode()) for start, end in pairs]
        self._inside = [False] * len(pairs)
        self._tails = [b""] * len(pairs)
        self.n_tokens = 0

    def feed(self, pieces: Iterable[bytes]) -> npt.NDArray[np.uint32]:
        """Add the texts of the next tokens.

        Returns:
            uint32 (n,): bit k is set where the token stands between the markers of pair k.
        """
        masks = []
        for piece in pieces:
            mask = 0
            for k in range(len(self._pairs)):
                self._advance(k, piece)
                mask |= self._inside[k] << k
            masks.append(mask)
        self.n_tokens += len(masks)
        return np.asarray(masks, np.uint32)

    def _advance(self, k: int, piece: bytes) -> None:
        text = self._tails[k] + piece
        while True:
            marker = self._pairs[k][self._inside[k]]
            at = text.find(marker)
            if at < 0:
                break
            text = text[at + len(marker) :]
            self._inside[k] = not self._inside[k]
        # Keep a possible beginning of the next marker; a marker found is not part of another.
        keep = len(marker) - 1
        self._tails[k] = text[-keep:] if keep else b""
