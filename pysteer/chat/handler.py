"""Calls of a model's chat handler with a stand-in for the model.

llama-cpp-python's chat handlers render messages to a prompt, call the model's `create_completion`,
and turn the completion into a chat completion. A stand-in for the model records the arguments of
`create_completion`, which gives the prompt of any messages under any handler. The stand-in can also
return an existing completion, which gives the chat completion.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias, cast

import llama_cpp
import numpy as np
from llama_cpp import Llama

from pysteer.chat.messages import user_message
from pysteer.chat.template import renders_chats
from pysteer.errors import SteeringError

Hold: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Makes a context manager that keeps the model from being freed inside its block."""

Complete: TypeAlias = Callable[[dict[str, Any]], Any]
"""A function with the arguments and the result of `create_completion`."""

_CHAT = inspect.signature(Llama.create_chat_completion)
_COMPLETION = inspect.signature(Llama.create_completion)

_ATTRIBUTES = frozenset({"verbose", "metadata", "model_path", "chat_format", "tokenizer_"})
_METHODS = frozenset(
    {"tokenize", "detokenize", "token_bos", "token_eos", "token_nl", "n_ctx", "n_vocab", "n_embd"}
)


class ChatCall:
    """One chat request in the model's chat handler.

    Args:
        llm: the model; its chat handler and vocabulary are used, nothing is decoded.
        arguments: those of `create_chat_completion`.
        hold: see `Hold`.

    Attributes:
        completion: the arguments with which the handler called `create_completion`.

    Raises:
        SteeringError: an argument that `create_chat_completion` lacks, or a handler that makes more
            than one completion or evaluates tokens itself.
        Exception: any other exception that the handler raises over these messages.
    """

    def __init__(
        self, llm: Llama, arguments: Mapping[str, Any], *, hold: Hold = nullcontext
    ) -> None:
        self._llm = llm
        self._arguments = _bind(_CHAT, arguments)
        self._vocabulary = _Vocabulary(llm, hold)
        self.completion: dict[str, Any] = {}

        def record(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
            if not arguments["stream"]:  # a handler that reads the answer although asked to stream
                raise _several_completions(llm)
            self.completion = arguments
            return iter(())

        try:
            self._call(record, stream=True)
        except _SeveralCompletionsError:
            raise
        except Exception:
            if not self.completion:
                raise
            # The handler did not expect an answer without chunks.

    def _call(self, complete: Complete, *, stream: bool) -> Any:
        stand_in = cast(Llama, _StandIn(self._llm, self._vocabulary, complete))
        return Llama.create_chat_completion(stand_in, **{**self._arguments, "stream": stream})

    def result(self, completion: dict[str, Any]) -> dict[str, Any]:
        """Return the chat completion of a completion."""
        return cast("dict[str, Any]", self._call(lambda _: completion, stream=False))

    def stream(self, chunks: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Return the chunks of the chat completion from the chunks of a completion."""
        return cast("Iterator[dict[str, Any]]", self._call(lambda _: chunks, stream=True))


def rendered_prompt(
    llm: Llama,
    arguments: Mapping[str, Any],
    *,
    hold: Hold = nullcontext,
    evaluates: bool = False,
) -> list[int]:
    """Return the tokens of the first prompt that a chat handler asks the model to complete.

    Args:
        llm: the model; nothing is decoded.
        arguments: those of `create_chat_completion`.
        hold: see `Hold`.
        evaluates: whether the handler may call `eval`, which then only notes the tokens.

    Raises:
        HandlerEvaluatesError: a handler that evaluates tokens although it may not.
        SteeringError: an argument that `create_chat_completion` lacks, or a handler that decodes by
            itself.
        Exception: any other exception that the handler raises over these messages.
    """
    prompts: list[str | list[int]] = []

    def record(arguments: dict[str, Any]) -> Any:
        prompts.append(arguments["prompt"])
        raise _RecordedError  # the handler has nothing more to tell

    kind = _EvaluatingStandIn if evaluates else _StandIn
    stand_in = cast(Llama, kind(llm, _Vocabulary(llm, hold), record))
    try:
        Llama.create_chat_completion(stand_in, **_bind(_CHAT, arguments))
    except Exception:
        if not prompts:
            raise
    if not prompts:
        raise SteeringError(f"the chat handler of format {llm.chat_format!r} completed no prompt")
    with hold():
        return prompt_tokens(llm, prompts[0])


def user_prompt(llm: Llama, text: str) -> list[int]:
    """Return the prompt of a single user's message: a chat, or the bare text.

    Extraction and evaluation use this form; serving renders chats alike.

    Args:
        llm: the model; nothing is decoded. Where the form of its chats would be a guess (see
            `pysteer.chat.template`), the text alone is the prompt.
        text: the message.
    """
    if renders_chats(llm):
        return rendered_prompt(llm, {"messages": [user_message(text)]})
    return prompt_tokens(llm, text)


def chat_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of `create_chat_completion`, each by its name."""
    return {**dict(zip(list(_CHAT.parameters)[1:], args, strict=False)), **kwargs}


def completion_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of `create_completion`, defaults filled in.

    Raises:
        SteeringError: an unknown argument, or a missing one.
    """
    return _bind(_COMPLETION, arguments)


def prompt_tokens(llm: Llama, prompt: str | Sequence[int]) -> list[int]:
    """Return the tokens that `create_completion` makes of a prompt."""
    if not isinstance(prompt, str):
        return list(prompt)
    vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
    first, last = llm.token_bos(), llama_cpp.llama_vocab_sep(vocabulary)
    if not prompt and first != -1:
        return [first]
    tokens = llm.tokenize(prompt.encode("utf-8"), add_bos=False, special=True) if prompt else []
    if llama_cpp.llama_vocab_get_add_bos(vocabulary) and first != -1:
        tokens = [first, *tokens]
    if llama_cpp.llama_vocab_get_add_eos(vocabulary) or last != -1:
        tokens = [*tokens, last if last != -1 else llm.token_eos()]
    return tokens


class HandlerEvaluatesError(SteeringError):
    """A chat handler uses more of its model than the vocabulary, as multimodal handlers do."""


class _RecordedError(Exception):
    pass


class _SeveralCompletionsError(SteeringError):
    pass


def _several_completions(llm: Llama) -> _SeveralCompletionsError:
    return _SeveralCompletionsError(
        f"the chat handler of format {llm.chat_format!r} makes several completions for one "
        "answer, which Engine does not support; name one tool in tool_choice, or use SteeredLlama"
    )


def _bind(signature: inspect.Signature, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a method of `Llama`, defaults filled in."""
    try:
        bound = signature.bind(None, **arguments)
    except TypeError as error:
        raise SteeringError(f"submit: {error}") from None
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "self"}


class _Vocabulary:
    """Recorded answers of the model, which a handler gets again after the model is freed."""

    def __init__(self, llm: Llama, hold: Hold) -> None:
        self._llm = llm
        self._hold = hold
        self._answers: dict[Any, Any] = {}

    def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        key = _key((method, args, sorted(kwargs.items())))
        if key not in self._answers:
            with self._hold():
                self._answers[key] = getattr(self._llm, method)(*args, **kwargs)
        return self._answers[key]


def _key(value: Any) -> Any:
    """Return a key that only equal arguments of one type share; `repr` of an array is cut."""
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_key, value))
    if hasattr(value, "tolist"):  # of numpy
        return type(value), _key(value.tolist())
    return type(value), value if isinstance(value, Hashable) else repr(value)


class _StandIn:
    """The part of a `Llama` that a chat handler may use."""

    def __init__(self, llm: Llama, vocabulary: _Vocabulary, complete: Complete) -> None:
        self._llm = llm
        self._vocabulary = vocabulary
        self._complete = complete
        self._calls = 0
        self.chat_handler = llm.chat_handler
        self._chat_handlers = llm._chat_handlers

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        self._calls += 1
        if self._calls > 1:
            raise _several_completions(self._llm)
        bound = _COMPLETION.bind(None, *args, **kwargs)
        bound.apply_defaults()
        return self._complete({k: v for k, v in bound.arguments.items() if k != "self"})

    __call__ = create_completion

    def __getattr__(self, name: str) -> Any:
        if name in _ATTRIBUTES:
            return getattr(self._llm, name)
        if name in _METHODS:
            return lambda *args, **kwargs: self._vocabulary.ask(name, *args, **kwargs)
        raise HandlerEvaluatesError(
            f"this chat handler uses the model's {name!r} besides the vocabulary; Engine "
            "cannot serve such a handler, SteeredLlama can"
        )


class _NoContext:
    """The context of a stand-in, in which nothing is decoded."""

    def kv_cache_clear(self) -> None:
        pass

    @property
    def ctx(self) -> Any:
        raise SteeringError("the chat handler decodes by itself, also without images")


class _EvaluatingStandIn(_StandIn):
    """A stand-in for handlers that evaluate a text by themselves before they complete it."""

    def __init__(self, llm: Llama, vocabulary: _Vocabulary, complete: Complete) -> None:
        super().__init__(llm, vocabulary, complete)
        self._ctx = _NoContext()
        self.n_batch = llm.n_batch
        self.input_ids = np.zeros(llm.n_ctx(), np.intc)
        self.n_tokens = 0

    def reset(self) -> None:
        self.n_tokens = 0

    def eval(self, tokens: Sequence[int]) -> None:
        stop = self.n_tokens + len(tokens)
        self.input_ids[self.n_tokens : stop] = tokens
        self.n_tokens = stop
