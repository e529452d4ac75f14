"""Where commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, ProgressColumn

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)

_debug = False


def set_debug(value: bool) -> bool:
    """Let exceptions through with their tracebacks. Called by the --debug option."""
    global _debug
    _debug = value
    return value


def debugging() -> bool:
    """Whether --debug was given."""
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


def say(text: str) -> None:
    """Print a line of rich markup on standard output; wrapping it is the terminal's business."""
    out.print(text, soft_wrap=True)


def plain(text: object) -> str:
    """Text from a file or a model, shown as it is: no markup in it, no control characters."""
    return escape("".join(c if c in "\n\t" or c.isprintable() else "�" for c in str(text)))


class _Lines(logging.Handler):
    """A line on standard error for each message, above the bars; wrapping would break paths."""

    def emit(self, record: logging.LogRecord) -> None:
        message = plain(record.getMessage())
        err.print(f"{record.levelname.lower()}: {message}", soft_wrap=True)


def show_warnings() -> None:
    """What the library logs, on standard error."""
    logger = logging.getLogger("pysteer")
    if not logger.handlers:
        logger.addHandler(_Lines(logging.WARNING))
