"""Errors that the caller can correct.

Messages name the cause and the way out. The command line prints them as one line and exits with
code 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SHOWN = 80


def quoted(value: object) -> str:
    """Return `repr` of a value, cut to 80 characters: quoted text may come from hostile files.

    Examples:
        >>> quoted("malware")
        "'malware'"
    """
    text = repr(value[: 2 * _SHOWN] if isinstance(value, (str, bytes, list)) else value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


class SteeringError(ValueError):
    """Base class of all errors of pysteer that the caller can correct."""


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
