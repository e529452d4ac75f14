"""The chat template that a model brings along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_cpp import Llama

_METADATA = "tokenizer.chat_template"
_FORMAT = "chat_template.default"  # llama-cpp-python's name for the template of the metadata


def has_template(llm: Llama) -> bool:
    """Tell whether the model file has a chat template."""
    return bool(llm.metadata.get(_METADATA))


def chooses_format(llama_arguments: Mapping[str, Any]) -> bool:
    """Tell whether the arguments of `Llama` choose a chat format or handler."""
    return any(llama_arguments.get(name) is not None for name in ("chat_format", "chat_handler"))


def use_own_template(llm: Llama) -> None:
    """Render chats by the template in the model file, if there is one.

    llama-cpp-python replaces some templates that it recognises (ChatML, Mistral, Llama 3) by
    formatters of its own, which give other tokens. A model without a template keeps the format
    that llama-cpp-python falls back to.
    """
    if has_template(llm):
        llm.chat_format = _FORMAT
