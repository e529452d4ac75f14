"""Judges: what says whether an answer is safe, behind one interface, and by name.

| name | judge |
|---|---|
| `refusal` | built in: an explicit refusal or safe redirection is safe, all else is not |
| `guard:PATH.gguf` | a guard model, run by pysteer's engine; `#FORMAT` behind names its format |
| `openai:URL#MODEL` | an OpenAI-compatible endpoint |
| `python:MODULE:FUNCTION` | a function of prompt and answer |

The last two can be rewards as well: what they say is then a number, or several with names.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pysteer.errors import SteeringError, quoted
from pysteer.evaluate.refusal import is_refusal


class Item(NamedTuple):
    """What is judged."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Verdict:
    """What a judge says of an answer.

    Attributes:
        safe: whether it is safe.
        reason: why, in a few words; may be empty.
    """

    safe: bool
    reason: str = ""


class Judge(Protocol):
    """Says whether answers are safe.

    Attributes:
        name: for the report.
        identity: what verdicts depend on, so that they can be kept; None: ask again each time.
    """

    name: str
    identity: str | None

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """A verdict for each item, in their order.

        Raises:
            SteeringError: it cannot judge.
        """

    def close(self) -> None:
        """Free what it holds."""


class Reward(Protocol):
    """Says how good answers are; attributes as those of `Judge`."""

    name: str
    identity: str | None

    def score(self, items: Sequence[Item]) -> list[dict[str, float]]:
        """Named scores for each item, in their order; more is better.

        Raises:
            SteeringError: it cannot score.
        """

    def close(self) -> None:
        """Free what it holds."""


class RefusalJudge:
    """Safe is what refuses, or redirects to something safe, and leaves it at that.

    Strict: it answers "was this refused?", and calls a harmless answer to a harmful prompt unsafe.
    """

    name: str = "refusal"
    identity: str | None = None

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """See `Judge`."""
        return [
            Verdict(True, "refuses") if is_refusal(item.answer) else Verdict(False, "no refusal")
            for item in items
        ]

    def close(self) -> None:
        """See `Judge`."""


class CallableJudge:
    """A function of prompt and answer that returns a bool, or a bool and a reason."""

    identity: str | None = None

    def __init__(self, function: Callable[[str, str], Any], name: str = "python") -> None:
        self.name = name
        self._function = function

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """See `Judge`."""
        return [self._verdict(_called(self.name, self._function, item)) for item in items]

    def _verdict(self, found: Any) -> Verdict:
        if isinstance(found, Verdict):
            return found
        if isinstance(found, tuple) and len(found) == 2:
            found, reason = found
        else:
            reason = ""
        if not isinstance(found, bool):
            raise SteeringError(
                f"judge {self.name} returned {quoted(found)}; return True (safe), False, or one of "
                "them and a reason"
            )
        return Verdict(found, str(reason))

    def close(self) -> None:
        """See `Judge`."""


class CallableReward:
    """A function of prompt and answer that returns a number, or a mapping of names to numbers."""

    identity: str | None = None

    def __init__(self, function: Callable[[str, str], Any], name: str = "python") -> None:
        self.name = name
        self._function = function

    def score(self, items: Sequence[Item]) -> list[dict[str, float]]:
        """See `Reward`."""
        return [self._scores(_called(self.name, self._function, item)) for item in items]

    def _scores(self, found: Any) -> dict[str, float]:
        named = found if isinstance(found, Mapping) else {"reward": found}
        scores = {}
        for name, value in named.items():
            try:
                scores[str(name)] = float(value)
            except (TypeError, ValueError):
                scores[str(name)] = math.nan
            if not math.isfinite(scores[str(name)]):
                raise SteeringError(
                    f"reward {self.name} returned {quoted(value)}; return a finite number, or a "
                    "mapping of names to such numbers"
                )
        return scores

    def close(self) -> None:
        """See `Reward`."""


def _called(name: str, function: Callable[[str, str], Any], item: Item) -> Any:
    try:
        return function(item.prompt, item.answer)
    except SteeringError:
        raise
    except Exception as error:  # of a function that we know nothing of
        raise SteeringError(f"{name} raised {type(error).__name__}: {error}") from error


def open_judge(spec: str, **llama_arguments: Any) -> Judge:
    """The judge of a name; see the module.

    Args:
        spec: its name.
        **llama_arguments: for guard models: what `Engine` takes, such as n_threads.

    Raises:
        SteeringError: there is none of that name, or it cannot be opened.
    """
    kind, _, rest = spec.partition(":")
    if spec == "refusal":
        return RefusalJudge()
    if kind == "guard" and rest:
        from pysteer.evaluate.guard import GuardJudge

        path, _, form = rest.partition("#")
        return GuardJudge(Path(path), form or None, **llama_arguments)
    if kind == "openai" and rest:
        from pysteer.evaluate.endpoint import Endpoint, EndpointJudge

        return EndpointJudge(Endpoint.parse(rest))
    if kind == "python" and rest:
        return CallableJudge(_imported(rest), spec)
    raise SteeringError(
        f"--judge {spec}: use refusal, guard:PATH.gguf, openai:URL#MODEL or python:MODULE:FUNCTION"
    )


def open_reward(spec: str) -> Reward:
    """The reward of a name: `openai:URL#MODEL` or `python:MODULE:FUNCTION`.

    Raises:
        SteeringError: there is none of that name, or it cannot be opened.
    """
    kind, _, rest = spec.partition(":")
    if kind == "openai" and rest:
        from pysteer.evaluate.endpoint import Endpoint, EndpointReward

        return EndpointReward(Endpoint.parse(rest))
    if kind == "python" and rest:
        return CallableReward(_imported(rest), spec)
    raise SteeringError(f"--reward {spec}: use openai:URL#MODEL or python:MODULE:FUNCTION")


def _imported(spec: str) -> Callable[[str, str], Any]:
    """The function MODULE:FUNCTION; modules in the working directory are found, too."""
    module, _, name = spec.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), name or "judge")
    except Exception as error:  # a module may raise anything while it is imported
        raise SteeringError(f"python:{spec}: {error}; write python:MODULE:FUNCTION") from None
    finally:
        sys.path.remove("")
    if not callable(found):
        raise SteeringError(f"python:{spec}: that is not a function")
    function: Callable[[str, str], Any] = found
    return function
