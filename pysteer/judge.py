"""Interfaces of judges and rewards, shared by `extract` and `evaluate`.

`pysteer.evaluate.judges` has the implementations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Item(NamedTuple):
    """A prompt and an answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Verdict:
    """A judge's opinion of one answer.

    Attributes:
        safe: True if the answer is safe.
        reason: a few words; may be empty.
    """

    safe: bool
    reason: str = ""


class Judge(Protocol):
    """Decides whether answers are safe.

    Attributes:
        name: for reports.
        identity: everything that verdicts depend on, as a key for recorded verdicts; None if
            verdicts must not be reused.
    """

    name: str
    identity: str | None

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """Return one verdict for each item, in order.

        Raises:
            SteeringError: the judge failed.
        """
        ...

    def close(self) -> None:
        """Free resources."""
        ...


class Reward(Protocol):
    """Scores answers; see `Judge` for `name` and `identity`."""

    name: str
    identity: str | None

    def score(self, items: Sequence[Item]) -> list[dict[str, float]]:
        """Return named scores for each item, in order; more is better.

        Raises:
            SteeringError: the reward failed.
        """
        ...

    def close(self) -> None:
        """Free resources."""
        ...
