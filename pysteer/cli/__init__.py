"""The command line: a module for each command, which parses, calls the library and prints.

Command modules import the library inside their functions, so that help is quick.
"""

from __future__ import annotations

import sys
from typing import Annotated

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
from pysteer.distribution import installed_version
from pysteer.errors import SteeringError, printable

app = typer.Typer(
    name="pysteer",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_INTERRUPTED = 130

for command in (demo, extract, calibrate, generate, chat, evaluate, inspect, compare, doctor):
    app.command()(command)


def _print_version(value: bool) -> None:
    if value:
        print(f"pysteer {installed_version()}")
        raise typer.Exit


@app.callback()
def pysteer(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Steer quantised llama.cpp models by category, per request."""


def main() -> None:
    """Run the command that the program was called with, and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command; an error is one line on standard error.

    Returns:
        The exit code: 0, 1 (a check failed, or a bug), 2 (a user's mistake) or 130 (interrupted).
    """
    console.set_debug(False)
    try:
        code = app(arguments or ["--help"], prog_name="pysteer", standalone_mode=False)
        if code != _INTERRUPTED:
            return int(code) if isinstance(code, int) else 0
        return _fail("interrupted", _INTERRUPTED)  # newer versions of typer catch the interrupt
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", _INTERRUPTED)
    except Exception as error:
        if console.debugging():
            raise
        if isinstance(error, (SteeringError, NotImplementedError)):
            return _fail(str(error), 2)
        # Errors of usage: click's class, or the class of newer versions of typer.
        describe = getattr(error, "format_message", None)
        if callable(describe):
            context = getattr(error, "ctx", None)
            command = "pysteer" if context is None else context.command_path
            return _fail(f"{describe()} (see {command} --help)", 2)
        return _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)


def _fail(message: str, code: int) -> int:
    print(f"pysteer: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code
