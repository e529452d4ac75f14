"""Answers of a chat: fitting a conversation into the context, and writing an answer."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pysteer.chat.handler import rendered_prompt
from pysteer.cli.chat_events import ChatSteering, Turn
from pysteer.errors import SteeringError
from pysteer.runtime.steered import SteeredLlama


@dataclass
class Answer:
    """An answer, filled in while the model writes.

    Attributes:
        pieces: text so far.
        finish_reason: "interrupted" until the model says otherwise.
        report: steering report, once there is one.
    """

    pieces: list[str] = field(default_factory=list)
    finish_reason: str = "interrupted"
    report: dict[str, Any] | None = None

    def turn(
        self, prompt: str, requested: ChatSteering, system: str | None, seed: int, left_out: int
    ) -> Turn:
        """Return the turn that this answer ends."""
        text = "".join(self.pieces)
        reason, report = self.finish_reason, self.report
        return Turn(prompt, text, reason, requested, report, system, seed, left_out)


class Writer:
    """Writes answers with a model, and can be stopped meanwhile.

    Args:
        llm: the model.
        max_tokens: token limit of an answer.
        temperature: 0 is greedy.

    Attributes:
        writing: the current answer has text.
        stopping: the current answer ends after the next token. Set by `stop`.
    """

    def __init__(self, llm: SteeredLlama, max_tokens: int, temperature: float) -> None:
        self._llm = llm
        self._max_tokens = max_tokens
        self._temperature = temperature
        self.writing = False
        self.stopping = False

    def fit(
        self, turns: Sequence[Turn], oldest: int, system: str | None, prompt: str
    ) -> tuple[list[Any], int]:
        """Return messages that leave room for an answer, and the first turn among them.

        Args:
            turns: the conversation so far.
            oldest: index of the first turn to send if there is room.
            system: system message, if any.
            prompt: the new message.

        Raises:
            SteeringError: the prompt alone is too long.
        """
        n_ctx = self._llm.n_ctx()
        room = n_ctx - min(self._max_tokens, n_ctx // 4)
        for first in range(min(oldest, len(turns)), len(turns) + 1):
            messages = [{"role": "system", "content": system}] if system is not None else []
            for turn in turns[first:]:
                messages.append({"role": "user", "content": turn.prompt})
                messages.append({"role": "assistant", "content": turn.response})
            messages.append({"role": "user", "content": prompt})
            n_tokens = len(rendered_prompt(self._llm, {"messages": messages}))
            if n_tokens <= room:
                break
        if n_tokens >= n_ctx:
            raise SteeringError(
                f"the message has {n_tokens} tokens and the context {n_ctx}; shorten the message, "
                "or start pysteer chat with a larger --context"
            )
        return messages, first

    def write(
        self, answer: Answer, messages: list[Any], requested: ChatSteering, seed: int
    ) -> Generator[str, None, None]:
        """Yield the pieces of an answer, and record them and the report in `answer`."""
        llm = self._llm
        steering: dict[str, Any] = {} if requested == "policy" else {"steering": requested}
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
                    answer.report = chunk.get("steering", answer.report)
                    answer.finish_reason = choice["finish_reason"] or answer.finish_reason
                    piece = choice["delta"].get("content")
                    if piece:
                        self.writing = True
                        answer.pieces.append(piece)
                        yield piece
                    if self.stopping:
                        break
            finally:
                stream.close()
                if answer.report is None and answer.pieces:  # the last chunk did not come
                    answer.report = llm.last_steering.to_dict()
        except KeyboardInterrupt:
            # It may have come between a decode and its record: forget all cached tokens.
            llm.reset()
            if not self.stopping:  # the interrupt is meant for the program
                raise
