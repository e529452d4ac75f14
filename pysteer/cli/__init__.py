"""The command line: one file per command, each of which parses, calls the library and prints."""

from __future__ import annotations

import sys

import typer

from pysteer.cli import console
from pysteer.cli.calibrate import calibrate
from pysteer.cli.chat import chat
from pysteer.cli.compare import compare
from pysteer.cli.demo import demo
from pysteer.cli.doctor import doctor
from pysteer.cli.evaluate import evaluate
from pysteer.cli.extract import extract
from pysteer.cli.generate import generate
from pysteer.cli.inspect import inspect
from pysteer.errors import SteeringError

app = typer.Typer(
    name="pysteer",
    help="Steer quantised llama.cpp models by category, per request.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_INTERRUPTED = 130

for command in (demo, extract, calibrate, generate, chat, evaluate, inspect, compare, doctor):
    app.command()(command)


def main() -> None:
    """Run a command; a user's mistake ends in one line on standard error and exit code 2."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code: 0, 1 (a check failed, or a bug), 2 or 130."""
    console.set_debug(False)
    try:
        code = app(arguments or ["--help"], prog_name="pysteer", standalone_mode=False)
        if code != _INTERRUPTED:
            return int(code) if isinstance(code, int) else 0
        return _fail("interrupted", _INTERRUPTED)  # newer versions of typer catch it themselves
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", _INTERRUPTED)
    except Exception as error:
        if console.debugging():
            raise
        if isinstance(error, (SteeringError, NotImplementedError)):
            return _fail(str(error), 2)
        # Errors of usage: click's class or the one that newer versions of typer bring themselves.
        describe = getattr(error, "format_message", None)
        if callable(describe):
            return _fail(f"{describe()} (see pysteer --help)", 2)
        return _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)


def _fail(message: str, code: int) -> int:
    print(f"pysteer: {' '.join(message.split())}", file=sys.stderr)
    return code
