"""The command line: a module for each command, which parses, calls the library and prints.

Command modules import the library inside their functions, so that help is quick.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from typing import Annotated

import typer

from pysteer.cli import console, streams
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
_UNREAD = 141
_REPEAT_SECONDS = 0.05

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
    streams.prepare()
    sys.unraisablehook = _repeat_interrupt
    code = run(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # one more interrupt ends the program at once
    streams.discard()
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run a command; an error is one line on standard error.

    Returns:
        The exit code: 0, 1 (a check failed, or a bug), 2 (a user's mistake), 130 (interrupted) or
        141 (nobody reads the output any more, as after a program that SIGPIPE ended).
    """
    console.set_debug(False)
    try:
        command = _parsed(arguments or ["--help"])
        if callable(command):
            command()
        elif command == _INTERRUPTED:  # newer versions of typer catch the interrupt
            return _fail("interrupted", _INTERRUPTED)
        sys.stdout.flush()
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", _INTERRUPTED)
    except BrokenPipeError:
        return _UNREAD
    except Exception as error:
        if console.debugging():
            raise
        return _fail(*_described(error))
    return 0


def _parsed(arguments: list[str]) -> object:
    """Return the command to call, or an exit code after help or the version."""
    try:
        return app(arguments, prog_name="pysteer", standalone_mode=False)
    except SystemExit:  # typer, about a closed pipe
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        raise BrokenPipeError from None


def _described(error: Exception) -> tuple[str, int]:
    """Return the line about an error, and the exit code."""
    if isinstance(error, SteeringError):
        return str(error), 2
    # Errors of usage: click's class, or the class of newer versions of typer.
    describe = getattr(error, "format_message", None)
    if callable(describe):
        context = getattr(error, "ctx", None)
        command = "pysteer" if context is None else context.command_path
        return f"{describe()} (see {command} --help)", 2
    if isinstance(error, OSError) and error.strerror:
        file = f"{error.filename}: " if error.filename is not None else ""
        return f"{file}{error.strerror} (--debug shows where)", 1
    return f"{type(error).__name__}: {error} (--debug shows where)", 1


def _repeat_interrupt(ignored: sys.UnraisableHookArgs) -> None:
    """Repeat an interrupt that came where Python cannot raise it, as in a callback of llama.cpp."""
    if not issubclass(ignored.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(ignored)
        return
    timer = threading.Timer(_REPEAT_SECONDS, _thread.interrupt_main)
    timer.daemon = True
    timer.start()


def _fail(message: str, code: int) -> int:
    print(f"pysteer: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code
