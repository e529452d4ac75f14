"""`pysteer chat` without a terminal: entries in, events out."""

from __future__ import annotations

import json
import random
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pysteer.cli.chat_events import (
    AnswerComplete,
    Category,
    CategoryList,
    ChatSteering,
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
from pysteer.cli.chat_input import COMMANDS, parse_entry, usage
from pysteer.cli.chat_writer import Answer, Writer
from pysteer.errors import SteeringError, quoted
from pysteer.files import write_text
from pysteer.runtime.steered import SteeredLlama

_STOPPED_EARLY = "stopped before the first token"


class Session:
    """A conversation with a model, and the steering in force.

    `handle` takes an entry and yields events. `stop`, called meanwhile (from a signal handler, or
    by the reader of the events between two of them), ends the answer after the next token. A
    KeyboardInterrupt after `stop` ends the answer at once, and so does a reader that closes the
    generator. The text so far stays part of the conversation.

    Args:
        llm: the model. Used by this session alone; otherwise prompts are computed from the start.
        requested: steering at the beginning.
        policy: the policy's steering, category to strength or "auto"; None: no policy decides.
        system: system message.
        max_tokens: token limit of an answer.
        temperature: 0 is greedy.
        seed: of the answers' seeds; None draws one.

    Raises:
        SteeringError: `llm` cannot be steered by `requested`.
    """

    def __init__(
        self,
        llm: SteeredLlama,
        *,
        requested: ChatSteering = None,
        policy: Mapping[str, float | str] | None = None,
        system: str | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> None:
        self._llm = llm
        self._writer = Writer(llm, max_tokens, temperature)
        self._seeds = random.Random(seed)
        self._first = 0  # the oldest turn that fits into the context; the user has been told
        self._saved: set[Path] = set()
        self._policy = policy
        self.system = system
        self.turns: list[Turn] = []
        self.requested: ChatSteering = None
        self._check(requested)
        self.requested = requested

    @property
    def categories(self) -> list[str]:
        """Names of the pack's categories."""
        return list(self._llm.pack.categories) if self._llm.pack is not None else []

    @property
    def writing(self) -> bool:
        """True once the current answer has text."""
        return self._writer.writing

    @property
    def stopping(self) -> bool:
        """True once `stop` has been called for the current answer."""
        return self._writer.stopping

    def stop(self) -> None:
        """End the answer after the next token."""
        self._writer.stopping = True

    def completions(self, text: str) -> list[str]:
        """Return the command lines that begin with `text`."""
        if not text.startswith("/"):
            return []
        if " " not in text:
            lines = [f"/{name}" + (" " if c.argument else "") for name, c in COMMANDS.items()]
        else:
            steer = [f"/steer {name} " for name in self.categories]
            lines = [s + "auto" for s in steer if text.startswith(s)] or steer
        return [line for line in lines if line.startswith(text)]

    def handle(self, entry: str) -> Generator[Event, None, None]:
        """Carry out a command, or answer a message; see `pysteer.cli.chat_input`."""
        self._writer.stopping = self._writer.writing = False
        try:
            name, text = parse_entry(entry)
            yield from self._message(text) if name is None else getattr(self, f"_do_{name}")(text)
        except SteeringError as error:
            yield UserError(str(error))
        except (ValueError, RuntimeError) as error:  # of llama_cpp, or of a chat template
            yield UserError(f"no answer: {error}")

    # ---- commands ----------------------------------------------------------------------------

    def _do_steer(self, argument: str) -> Generator[Event, None, None]:
        if not argument:
            now = describe_steering(self.requested)
            yield Notice(f"steering: {now}; write {usage('steer')} to change it")
            return
        self._require_pack()
        *words, value = argument.rsplit(None, 1)
        category = words[0] if words else ""
        if len(category) > 1 and category[0] == category[-1] and category[0] in "'\"":
            category = category[1:-1]
        if not category:
            names = ", ".join(self.categories)
            raise SteeringError(f"write {usage('steer')}, with a category of {names}")
        try:
            strength: float | str = value if value == "auto" else float(value)
        except ValueError:
            raise SteeringError(
                f"{quoted(value)} is not a strength; write {usage('steer')}, "
                f"as in /steer {self.categories[0]} 0.8"
            ) from None
        requested = dict(self.requested) if isinstance(self.requested, dict) else {}
        requested[category] = strength
        self._check(requested)
        if strength == 0:
            del requested[category]
        yield self._steer(requested or None)

    def _do_auto(self, _: str) -> Generator[Event, None, None]:
        self._require_pack()
        self._check("auto")
        yield self._steer("auto")

    def _do_policy(self, _: str) -> Generator[Event, None, None]:
        self._require_pack()
        if self._policy is None:
            raise SteeringError(
                "no policy and no router decides here; start pysteer chat with --policy"
            )
        yield self._steer("policy")

    def _do_off(self, _: str) -> Generator[Event, None, None]:
        yield self._steer(None)

    def _do_why(self, _: str) -> Generator[Event, None, None]:
        report = self._last().steering
        if report is None:
            raise SteeringError("the last answer has no steering report")
        yield Explanation(report)

    def _do_compare(self, _: str) -> Generator[Event, None, None]:
        turn = self._last()
        if turn.requested is None:
            raise SteeringError("the last answer was made without steering; nothing to compare")
        messages, first = self._fit(self.turns[:-1], turn.system, turn.prompt)
        answer = Answer()
        for _piece in self._writer.write(answer, messages, None, turn.seed):
            pass  # the answers are shown side by side, once both are complete
        if self.stopping and not answer.pieces:
            yield Notice(_STOPPED_EARLY)
            return
        if turn.requested != self.requested:
            yield Notice(
                f"the last answer was given under steering {describe_steering(turn.requested)}; "
                "send the message again to compare the steering in force now, "
                f"{describe_steering(self.requested)}"
            )
        yield Comparison(turn, answer.turn(turn.prompt, None, turn.system, turn.seed, first))

    def _do_categories(self, _: str) -> Generator[Event, None, None]:
        self._require_pack()
        pack = self._llm.pack
        assert pack is not None
        gated = pack.router.categories if pack.router is not None else ()
        yield CategoryList(
            [
                Category(name, vector.site, vector.layers, name in gated, self._now(name))
                for name, vector in pack.categories.items()
            ]
        )

    def _do_system(self, argument: str) -> Generator[Event, None, None]:
        self.system = argument or None
        self._first = 0  # the new message may be shorter
        yield Notice("system message set" if argument else "system message removed")

    def _do_undo(self, _: str) -> Generator[Event, None, None]:
        turn = self._last()
        self.turns.pop()
        self._first = 0  # there may be room again
        yield Notice(f"forgotten: {quoted(turn.prompt)} and its answer")

    def _do_clear(self, _: str) -> Generator[Event, None, None]:
        self.turns.clear()
        self._first = 0
        yield Notice("conversation forgotten")

    def _do_save(self, argument: str) -> Generator[Event, None, None]:
        self._last()
        path = Path(argument).expanduser()
        text = "".join(json.dumps(asdict(turn), allow_nan=False) + "\n" for turn in self.turns)
        # Replace only files of this session.
        if path not in self._saved and (path.exists() or path.is_symlink()):
            raise SteeringError(f"{path} exists already; name a new file")
        write_text(path, text)
        self._saved.add(path)
        yield Notice(f"saved to {path}: {len(self.turns)} turn{'s' * (len(self.turns) > 1)}")

    def _do_help(self, _: str) -> Generator[Event, None, None]:
        yield HelpText([(usage(name), command.meaning) for name, command in COMMANDS.items()])

    def _do_quit(self, _: str) -> Generator[Event, None, None]:
        yield Goodbye()

    # ---- steering ----------------------------------------------------------------------------

    def _steer(self, requested: ChatSteering) -> Notice:
        self.requested = requested
        return Notice(f"steering: {describe_steering(requested)}")

    def _check(self, requested: ChatSteering) -> None:
        """Raise SteeringError unless the model can be steered so."""
        if requested is not None and requested != "policy":
            with self._llm.steering(requested):
                pass

    def _now(self, category: str) -> float | str | None:
        requested = self._policy if self.requested == "policy" else self.requested
        return requested.get(category) if isinstance(requested, Mapping) else requested

    def _require_pack(self) -> None:
        if self._llm.pack is None:
            raise SteeringError("no pack to steer with; start pysteer chat with --pack")

    def _last(self) -> Turn:
        if not self.turns:
            raise SteeringError("there is no answer yet")
        return self.turns[-1]

    # ---- answers -----------------------------------------------------------------------------

    def _message(self, prompt: str) -> Generator[Event, None, None]:
        if not prompt.strip():
            return
        system, requested, seed = self.system, self.requested, self._seeds.getrandbits(31)
        answer = Answer()
        try:
            messages, first = self._fit(self.turns, system, prompt)
            if first > self._first:
                turns = "turn is" if first == 1 else f"{first} turns are"
                yield Notice(f"the context is full: the oldest {turns} left out from here on")
            self._first = first
            with closing(self._writer.write(answer, messages, requested, seed)) as pieces:
                for piece in pieces:
                    yield TextPiece(piece)
        except GeneratorExit:  # the reader left in the middle of the answer
            if answer.pieces:
                self.turns.append(answer.turn(prompt, requested, system, seed, first))
            raise
        else:
            if answer.finish_reason == "interrupted" and not answer.pieces:
                yield Notice(f"{_STOPPED_EARLY}; the message is forgotten")
                return
            turn = answer.turn(prompt, requested, system, seed, first)
            self.turns.append(turn)
            yield AnswerComplete(turn)

    def _fit(self, turns: list[Turn], system: str | None, prompt: str) -> tuple[list[Any], int]:
        return self._writer.fit(turns, self._first, system, prompt)
