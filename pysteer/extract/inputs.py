"""Tokens of an extraction: every distinct prompt is tokenized once, and the result is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from pysteer.chat.form import form_of
from pysteer.chat.spans import Span, TemplateEnds, message_span
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
        form: form of all these prompts; see `pysteer.chat.form`.
    """

    unsafe: Sequence[TokenizedPrompt]
    safe: Sequence[TokenizedPrompt]
    benign: Sequence[TokenizedPrompt]
    sides: Sides[TokenizedPrompt]
    form: TemplateEnds | None


class Tokenizer:
    """Tokenizes prompts, each distinct text once.

    Args:
        capture: the model.
        responses: True: tokenize the responses that come with the prompts.

    Attributes:
        form: form of the prompts; see `pysteer.chat.form`.
    """

    def __init__(self, capture: Capture, *, responses: bool = False) -> None:
        self._capture = capture
        self._responses = responses
        self._prompt_tokens = cache(capture.prompt_tokens)
        self._response_tokens = cache(capture.response_tokens)
        self.form = form_of(self._prompt_tokens)

    def __call__(self, prompt: Prompt) -> TokenizedPrompt:
        """Return a prompt with its tokens.

        Raises:
            SteeringError: with file and line, for an empty prompt, and for a prompt that is longer
                than the model's context.
        """
        if not prompt.prompt.strip():
            raise SteeringError(f"{where(prompt)}the prompt is empty")
        tokens = self._prompt_tokens(prompt.prompt)
        require_fits(tokens, self._capture, prompt)
        text = prompt.response or ""
        response = self._response_tokens(text) if self._responses and text else ()
        return TokenizedPrompt(prompt, tokens, response, message_span(tokens, self.form))


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
