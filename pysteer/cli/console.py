"""Output of commands: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, ProgressColumn

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)

_debug = False


def set_debug(value: bool) -> bool:
    """Let exceptions through with their tracebacks; callback of the --debug option."""
    global _debug
    _debug = value
    return value


def debugging() -> bool:
    """Return True if --debug was given."""
    return _debug


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on standard output."""
    sys.stdout.write(json.dumps(value, allow_nan=False, indent=2) + "\n")


@contextmanager
def progress(*columns: ProgressColumn) -> Iterator[Progress]:
    """Bars on standard error while the block runs; nothing at all where that is no terminal."""
    bars = Progress(*columns, console=err, transient=True)
    if err.is_terminal:
        with bars:
            yield bars
    else:  # without being started, because some versions of rich print an empty line at the end
        yield bars


def waiting(activity: str) -> AbstractContextManager[object]:
    """Show a spinner on standard error while the block runs, if that is a terminal."""
    return err.status(activity) if err.is_terminal else nullcontext()


def say(text: str) -> None:
    """Print a line of rich markup on standard output, without breaking it."""
    out.print(text, soft_wrap=True)


def plain(text: object) -> str:
    """Escape text of a file or a model: no markup, no control characters."""
    return escape("".join(c if c in "\n\t" or c.isprintable() else "�" for c in str(text)))


class _Lines(logging.Handler):
    """Prints each message as one line on standard error, above the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        message = plain(record.getMessage())
        err.print(f"{record.levelname.lower()}: {message}", soft_wrap=True)


def show_warnings() -> None:
    """Print the library's warnings on standard error."""
    logger = logging.getLogger("pysteer")
    if not logger.handlers:
        logger.addHandler(_Lines(logging.WARNING))
