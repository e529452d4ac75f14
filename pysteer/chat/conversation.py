"""The conversation of one chat request."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from llama_cpp import Llama

from pysteer.chat.handler import HandlerEvaluatesError, Hold, rendered_prompt
from pysteer.chat.messages import Message, snapshot, without_images
from pysteer.chat.spans import Span, TemplateEnds, message_span, template_ends
from pysteer.chat.template import require_form
from pysteer.errors import SteeringError

_log = logging.getLogger(__name__)
_warned: set[tuple[str | None, type[Exception]]] = set()  # chat format and error


class Conversation:
    """Finds the last user message in the prompts of one chat request.

    The first prompt costs one rendering and one tokenisation by the model's chat handler for each
    sentinel. Multimodal handlers, which evaluate tokens and images themselves, render the texts
    without the images. If a handler cannot render the sentinels, the whole prompt stands for the
    message, with a warning once.

    Args:
        llm: the model; nothing is decoded.
        arguments: arguments of `create_chat_completion`. The messages are copied: their owner may
            change them before a stream is read.
        hold: see `pysteer.chat.handler.Hold`.
    """

    def __init__(
        self, llm: Llama, arguments: Mapping[str, Any], *, hold: Hold = nullcontext
    ) -> None:
        self._llm = llm
        self._arguments = {**arguments, "messages": snapshot(arguments.get("messages"))}
        self._hold = hold
        self._finding = False
        self._found: Span | None = None
        self._first: list[int] = []  # the first prompt

    def message_span(self, prompt: Sequence[int]) -> Span:
        """Return the range of the last user message in a prompt; see `pysteer.chat.spans`.

        A handler that makes several completions for one answer starts each prompt with the same
        messages, so the message has the same range in all prompts.

        Args:
            prompt: tokens of a prompt that the handler has rendered for this request, without the
            positions of images.
        """
        prompt = list(prompt)
        if self._found is None or prompt[: self._found[1]] != self._first[: self._found[1]]:
            self._found, self._first = self._find(prompt), prompt
        return (0, len(prompt)) if self._found == (0, len(self._first)) else self._found

    def require_form(self) -> None:
        """Raise SteeringError where the form is a guess; see `pysteer.chat.template`."""
        require_form(self._llm)

    def require_found(self) -> None:
        """Raise SteeringError while the message is being found.

        A handler that was called for that may use the model itself and not the one it was given.
        """
        if self._finding:
            raise SteeringError("the chat handler does not use the model that it is called with")

    def _find(self, prompt: Sequence[int]) -> Span:
        self._finding = True
        try:
            return message_span(prompt, self._ends())
        except Exception as error:  # of any kind: handlers are foreign code
            self._warn(error)
            return 0, len(prompt)
        finally:
            self._finding = False

    def _ends(self) -> TemplateEnds | None:
        messages = self._arguments["messages"]
        try:
            return template_ends(self._render, messages)
        except HandlerEvaluatesError:
            render = partial(self._render, evaluates=True)
            return template_ends(render, without_images(messages))

    def _warn(self, error: Exception) -> None:
        chat_format = self._llm.chat_format
        if (chat_format, type(error)) not in _warned:
            _warned.add((chat_format, type(error)))
            _log.warning(
                "the chat handler of format %r renders no other user message (%s: %s), so the "
                "router reads the whole prompt",
                *(chat_format, type(error).__name__, error),
            )

    def _render(self, messages: Sequence[Message], *, evaluates: bool = False) -> list[int]:
        arguments = {**self._arguments, "messages": list(messages)}
        return rendered_prompt(self._llm, arguments, hold=self._hold, evaluates=evaluates)
