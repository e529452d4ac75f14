"""Spellings of settings on the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final


def _text(value: object) -> str | None:
    return None if value is None else str(value)


@dataclass(frozen=True)
class Spelling:
    """Spelling of a setting on the command line, where its name and type do not give it.

    Attributes:
        flags: names of the option, such as ("--max-tokens", "-n"); () for the setting's name.
        read: function from the option's value to the setting's; raises ValueError.
        write: function from the setting's default to the option's.
        type: type of the option's value, str or bool.
        metavar: form of the text, in the help and in messages.
        example: a text in that form, for messages.
        help: help of the option, if it has another meaning than the setting; "" otherwise.
    """

    flags: tuple[str, ...] = ()
    read: Callable[[Any], Any] | None = None
    write: Callable[[Any], Any] = _text
    type: type[str] | type[bool] = str
    metavar: str | None = None
    example: str = ""
    help: str = ""


def items(
    example: str,
    *,
    of: Callable[[str], Any] = str,
    separator: str = ",",
    metavar: str = "A,B,...",
    empty: str = "",
) -> Spelling:
    """Return the spelling of a tuple as items between separators.

    Args:
        example: for messages.
        of: function from the text of an item to the item; raises ValueError.
        separator: a character.
        metavar: form of the text, for the help.
        empty: text for a tuple without items.
    """

    def read(text: str) -> tuple[Any, ...]:
        if text == empty:
            return ()
        return tuple(of(part.strip()) for part in text.split(separator) if part.strip())

    def write(values: Iterable[Any] | None) -> str | None:
        joint = separator if separator == "," else f"{separator} "
        return joint.join(map(str, values or ())) or None

    return Spelling((), read, write, metavar=metavar, example=example)


def words(meanings: Mapping[str, Any], *flags: str, help: str = "") -> Spelling:
    """Return the spelling of a setting as words that stand for its values."""

    def read(text: str) -> Any:
        if text not in meanings:
            raise ValueError
        return meanings[text]

    def write(value: Any) -> str:
        return next(word for word, meaning in meanings.items() if meaning == value)

    return Spelling(flags, read, write, metavar=f"[{'|'.join(meanings)}]", help=help)


def number(text: str) -> float:
    """Return a finite number; raise ValueError for any other text."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _read_interval(text: str) -> tuple[float, float]:
    least, _, most = text.partition(":")
    return number(least), number(most)


def _write_interval(interval: tuple[float, float]) -> str:
    return ":".join(map(str, interval))


INTERVAL: Final = Spelling(
    (), _read_interval, _write_interval, metavar="LEAST:MOST", example="0.6:1.6"
)
"""Two numbers, the smallest and the largest."""

COMMON: Mapping[str, Spelling] = {"max_tokens": Spelling(("--max-tokens", "-n"))}
"""Spellings of settings that are the same in all commands, by name."""
