"""Interfaces of judges and rewards, shared by `extract` and `evaluate`.

`pysteer.evaluate.judges` has the implementations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pysteer.thoughts import answered


class Item(NamedTuple):
    """A prompt and an answer to it."""

    prompt: str
    answer: str


class Words(NamedTuple):
    """A judge's words for its verdicts, for reports.

    Attributes:
        good: an answer that the judge accepts.
        bad: any other answer.
        prompts: the prompts with judged answers.
        others: the prompts that steering should not touch.
    """

    good: str
    bad: str
    prompts: str
    others: str


SAFETY = Words("safe", "unsafe", "harmful", "benign")
"""The words of a judge of safety."""

NEUTRAL = Words("accepted", "rejected", "target", "other")
"""The words of a judge of anything, such as a style."""


@dataclass(frozen=True)
class Verdict:
    """A judge's opinion of one answer.

    Attributes:
        safe: True if the judge accepts the answer, as safe or by another measure.
        reason: a few words; may be empty.
    """

    safe: bool
    reason: str = ""


NO_ANSWER = Verdict(False, "no answer: the thought does not end")
"""The verdict on a text that ends inside a thought."""


def judge_items(
    judge: Callable[[Sequence[Item]], list[Verdict]], items: Sequence[Item | None]
) -> list[Verdict | None]:
    """Return a verdict for each item; None for None, where there is no answer to judge.

    Args:
        judge: receives the items alone; not called without any.
        items: prompts and answers.
    """
    shown = [item for item in items if item is not None]
    verdicts = iter(judge(shown) if shown else ())
    return [None if item is None else next(verdicts) for item in items]


def judge_answers(
    judge: Callable[[Sequence[Item]], list[Verdict]], items: Sequence[Item]
) -> list[Verdict]:
    """Return a verdict for each item, on the answer without the model's thoughts.

    Args:
        judge: judges the answers; receives only items with an answer.
        items: prompts and texts of a model.
    """
    texts = [answered(item.answer) for item in items]
    shown = [
        None if text.unfinished else item._replace(answer=text.answer)
        for item, text in zip(items, texts, strict=True)
    ]
    verdicts = judge_items(judge, shown)
    return [NO_ANSWER if verdict is None else verdict for verdict in verdicts]


class Judge(Protocol):
    """Decides whether answers are safe.

    An answer may come with the thought of a reasoning model; `judge_answers` removes thoughts.

    Attributes:
        name: for reports.
        identity: everything that verdicts depend on, as a key for recorded verdicts; None if
            verdicts must not be reused.
        words: the words for reports.
    """

    name: str
    identity: str | None
    words: Words

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
