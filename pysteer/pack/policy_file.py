"""Policy files: from YAML or JSON to plain data and the line of each key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pysteer.errors import FormatError, naming, quoted
from pysteer.files import read_bytes
from pysteer.pack.policy_error import PolicyError, PolicyPath, at_place

MAX_BYTES = 2**20
"""Largest size of a policy file."""

_MAX_DEPTH = 8  # of the YAML; a policy needs 5
_QUOTE_FIRST = re.compile(r"""\s*["']?when["']?\s*:\s*['"]""")
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")


def read(path: Path) -> tuple[Any, dict[PolicyPath, str]]:
    """Read the data of a policy file, unchecked.

    Args:
        path: the file; read as JSON if its name ends in ".json", else as YAML 1.2 (`off` is text)
            without anchors, aliases and tags.

    Returns:
        The data, and for each key its place, such as "policy.yaml, line 9".

    Raises:
        FormatError: the file cannot be read, or is not such YAML or JSON; names file and line.
    """
    with naming(path):
        text = read_bytes(path, MAX_BYTES).decode("utf-8-sig")
    content, lines = _parsed(text, path)
    return content, {at: f"{path}, line {line}" for at, line in lines.items()}


def _parsed(text: str, path: Path) -> tuple[Any, dict[PolicyPath, int]]:
    """Return the data of a text, and the line of each key from 1.

    From YAML's events, because PyYAML's own construction has no lines, takes `off` for False, lets
    the last of two equal keys win and follows aliases.
    """
    if path.suffix.lower() == ".json":
        text = _as_yaml(text)
    written = text.splitlines() or [""]
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _Reader(path, yaml.parse(text, Loader=loader)).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = min(mark.line if mark is not None else 0, len(written) - 1)
        reason = _one_line(error.problem or error.context)
        if isinstance(error, yaml.parser.ParserError) and _QUOTE_FIRST.match(written[line]):
            reason += "; put parentheses around a name in quotes at the start of a rule"
    except yaml.reader.ReaderError as error:
        line = text[: text.find(chr(error.character))].count("\n")
        reason = _one_line(error.reason)
    raise FormatError(f"{path}, line {line + 1}: not YAML: {reason}")


class _Reader:
    """Turns YAML events into mappings, lists, text, numbers, truth values and None."""

    def __init__(self, path: Path, events: Iterator[Any]) -> None:
        self._path = path
        self._events = events
        self._lines: dict[PolicyPath, int] = {}

    def document(self) -> tuple[Any, dict[PolicyPath, int]]:
        """Return the data of the only document of the file, and the line of each key."""
        next(self._events)  # the start of the stream
        event = next(self._events)
        if type(event).__name__ == "StreamEndEvent":
            raise FormatError(f"{self._path}: the file is empty; an empty policy is {{}}")
        self._lines[()] = 1
        value = self._value(next(self._events), ())
        next(self._events)  # the end of the document
        event = next(self._events)
        if type(event).__name__ != "StreamEndEvent":
            self._refuse(event, (), "a second document begins; a policy is one document")
        return value, self._lines

    def _value(self, event: Any, path: PolicyPath) -> Any:
        kind = type(event).__name__
        if kind == "AliasEvent" or event.anchor is not None:
            self._refuse(event, path, "anchors and aliases are not supported; write the value out")
        if event.tag is not None:
            self._refuse(event, path, f"the tag {quoted(event.tag)} is not supported; leave it out")
        if kind == "ScalarEvent":
            return _plain(event.value) if event.implicit[0] else event.value
        if len(path) >= _MAX_DEPTH:
            self._refuse(event, path, f"nested more than {_MAX_DEPTH} deep")
        if kind == "SequenceStartEvent":
            items: list[Any] = []
            while type(event := next(self._events)).__name__ != "SequenceEndEvent":
                items.append(self._value(event, (*path, str(len(items)))))
            return items
        found: dict[str, Any] = {}
        while type(event := next(self._events)).__name__ != "MappingEndEvent":
            if type(event).__name__ not in ("ScalarEvent", "AliasEvent"):
                self._refuse(event, path, "a key is a list or a mapping, not text")
            key = self._value(event, path)
            if not isinstance(key, str):
                self._refuse(
                    event, path, f"the key {quoted(event.value)} is not text; put it in quotes"
                )
            here = (*path, key)
            if key in found:
                self._refuse(event, here, f"given twice, first in line {self._lines[here]}")
            self._lines[here] = event.start_mark.line + 1
            found[key] = self._value(next(self._events), here)
        return found

    def _refuse(self, event: Any, path: PolicyPath, reason: str) -> NoReturn:
        place = f"{self._path}, line {event.start_mark.line + 1}"
        raise FormatError(at_place(place, PolicyError(path, reason)))


def _plain(text: str) -> object:
    """Return the value of a scalar without quotes in YAML 1.2; infinity and NaN stay text."""
    if _NULL.fullmatch(text):
        return None
    if truth := _BOOL.fullmatch(text):
        return truth[1] is not None
    if _INT.fullmatch(text) and len(text) < 20:  # a longer number is not a count
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _as_yaml(text: str) -> str:
    """Return JSON rewritten so that YAML reads the same data.

    JSON and YAML differ in escaped surrogate pairs, in characters that YAML folds or refuses, and
    in tabs, which JSON allows only between its values.
    """

    def escaped(match: re.Match[str]) -> str:
        if match["high"]:
            return bytes.fromhex(match["high"] + match["low"]).decode("utf-16-be")
        return match[0] if match[0][0] == "\\" else f"\\U{ord(match[0]):08X}"

    pair = r"\\u(?P<high>[dD][89abAB][0-9a-fA-F]{2})\\u(?P<low>[dD][c-fC-F][0-9a-fA-F]{2})"
    odd = r"[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]"
    return re.sub(rf"{pair}|\\.|{odd}", escaped, text.replace("\t", " "))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
