"""`Scope`: the tokens of a sequence that are steered, and a factor on the strength for each.

Position p counts the tokens of a sequence from 0, n of them are the prompt. The response index
r = p - (n - 1) is 0 at the last prompt token, because its row decides the first response token.

    all                 1 everywhere
    prompt              1 where r <= 0
    response            1 where r >= 0
    first k             1 where 0 <= r < k: the rows that decide the first k response tokens
    range start stop    1 where start <= p < stop; without a stop to the end
    linear m            1 - r/m where 0 <= r < m
    cosine m            0.5 (1 + cos(pi r/m)) where 0 <= r < m
    values v0 v1 ...    v_r where 0 <= r < the number of values

and 0 elsewhere. Text between two marker strings can be excluded from any scope.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from pysteer.errors import SteeringError, quoted

TOKENS = ("all", "prompt", "response")
COUNTED = ("first", "linear", "cosine")
KINDS = (*TOKENS, *COUNTED, "range", "values")

MAX_POSITION = 2**31 - 1  # llama.cpp counts positions in int32
MAX_VALUES = 2**16
MAX_MARKER = 256

_INTEGER = re.compile(r"-?[0-9]{1,12}")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_EXCLUDE = re.compile(r"\sexclude(?=[\s\"]|$)")
_USE = (
    "use all, prompt, response, 'first 8', 'range 3 20', 'linear 32', 'cosine 32' or 'values 1 0.5'"
)


@dataclass(frozen=True)
class Scope:
    """The tokens that are steered. The module's docstring has the formulas.

    Attributes:
        kind: one of `KINDS`.
        start: "range" only: the first position, from 0.
        stop: "range" only: the position after the last, or None for no end.
        length: "first", "linear" and "cosine" only: the number of rows from r = 0.
        values: "values" only: the factors from r = 0; a tuple of finite numbers.
        exclude: start and end marker, or None. Unsteered are the rows from the token that completes
            the start marker up to, not including, the token that completes the end marker.

    Raises:
        SteeringError: an unknown kind, an attribute of another kind, or an empty scope.
    """

    kind: str = "all"
    start: int = 0
    stop: int | None = None
    length: int = 0
    values: tuple[float, ...] = ()
    exclude: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise SteeringError(f"unknown scope {quoted(self.kind)}; {_USE}")
        if self.kind != "range" and (self.start != 0 or self.stop is not None):
            raise SteeringError(f"the scope {self.kind!r} has no start and stop; use a range")
        if self.kind not in COUNTED and self.length != 0:
            raise SteeringError(
                f"the scope {self.kind!r} has no length; use one of {_list(COUNTED)}"
            )
        if self.kind != "values" and not _is_empty(self.values):
            raise SteeringError(f"the scope {self.kind!r} has no values; use 'values'")
        if self.kind == "range":
            self._check_range()
        if self.kind in COUNTED and not (_is_position(self.length) and self.length >= 1):
            raise SteeringError(
                f"the scope {self.kind!r} needs a number of tokens from 1 to {MAX_POSITION}, "
                f"not {quoted(self.length)}"
            )
        object.__setattr__(self, "values", self._checked_values())
        if self.exclude is not None:
            object.__setattr__(self, "exclude", _markers(self.exclude))

    def _check_range(self) -> None:
        for what, position in (("start", self.start), ("stop", self.stop)):
            if not _is_position(position) and not (what == "stop" and position is None):
                raise SteeringError(
                    f"the {what} of a range is {quoted(position)}, not a position from 0 to "
                    f"{MAX_POSITION}"
                )
        if self.stop is not None and self.stop <= self.start:
            raise SteeringError(
                f"the range {self.start} {self.stop} is empty: the stop is the position after the "
                "last, and must be above the start"
            )

    def _checked_values(self) -> tuple[float, ...]:
        if self.kind != "values":
            return ()
        if not isinstance(self.values, (list, tuple)) or not self.values:
            raise SteeringError(
                "the scope 'values' needs at least one number, as in 'values 1 0.5'"
            )
        if len(self.values) > MAX_VALUES:
            raise SteeringError(f"the scope 'values' has more than {MAX_VALUES} numbers")
        for value in self.values:
            if not is_finite(value):
                raise SteeringError(f"the scope 'values' needs finite numbers, not {quoted(value)}")
        return tuple(float(value) + 0.0 for value in self.values)  # no negative zeros

    @classmethod
    def parse(cls, given: object) -> Scope:
        """Return the scope of a text such as "first 8" or a mapping such as {"first": 8}.

        Args:
            given: a text as from `str`; a mapping of one of `tokens` (all, prompt, response),
                `first`, `range` ([start, stop] or [start]), `linear`, `cosine`, `values`, and
                perhaps `exclude` ([start marker, end marker]); or a Scope.

        Raises:
            SteeringError: another type, an unknown scope, or contradicting keys.
        """
        if isinstance(given, Scope):
            return given
        if isinstance(given, str):
            return _from_text(given)
        if isinstance(given, Mapping):
            return _from_mapping(given)
        raise SteeringError(f"{quoted(given)} is not a scope; {_USE}")

    from_content = parse

    def content(self) -> str | dict[str, Any]:
        """Return the scope as JSON data for `from_content`: a text, or a mapping to exclude."""
        if self.exclude is None:
            return str(self)
        if self.kind in TOKENS:
            found: dict[str, Any] = {"tokens": self.kind}
        elif self.kind in COUNTED:
            found = {self.kind: self.length}
        elif self.kind == "values":
            found = {"values": list(self.values)}
        else:
            found = {"range": [self.start] if self.stop is None else [self.start, self.stop]}
        return {**found, "exclude": list(self.exclude)}

    def __str__(self) -> str:
        words = [self.kind]
        if self.kind in COUNTED:
            words.append(str(self.length))
        elif self.kind == "range":
            words += [str(end) for end in (self.start, self.stop) if end is not None]
        words += [repr(value).removesuffix(".0") for value in self.values]
        if self.exclude is not None:
            words += [
                "exclude",
                *(json.dumps(marker, ensure_ascii=False) for marker in self.exclude),
            ]
        return " ".join(words)


def is_finite(value: object) -> bool:
    """Return True for a finite real number that is not a truth value."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int beyond the floats
        return False


def _from_text(text: str) -> Scope:
    head, *markers = _EXCLUDE.split(text, maxsplit=1)
    exclude = _quoted_markers(markers[0]) if markers else None
    kind, *words = head.split() or [""]
    if kind in TOKENS and words:
        raise SteeringError(f"the scope {kind!r} takes no argument; remove {quoted(words[0])}")
    if kind in COUNTED:
        if len(words) != 1:
            raise SteeringError(f"the scope {kind!r} needs one number of tokens, as in '{kind} 8'")
        return Scope(kind, length=_integer(words[0]), exclude=exclude)
    if kind == "range":
        return _range([_integer(word) for word in words], exclude)
    if kind == "values":
        return Scope(kind, values=tuple(_number(word) for word in words), exclude=exclude)
    if kind not in TOKENS:
        raise SteeringError(f"unknown scope {quoted(text)}; {_USE}")
    return Scope(kind, exclude=exclude)


def _from_mapping(given: Mapping[Any, Any]) -> Scope:
    named = ("tokens", *KINDS[len(TOKENS) :])
    unknown = [key for key in given if key not in (*named, "exclude")]
    if unknown:
        raise SteeringError(
            f"unknown key {quoted(unknown[0])} in a scope; there are {_list((*named, 'exclude'))}"
        )
    keys = [key for key in given if key != "exclude"]
    if len(keys) > 1:
        if given.get("tokens") == "prompt":
            other = next(key for key in keys if key != "tokens")
            raise SteeringError(f"a scope of prompt tokens has no {other!r}: leave one of them out")
        raise SteeringError(f"a scope is one of {_list(keys)}, not several at once")
    if not keys:
        raise SteeringError(f"the scope names no tokens; add one of {_list(named)}")
    [key] = keys
    value, exclude = given[key], given.get("exclude")
    if "exclude" in given:
        exclude = _markers(exclude)
    if key == "tokens":
        if value not in TOKENS:
            raise SteeringError(f"'tokens' is one of {_list(TOKENS)}, not {quoted(value)}")
        return Scope(value, exclude=exclude)
    if key == "range":
        return _range(value, exclude)
    if key == "values":
        return Scope(key, values=value, exclude=exclude)
    return Scope(key, length=value, exclude=exclude)


def _range(ends: object, exclude: tuple[str, str] | None) -> Scope:
    if not isinstance(ends, (list, tuple)) or len(ends) not in (1, 2):
        raise SteeringError("a range needs a start and may have a stop, as in 'range 3 20'")
    if len(ends) == 2 and ends[1] is None:
        raise SteeringError("a range without an end has no stop, as in 'range 3'")
    return Scope("range", start=ends[0], stop=ends[1] if len(ends) == 2 else None, exclude=exclude)


def _quoted_markers(text: str) -> tuple[str, str]:
    """Return the two JSON strings that follow the word `exclude`, checked."""
    found: list[str] = []
    while text.strip():
        text = text.lstrip()
        try:
            marker, end = json.JSONDecoder(strict=False).raw_decode(text)
        except (ValueError, RecursionError):
            found = []
            break
        found.append(marker)
        text = text[end:]
    if len(found) != 2:
        raise SteeringError(
            "'exclude' needs two markers in double quotes, as in 'response exclude "
            '"<think>" "</think>"\''
        )
    return _markers(found)


def _markers(given: object) -> tuple[str, str]:
    """Return start and end marker, checked."""
    if not isinstance(given, (list, tuple)) or len(given) != 2:
        raise SteeringError("'exclude' needs a start and an end marker, as in [<think>, </think>]")
    for marker in given:
        if not isinstance(marker, str) or not marker:
            raise SteeringError(f"a marker to exclude is {quoted(marker)}, not a text")
        if len(marker) > MAX_MARKER:
            raise SteeringError(f"a marker to exclude is longer than {MAX_MARKER} characters")
        if not is_text(marker):
            raise SteeringError(f"a marker to exclude is {quoted(marker)}, which is not UTF-8 text")
    start, end = given
    if start == end:
        raise SteeringError(f"the start and the end marker to exclude are both {quoted(start)}")
    if start.endswith(end) or end.endswith(start):
        raise SteeringError(
            f"one of the markers {quoted(start)} and {quoted(end)} ends with the other, so that "
            "the same text completes both"
        )
    return start, end


def is_text(value: str) -> bool:
    """Return True if `value` can be written as UTF-8; lone surrogates cannot."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _integer(word: str) -> int:
    if not _INTEGER.fullmatch(word):
        raise SteeringError(f"{quoted(word)} in a scope is not a number of tokens")
    return int(word)


def _number(word: str) -> float:
    if not _NUMBER.fullmatch(word):
        raise SteeringError(f"{quoted(word)} in a scope is not a finite number")
    return float(word)


def _is_position(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_POSITION


def _is_empty(values: object) -> bool:
    return isinstance(values, (list, tuple)) and not values


def _list(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names)
