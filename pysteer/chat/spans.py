"""Which tokens of a prompt the user's message is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def last_user_text(messages: Sequence[Any]) -> str | None:
    """What the user said last: the text of the last message of role "user"; None if there is none.

    Args:
        messages: as `create_chat_completion` takes them; of content in parts, the texts are joined.
    """
    for message in reversed(list(messages)):
        if not isinstance(message, dict) or message.get("role") != "user":
            continue
        content = message.get("content")
        if isinstance(content, list):
            content = "\n".join(
                str(part["text"]) for part in content if isinstance(part, dict) and "text" in part
            )
        return content if isinstance(content, str) and content.strip() else None
    return None


def span_of(text: str, pieces: Sequence[bytes]) -> tuple[int, int]:
    """The tokens that hold `text`, where it stands last.

    Args:
        text: what to find; white space around it does not count, which chat templates may strip.
        pieces: the text of each token of the prompt, as bytes.

    Returns:
        Token range [start, stop); the whole prompt where the text is not in it.
    """
    wanted = text.strip().encode()
    joined = b"".join(pieces)
    first = joined.rfind(wanted)
    if first < 0 or not wanted:
        return 0, len(pieces)
    start = stop = at = 0
    for index, piece in enumerate(pieces):
        if at <= first:
            start = index
        if at < first + len(wanted):
            stop = index + 1
        at += len(piece)
    return start, stop


def pooled_span(pooling: str, said: tuple[int, int], n_prompt: int) -> tuple[int, int]:
    """The tokens of a prompt that a router's read averages over.

    Args:
        pooling: one of `pysteer.pack.router.POOLINGS`.
        said: where the user's message is, or the whole prompt.
        n_prompt: number of prompt tokens.

    Returns:
        Token range [start, stop).
    """
    if pooling == "user":
        return said
    if pooling == "prompt":
        return 0, n_prompt
    if pooling == "suffix":
        return min(said[1], n_prompt - 1), n_prompt
    return n_prompt - 1, n_prompt
