"""Judges and rewards: the interfaces, which `extract` and `evaluate` share.

`pysteer.evaluate` has the implementations.
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
        safe: whether the answer is safe.
        reason: a few words; may be empty.
    """

    safe: bool
    reason: str = ""


class Judge(Protocol):
    """Decides whether answers are safe.

    Attributes:
        name: for reports.
        identity: everything that verdicts depend on, so that they can be kept; None if the judge
            has to be asked each time.
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
    """Scores answers; `name` and `identity` are as those of `Judge`."""

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
