"""Display of a chat: answers on standard output, everything else on standard error."""

from __future__ import annotations

import json as json_format
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from pysteer.cli import console
from pysteer.cli.answer_text import AnswerPrinter
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

_HEADINGS = ("score", "threshold", "gate", "strength", "where", "tokens steered")

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
        self._answer: AnswerPrinter | None = None  # of an answer whose line has no end yet

    def show(self, events: Iterator[Event], activity: str = "reading the message") -> bool:
        """Print events, each at once; return False after a `Goodbye`.

        Args:
            events: of an entry.
            activity: label of the time before the first event.
        """
        with console.waiting(activity):
            event = next(events, None)
        while event is not None:
            if isinstance(event, Goodbye):
                return False
            self._show(event)
            event = next(events, None)
        return True

    def end_line(self) -> None:
        """Start a new line if the text of an answer ended in the middle of a line."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.end()

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
        if self._answer is None:
            self._answer = AnswerPrinter()
        self._answer.add(text)

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
        answers = (event.steered.response, event.unsteered.response)
        sides.add_row(*(console.plain(answer) for answer in answers))
        for column in sides.columns:
            column.ratio = 1
        sides.expand = True
        console.out.print(sides)
        if event.unsteered.finish_reason == "interrupted":
            _say("the answer without steering was stopped", "dim")


def _print_line(value: dict[str, Any]) -> None:
    print(json_format.dumps(value, allow_nan=False), flush=True)


def _say(text: str, style: str | None = None) -> None:
    # One paragraph, even if names and messages in the text have line breaks.
    console.note(" ".join(text.split()), style)


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
    """Print a row for each category, the highest score first, and shared values once."""
    columns = {
        name: {
            "score": _number(category["score"]),
            "threshold": _number(category["threshold"]),
            "gate": _gate(category),
            "strength": f"{category['strength']:g}",
            "where": f"{category['site']} {ranges(category['layers'])}",
            "tokens steered": str(category["tokens_steered"]),
        }
        for name, category in report["categories"].items()
    }
    for name, score in report["scores"].items():
        columns.setdefault(name, {"score": _number(score), "gate": "not asked"})
    scores = {name: report["scores"].get(name, -math.inf) for name in columns}
    columns = {name: columns[name] for name in sorted(columns, key=lambda name: -scores[name])}
    shared = _shared(list(columns.values()))
    headings = [heading for heading in _HEADINGS if heading not in shared]
    rows = table("category", *headings)
    rows.columns[0].overflow = "fold"
    for column in rows.columns[1:]:
        column.no_wrap = True
    for name, cells in columns.items():
        rows.add_row(console.plain(name), *(cells.get(heading, "") for heading in headings))
    if columns and headings:
        console.err.print(rows)
    if shared:
        same = ", ".join(f"{heading} {value}" for heading, value in shared.items())
        _say(f"all {len(columns)} categories: {same}")
    parts = [f"steering: {report['mode']}", f"{report['tokens_steered']} tokens steered"]
    if report["gate"] is not None:
        checks = "once" if report["checks"] == 1 else f"{report['checks']} times"
        parts.append(f"gate {report['gate']}, decided {checks}")
    if report["prompt_reprocessed"]:
        parts.append("the prompt was processed once more")
    _say("; ".join(parts))


def _shared(rows: list[dict[str, str]]) -> dict[str, str]:
    """Return the values that all of several rows share, by heading."""
    if len(rows) < 2:
        return {}
    return {
        heading: value
        for heading in _HEADINGS
        if (value := rows[0].get(heading, "")) and all(row.get(heading) == value for row in rows)
    }


def _gate(category: dict[str, Any]) -> str:
    if not category["gated"]:
        return "forced"
    if category["fired"] is None:
        return "not decided"
    return "open" if category["fired"] else "closed"


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
