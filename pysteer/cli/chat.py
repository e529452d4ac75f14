"""`pysteer chat`: a conversation in the terminal, with live steering."""

from __future__ import annotations

import io
import json as json_format
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pysteer.cli import console, options
from pysteer.cli.chat_events import (
    Answered,
    Asked,
    Compared,
    Event,
    Explained,
    Helped,
    Left,
    Listed,
    Mistake,
    Piece,
    Said,
    Turn,
    in_words,
)
from pysteer.cli.chat_session import Session, unfinished
from pysteer.cli.loading import load_steered
from pysteer.cli.tables import ranges, table
from pysteer.errors import SteeringError
from pysteer.pack.pack import SteeringPack
from pysteer.pack.policy import Policy
from pysteer.shipped import default_pack_path

# What a terminal would take for an order: the model's text may hold anything.
_CONTROLS = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

KEYS = (
    ("Enter", 'send; after a backslash, or in a block that """ opens and closes: a new line'),
    ("Alt-Enter", "a new line (on some terminals only Esc, then Enter)"),
    ("Up, Down", "what was entered before"),
    ("Tab", "complete a command or a category"),
    ("Ctrl-C", "stop the answer, or clear the line"),
    ("Ctrl-D", "leave"),
)
"""Keys and what they do, for the help."""


def chat(
    model: options.Model = None,
    pack: options.Pack = None,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A YAML file: what acts when.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = 0.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="For temperatures above 0; drawn if left out.")
    ] = None,
    context: options.Context = 4096,
    threads: options.Threads = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each answer instead.")
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Talk to a model, and change the steering as you go: /help says how.

    Steering starts as the policy says, if there is one; else with every category of the pack that
    its router finds; else off. Where standard input is no terminal, every line of it is a message
    or a command; answers go to standard output and everything else to standard error.
    """
    options.check_temperature(temperature)
    if pack is None and model is None:
        pack = default_pack_path()
    loaded = SteeringPack.load(pack) if pack is not None else None
    path = options.model_path(model)
    arguments: dict[str, Any] = {"n_ctx": context, "n_threads": threads}
    if policy is not None:
        if loaded is None:
            raise SteeringError("--policy needs --pack: a pack for this model")
        arguments["policy"] = _read_policy(policy, loaded)
    with _waiting("loading the model"):
        llm = load_steered(path, loaded, **arguments)
    with closing(llm):
        session = Session(
            llm,
            asked=_first_steering(loaded, policy),
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
        )
        printer = _Printer(json)
        if sys.stdin.isatty():
            _talk(session, printer)
        else:
            _follow(session, printer)


def _read_policy(path: Path, pack: SteeringPack) -> Policy:
    """The policy, held against the pack before the model is loaded, which may take long."""
    policy = Policy.load(path)
    pack.check_policy(policy)
    return policy


def _first_steering(pack: SteeringPack | None, policy: Path | None) -> Asked:
    if policy is not None or (pack is not None and pack.policy is not None):
        return "policy"
    return "auto" if pack is not None and pack.router is not None else None


def _talk(session: Session, printer: _Printer) -> None:
    """With a person at a terminal."""
    from pysteer.cli.chat_terminal import Terminal, interrupting  # takes a while

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
        except KeyboardInterrupt:  # in the middle of printing, or just before or after an answer
            printer.end_line()


def _follow(session: Session, printer: _Printer) -> None:
    """With whatever writes to standard input."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the session refuses what is not UTF-8
    for entry in _entries(sys.stdin):
        with closing(session.handle(entry)) as events:
            if not printer.show(events):
                return


def _entries(lines: Iterable[str]) -> Iterator[str]:
    """Lines, joined where an entry has several."""
    entry = ""
    for line in lines:
        entry += line.removesuffix("\n")
        if unfinished(entry):
            entry += "\n"
        else:
            yield entry
            entry = ""
    if entry:
        yield entry.removesuffix("\n")


def _waiting(what: str) -> AbstractContextManager[object]:
    """A sign of life on standard error while the block runs, where that is a terminal."""
    return console.err.status(what) if console.err.is_terminal else nullcontext()


class _Printer:
    """Shows what a session tells: answers on standard output, everything else on standard error.

    Args:
        json: print an object for each answer rather than its text.
    """

    def __init__(self, json: bool) -> None:
        self._json = json
        self._open = False  # a line of an answer has no end yet

    def show(self, events: Iterator[Event]) -> bool:
        """Show all events as they come; False if the last one is that the user leaves."""
        with _waiting("..."):
            event = next(events, None)
        while event is not None:
            if isinstance(event, Left):
                return False
            self._show(event)
            event = next(events, None)
        return True

    def end_line(self) -> None:
        """Start a new line if the text of an answer ended in the middle of one."""
        if self._open:
            self._open = False
            print(flush=True)

    def _show(self, event: Event) -> None:
        if isinstance(event, Piece):
            self._show_piece(event.text)
            return
        self.end_line()
        if isinstance(event, Answered):
            self._show_turn(event.turn)
        elif isinstance(event, Said):
            _say(event.text)
        elif isinstance(event, Mistake):
            _say(event.text, "red")
        elif isinstance(event, Compared):
            self._show_comparison(event)
        elif isinstance(event, Explained):
            _show_report(event.report)
        elif isinstance(event, Listed):
            _show_categories(event)
        elif isinstance(event, Helped):
            _show_help(event)

    def _show_piece(self, text: str) -> None:
        if self._json:
            return
        self._open = True
        print(text.translate(_CONTROLS) if sys.stdout.isatty() else text, end="", flush=True)

    def _show_turn(self, turn: Turn) -> None:
        if self._json:
            _print_line(asdict(turn))
        elif not turn.response:
            print(flush=True)
        for line in _remarks(turn):
            _say(line, "dim")

    def _show_comparison(self, event: Compared) -> None:
        if self._json:
            _print_line({"compare": {key: asdict(turn) for key, turn in vars(event).items()}})
            return
        sides = Table(f"steered: {console.plain(in_words(event.steered.asked))}", "not steered")
        sides.add_row(
            *(escape(t.response.translate(_CONTROLS)) for t in (event.steered, event.unsteered))
        )
        for column in sides.columns:
            column.ratio = 1
        sides.expand = True
        console.out.print(sides)
        if event.unsteered.finish_reason == "interrupted":
            _say("the answer without steering was stopped", "dim")


def _print_line(value: dict[str, Any]) -> None:
    print(json_format.dumps(value, allow_nan=False), flush=True)


def _say(text: str, style: str | None = None) -> None:
    # One line, whatever names and messages are in it.
    console.err.print(console.plain(" ".join(text.split())), style=style, soft_wrap=True)


def _remarks(turn: Turn) -> Iterator[str]:
    """What is worth knowing about an answer without asking."""
    if turn.finish_reason == "interrupted":
        yield "stopped; what was written stays part of the conversation"
    elif turn.finish_reason == "length":
        yield "cut short: --max-tokens or the end of the context was reached"
    for name, found in (turn.steering or {}).get("categories", {}).items():
        if found["active"]:
            score = "" if found["score"] is None else f" (score {found['score']:.2f})"
            steered = f"{found['tokens_steered']} tokens steered"
            yield f"{name} {found['strength']:g}{score}: {steered}"


def _show_report(report: dict[str, Any]) -> None:
    rows = table("category", "score", "threshold", "fired", "acts", "strength", "where", "tokens")
    for name, found in report["categories"].items():
        rows.add_row(
            console.plain(name),
            _number(found["score"]),
            _number(found["threshold"]),
            "forced" if not found["gated"] else _yes(found["fired"]),
            _yes(found["active"]),
            f"{found['strength']:g}",
            f"{found['site']} {ranges(found['layers'])}",
            str(found["tokens_steered"]),
        )
    for name, score in report["scores"].items():
        if name not in report["categories"]:
            rows.add_row(console.plain(name), _number(score), "", "not asked")
    if rows.row_count:
        console.err.print(rows)
    said = [f"steering: {report['mode']}", f"{report['tokens_steered']} tokens steered"]
    if report["gate"] is not None:
        checks = "once" if report["checks"] == 1 else f"{report['checks']} times"
        said.append(f"gate {report['gate']}, decided {checks}")
    if report["prompt_reprocessed"]:
        said.append("the prompt was processed once more")
    _say("; ".join(said))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _show_categories(event: Listed) -> None:
    rows = table("category", "where", "has a gate", "now")
    for found in event.categories:
        rows.add_row(
            console.plain(found.name),
            f"{found.site} {ranges(found.layers)}",
            _yes(found.gated),
            "off" if found.now is None else str(found.now),
        )
    console.err.print(rows)


def _show_help(event: Helped) -> None:
    rows = Table.grid(padding=(0, 2))
    for usage, meaning in (*event.commands, ("", ""), *KEYS):
        rows.add_row(escape(usage), escape(meaning))
    console.err.print(rows)
