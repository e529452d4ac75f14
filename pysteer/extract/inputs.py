"""Tokens of an extraction: every distinct prompt is tokenized once, and the result is frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from pysteer.chat.messages import Message, user_message
from pysteer.chat.spans import Span, TemplateEnds, message_span, template_ends
from pysteer.errors import SteeringError
from pysteer.extract.capture import Capture, Pooling, Row, Tokens, pooled_row
from pysteer.extract.data import where
from pysteer.extract.sides import Sides
from pysteer.prompts import Prompt


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt and its tokens.

    Attributes:
        prompt: the prompt.
        tokens: the prompt in the chat template, up to where the response starts.
        response: tokens of the response that comes with the data; () without.
        message: range of the user's message in `tokens`; see `pysteer.chat.spans`.
    """

    prompt: Prompt
    tokens: Tokens
    response: Tokens
    message: Span

    def row(self, pooling: Pooling) -> Row:
        """Return the tokens to run, and the range of them to average; see `pooled_row`."""
        try:
            return pooled_row(self.tokens, self.response, pooling, self.message)
        except SteeringError as error:
            raise SteeringError(f"{where(self.prompt)}{error}") from None


@dataclass(frozen=True)
class Inputs:
    """The tokenized prompts of an extraction.

    Attributes:
        unsafe: unsafe prompts, in the order of the data.
        safe: safe prompts, in the order of the data.
        benign: harmless prompts for the router alone, in the order of the data.
        sides: unsafe and safe prompts as `split_sides` divides them.
    """

    unsafe: Sequence[TokenizedPrompt]
    safe: Sequence[TokenizedPrompt]
    benign: Sequence[TokenizedPrompt]
    sides: Sides[TokenizedPrompt]


def tokenizer(capture: Capture, *, responses: bool = False) -> Callable[[Prompt], TokenizedPrompt]:
    """Return a function that tokenizes prompts, each distinct text once.

    The function raises SteeringError, with file and line, for an empty prompt and for a prompt that
    is longer than the model's context.

    Args:
        capture: the model.
        responses: True: tokenize the responses that come with the prompts.
    """
    ends = prompt_ends(capture)
    prompt_tokens = cache(capture.prompt_tokens)
    response_tokens = cache(capture.response_tokens)

    def tokenized(prompt: Prompt) -> TokenizedPrompt:
        if not prompt.prompt.strip():
            raise SteeringError(f"{where(prompt)}the prompt is empty")
        tokens = prompt_tokens(prompt.prompt)
        require_fits(tokens, capture, prompt)
        text = prompt.response or ""
        response = response_tokens(text) if responses and text else ()
        return TokenizedPrompt(prompt, tokens, response, message_span(tokens, ends))

    return tokenized


def prompt_ends(capture: Capture) -> TemplateEnds | None:
    """Return the tokens around the message in every prompt of a capture."""

    def render(messages: Sequence[Message]) -> Tokens:
        return capture.prompt_tokens(messages[0]["content"])

    return template_ends(render, [user_message("any")])


def rows_of(capture: Capture, prompts: Sequence[TokenizedPrompt], pooling: Pooling) -> list[Row]:
    """Return the tokens to run for each prompt, and the range of them to average.

    Raises:
        SteeringError: with file and line, for a prompt with nothing to average, or whose tokens and
            response together are longer than the model's context.
    """
    rows = []
    for prompt in prompts:
        row = prompt.row(pooling)
        require_fits(row.tokens, capture, prompt.prompt)
        rows.append(row)
    return rows


def require_fits(tokens: Tokens, capture: Capture, prompt: Prompt, *, answer: int = 0) -> None:
    """Raise SteeringError if tokens of a prompt, and an answer, are longer than the context.

    Args:
        tokens: tokens to run.
        capture: the model.
        prompt: the prompt to name in the message.
        answer: number of tokens of an answer to come.
    """
    if len(tokens) + answer > capture.n_ctx:
        more = f" and an answer of {answer}" if answer else ""
        raise SteeringError(
            f"{where(prompt)}{len(tokens)} tokens{more}, and the context holds {capture.n_ctx}; "
            "shorten the prompt, or with --engine llama raise --context"
        )


def fitting(capture: Capture, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts that are not longer than the model's context."""
    return [p for p in prompts if len(capture.prompt_tokens(p.prompt)) <= capture.n_ctx]


def require_room(capture: Capture, prompts: Sequence[TokenizedPrompt], answer: int) -> None:
    """Raise SteeringError, with file and line, where the context has no room for an answer."""
    for prompt in prompts:
        require_fits(prompt.tokens, capture, prompt.prompt, answer=answer)
