"""The form of a model's chats: the template in its file, a format that was chosen, or a guess."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_cpp import Llama, llama_chat_format

from pysteer.errors import SteeringError, quoted

_METADATA = "tokenizer.chat_template"
_FORMAT = "chat_template.default"  # llama-cpp-python's name for the template of the metadata


class GuessedFormat(str):
    """The chat format that llama-cpp-python takes where a file has no template and none was given.

    A string like any format, so that unsteered chats stay as llama-cpp-python has them.
    """

    __slots__ = ()


def has_template(llm: Llama) -> bool:
    """Return True if the model file has a chat template."""
    return bool(llm.metadata.get(_METADATA))


def chooses_format(llama_arguments: Mapping[str, Any]) -> bool:
    """Return True if the arguments of `Llama` choose a chat format or handler."""
    chosen = llama_arguments.get("chat_format")
    if chosen is not None and not isinstance(chosen, GuessedFormat):
        return True
    return llama_arguments.get("chat_handler") is not None


def settle_format(llm: Llama, llama_arguments: Mapping[str, Any]) -> None:
    """Settle how a new model renders chats.

    A format or handler that was chosen is kept. Otherwise the template in the file renders, also
    where llama-cpp-python recognises it (ChatML, Mistral, Llama 3) and takes its own formatter,
    which gives other tokens. Without a template llama-cpp-python's fallback stays, as a guess.

    Raises:
        SteeringError: a format was chosen that neither llama-cpp-python nor the file has.
    """
    if chooses_format(llama_arguments):
        if llm.chat_handler is None and llm.chat_format is not None:
            _require_format(llm, llm.chat_format)
    elif has_template(llm):
        llm.chat_format = _FORMAT
    else:
        llm.chat_format = GuessedFormat(llm.chat_format)


def renders_chats(llm: Llama) -> bool:
    """Return True if the form of chats is known: a template, or a format or handler was chosen."""
    return llm.chat_handler is not None or not isinstance(llm.chat_format, GuessedFormat)


def require_form(llm: Llama) -> None:
    """Raise SteeringError where the form of chats is a guess, on which no router may decide."""
    if not renders_chats(llm):
        raise SteeringError(
            "the model file has no chat template, so a router cannot decide in its chats: the form "
            f"{str(llm.chat_format)!r} would be a guess, and scores depend on the form; give "
            "chat_format= or chat_handler= (--chat-format on the command line), or use "
            "create_completion (--raw)"
        )


def _require_format(llm: Llama, name: str) -> None:
    if name in llm._chat_handlers:
        return
    try:
        llama_chat_format.get_chat_completion_handler(name)
    except llama_chat_format.LlamaChatCompletionHandlerNotFoundException:
        own = f", or of this file: {', '.join(llm._chat_handlers)}" if llm._chat_handlers else ""
        raise SteeringError(
            f"unknown chat_format {quoted(name)}; give one of llama-cpp-python, such as chatml, "
            f"llama-3 or mistral-instruct{own}"
        ) from None
