"""The end of a completion at `max_tokens`, also inside a character.

llama-cpp-python counts no token that leaves a character unfinished, so that a run of such tokens
would go on to the end of the context. `create_completion` hands its `stopping_criteria` on to
`generate`, and a `TokenLimit` in their place carries the number of tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from llama_cpp import Llama, StoppingCriteriaList

_COMPLETION = inspect.signature(Llama.create_completion)


class TokenLimit(StoppingCriteriaList):
    """The number of tokens of one completion, in the place of its stopping criteria.

    Args:
        llm: the model.
        arguments: arguments of `create_completion`, defaults filled in.

    Attributes:
        criteria: the completion's own stopping criteria.
        reached: True if the limit ended the completion inside a character.
    """

    def __init__(self, llm: Llama, arguments: dict[str, Any]) -> None:
        super().__init__()
        self._llm = llm
        self._stream = bool(arguments["stream"])
        self._echoed = arguments["prompt"] if arguments["echo"] else ""
        self._logprobs = arguments["logprobs"] is not None
        stop = arguments["stop"] or []
        self._stop = [s.encode() for s in ([stop] if isinstance(stop, str) else stop)]
        # llama-cpp-python counts the BOS token of an empty prompt.
        asked = arguments["max_tokens"]
        self._asked = None if asked is None or asked <= 0 else asked - (not arguments["prompt"])
        self._step: Callable[[], AbstractContextManager[None]] = nullcontext
        self._prompt: list[int] = []
        self._drawn: list[int] = []
        self.criteria = arguments["stopping_criteria"]
        self.reached = False

    def begin(self, prompt: list[int], step: Callable[[], AbstractContextManager[None]]) -> int:
        """Return the number of tokens that may be drawn after a prompt, at least 1.

        Args:
            prompt: tokens.
            step: context manager of a step of the generation, for calls of the criteria.
        """
        self._prompt, self._drawn, self.reached, self._step = prompt, [], False, step
        room = len(self._llm.input_ids) - len(prompt)  # llama.cpp may round n_ctx up
        return max(room if self._asked is None else min(self._asked, room), 1)

    def note(self, token: int) -> None:
        """Count a token that was drawn."""
        self._drawn.append(token)

    def __call__(self, *args: Any) -> bool:
        """Return True if the completion's own criteria end the text."""
        if self.criteria is None:
            return False
        with self._step():
            return bool(self.criteria(*args))

    def finish(self, result: Any) -> Any:
        """Return the completion, with its whole text if the text ends inside a character."""
        if self._stream:
            return self._finished(result)
        choice = result["choices"][0]
        if choice["finish_reason"] == "length" and self._ends_inside:
            text, choice["finish_reason"] = self._ended()
            choice["text"] = self._echoed + text
        return result

    @property
    def _ends_inside(self) -> bool:
        """True if the text ends inside a character, or in U+FFFD, which looks alike."""
        return self.reached or self._text.decode(errors="replace").endswith("\ufffd")

    @property
    def _text(self) -> bytes:
        return self._llm.detokenize(self._drawn, prev_tokens=self._prompt)

    def _ended(self) -> tuple[str, str]:
        """Return the text up to the first stop string, with U+FFFD for bytes that are not UTF-8."""
        text = self._text
        for stop in self._stop:
            if stop in text:
                return text[: text.index(stop)].decode(errors="replace"), "stop"
        return text.decode(errors="replace"), "length"

    def _finished(self, chunks: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        sent = ""
        for chunk in chunks:
            choice = chunk["choices"][0]
            # With logprobs there is a chunk for each token.
            if choice["finish_reason"] == "length" and not self._logprobs and self._ends_inside:
                text, choice["finish_reason"] = self._ended()
                if len(text) > len(sent) and text.startswith(sent):
                    rest = {**choice, "text": text[len(sent) :], "finish_reason": None}
                    yield {**chunk, "choices": [rest]}
            elif self.reached and not self._logprobs and choice["finish_reason"] is None:
                continue  # llama-cpp-python leaves out the bytes that are not UTF-8
            sent += choice["text"]
            yield chunk


def limited(
    llm: Llama, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[TokenLimit, dict[str, Any]]:
    """Return the limit of a call of `create_completion`, and the arguments that carry it."""
    bound = _COMPLETION.bind(llm, *args, **kwargs)
    bound.apply_defaults()
    arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
    limit = TokenLimit(llm, arguments)
    return limit, {**arguments, "stopping_criteria": limit}
