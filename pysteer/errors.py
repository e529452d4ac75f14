"""What pysteer raises when something the caller can change is wrong.

Every message names the cause and the way out; the command line prints it as one line and exits
with code 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SHOWN = 80


def quoted(value: object) -> str:
    """`repr`, cut to a length that fits into one line: hostile files choose what is quoted."""
    text = repr(value[: 2 * _SHOWN] if isinstance(value, (str, bytes, list)) else value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


class SteeringError(ValueError):
    """Base of all errors below; catch this one to catch them all."""


class FormatError(SteeringError):
    """A file is not what it claims to be: truncated, hostile, or of another kind."""


class ModelMismatchError(SteeringError):
    """A steering vector or pack was made for a model of another shape."""


class UnknownCategoryError(SteeringError):
    """A category was asked for that the pack does not hold."""


class HookError(SteeringError):
    """The llama.cpp or the model's graph cannot be hooked, or a decode went past the plan."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in whatever is found wrong with its content, as a FormatError."""
    try:
        yield
    except SteeringError as error:
        raise FormatError(f"{path}: {error}") from None
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # a path that cannot be one, text that is not UTF-8
        raise FormatError(f"{path}: {error}") from None
