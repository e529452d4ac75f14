"""The form of prompts that a router was fitted with, kept in a pack's provenance.

The form is the tokens around the user's message, from the renderings of `pysteer.chat.spans`. Two
templates that give the same tokens are one form. A template that writes the date gives other tokens
on another day, so a short stretch of other tokens makes no other form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pysteer.chat.messages import Message, user_message
from pysteer.chat.spans import TemplateEnds, shared_start, template_ends

_DATE = 8  # most tokens of a date


def form_of(tokenize: Callable[[str], Sequence[int]]) -> TemplateEnds | None:
    """Return the form of the prompts that a tokenizer makes; None: the message is not rendered.

    Args:
        tokenize: from a user's message to the tokens of the prompt; called twice.
    """

    def render(messages: Sequence[Message]) -> Sequence[int]:
        return tokenize(messages[0]["content"])

    return template_ends(render, [user_message("any")])


def form_content(form: TemplateEnds | None) -> dict[str, list[int]]:
    """Return a form as JSON data for provenance; without tokens for None."""
    before, after = form or ((), ())
    return {"before": list(before), "after": list(after)}


def is_other_form(provenance: Mapping[str, Any], form: TemplateEnds | None) -> bool:
    """Return True if provenance holds a form that differs from `form`.

    Args:
        provenance: of a pack; of any shape, as it comes from a file.
        form: the form of a model's chats.
    """
    fitted = provenance.get("form")
    if not isinstance(fitted, Mapping):
        return False
    before, after = fitted.get("before"), fitted.get("after")
    if not isinstance(before, list) or not isinstance(after, list):
        return False
    if not all(type(token) is int for token in (*before, *after)):
        return False
    own_before, own_after = map(list, form or ((), ()))
    return after != own_after or not _same(before, own_before)


def _same(one: list[int], other: list[int]) -> bool:
    """Return True if two runs of tokens are equal but for a date inside."""
    if one == other:
        return True
    start = shared_start([one, other])
    end = shared_start([one[::-1], other[::-1]])
    return start > 0 and end > 0 and max(len(one), len(other)) - start - end <= _DATE
