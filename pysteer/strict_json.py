"""A reader of JSON that refuses ambiguous JSON, which other readers read differently."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from pysteer.errors import quoted


class DuplicateKeyError(ValueError):
    """A key twice in an object; readers take the first value or the last."""


def loads(text: str) -> Any:
    """Return the data of a JSON text.

    Raises:
        DuplicateKeyError: a key occurs twice in an object.
        ValueError: the text is not JSON, is nested too deep, or has a number that is not finite.

    Examples:
        >>> loads('{"a": [1, 0.5]}')
        {'a': [1, 0.5]}
        >>> loads('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        pysteer.strict_json.DuplicateKeyError: the key 'a' occurs twice
    """
    try:
        return json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(f"the key {quoted(key)} occurs twice")
            seen.add(key)
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {quoted(text)} is too large")
    return number
