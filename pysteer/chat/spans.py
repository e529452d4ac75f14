"""The rule for the tokens of a prompt that a router reads, for fitting and for serving.

The user's message is found by rendering the conversation, never by searching the prompt for the
message's text: that text may occur in the template or in an earlier turn, and templates strip white
space from some messages and not from others.

1. The conversation is rendered with each of `SENTINELS` in the place of the last message of role
   "user" (in a content of parts: of each part with text).
2. The tokens that these renderings have in common at their start and at their end are the
   template's (and those of the other messages).
3. The message's tokens are the rest of the prompt. Where the tokenizer joins characters of template
   and message, the template's last tokens before the message or first ones after it are not those
   of the other renderings; the tokens from the first difference on belong to the message.

Without a user message, and where that message is empty or is not rendered, the whole prompt stands
for the message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple, TypeAlias

from pysteer.chat.messages import Message, replace_user_text

Span: TypeAlias = tuple[int, int]
"""Token range [start, stop)."""

SENTINELS = ("1", "2 or 3")
"""Messages whose first characters differ, and so do the last, hence the tokens at either end.
Digits, because hardly a tokenizer joins them to the spaces, line breaks and punctuation around a
message. Their lengths differ for vocabularies with one token for all unknown words."""

_SEAM = 8
"""Tokens of the template next to the message that the message may change."""


class TemplateEnds(NamedTuple):
    """Tokens of a prompt around the last user message.

    Attributes:
        before: from the start of the prompt up to the message.
        after: from the message up to the end of the prompt.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]


def template_ends(
    render: Callable[[Sequence[Message]], Sequence[int]], messages: Sequence[Message]
) -> TemplateEnds | None:
    """Return the tokens around the last user message, independent of the message's text.

    Args:
        render: from messages to the tokens of the prompt; called once for each of `SENTINELS`.
        messages: a conversation.

    Returns:
        None: there is no user message, it is empty, or it is not rendered.
    """
    prompts = []
    for sentinel in SENTINELS:
        replaced = replace_user_text(messages, sentinel)
        if replaced is None:
            return None
        prompts.append(tuple(render(replaced)))
    if len(set(prompts)) == 1:  # the template leaves the message out
        return None
    n_before = shared_start(prompts)
    # A token common to all renderings counts once, as part of the start.
    n_after = min(
        shared_start([prompt[::-1] for prompt in prompts]), min(map(len, prompts)) - n_before
    )
    return TemplateEnds(prompts[0][:n_before], prompts[0][len(prompts[0]) - n_after :])


def message_span(prompt: Sequence[int], ends: TemplateEnds | None) -> Span:
    """Return the range of the last user message in a prompt, between the template's ends.

    Args:
        prompt: tokens of the conversation that `ends` comes from.
        ends: from `template_ends`.

    Returns:
        the whole prompt where `ends` is None, or where nothing is left between the ends.
    """
    if ends is not None:
        start = _n_template(prompt, ends.before)
        stop = len(prompt) - _n_template(prompt[::-1], ends.after[::-1])
        if start < stop:
            return start, stop
    return 0, len(prompt)


def pooled_span(pooling: str, message: Span, n_prompt: int) -> Span:
    """Return the tokens of a prompt whose activations are averaged.

    Args:
        pooling: one of `pysteer.pack.router.POOLINGS`.
        message: from `message_span`.
        n_prompt: number of prompt tokens.
    """
    if pooling == "user":
        return message
    if pooling == "prompt":
        return 0, n_prompt
    if pooling == "suffix":
        return min(message[1], n_prompt - 1), n_prompt
    return n_prompt - 1, n_prompt


def shared_start(sequences: Sequence[Sequence[int]]) -> int:
    """Return the length of the sequences' common beginning."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _n_template(prompt: Sequence[int], template: Sequence[int]) -> int:
    """Return how many tokens at the start of a prompt are the template's.

    A template that writes the date may write another: differences before the last `_SEAM` tokens
    do not count where these are all the same. Where they are not, the tokens from the first
    difference on are the message's: a template may shorten other turns because of the message.
    """
    pairs = zip(prompt, template, strict=False)
    differences = [at for at, (token, expected) in enumerate(pairs) if token != expected]
    seam = max(len(template) - _SEAM, 0)
    if len(prompt) >= len(template) and not (differences and differences[-1] >= seam):
        return len(template)
    return differences[0] if differences else len(prompt)
