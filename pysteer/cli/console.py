"""Output of commands: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from pysteer.cli.streams import writable
from pysteer.errors import SteeringError, printable


class _Console(Console):
    """A console that takes any text, and leaves a closed pipe to `pysteer.cli.run`."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(writable(text, self.encoding), **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


out = _Console(highlight=False, emoji=False)
err = _Console(stderr=True, highlight=False, emoji=False)

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


def waiting(activity: str) -> AbstractContextManager[object]:
    """Show a spinner on standard error while the block runs, if that is a terminal."""
    if not err.is_terminal:
        return nullcontext()
    return err.status(activity, spinner="line" if err.options.ascii_only else "dots")


@contextmanager
def resumable(folder: Path, *, mention_in_errors: bool = False) -> Iterator[None]:
    """Tell the user that finished work is kept in a folder, if the block is interrupted.

    Args:
        folder: nothing is told if the folder does not exist.
        mention_in_errors: tell so in a SteeringError, too.
    """
    kept = f"finished work is kept in {folder}"
    try:
        yield
    except SteeringError as error:
        if mention_in_errors and folder.is_dir():
            raise SteeringError(f"{error} ({kept})") from None
        raise
    except BaseException:
        if folder.is_dir():
            resume = "the same command resumes from there"
            err.print(f"{plain(kept)}; {resume}", soft_wrap=True)
        raise


def say(text: str) -> None:
    """Print a line of rich markup on standard output, without breaking it."""
    out.print(text, soft_wrap=True)


def note(text: str, style: str | None = None) -> None:
    """Print plain text on standard error; a terminal gets lines that end between words."""
    err.print(plain(text), style=style, soft_wrap=not err.is_terminal)


def headline(text: str, *, beside_result: bool) -> None:
    """Print the line about model, pack and mode that a command begins with.

    Args:
        text: the line.
        beside_result: print on standard error, because standard output is an answer or JSON.
    """
    if beside_result:
        note(text, "dim")
    else:
        out.print(plain(text), style="dim", soft_wrap=not out.is_terminal)


def plain(text: object) -> str:
    """Escape text of a file or a model: no markup, no control characters."""
    return escape(printable(str(text), "�"))


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
