"""`Handle`: a request seen from the outside."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pysteer.engine.text import FinishReason
from pysteer.llama.forks import bind_to_process, left_behind

Completion = dict[str, Any]
Chunk = dict[str, Any]


class End(NamedTuple):
    """The end of a request.

    Attributes:
        text: the whole text written.
        finish_reason: reason for the end of the text.
        prompt_tokens: number of prompt tokens.
        completion_tokens: number of tokens written.
        steering: report of the steering; see `pysteer.runtime.report`.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    steering: dict[str, Any]


class Shape(Protocol):
    """Converts a completion, or its chunks, into the results of a request."""

    def result(self, completion: Completion) -> dict[str, Any]:
        """Return the dictionary for `Handle.result`."""

    def stream(self, chunks: Iterator[Chunk]) -> Iterator[dict[str, Any]]:
        """Return the items of iterating over the handle."""


class PlainShape:
    """Returns completions unchanged."""

    def result(self, completion: Completion) -> dict[str, Any]:
        """Return the completion."""
        return completion

    def stream(self, chunks: Iterator[Chunk]) -> Iterator[dict[str, Any]]:
        """Return the chunks."""
        return chunks


class Handle:
    """One request: its stream, its result, and the way to end it.

    Iterating yields the chunks of `create_chat_completion(stream=True)`, or for a `prompt` of
    `create_completion(stream=True)`. Every iteration, in any thread, starts at the first chunk. The
    last chunk and the result have the key "steering".

    Attributes:
        cancelled: `cancel` was called.
        first_logits: float32 (n_vocab,), logits of the first token of the text; None until then,
            and where `submit` was not asked to keep them.
        prompt_tokens: tokens of the prompt.
        text_tokens: tokens of the text; empty until the request is done.
    """

    def __init__(
        self, *, model: str, shape: Shape, echo: str = "", prompt_tokens: Sequence[int] = ()
    ) -> None:
        self._model = model
        self._shape = shape
        self._echo = echo
        self._id = f"cmpl-{uuid.uuid4()}"
        self._created = int(time.time())
        self._changed = threading.Condition()
        self._texts: list[str] = []
        self._end: End | None = None
        self._error: BaseException | None = None
        self._result: dict[str, Any] | None = None
        self._on_cancel: Callable[[], None] | None = None
        self._require_waitable: Callable[[], None] | None = None
        self._left = False
        bind_to_process(self)
        self.cancelled = False
        self.first_logits: npt.NDArray[np.float32] | None = None
        self.prompt_tokens: Sequence[int] = prompt_tokens
        self.text_tokens: Sequence[int] = ()

    # ---- the caller's side -------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """The request has ended: by itself, cancelled, or by an error."""
        return self._end is not None or self._error is not None

    def cancel(self) -> None:
        """End the request soon; the result has the text so far and "cancelled" as finish reason.

        Does nothing to a request that is done.

        Raises:
            SteeringError: in a forked process.
        """
        with self._changed:
            if not self.done:
                self._require_end_to_come()
            self.cancelled = True
            wake = self._on_cancel
        if wake is not None:
            wake()

    def result(self, timeout: float | None = None) -> dict[str, Any]:
        """Return the dictionary of `create_chat_completion` or `create_completion`.

        Args:
            timeout: seconds to wait; None waits without limit.

        Raises:
            TimeoutError: not done by then. The request goes on.
            SteeringError: decoding failed, or is going on in another process.
            BaseException: raised by a logits processor or stopping criterion of the request.
        """
        with self._changed:
            if not self.done:
                self._check_wait()
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"not done after {timeout} seconds")
            if self._error is not None:
                raise self._error
            if self._result is None:
                self._result = self._finished(self._shape.result(self._completion()))
            return self._result

    def __iter__(self) -> Iterator[dict[str, Any]]:
        chunks = _Chunks(self._chunks())
        held: dict[str, Any] | None = None
        for chunk in self._shape.stream(chunks):
            if held is not None:
                yield held
                held = None
            if chunks.ended:
                held = chunk  # possibly the last
            else:
                yield chunk
        if held is not None:
            yield self._finished(held)

    def leave(self) -> None:
        """Become the copy in a forked process, where the request never ends."""
        self._changed = threading.Condition()
        self._left = True

    def _require_end_to_come(self) -> None:
        if self._left:
            raise left_behind("the engine")

    def _check_wait(self) -> None:
        self._require_end_to_come()
        if self._require_waitable is not None:
            self._require_waitable()

    # ---- the scheduler's side ----------------------------------------------------------------

    def attach(self, wake: Callable[[], None], require_waitable: Callable[[], None]) -> None:
        """Call `wake` when the request is cancelled, and `require_waitable` before a wait."""
        self._on_cancel = wake
        self._require_waitable = require_waitable

    def push(self, text: str) -> None:
        """Add text to the stream."""
        with self._changed:
            self._texts.append(text)
            self._changed.notify_all()

    def finish(self, end: End) -> None:
        """End the request."""
        self._close(end, None)

    def fail(self, error: BaseException) -> None:
        """End the request with an error."""
        self._close(None, error)

    def _close(self, end: End | None, error: BaseException | None) -> None:
        with self._changed:
            if self.done:  # the first end holds
                return
            self._end, self._error = end, error
            self._on_cancel = self._require_waitable = None
            self._changed.notify_all()

    # ---- dictionaries ------------------------------------------------------------------------

    def _finished(self, outcome: dict[str, Any]) -> dict[str, Any]:
        assert self._end is not None
        outcome = {**outcome, "steering": self._end.steering}
        if self._end.finish_reason == "cancelled":  # chat handlers have tool calls end as such
            choices = [{**choice, "finish_reason": "cancelled"} for choice in outcome["choices"]]
            outcome["choices"] = choices
        return outcome

    def _completion(self) -> Completion:
        end = self._end
        assert end is not None
        return {
            **self._head(),
            "choices": [_choice(self._echo + end.text, end.finish_reason)],
            "usage": {
                "prompt_tokens": end.prompt_tokens,
                "completion_tokens": end.completion_tokens,
                "total_tokens": end.prompt_tokens + end.completion_tokens,
            },
        }

    def _chunks(self) -> Iterator[Chunk]:
        read = 0
        while True:
            with self._changed:
                while len(self._texts) == read and not self.done:
                    self._check_wait()
                    self._changed.wait()
                fresh = self._texts[read:]
                end, error = self._end, self._error
            read += len(fresh)
            for text in fresh:
                yield {**self._head(), "choices": [_choice(text, None)]}
            if error is not None:
                raise error
            if end is not None:
                yield {**self._head(), "choices": [_choice("", end.finish_reason)]}
                return

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
        }


class _Chunks:
    """An iterator over chunks that knows, in `ended`, that its latest chunk was the last."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self._chunks = chunks
        self.ended = False

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        chunk = next(self._chunks)
        self.ended = chunk["choices"][0]["finish_reason"] is not None
        return chunk


def _choice(text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"text": text, "index": 0, "logprobs": None, "finish_reason": finish_reason}
