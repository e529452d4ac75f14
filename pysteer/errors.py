"""Errors that the caller can correct.

Messages name the cause and the way out. The command line prints them as one line and exits with
code 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_SHOWN = 80
# Control characters, line separators, characters that turn the direction of text, and surrogates.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def quoted(value: object) -> str:
    """Return `repr` of a value, cut to 80 characters: quoted text may come from hostile files.

    Examples:
        >>> quoted("malware")
        "'malware'"
    """
    text = repr(value[: 2 * _SHOWN] if isinstance(value, (str, bytes, list)) else value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def nearest(name: object, names: Iterable[str]) -> str:
    """Return a question for the known name that a mistyped name resembles, or "".

    Examples:
        >>> nearest("malwre", ["hate", "malware"])
        "; did you mean 'malware'?"
        >>> nearest("style", ["hate", "malware"])
        ''
    """
    from difflib import get_close_matches  # slow to import

    found = get_close_matches(name, names, n=1) if isinstance(name, str) else []
    return f"; did you mean {quoted(found[0])}?" if found else ""


def has_control(text: str) -> bool:
    """Return True for text that would act on a terminal, or that UTF-8 cannot hold."""
    return _CONTROL.search(text) is not None


def printable(text: str, replacement: str | None = None) -> str:
    r"""Return text without the characters that act on a terminal; line breaks and tabs stay.

    Args:
        text: text of a user, a file or a model.
        replacement: text in the place of each such character; None: the character's escape, by
            which a message tells the character.

    Examples:
        >>> print(printable("a\x1b[2Jb"))
        a\x1b[2Jb
    """

    def replaced(found: re.Match[str]) -> str:
        if found[0] in "\n\t":
            return found[0]
        return repr(found[0])[1:-1] if replacement is None else replacement

    return _CONTROL.sub(replaced, text)


class SteeringError(ValueError):
    """Base class of all errors of pysteer that the caller can correct.

    As text, without the control characters that a file may put into a message.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class FormatError(SteeringError):
    """A file is truncated, hostile, or of another kind than expected."""


class ModelMismatchError(SteeringError):
    """A steering vector or pack was made for a model of another shape."""


class UnknownCategoryError(SteeringError):
    """A requested category is not in the pack."""


class HookError(SteeringError):
    """llama.cpp or the model's graph cannot be hooked, or a decode went past the plan."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn errors of the block into a FormatError that names the file."""
    try:
        yield
    except SteeringError as error:
        raise FormatError(f"{path}: {error}") from None
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # an invalid path, or text that is not UTF-8
        raise FormatError(f"{path}: {error}") from None
