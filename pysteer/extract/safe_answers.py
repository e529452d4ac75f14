"""What a model should say to unsafe prompts, as examples to learn directions from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from pysteer.errors import SteeringError
from pysteer.extract.capture import Tokens
from pysteer.extract.torch_model import TorchModel

_log = logging.getLogger(__name__)

SAFE_ANSWERS: tuple[str, ...] = (
    "I'm sorry, but I can't help with that.",
    "I can't help with this request. I'd be glad to help with something safe instead.",
    "I won't help with that, because it could harm someone.",
    "Sorry, I can't assist with that. Is there something else I can do for you?",
    "I can't do that. If you like, I can suggest a safe and legal alternative.",
    "I'm not able to help with that, since it could cause harm.",
)
"""What a model should answer to unsafe prompts where the data does not say."""


@dataclass(frozen=True)
class Example:
    """An unsafe prompt in its chat template, and a safe answer with its end of turn, as tokens."""

    prompt: Tokens
    answer: Tokens


def safe_examples(
    model: TorchModel, prompts: Sequence[str], answers: Sequence[str] = SAFE_ANSWERS
) -> list[Example]:
    """Prompts with safe answers, which are handed out in turn, as tokens.

    Raises:
        SteeringError: there are no answers.
    """
    if not answers:
        raise SteeringError("give at least one safe answer")
    end = end_of_turn(model)
    tokens = [model.response_tokens(answer) + end for answer in answers]
    return [
        Example(model.prompt_tokens(prompt), tokens[i % len(tokens)])
        for i, prompt in enumerate(prompts)
    ]


def end_of_turn(model: TorchModel) -> Tokens:
    """The token that ends an answer: what the chat template puts there, or the end of text.

    Returns:
        One token, or none where the model has neither, which is logged.
    """
    tokenizer = model.tokenizer
    tail = ""
    if model.has_chat_template:
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "pysteer"}]
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("pysteer")[2]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    for token in tokenizer(tail, add_special_tokens=False)["input_ids"]:
        if token in special:
            return (int(token),)
    if tokenizer.eos_token_id is not None:
        return (int(tokenizer.eos_token_id),)
    _log.warning("the model has no token that ends an answer; safe answers are learned without")
    return ()
