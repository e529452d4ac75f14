r"""Input syntax of `pysteer chat`: messages, commands, and entries of several lines.

An entry is a message, or a command if it begins with a slash. It goes on in the next line after a
backslash at the end of a line, and in a block between \""" and \""", which is always a message.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from pysteer.errors import SteeringError, quoted

BLOCK = '"""'


class Command(NamedTuple):
    """Syntax of a command.

    Attributes:
        argument: as in the help; "" for a command without an argument.
        required: the argument cannot be left out.
        meaning: one line for the help.
    """

    argument: str
    required: bool
    meaning: str


COMMANDS: Mapping[str, Command] = {
    "steer": Command(
        "CATEGORY STRENGTH|auto", False, "steer by a category; others stay as set, and 0 ends it"
    ),
    "auto": Command("", False, "steer by every category that the router finds"),
    "policy": Command("", False, "steer as the policy says"),
    "off": Command("", False, "stop steering"),
    "why": Command("", False, "show the router's scores for the last message and the steering"),
    "compare": Command("", False, "answer the last message without steering, side by side"),
    "categories": Command("", False, "list the categories of the pack"),
    "system": Command("[TEXT]", False, "set the system message; without a text, remove it"),
    "undo": Command("", False, "forget the last message and its answer"),
    "clear": Command("", False, "forget the conversation"),
    "save": Command("FILE", True, "write the conversation to a new JSONL file"),
    "help": Command("", False, "show this help"),
    "quit": Command("", False, "leave; so does Ctrl-D"),
}
"""Commands by name."""


def usage(name: str) -> str:
    """Return the written form of a command, such as "/save FILE"."""
    return f"/{name} {COMMANDS[name].argument}".rstrip()


def unfinished(text: str) -> bool:
    r"""Return True if the entry goes on in the next line: after a backslash, or in a block."""
    if _is_block(text):
        body = text.strip()
        return len(body) < 2 * len(BLOCK) or not body.endswith(BLOCK)
    return text.endswith("\\")


def entries(lines: Iterable[str]) -> Iterator[str]:
    """Join lines to entries; the last entry may be unfinished."""
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


def parse_entry(entry: str) -> tuple[str | None, str]:
    """Return a command's name and argument, or None and a message.

    Raises:
        SteeringError: text that is not Unicode, an open block, or a command that does not exist or
            has the wrong arguments.
    """
    try:
        entry.encode()
    except UnicodeEncodeError:
        raise SteeringError("the input is not Unicode text") from None
    if _is_block(entry):
        if unfinished(entry):
            raise SteeringError(f"the block is not closed; end it with {BLOCK}")
        return None, entry.strip()[len(BLOCK) : -len(BLOCK)].strip("\n")
    text = entry.removesuffix("\\").replace("\\\n", "\n")
    if not text.lstrip().startswith("/"):
        return None, text
    name, *rest = text.strip()[1:].split(None, 1)[:2] or [""]
    argument = rest[0] if rest else ""
    command = COMMANDS.get(name)
    if command is None:
        known = ", ".join(f"/{known}" for known in COMMANDS)
        raise SteeringError(
            f"unknown command {quoted('/' + name)[1:-1]}; use one of {known} "
            f"(put a message that begins with / between {BLOCK} and {BLOCK})"
        )
    if argument and not command.argument:
        raise SteeringError(f"/{name} takes no argument; write {usage(name)}")
    if command.required and not argument:
        raise SteeringError(f"/{name} needs an argument; write {usage(name)}")
    return name, argument


def activity_of(entry: str) -> str:
    """Return a label for the time before the first event of an entry."""
    if entry.split(None, 1)[:1] == ["/compare"]:
        return "answering again, without steering"
    return "working" if entry.lstrip().startswith("/") else "reading the message"


def _is_block(text: str) -> bool:
    return text.lstrip().startswith(BLOCK)
