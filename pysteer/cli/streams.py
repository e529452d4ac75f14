"""The standard streams of the process, which take any text, and end quietly."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

_HANDLER: Final = "pysteer.ascii"

_ASCII: Final = {
    "\N{RIGHTWARDS ARROW}": "->",
    "\N{DOWNWARDS ARROW}": "v",
    "\N{HORIZONTAL ELLIPSIS}": "...",
    "\N{REPLACEMENT CHARACTER}": "?",
    "\N{BULLET}": "*",
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"',
    "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
}
"""Spellings in ASCII of characters that many encodings lack."""


def prepare() -> None:
    """Make the standard streams take any text under any encoding of the locale.

    Where the encoding lacks a character, its spelling in ASCII is written, or an escape such as
    \\U0001f600. An empty stream replaces a stream that the process was started without.
    """
    empty = Path(os.devnull)
    if sys.stdin is None:
        sys.stdin = empty.open(encoding="utf-8")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, empty.open("w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(character: str) -> str:
    return _ASCII.get(character) or character.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(_HANDLER, _spelled)


def writable(text: str, encoding: str) -> str:
    """Return a text with the spellings in ASCII of characters that an encoding lacks.

    For tables, which measure their columns; `prepare` covers all other output.
    """
    if text.isascii() or encoding.lower().startswith("utf"):
        return text
    return text.encode(encoding, _HANDLER).decode(encoding)


def unicode_text(text: str) -> str:
    """Return an argument's text as UTF-8, in a locale with another encoding too.

    Raises:
        UnicodeError: the argument is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text).decode()
    return text


def input_lines() -> Iterator[str]:
    """Yield the lines of standard input, in UTF-8 or else in the stream's own encoding.

    Bytes in neither encoding become lone surrogates.
    """
    binary = getattr(sys.stdin, "buffer", None)
    if binary is None:  # replaced by a stream of text
        yield from sys.stdin
        return
    for line in binary:
        yield _decoded(line).replace("\r\n", "\n")


def read_input() -> str:
    """Return all of standard input, decoded as by `input_lines`.

    Raises:
        UnicodeError: a line is in neither encoding.
    """
    text = "".join(input_lines())
    text.encode()
    return text


def _decoded(line: bytes) -> str:
    for encoding in ("utf-8", sys.stdin.encoding):
        with suppress(UnicodeDecodeError):
            return line.decode(encoding)
    return line.decode(errors="surrogateescape")


def discard() -> None:
    """Write the rest of the standard streams, or drop the rest if nobody reads.

    Afterwards the interpreter can close the streams without a message.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.dup2(descriptor, stream.fileno())
            os.close(descriptor)
