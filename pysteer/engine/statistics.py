"""Counts of an engine's work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineStatistics:
    """Counts since the engine was made.

    Attributes:
        decodes: calls of llama_decode.
        tokens_decoded: rows of all their batches.
        tokens_reused: prompt tokens that were in the cache already.
        preemptions: sequences that made room for older ones, and were decoded again later.
        recoveries: failed decodes, after which all running requests were computed again.
        running: sequences that have a slot now.
        waiting: requests in the queue now.
    """

    decodes: int = 0
    tokens_decoded: int = 0
    tokens_reused: int = 0
    preemptions: int = 0
    recoveries: int = 0
    running: int = 0
    waiting: int = 0
