"""Chat messages as `llama_cpp.Llama.create_chat_completion` takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from pysteer.errors import SteeringError, quoted

Message: TypeAlias = Mapping[str, Any]
"""A role and a content: a string, or a list of parts, some with text."""

MAX_DEPTH: Final = 64
"""Most levels of mappings and lists in a message; calls of tools have about ten."""


def user_message(text: str) -> Message:
    """Return a user's message."""
    return {"role": "user", "content": text}


def snapshot(messages: Any) -> Any:
    """Return a copy of messages, and of their parts, that later changes do not reach.

    Anything else but a text is returned as it is.

    Raises:
        SteeringError: a text instead of messages, or a message that is nested more than `MAX_DEPTH`
            deep or contains itself.
    """
    if isinstance(messages, str):
        raise SteeringError(
            f"messages={quoted(messages)}: give a list of messages, such as "
            '[{"role": "user", "content": "Hello"}]'
        )
    if not isinstance(messages, Sequence):
        return messages
    return [_copied(message, 1) for message in messages]


def _copied(value: Any, depth: int) -> Any:
    if not isinstance(value, (Mapping, list)):
        return value
    if depth > MAX_DEPTH:
        raise SteeringError(f"a message is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return {key: _copied(item, depth + 1) for key, item in value.items()}
    return [_copied(item, depth + 1) for item in value]


def replace_user_text(messages: Sequence[Message], text: str) -> list[Message] | None:
    """Return the messages with another text in the last message of role "user".

    In a content of parts, every part with text gets the new text; images and other parts stay.

    Args:
        messages: a conversation; not changed.
        text: the new text.

    Returns:
        the new conversation, or None: there is no user message, or the last one has no text.
    """
    for index in reversed(range(len(messages))):
        message = messages[index]
        if not isinstance(message, Mapping) or message.get("role") != "user":
            continue
        content = message.get("content")
        new: Any = text
        if isinstance(content, list):
            if not any(map(_has_text, content)):
                return None
            new = [{**part, "text": text} if _is_text(part) else part for part in content]
        elif not isinstance(content, str) or not content:
            return None
        return [*messages[:index], {**message, "content": new}, *messages[index + 1 :]]
    return None


def without_images(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with the text alone of contents of parts."""
    return [
        {**message, "content": [part for part in message["content"] if _is_text(part)]}
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _has_text(part: Any) -> bool:
    return _is_text(part) and part["text"] != ""
