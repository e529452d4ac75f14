"""Python functions as judges and rewards."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pysteer.errors import SteeringError, quoted
from pysteer.judge import NEUTRAL, Item, Judge, Reward, Verdict, Words, judge_answers


class CallableJudge:
    """A judge that calls a function of prompt and answer; the answer has no thoughts.

    Args:
        function: returns a bool (safe or not), a bool with a reason, or a `Verdict`. Its attribute
            `words`, if it has one, is a pair of words for reports: of an answer for which it
            returns True, and of any other, such as ("pirate", "plain").
        name: for reports.

    Attributes:
        words: by the function; else `NEUTRAL`, as a function may judge anything, such as a style.

    Raises:
        SteeringError: the function's `words` are something else.

    Examples:
        >>> judge = CallableJudge(lambda prompt, answer: "sorry" in answer)
        >>> judge.judge([Item("Hello", "I am sorry.")])
        [Verdict(safe=True, reason='')]
    """

    identity: str | None = None

    def __init__(self, function: Callable[[str, str], Any], name: str = "python") -> None:
        self.name = name
        self.words: Words = _words(name, function)
        self._function = function

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """Return one verdict for each item; see `Judge`."""
        return judge_answers(self._judge, items)

    def _judge(self, items: Sequence[Item]) -> list[Verdict]:
        return [self._verdict(_called(self.name, self._function, item)) for item in items]

    def _verdict(self, result: Any) -> Verdict:
        if isinstance(result, Verdict):
            return result
        safe, reason = result if isinstance(result, tuple) and len(result) == 2 else (result, "")
        if not isinstance(safe, bool):
            raise SteeringError(
                f"judge {self.name} returned {quoted(safe)}; return True (safe) or False, alone or "
                "with a reason"
            )
        return Verdict(safe, str(reason))

    def close(self) -> None:
        """Do nothing; see `Judge`."""


class CallableReward:
    """A reward that calls a function of prompt and answer.

    Args:
        function: returns a number, or a mapping of names to numbers.
        name: for reports.
    """

    identity: str | None = None

    def __init__(self, function: Callable[[str, str], Any], name: str = "python") -> None:
        self.name = name
        self._function = function

    def score(self, items: Sequence[Item]) -> list[dict[str, float]]:
        """Return named scores for each item; see `Reward`."""
        return [self._scores(_called(self.name, self._function, item)) for item in items]

    def _scores(self, result: Any) -> dict[str, float]:
        named = result if isinstance(result, Mapping) else {"reward": result}
        scores = {}
        for name, value in named.items():
            try:
                score = float(value)
            except (TypeError, ValueError):
                score = math.nan
            if not math.isfinite(score):
                raise SteeringError(
                    f"reward {self.name} returned {quoted(value)}; return a finite number, or a "
                    "mapping of names to such numbers"
                )
            scores[str(name)] = score
        return scores

    def close(self) -> None:
        """Do nothing; see `Reward`."""


def open_judge(argument: str, **llama_arguments: Any) -> Judge:
    """Return the judge `python:MODULE:FUNCTION`."""
    return CallableJudge(_imported(argument), f"python:{argument}")


def open_reward(argument: str) -> Reward:
    """Return the reward `python:MODULE:FUNCTION`."""
    return CallableReward(_imported(argument), f"python:{argument}")


def _words(name: str, function: Callable[[str, str], Any]) -> Words:
    pair = getattr(function, "words", NEUTRAL[:2])
    if not isinstance(pair, (tuple, list)) or [type(word) for word in pair] != [str, str]:
        raise SteeringError(
            f"judge {name} has the words {quoted(pair)}; give two, as in ('pirate', 'plain')"
        )
    return NEUTRAL._replace(good=pair[0], bad=pair[1])


def _called(name: str, function: Callable[[str, str], Any], item: Item) -> Any:
    try:
        return function(item.prompt, item.answer)
    except SteeringError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise SteeringError(f"{name} raised {type(error).__name__}: {error}") from error


def _imported(argument: str) -> Callable[[str, str], Any]:
    """Import MODULE:FUNCTION, from the working directory too."""
    module, _, name = argument.partition(":")
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name or "judge")
    except Exception as error:  # a module may raise anything while it is imported
        raise SteeringError(f"python:{argument}: {error}; write python:MODULE:FUNCTION") from None
    finally:
        sys.path.remove("")
    if not callable(function):
        raise SteeringError(f"python:{argument}: {name} is {quoted(function)}, not a function")
    judging: Callable[[str, str], Any] = function
    return judging
