"""`pysteer chat`: a conversation in the terminal, with live steering."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from pysteer.cli import console, options
from pysteer.cli.chat_events import ChatSteering, describe_steering
from pysteer.cli.chat_input import activity_of, entries
from pysteer.cli.loading import load_setup, read_setup
from pysteer.cli.settings_options import with_options
from pysteer.cli.streams import input_lines, unicode_text
from pysteer.evaluate.settings import Sampling

if TYPE_CHECKING:
    from pysteer.cli.chat_session import Session
    from pysteer.cli.chat_view import Printer

_RUNNING = options.Running(context=4096)
_SAMPLING = Sampling(max_tokens=512)


@with_options(leave_out=("seed",))
def chat(
    running: options.Running = _RUNNING,
    pack: options.Packs = None,
    steer: options.Steer = None,
    policy: options.Policy = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    sampling: Sampling = _SAMPLING,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Seed for temperatures above 0; by default drawn at random."
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each answer.")
    ] = False,
) -> None:
    """Talk to a model, and change the steering as you go.

    /help lists the commands. Without --steer, steering starts as the policy says: by default the
    pack's router decides. Where standard input is not a terminal, every line is a message or a
    command; answers go to standard output and everything else to standard error.
    """
    from pysteer.cli.chat_session import Session
    from pysteer.cli.chat_view import Printer

    setup = read_setup(running.model, pack, policy)
    asked = setup.steering(steer)
    requested: ChatSteering = "policy" if setup.decided else None
    requested = asked.get("steering", requested)
    system = None if system is None else unicode_text(system)
    with closing(load_setup(setup, **running.arguments)) as llm:
        session = Session(
            llm,
            requested=requested,
            policy=setup.resolved.default_steering if setup.resolved and setup.decided else None,
            system=system,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=seed,
        )
        mode = setup.policy_words if requested == "policy" else describe_steering(requested)
        console.headline(setup.headline(mode), beside_result=True)
        printer = Printer(json)
        if sys.stdin.isatty():
            _talk(session, printer)
        else:
            _follow(session, printer)


def _talk(session: Session, printer: Printer) -> None:
    """Run a session with a terminal."""
    from pysteer.cli.chat_terminal import Terminal, interrupting

    terminal = Terminal(session)
    for line in _welcome(session):
        console.note(line, "dim")
    while True:
        try:
            entry = terminal.read()
            if entry is None:
                return
            with interrupting(session), closing(session.handle(entry)) as events:
                if not printer.show(events, activity_of(entry)):
                    return
        except KeyboardInterrupt:  # while printing, or just before or after an answer
            printer.end_line()


def _welcome(session: Session) -> Iterator[str]:
    """Yield lines about the categories, and about the prompt of `Terminal`."""
    if session.categories:
        yield f"categories: {', '.join(session.categories)}"
        yield (
            "The brackets show the steering in force; policy: the policy decides for each message. "
            "/steer, /auto and /off change it, and /why explains the last answer."
        )
    yield "Type a message, or /help."


def _follow(session: Session, printer: Printer) -> None:
    """Run a session with the lines of standard input."""
    for entry in entries(input_lines()):  # a line that is not Unicode is refused by the session
        with closing(session.handle(entry)) as events:
            if not printer.show(events):
                return
