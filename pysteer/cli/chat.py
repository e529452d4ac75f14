"""`pysteer chat`: a conversation in the terminal, with live steering."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pysteer.cli import console, options
from pysteer.cli.loading import load_policy, load_steered
from pysteer.cli.settings_options import with_options
from pysteer.cli.streams import input_lines
from pysteer.evaluate.settings import Sampling
from pysteer.shipped import default_pack_path

if TYPE_CHECKING:
    from pysteer.cli.chat_events import ChatSteering
    from pysteer.cli.chat_session import Session
    from pysteer.cli.chat_view import Printer
    from pysteer.pack.pack import SteeringPack

_RUNNING = options.Running(context=4096)
_SAMPLING = Sampling(max_tokens=512)


@with_options(leave_out=("seed",))
def chat(
    running: options.Running = _RUNNING,
    pack: options.Packs = None,
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

    /help lists the commands. Steering starts as the policy says, if there is one; otherwise the
    pack's router decides, if there is one; otherwise steering is off. Where standard input is not
    a terminal, every line is a message or a command; answers go to standard output and everything
    else to standard error.
    """
    from pysteer.cli.chat_session import Session
    from pysteer.cli.chat_view import Printer
    from pysteer.runtime.arguments import read_pack

    if not pack and running.model is None:
        pack = [default_pack_path()]
    loaded = read_pack(pack) if pack else None
    path = options.model_path(running.model)
    arguments: dict[str, Any] = {"n_ctx": running.context, "n_threads": running.threads}
    if policy is not None:
        arguments["policy"] = load_policy(policy, loaded)
    with console.waiting("loading the model"):
        llm = load_steered(path, loaded, **arguments)
    with closing(llm):
        session = Session(
            llm,
            requested=_first_steering(loaded, policy),
            system=system,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=seed,
        )
        printer = Printer(json)
        if sys.stdin.isatty():
            _talk(session, printer)
        else:
            _follow(session, printer)


def _first_steering(pack: SteeringPack | None, policy: Path | None) -> ChatSteering:
    if policy is not None or (pack is not None and pack.policy is not None):
        return "policy"
    return "auto" if pack is not None and pack.router is not None else None


def _talk(session: Session, printer: Printer) -> None:
    """Run a session with a terminal."""
    from pysteer.cli.chat_terminal import Terminal, interrupting

    terminal = Terminal(session)
    console.err.print("Type a message, or /help.", style="dim")
    while True:
        try:
            entry = terminal.read()
            if entry is None:
                return
            with interrupting(session), closing(session.handle(entry)) as events:
                if not printer.show(events):
                    return
        except KeyboardInterrupt:  # while printing, or just before or after an answer
            printer.end_line()


def _follow(session: Session, printer: Printer) -> None:
    """Run a session with the lines of standard input."""
    from pysteer.cli.chat_input import entries

    for entry in entries(input_lines()):  # a line that is not Unicode is refused by the session
        with closing(session.handle(entry)) as events:
            if not printer.show(events):
                return
