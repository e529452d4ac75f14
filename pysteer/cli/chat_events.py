"""What a chat session tells whoever shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

Asked: TypeAlias = "Literal['auto', 'policy'] | dict[str, float | str] | None"
"""The steering asked for: a request's `steering`, or "policy" to leave it to the policy."""


def in_words(asked: Asked) -> str:
    """The steering asked for, on one line."""
    if asked is None or isinstance(asked, str):
        return asked or "off"
    return ", ".join(
        f"{name} {value if isinstance(value, str) else format(value, 'g')}"
        for name, value in asked.items()
    )


@dataclass(frozen=True)
class Turn:
    """One message and its answer. As JSON it is also a row of a prompt file.

    Attributes:
        prompt: what the user said.
        response: what the model answered, as far as it came.
        finish_reason: "stop", "length" (cut at the number of tokens allowed, or the context was
            full) or "interrupted".
        asked: the steering in force: category to strength or "auto", "auto", "policy" or None.
        steering: what became of it: the `steering` field of the result, if there was one.
        system: the system message, if there was one.
        seed: what tokens were drawn with.
        left_out: how many of the oldest turns were not sent, because the context was full.
    """

    prompt: str
    response: str
    finish_reason: str
    asked: Asked
    steering: dict[str, Any] | None
    system: str | None
    seed: int
    left_out: int


@dataclass(frozen=True)
class Said:
    """A line about what was done."""

    text: str


@dataclass(frozen=True)
class Mistake:
    """A line about what could not be done, and what can be."""

    text: str


@dataclass(frozen=True)
class Piece:
    """Some more text of the answer."""

    text: str


@dataclass(frozen=True)
class Answered:
    """The answer is complete, or was stopped."""

    turn: Turn


@dataclass(frozen=True)
class Compared:
    """The last turn, and the same turn answered without steering."""

    steered: Turn
    unsteered: Turn


@dataclass(frozen=True)
class Explained:
    """The `steering` field of the last answer."""

    report: dict[str, Any]


class Category(NamedTuple):
    """A category of the pack; `now` is its strength in force, "auto", or None."""

    name: str
    site: str
    layers: tuple[int, ...]
    gated: bool
    now: float | str | None


@dataclass(frozen=True)
class Listed:
    """The categories of the pack."""

    categories: list[Category]


@dataclass(frozen=True)
class Helped:
    """Usage and meaning of every command."""

    commands: list[tuple[str, str]]


@dataclass(frozen=True)
class Left:
    """The user wants to go."""


Event: TypeAlias = (
    "Said | Mistake | Piece | Answered | Compared | Explained | Listed | Helped | Left"
)
