"""The chat template in a model file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_cpp import Llama

_METADATA = "tokenizer.chat_template"
_FORMAT = "chat_template.default"  # llama-cpp-python's name for the template of the metadata


def has_template(llm: Llama) -> bool:
    """Return True if the model file has a chat template."""
    return bool(llm.metadata.get(_METADATA))


def chooses_format(llama_arguments: Mapping[str, Any]) -> bool:
    """Return True if the arguments of `Llama` choose a chat format or handler."""
    return any(llama_arguments.get(name) is not None for name in ("chat_format", "chat_handler"))


def use_own_template(llm: Llama) -> None:
    """Render chats by the template in the model file, if there is one.

    llama-cpp-python replaces some templates that it recognises (ChatML, Mistral, Llama 3) by
    its own formatters, which give other tokens. A model without a template keeps llama-cpp-python's
    fallback format.
    """
    if has_template(llm):
        llm.chat_format = _FORMAT
