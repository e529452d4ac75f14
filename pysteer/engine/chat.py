"""llama-cpp-python's chat handlers, with the completion in the middle left to the engine.

A handler makes a prompt of messages, calls `create_completion`, and turns what that returns into a
chat completion. Here it is called with a stand-in for the model: once to see what it would have
completed, and later again with what the engine has written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeAlias, cast

from llama_cpp import Llama

from pysteer.engine.handle import Chunk, Completion
from pysteer.errors import SteeringError

Kept: TypeAlias = Callable[[], AbstractContextManager[None]]

_CHAT = inspect.signature(Llama.create_chat_completion)
_COMPLETION = inspect.signature(Llama.create_completion)

_ATTRIBUTES = frozenset({"verbose", "metadata", "model_path", "chat_format", "tokenizer_"})
_METHODS = frozenset(
    {"tokenize", "detokenize", "token_bos", "token_eos", "token_nl", "n_ctx", "n_vocab", "n_embd"}
)


def bind(signature: inspect.Signature, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a method of `Llama`, defaults filled in.

    Raises:
        SteeringError: one that it does not have, or one that is missing.
    """
    try:
        bound = signature.bind(None, **arguments)
    except TypeError as error:
        raise SteeringError(f"submit: {error}") from None
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "self"}


def completion_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of `create_completion`, defaults filled in; raises as `bind`."""
    return bind(_COMPLETION, arguments)


class _Vocabulary:
    """What handlers may ask a model, remembered so that it can be said again after its end."""

    def __init__(self, llm: Llama, kept: Kept) -> None:
        self._llm = llm
        self._kept = kept
        self._answers: dict[Any, Any] = {}

    def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        key = (method, repr(args), repr(sorted(kwargs.items())))
        if key not in self._answers:
            with self._kept():
                self._answers[key] = getattr(self._llm, method)(*args, **kwargs)
        return self._answers[key]


class _StandIn:
    """A `Llama` as far as a chat handler may see it."""

    def __init__(
        self, llm: Llama, vocabulary: _Vocabulary, complete: Callable[[dict[str, Any]], Any]
    ) -> None:
        self._llm = llm
        self._vocabulary = vocabulary
        self._complete = complete
        self._calls = 0
        self.chat_handler = llm.chat_handler
        self._chat_handlers = llm._chat_handlers

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        self._calls += 1
        if self._calls > 1:
            raise _refused(self._llm)
        bound = _COMPLETION.bind(None, *args, **kwargs)
        bound.apply_defaults()
        return self._complete({k: v for k, v in bound.arguments.items() if k != "self"})

    __call__ = create_completion

    def __getattr__(self, name: str) -> Any:
        if name in _ATTRIBUTES:
            return getattr(self._llm, name)
        if name in _METHODS:
            return lambda *args, **kwargs: self._vocabulary.ask(name, *args, **kwargs)
        raise SteeringError(
            f"this chat handler wants the model's {name!r}, which the engine cannot lend it; "
            "use SteeredLlama for it"
        )


class _Refused(SteeringError):
    pass


def _refused(llm: Llama) -> _Refused:
    return _Refused(
        f"the chat handler of format {llm.chat_format!r} makes more than one completion for one "
        "answer, which the engine cannot do; name one tool in tool_choice, or use SteeredLlama"
    )


class ChatShape:
    """The chat completion of one request.

    Args:
        llm: the model, for its chat handler and vocabulary.
        arguments: those of `create_chat_completion`.
        kept: keeps the model from being freed while it is asked something.

    Raises:
        SteeringError: arguments that `create_chat_completion` does not have, or a handler that
            makes more than one completion or evaluates by itself.
        Exception: what else the handler raises over these messages.
    """

    def __init__(self, llm: Llama, arguments: Mapping[str, Any], *, kept: Kept) -> None:
        self._llm = llm
        self._arguments = bind(_CHAT, arguments)
        self._vocabulary = _Vocabulary(llm, kept)
        self.completion: dict[str, Any] = {}
        """The arguments of `create_completion` that the handler arrived at."""

        def see(asked: dict[str, Any]) -> Iterator[Chunk]:
            if not asked["stream"]:  # although a stream is asked for: it reads the answer itself
                raise _refused(llm)
            self.completion = asked
            return iter(())

        try:
            self._call(see, stream=True)
        except _Refused:
            raise
        except Exception:
            if not self.completion:
                raise
            # Else it did not expect an answer without chunks.

    def _call(self, complete: Callable[[dict[str, Any]], Any], *, stream: bool) -> Any:
        stand_in = cast(Llama, _StandIn(self._llm, self._vocabulary, complete))
        return Llama.create_chat_completion(stand_in, **{**self._arguments, "stream": stream})

    def result(self, completion: Completion) -> dict[str, Any]:
        """The chat completion."""
        return cast("dict[str, Any]", self._call(lambda _: completion, stream=False))

    def stream(self, chunks: Iterator[Chunk]) -> Iterator[dict[str, Any]]:
        """The chunks of the chat completion."""
        return cast("Iterator[dict[str, Any]]", self._call(lambda _: chunks, stream=True))
