"""Which steering each cached token was computed under."""

from __future__ import annotations

from pysteer.runtime.plan import Key


class CacheLedger:
    """One key per token of the KV cache, kept as runs.

    Positions count from 0. What lies beyond the recorded positions is unknown and never reused.
    """

    def __init__(self, runs: list[tuple[int, Key]] | None = None) -> None:
        """Start from `runs`, pairs of end position and key, as `runs()` gives them."""
        self._runs = list(runs or [])

    def runs(self) -> list[tuple[int, Key]]:
        """Pairs of end position (exclusive, ascending) and key; a copy that can be pickled."""
        return list(self._runs)

    def record(self, start: int, stop: int, key: Key) -> None:
        """Tokens [start, stop) were computed under `key`; what was recorded after is forgotten."""
        kept: list[tuple[int, Key]] = []
        previous_end = 0
        for end, run_key in self._runs:
            if previous_end >= start:
                break
            kept.append((min(end, start), run_key))
            previous_end = end
        recorded = kept[-1][0] if kept else 0
        if start > recorded:
            raise ValueError(f"tokens {recorded} to {start} have never been recorded")
        if stop > start:
            if kept and kept[-1][1] == key:
                kept.pop()
            kept.append((stop, key))
        self._runs = kept

    def reusable(self, key: Key) -> int:
        """How many tokens from the start were computed under `key`."""
        if self._runs and self._runs[0][1] == key:
            return self._runs[0][0]
        return 0
