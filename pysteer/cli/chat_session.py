"""What `pysteer chat` does, without a terminal: a line of input in, events out."""

from __future__ import annotations

import json
import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from llama_cpp import llama_chat_format

from pysteer.cli.chat_events import (
    Answered,
    Asked,
    Category,
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
from pysteer.errors import SteeringError, quoted
from pysteer.runtime.steered import SteeredLlama

_BLOCK = '"""'
_NOTHING_WRITTEN = "stopped before anything was written"


# ---- input -----------------------------------------------------------------------------------


def unfinished(text: str) -> bool:
    r"""Whether the message goes on in the next line: after a backslash, or in a block of \"""."""
    if _is_block(text):
        body = text.strip()
        return len(body) < 2 * len(_BLOCK) or not body.endswith(_BLOCK)
    return text.endswith("\\")


def _is_block(text: str) -> bool:
    return text.lstrip().startswith(_BLOCK)


# ---- the session -----------------------------------------------------------------------------


class _Command(NamedTuple):
    argument: str  # as in the help; "" takes none
    needed: bool
    meaning: str


COMMANDS: Mapping[str, _Command] = {
    "steer": _Command(
        "CATEGORY STRENGTH|auto", False, "steer by it; several may be named so, and 0 ends one"
    ),
    "auto": _Command("", False, "every category acts where the router finds it"),
    "policy": _Command("", False, "what acts is what the policy says"),
    "off": _Command("", False, "no steering"),
    "why": _Command("", False, "what the router saw in the last message, and what acted"),
    "compare": _Command("", False, "answer the last message without steering, side by side"),
    "categories": _Command("", False, "what the pack can steer"),
    "system": _Command("[TEXT]", False, "set the system message; without a text, remove it"),
    "undo": _Command("", False, "forget the last message and its answer"),
    "clear": _Command("", False, "forget the conversation"),
    "save": _Command("FILE", True, "write the conversation to a new JSONL file"),
    "help": _Command("", False, "show this"),
    "quit": _Command("", False, "leave; so does Ctrl-D"),
}
"""Name to what `/name` takes and does."""


@dataclass
class _Writing:
    """An answer while it is written."""

    pieces: list[str] = field(default_factory=list)
    finish_reason: str = "interrupted"
    report: dict[str, Any] | None = None

    def turn(self, prompt: str, asked: Asked, system: str | None, seed: int, left_out: int) -> Turn:
        text = "".join(self.pieces)
        return Turn(prompt, text, self.finish_reason, asked, self.report, system, seed, left_out)


class _Counter:
    """Stands in for the model in a chat handler, to learn which tokens it makes of messages."""

    verbose = False

    def __init__(self, llm: SteeredLlama) -> None:
        self.tokenize = llm.tokenize
        self.n_tokens = 0

    def create_completion(self, *, prompt: Sequence[int], **_: Any) -> Iterator[Any]:
        self.n_tokens = len(prompt)
        return iter(())


class Session:
    """A conversation with a model, and the steering in force.

    `handle` takes what the user entered and yields events. `stop`, called meanwhile (from a signal
    handler, or by the reader of the events between two of them), ends the answer after the next
    token; a KeyboardInterrupt after `stop` ends it without waiting for one; and so does a reader
    that stops reading. What was written stays part of the conversation.

    Args:
        llm: answers; nobody else may use it meanwhile, or prompts are computed from the start.
        asked: the steering in force at first.
        system: a system message.
        max_tokens: where an answer is cut.
        temperature: 0 is greedy.
        seed: of the seeds of the answers; None draws one.

    Raises:
        SteeringError: `asked` is nothing that `llm` can be steered by.
    """

    def __init__(
        self,
        llm: SteeredLlama,
        *,
        asked: Asked = None,
        system: str | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> None:
        self._llm = llm
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._seeds = random.Random(seed)
        self._first = 0  # the oldest turn that fits into the context; the user knows of it
        self._saved: set[Path] = set()
        self._has_policy = asked == "policy"
        self.system = system
        self.turns: list[Turn] = []
        self.writing = False  # an answer has begun to come
        self.stopping = False
        self.asked: Asked = None
        self._check(asked)
        self.asked = asked

    @property
    def categories(self) -> list[str]:
        """The names of the pack's categories."""
        return list(self._llm.pack.categories) if self._llm.pack is not None else []

    @property
    def steering(self) -> str:
        """The steering in force, in words."""
        return in_words(self.asked)

    def stop(self) -> None:
        """End the answer after the next token."""
        self.stopping = True

    def completions(self, text: str) -> list[str]:
        """What a line that begins with `text` may be meant to become."""
        if not text.startswith("/"):
            return []
        if " " not in text:
            lines = [f"/{name}" + (" " if c.argument else "") for name, c in COMMANDS.items()]
        else:
            steer = [f"/steer {name} " for name in self.categories]
            lines = [s + "auto" for s in steer if text.startswith(s)] or steer
        return [line for line in lines if line.startswith(text)]

    def handle(self, text: str) -> Generator[Event, None, None]:
        r"""Carry out a command, or answer a message.

        Args:
            text: what was entered, which is a command if it begins with a slash. A block between
                \""" and \""" never is; a backslash at the end of a line only stands for the line
                break.
        """
        self.stopping = self.writing = False
        try:
            yield from self._handle(text)
        except SteeringError as error:
            yield Mistake(str(error))
        except (ValueError, RuntimeError) as error:  # llama_cpp's own, or a chat template's
            yield Mistake(f"no answer: {error}")

    def _handle(self, text: str) -> Generator[Event, None, None]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise SteeringError("this is not Unicode text") from None
        if _is_block(text):
            if unfinished(text):
                raise SteeringError(f"the block that {_BLOCK} opens has no {_BLOCK} at its end")
            yield from self._message(text.strip()[len(_BLOCK) : -len(_BLOCK)].strip("\n"))
            return
        text = text.removesuffix("\\").replace("\\\n", "\n")
        if text.lstrip().startswith("/"):
            yield from self._command(text.strip())
        else:
            yield from self._message(text)

    # ---- commands ----------------------------------------------------------------------------

    def _command(self, text: str) -> Generator[Event, None, None]:
        name, *rest = text[1:].split(None, 1)[:2] or [""]
        argument = rest[0] if rest else ""
        command = COMMANDS.get(name)
        if command is None:
            known = ", ".join(f"/{known}" for known in COMMANDS)
            raise SteeringError(
                f"unknown command {quoted('/' + name)[1:-1]}; there is {known} "
                f"(a message that begins with / goes between {_BLOCK} and {_BLOCK})"
            )
        if (argument and not command.argument) or (command.needed and not argument):
            raise SteeringError(f"write {_usage(name)}" + ", and no more" * (not command.argument))
        yield from getattr(self, f"_do_{name}")(argument)

    def _do_steer(self, argument: str) -> Generator[Event, None, None]:
        if not argument:
            yield Said(f"steering: {self.steering}; write {_usage('steer')} to change it")
            return
        self._require_pack()
        *words, value = argument.rsplit(None, 1)
        category = words[0] if words else ""
        if len(category) > 1 and category[0] == category[-1] and category[0] in "'\"":
            category = category[1:-1]
        if not category:
            names = ", ".join(self.categories)
            raise SteeringError(f"write {_usage('steer')}, with one of {names}")
        try:
            strength: float | str = value if value == "auto" else float(value)
        except ValueError:
            raise SteeringError(
                f"{quoted(value)} is no strength; write {_usage('steer')}, "
                f"as in /steer {self.categories[0]} 0.8"
            ) from None
        asked = dict(self.asked) if isinstance(self.asked, dict) else {}
        asked[category] = strength
        self._check(asked)
        if strength == 0:
            del asked[category]
        yield self._steer(asked or None)

    def _do_auto(self, _: str) -> Generator[Event, None, None]:
        self._require_pack()
        self._check("auto")
        yield self._steer("auto")

    def _do_policy(self, _: str) -> Generator[Event, None, None]:
        if not self._has_policy:
            raise SteeringError("there is no policy; start pysteer chat with --policy")
        yield self._steer("policy")

    def _do_off(self, _: str) -> Generator[Event, None, None]:
        yield self._steer(None)

    def _do_why(self, _: str) -> Generator[Event, None, None]:
        report = self._last().steering
        if report is None:
            raise SteeringError("of the last answer no report was made")
        yield Explained(report)

    def _do_compare(self, _: str) -> Generator[Event, None, None]:
        turn = self._last()
        if turn.asked is None:
            raise SteeringError("the last answer is one without steering; there is no other")
        messages, first = self._fit(self.turns[:-1], turn.system, turn.prompt)
        writing = _Writing()
        for _piece in self._write(writing, messages, None, turn.seed):
            pass  # both answers are shown when both are there
        if self.stopping and not writing.pieces:
            yield Said(_NOTHING_WRITTEN)
            return
        unsteered = writing.turn(turn.prompt, None, turn.system, turn.seed, first)
        yield Compared(turn, unsteered)

    def _do_categories(self, _: str) -> Generator[Event, None, None]:
        self._require_pack()
        pack = self._llm.pack
        assert pack is not None
        gated = pack.router.categories if pack.router is not None else ()
        yield Listed(
            [
                Category(name, vector.site, vector.layers, name in gated, self._now(name))
                for name, vector in pack.categories.items()
            ]
        )

    def _do_system(self, argument: str) -> Generator[Event, None, None]:
        self.system = argument or None
        self._first = 0  # it may be shorter
        yield Said("the system message is set" if argument else "there is no system message now")

    def _do_undo(self, _: str) -> Generator[Event, None, None]:
        turn = self._last()
        self.turns.pop()
        self._first = 0  # there may be room again
        yield Said(f"forgotten: {quoted(turn.prompt)} and its answer")

    def _do_clear(self, _: str) -> Generator[Event, None, None]:
        self.turns.clear()
        self._first = 0
        yield Said("the conversation begins anew")

    def _do_save(self, argument: str) -> Generator[Event, None, None]:
        self._last()
        path = Path(argument).expanduser()
        text = "".join(json.dumps(asdict(turn), allow_nan=False) + "\n" for turn in self.turns)
        try:
            # Its own files it may replace; others are somebody's.
            with path.open("w" if path in self._saved else "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise SteeringError(f"{path} is there already; name a new file") from None
        except (OSError, ValueError) as error:
            raise SteeringError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        self._saved.add(path)
        yield Said(f"saved to {path}: {len(self.turns)} turn{'s' * (len(self.turns) > 1)}")

    def _do_help(self, _: str) -> Generator[Event, None, None]:
        yield Helped([(_usage(name), command.meaning) for name, command in COMMANDS.items()])

    def _do_quit(self, _: str) -> Generator[Event, None, None]:
        yield Left()

    # ---- steering ----------------------------------------------------------------------------

    def _steer(self, asked: Asked) -> Said:
        self.asked = asked
        return Said(f"steering: {self.steering}")

    def _check(self, asked: Asked) -> None:
        """Raise SteeringError for what the model cannot be steered by."""
        if asked is not None and asked != "policy":
            with self._llm.steering(asked):
                pass

    def _now(self, category: str) -> float | str | None:
        return self.asked.get(category) if isinstance(self.asked, dict) else self.asked

    def _require_pack(self) -> None:
        if self._llm.pack is None:
            raise SteeringError("there is nothing to steer with; start pysteer chat with --pack")

    def _last(self) -> Turn:
        if not self.turns:
            raise SteeringError("there is no answer yet")
        return self.turns[-1]

    # ---- answers -----------------------------------------------------------------------------

    def _message(self, prompt: str) -> Generator[Event, None, None]:
        if not prompt.strip():
            return
        system, asked, seed = self.system, self.asked, self._seeds.getrandbits(31)
        writing = _Writing()
        try:
            messages, first = self._fit(self.turns, system, prompt)
            if first > self._first:
                what = "turn is" if first == 1 else f"{first} turns are"
                yield Said(f"the context is full: the oldest {what} left out from here on")
            self._first = first
            with closing(self._write(writing, messages, asked, seed)) as pieces:
                for piece in pieces:
                    yield Piece(piece)
        except GeneratorExit:  # the reader left in the middle
            if writing.pieces:
                self.turns.append(writing.turn(prompt, asked, system, seed, first))
            raise
        else:
            if writing.finish_reason == "interrupted" and not writing.pieces:
                yield Said(f"{_NOTHING_WRITTEN}; the message is forgotten")
                return
            turn = writing.turn(prompt, asked, system, seed, first)
            self.turns.append(turn)
            yield Answered(turn)

    def _fit(self, turns: Sequence[Turn], system: str | None, prompt: str) -> tuple[list[Any], int]:
        """The messages to send, and the oldest turn among them, so that an answer has room.

        Raises:
            SteeringError: the prompt alone is too long.
        """
        n_ctx = self._llm.n_ctx()
        room = n_ctx - min(self._max_tokens, n_ctx // 4)
        for first in range(min(self._first, len(turns)), len(turns) + 1):
            messages = [{"role": "system", "content": system}] if system is not None else []
            for turn in turns[first:]:
                messages.append({"role": "user", "content": turn.prompt})
                messages.append({"role": "assistant", "content": turn.response})
            messages.append({"role": "user", "content": prompt})
            n_tokens = self._count(messages)
            if n_tokens <= room:
                break
        if n_tokens >= n_ctx:
            raise SteeringError(
                f"the message takes {n_tokens} tokens and the context has {n_ctx}; shorten it, "
                "or start pysteer chat with a larger --context"
            )
        return messages, first

    def _count(self, messages: list[Any]) -> int:
        """How many tokens the prompt has that the model's chat template makes of the messages."""
        llm: Any = self._llm
        counter = _Counter(self._llm)
        # As Llama.create_chat_completion finds it.
        handler = (
            llm.chat_handler
            or llm._chat_handlers.get(llm.chat_format)
            or llama_chat_format.get_chat_completion_handler(llm.chat_format)
        )
        handler(llama=cast(Any, counter), messages=messages, stream=True)
        return counter.n_tokens

    def _write(
        self, writing: _Writing, messages: list[Any], asked: Asked, seed: int
    ) -> Generator[str, None, None]:
        """Yield the pieces of an answer, and put them and what else is learned into `writing`."""
        llm = self._llm
        steering: dict[str, Any] = {} if asked == "policy" else {"steering": asked}
        stream = llm.create_chat_completion(
            messages,
            stream=True,
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            seed=seed,
            **steering,
        )
        try:
            try:
                for chunk in stream:
                    choice = chunk["choices"][0]
                    writing.report = chunk.get("steering", writing.report)
                    writing.finish_reason = choice["finish_reason"] or writing.finish_reason
                    piece = choice["delta"].get("content")
                    if piece:
                        self.writing = True
                        writing.pieces.append(piece)
                        yield piece
                    if self.stopping:
                        break
            finally:
                stream.close()
                if writing.report is None and writing.pieces:  # the last chunk did not come
                    writing.report = llm.last_steering.to_dict()
        except KeyboardInterrupt:
            # It may have come between a decode and the note of it: trust nothing that is cached.
            llm.reset()
            if not self.stopping:  # it is meant for the program
                raise


def _usage(name: str) -> str:
    return f"/{name} {COMMANDS[name].argument}".rstrip()
