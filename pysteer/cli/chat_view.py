"""Display of a chat: answers on standard output, everything else on standard error."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from pysteer.cli import console
from pysteer.cli.chat_events import (
    AnswerComplete,
    CategoryList,
    Comparison,
    Event,
    Explanation,
    Goodbye,
    HelpText,
    Notice,
    TextPiece,
    Turn,
    UserError,
    describe_steering,
)
from pysteer.cli.tables import ranges, table

# Control characters, which a terminal would obey: the model's text may hold any.
_CONTROLS = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

_KEYS = (
    ("Enter", 'send; after a backslash, or in a block between """ and """: a new line'),
    ("Alt-Enter", "a new line (on some terminals only Esc, then Enter)"),
    ("Up, Down", "earlier entries"),
    ("Tab", "complete a command or a category"),
    ("Ctrl-C", "stop the answer, or clear the line"),
    ("Ctrl-D", "leave"),
)


class Printer:
    """Prints the events of a session.

    Args:
        json: print an object for each answer rather than its text.
    """

    def __init__(self, json: bool) -> None:
        self._json = json
        self._open = False  # the last line of an answer has no end yet

    def show(self, events: Iterator[Event]) -> bool:
        """Print events as they come; return False after a `Goodbye`."""
        with console.waiting("..."):
            event = next(events, None)
        while event is not None:
            if isinstance(event, Goodbye):
                return False
            self._show(event)
            event = next(events, None)
        return True

    def end_line(self) -> None:
        """Start a new line if the text of an answer ended in the middle of a line."""
        if self._open:
            self._open = False
            print(flush=True)

    def _show(self, event: Event) -> None:
        if isinstance(event, TextPiece):
            self._show_piece(event.text)
            return
        self.end_line()
        if isinstance(event, AnswerComplete):
            self._show_turn(event.turn)
        elif isinstance(event, Notice):
            _say(event.text)
        elif isinstance(event, UserError):
            _say(event.text, "red")
        elif isinstance(event, Comparison):
            self._show_comparison(event)
        elif isinstance(event, Explanation):
            _show_report(event.report)
        elif isinstance(event, CategoryList):
            _show_categories(event)
        elif isinstance(event, HelpText):
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

    def _show_comparison(self, event: Comparison) -> None:
        if self._json:
            _print_line({"compare": {key: asdict(turn) for key, turn in vars(event).items()}})
            return
        steering = console.plain(describe_steering(event.steered.requested))
        sides = Table(f"steered: {steering}", "not steered")
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
    # On one line, even if names and messages in the text have line breaks.
    console.err.print(console.plain(" ".join(text.split())), style=style, soft_wrap=True)


def _remarks(turn: Turn) -> Iterator[str]:
    """Yield lines about the end of an answer and its steering."""
    if turn.finish_reason == "interrupted":
        yield "stopped; the text so far stays part of the conversation"
    elif turn.finish_reason == "length":
        yield "cut short by --max-tokens or the end of the context"
    for name, category in (turn.steering or {}).get("categories", {}).items():
        if category["active"]:
            score = "" if category["score"] is None else f" (score {category['score']:.2f})"
            steered = f"{category['tokens_steered']} tokens steered"
            yield f"{name} {category['strength']:g}{score}: {steered}"


def _show_report(report: dict[str, Any]) -> None:
    rows = table("category", "score", "threshold", "fired", "acts", "strength", "where", "tokens")
    for name, category in report["categories"].items():
        rows.add_row(
            console.plain(name),
            _number(category["score"]),
            _number(category["threshold"]),
            "forced" if not category["gated"] else _yes(category["fired"]),
            _yes(category["active"]),
            f"{category['strength']:g}",
            f"{category['site']} {ranges(category['layers'])}",
            str(category["tokens_steered"]),
        )
    for name, score in report["scores"].items():
        if name not in report["categories"]:
            rows.add_row(console.plain(name), _number(score), "", "not asked")
    if rows.row_count:
        console.err.print(rows)
    parts = [f"steering: {report['mode']}", f"{report['tokens_steered']} tokens steered"]
    if report["gate"] is not None:
        checks = "once" if report["checks"] == 1 else f"{report['checks']} times"
        parts.append(f"gate {report['gate']}, decided {checks}")
    if report["prompt_reprocessed"]:
        parts.append("the prompt was processed once more")
    _say("; ".join(parts))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _show_categories(event: CategoryList) -> None:
    rows = table("category", "where", "has a gate", "now")
    for category in event.categories:
        rows.add_row(
            console.plain(category.name),
            f"{category.site} {ranges(category.layers)}",
            _yes(category.gated),
            "off" if category.now is None else str(category.now),
        )
    console.err.print(rows)


def _show_help(event: HelpText) -> None:
    rows = Table.grid(padding=(0, 2))
    for usage, meaning in (*event.commands, ("", ""), *_KEYS):
        rows.add_row(escape(usage), escape(meaning))
    console.err.print(rows)
