"""Chats whose handler evaluates the prompt by itself, as multimodal handlers do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from pysteer.errors import SteeringError
from pysteer.llama.hooked import HookedLlama
from pysteer.runtime.cache import SteeredCache
from pysteer.runtime.generation import ActiveSteering
from pysteer.runtime.handler_prompt import AgainError, HandlerPrompt
from pysteer.runtime.turns import Turns

_CALLS: Final = 3
"""Most calls of a handler: for the length of its prompt, for a gate, and under its decision."""

Evaluate = Callable[[Sequence[int]], None]


class HandlerChats:
    """Calls chat handlers as often as the rows of their images have to be computed.

    All calls need the context's lock.

    Args:
        llm: the model.
        cache: the steering of the tokens in its context.
        turns: the generations that share the context.
    """

    def __init__(self, llm: HookedLlama, cache: SteeredCache, turns: Turns) -> None:
        self._llm = llm
        self._cache = cache
        self._turns = turns

    def run(self, active: ActiveSteering, chat: Callable[[], Any]) -> Any:
        """Make the chat of a request.

        Args:
            active: the steering of the request.
            chat: calls the chat handler.

        Returns:
            The result of the handler.

        Raises:
            SteeringError: an image cannot be steered, or the handler makes another prompt when it
                is called again.
        """
        request = active.request
        assert request is not None
        if request.prompt is not None and request.prompt.open:
            return chat()  # by a handler, as a part of its own chat
        self._turns.take(None)
        self._cache.install(None)
        with self._llm.context.decoding([]):  # writes zeros over the latest control vector
            pass
        prompt = request.prompt = HandlerPrompt(self._cache.start(active, None))
        for _ in range(_CALLS):
            try:
                self._cache.watch(prompt)
                result = chat()
                if not prompt.again:
                    return result
            except AgainError:
                pass
            except BaseException:
                prompt.open, request.latest = False, None
                self._llm.reset()  # rows of no use without the rest
                raise
            finally:
                prompt.open = False
                self._llm.context.drop_foreign()
            request.latest = None  # nothing of it is needed any more
            prompt.restart()
        raise SteeringError(
            "the chat handler was called again for its images, and completed another prompt each "
            "time; pass steering=None"
        )

    def evaluate(self, active: ActiveSteering, tokens: Sequence[int], evaluate: Evaluate) -> bool:
        """Evaluate a part of a handler's prompt.

        Returns:
            False if no handler evaluates a prompt; nothing was evaluated.
        """
        request = active.request
        if request is None or request.prompt is None or not request.prompt.open:
            return False
        assert request.prompt.sequence is not None
        self._turns.evaluate_prompt(request, request.prompt.sequence)
        self._cache.evaluate_part(request.prompt, tokens, evaluate)
        return True

    def settle(self, active: ActiveSteering | None, tokens: list[int], evaluate: Evaluate) -> None:
        """Complete the prompt of the handler that runs, if one does; see `SteeredCache.settle`."""
        request = None if active is None else active.request
        if active is None or request is None or self._turns.running is not None:
            return
        prompt = request.prompt
        if prompt is None or not prompt.open:
            return
        request.latest = None  # the prompt's, which may be computed again
        if not self._cache.settle(active, prompt, tokens, evaluate):
            request.prompt = None
            return
        assert prompt.sequence is not None  # until a generation takes it
        self._turns.evaluate_prompt(request, prompt.sequence)
