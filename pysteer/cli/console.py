"""Where commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape

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


def say(text: str) -> None:
    """Print a line of rich markup on standard output; wrapping it is the terminal's business."""
    out.print(text, soft_wrap=True)


def plain(text: object) -> str:
    """Text from a file or a model, shown as it is: no markup in it, no control characters."""
    return escape("".join(c if c in "\n\t" or c.isprintable() else "�" for c in str(text)))
