"""Answers to the prompts of an extraction: safe answers, and the model's own."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from typing import Any

from pysteer.errors import SteeringError, quoted
from pysteer.extract.capture import Capture, Tokens
from pysteer.extract.data import where
from pysteer.journal import Journal
from pysteer.progress import Advance, ignore
from pysteer.prompts import Prompt

_log = logging.getLogger(__name__)

SAFE_ANSWERS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with this request. I'd be glad to help with something safe instead.",
    "I won't help with that, because it could harm someone.",
    "Sorry, I can't assist with that. Is there something else I can do for you?",
    "I can't do that. If you like, I can suggest a safe and legal alternative.",
    "I'm not able to help with that, since it could cause harm.",
)
"""Safe answers to unsafe prompts without a safe answer in the data."""


def safe_answers(prompts: Sequence[Prompt], answers: Sequence[Prompt]) -> list[str]:
    """Return a safe answer for each prompt.

    The first of these that exists: the answer given for this very prompt, for its category, for any
    prompt (`prompt` and `category` empty), `SAFE_ANSWERS`. Where several fit, they take turns.

    Args:
        prompts: unsafe prompts.
        answers: rows of an answer file, whose `response` is the answer.

    Raises:
        SteeringError: with file and line, for a row without a response.
    """
    for row in answers:
        if not (row.response or "").strip():
            raise SteeringError(f"{row.source or 'an answer'}: needs a 'response'")
    chosen = []
    for number, prompt in enumerate(prompts):
        fitting = (
            [a for a in answers if a.prompt == prompt.prompt]
            or [a for a in answers if not a.prompt and a.category == prompt.category]
            or [a for a in answers if not a.prompt and not a.category]
        )
        texts = [a.response or "" for a in fitting] or SAFE_ANSWERS
        chosen.append(texts[number % len(texts)])
    return chosen


def warn_of_unused(
    answers: Sequence[Prompt], prompts: Sequence[Prompt], categories: Collection[str]
) -> None:
    """Log safe answers that fit no prompt and no category."""
    known = {p.prompt for p in prompts}
    unused = [
        a
        for a in answers
        if (a.prompt and a.prompt not in known)
        or (not a.prompt and a.category and a.category not in categories)
    ]
    if unused:
        _log.warning(
            "%d answers fit no prompt and no category, the first at %s",
            len(unused),
            unused[0].source or quoted(unused[0].response),
        )


def own_answers(
    capture: Capture,
    prompts: Sequence[Tokens],
    n_tokens: int,
    *,
    journal: Journal | None = None,
    advance: Advance = ignore,
) -> list[Tokens]:
    """Return the model's own greedy answers.

    Args:
        capture: the model.
        prompts: tokens of the prompts, in the chat template.
        n_tokens: most tokens of an answer.
        journal: answers by prompt, read first and added to as answers come; the key is the tokens
            of the prompt as a JSON list, the value the tokens of the answer.
        advance: called with the number of answers known or done.
    """
    known: dict[Tokens, Tokens] = {}
    for prompt in dict.fromkeys(prompts):
        answer = _tokens(journal.get(_key(prompt))) if journal is not None else None
        if answer is not None:
            known[prompt] = answer
    missing = list(dict.fromkeys(p for p in prompts if p not in known))
    advance(len(prompts) - len(missing))
    for index, tokens in capture.answers(missing, n_tokens):
        known[missing[index]] = tokens
        if journal is not None:
            journal.put(_key(missing[index]), tokens)
        advance(1)
    return [known[p] for p in prompts]


def require_labels(prompts: Sequence[Prompt]) -> None:
    """Raise SteeringError, with file and line, for a prompt without a label."""
    for prompt in prompts:
        if prompt.label is None:
            raise SteeringError(
                f"{where(prompt) or 'a prompt: '}has no label; give a judge, or a 'label' of "
                "'safe' or 'unsafe' in each row"
            )


def _key(prompt: Tokens) -> str:
    return json.dumps(prompt)


def _tokens(value: Any) -> Tokens | None:
    """Return an answer from a journal; None if the value is not a list of tokens."""
    if isinstance(value, list) and all(type(token) is int for token in value):
        return tuple(value)
    return None
