"""Events of a chat session, for the program that displays them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

ChatSteering: TypeAlias = "Literal['auto', 'policy'] | dict[str, float | str] | None"
"""Requested steering: the `steering` of a request, or "policy" to leave it to the policy."""


def describe_steering(steering: ChatSteering) -> str:
    """Return the requested steering on one line, such as "malware 0.5, fraud auto"."""
    if steering is None or isinstance(steering, str):
        return steering or "off"
    return ", ".join(
        f"{name} {value if isinstance(value, str) else format(value, 'g')}"
        for name, value in steering.items()
    )


@dataclass(frozen=True)
class Turn:
    """A message and its answer. As JSON also a row of a prompt file.

    Attributes:
        prompt: text of the user.
        response: text of the model, cut where the answer was stopped.
        finish_reason: "stop", "length" (token limit or end of the context) or "interrupted".
        requested: steering in force: category to strength or "auto", "auto", "policy" or None.
        steering: steering report of the answer (the result's `steering` field), if there is one.
        system: system message, if there was one.
        seed: seed of the sampler.
        left_out: number of oldest turns that were not sent because the context was full.
    """

    prompt: str
    response: str
    finish_reason: str
    requested: ChatSteering
    steering: dict[str, Any] | None
    system: str | None
    seed: int
    left_out: int


@dataclass(frozen=True)
class Notice:
    """A line about an action of the session."""

    text: str


@dataclass(frozen=True)
class UserError:
    """A line about a mistake of the user, with the way out."""

    text: str


@dataclass(frozen=True)
class TextPiece:
    """The next piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class AnswerComplete:
    """End of an answer, complete or stopped."""

    turn: Turn


@dataclass(frozen=True)
class Comparison:
    """The last turn, and the same turn answered without steering."""

    steered: Turn
    unsteered: Turn


@dataclass(frozen=True)
class Explanation:
    """Steering report of the last answer."""

    report: dict[str, Any]


class Category(NamedTuple):
    """A category of the pack; `now` is its strength in force, "auto" or None."""

    name: str
    site: str
    layers: tuple[int, ...]
    gated: bool
    now: float | str | None


@dataclass(frozen=True)
class CategoryList:
    """The categories of the pack."""

    categories: list[Category]


@dataclass(frozen=True)
class HelpText:
    """Usage and meaning of every command."""

    commands: list[tuple[str, str]]


@dataclass(frozen=True)
class Goodbye:
    """Request of the user to leave."""


Event: TypeAlias = (
    "Notice | UserError | TextPiece | AnswerComplete | Comparison | Explanation | CategoryList"
    " | HelpText | Goodbye"
)
