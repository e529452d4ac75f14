"""llama.cpp's log: silent with `verbose=False`, and the errors of a failed call kept as its cause.

llama-cpp-python's own log callback counts levels from another number than llama.cpp does: with
`verbose=False` the callback prints warnings and hides errors. `take_over` replaces that callback
alone: a program that sets a callback by `llama_log_set`, before or after, keeps its own.
"""

from __future__ import annotations

import ctypes
import logging
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp
from llama_cpp._logger import llama_log_callback, logger

_LEVELS = {0: logging.INFO, 1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUES = 5  # the text goes on in the line before
_MAX_ERRORS = 8  # the first error names the cause
_FUNCTION = re.compile(r"^(?:\w+: )+")  # the names of the functions that report


class _Thread(threading.local):
    """State of the log in one thread: llama.cpp reports in the thread of the call."""

    level = logging.INFO
    errors: list[str] | None = None


_thread = _Thread()


@contextmanager
def kept_errors() -> Iterator[list[str]]:
    """Collect the errors that llama.cpp reports in this thread inside the `with` block.

    Yields:
        A list that grows, one line of text each; empty where a program has its own log callback.
    """
    errors: list[str] = []
    outer = _thread.errors
    _thread.errors = errors
    try:
        yield errors
    finally:
        _thread.errors = outer


def with_cause(message: str, errors: list[str]) -> str:
    """Return a message with llama.cpp's first error behind it, if there is one."""
    for error in errors:
        if line := _FUNCTION.sub("", error.strip()):
            return f"{message}: {line}"
    return message


def take_over() -> None:
    """Replace llama-cpp-python's log callback, but no other callback. Free when repeated."""
    current, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(current), ctypes.byref(data))
    if _address(current) == _address(llama_log_callback):
        llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))


def _address(callback: Any) -> int | None:
    return ctypes.cast(callback, ctypes.c_void_p).value


def _log(level: int, text: bytes, _: object) -> None:
    if level != _CONTINUES:
        _thread.level = _LEVELS.get(level, logging.INFO)
    line = text.decode("utf-8", errors="replace")
    errors = _thread.errors
    if errors is not None and _thread.level == logging.ERROR:
        if level == _CONTINUES and errors:
            errors[-1] += line
        elif len(errors) < _MAX_ERRORS:
            errors.append(line)
    # `verbose` of the latest model sets the logger to DEBUG, or to ERROR for silence.
    if logger.level < logging.ERROR and logger.level <= _thread.level and sys.stderr is not None:
        print(line, end="", flush=True, file=sys.stderr)


_callback = llama_cpp.llama_log_callback(_log)
