"""The interface of a model for extraction, independent of the library that runs the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from pysteer.chat.spans import Span, pooled_span
from pysteer.errors import SteeringError
from pysteer.pack.pack import BaseModel
from pysteer.pack.router import POOLINGS

Tokens: TypeAlias = tuple[int, ...]

Pooling: TypeAlias = Literal["last", "prompt", "user", "suffix", "response"] | tuple[int, int]
"""The tokens whose activations are averaged: one of `pysteer.pack.router.POOLINGS`, the "response",
or a range [start, stop) of positions."""


@dataclass(frozen=True)
class Row:
    """Tokens of one sequence, and the range [start, stop) of them that is averaged."""

    tokens: Tokens
    start: int
    stop: int


class Capture(Protocol):
    """A model whose activations can be read. Tokens are of the model's own vocabulary."""

    @property
    def base_model(self) -> BaseModel:
        """Identity of the model."""
        ...

    @property
    def weights(self) -> str:
        """Name of the file or repository, and precision: for the provenance."""
        ...

    @property
    def identity(self) -> str:
        """The rest of what activations depend on: the weights' file, their precision."""
        ...

    @property
    def sites(self) -> Mapping[str, tuple[int, ...]]:
        """Site to the layers that have it, ascending."""
        ...

    @property
    def n_ctx(self) -> int:
        """Most tokens of a sequence."""
        ...

    @property
    def has_chat_template(self) -> bool:
        """True if prompts are put into a chat template; otherwise they are run as they are."""
        ...

    def prompt_tokens(self, prompt: str) -> Tokens:
        """Return a user's message in the chat template, up to where the response starts."""
        ...

    def response_tokens(self, text: str) -> Tokens:
        """Return text as it continues a prompt: no special tokens are added or recognised."""
        ...

    def text(self, tokens: Tokens) -> str:
        """Return the text of a response, special tokens included."""
        ...

    def answers(self, prompts: Sequence[Tokens], n_tokens: int) -> Iterator[tuple[int, Tokens]]:
        """Yield the model's own greedy answers, without the end-of-turn token.

        Args:
            prompts: tokens of the prompts.
            n_tokens: most tokens of an answer.

        Yields:
            Index into `prompts` and answer, in any order.
        """
        ...

    def activations(
        self, rows: Sequence[Row], *, site: str, layers: Sequence[int]
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield the mean activations of each row's range.

        Rows that differ only in their range run together, as far as the engine can.

        Yields:
            Index into `rows` and a float32 array of shape (len(layers), n_embd), in any order.
        """
        ...


def file_identity(path: Path) -> str:
    """Return path, size and time of a file: they change when the file does."""
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def continuation(encode: Callable[[str], Sequence[int]], text: str) -> Tokens:
    """Return the tokens of a text that follows other text.

    Sentencepiece tokenizers put a space before text that stands alone. So the text is encoded
    behind a line break, which is then removed.
    """
    anchor, both = list(encode("\n")), list(encode("\n" + text))
    if both[: len(anchor)] == anchor:
        return tuple(both[len(anchor) :])
    return tuple(encode(text))  # its own line breaks are one token with the anchor


def pooled_row(prompt: Tokens, response: Tokens, pooling: Pooling, message: Span) -> Row:
    """Return the tokens to run, and the range of them to average.

    Args:
        prompt: the prompt's tokens, in the chat template.
        response: the response's, or ().
        pooling: see `Pooling`. Only "response" and a range reach beyond the prompt; the others
            leave the response out, since later tokens do not change earlier ones.
        message: range of the user's message in the prompt; see `pysteer.chat.spans`.

    Raises:
        SteeringError: there is nothing to average.
    """
    if isinstance(pooling, tuple):
        row = Row(prompt + response, pooling[0], min(pooling[1], len(prompt + response)))
    elif pooling == "response":
        row = Row(prompt + response, len(prompt), len(prompt + response))
    elif pooling in POOLINGS:
        row = Row(prompt, *pooled_span(pooling, message, len(prompt)))
    else:
        known = ", ".join([*POOLINGS, "response"])
        raise SteeringError(f"unknown pooling {pooling!r}; use one of {known}")
    if not 0 <= row.start < row.stop:
        what = "response" if pooling == "response" else "text"
        raise SteeringError(f"there is no {what} to average over (pooling {pooling!r})")
    return row


def run_once(rows: Sequence[Row], *, disjoint: bool) -> list[list[int]]:
    """Return groups of rows that have the same tokens and can run as one sequence.

    Args:
        rows: rows.
        disjoint: True: the ranges of one sequence must not overlap.

    Returns:
        Indices into `rows`, by group.
    """
    groups: list[list[int]] = []
    of_tokens: dict[Tokens, list[list[int]]] = {}
    for index, row in enumerate(rows):
        known = of_tokens.setdefault(row.tokens, [])
        for group in known:
            if not disjoint or all(
                row.stop <= rows[other].start or rows[other].stop <= row.start for other in group
            ):
                group.append(index)
                break
        else:
            groups.append([index])
            known.append(groups[-1])
    return groups


def token_batches(
    lengths: Sequence[int], budget: int, max_rows: int, *, padded: bool
) -> Iterator[list[int]]:
    """Yield batches of rows of similar length: indices of at most `budget` tokens together.

    The longest rows come first, so that a lack of memory shows at once. A row longer than the
    budget is a single batch.

    Args:
        lengths: tokens of each row.
        budget: tokens of a batch.
        max_rows: rows of a batch.
        padded: True: every row of a batch counts as many tokens as the longest.
    """
    batch: list[int] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[batch[0]] if padded and batch else lengths[index]
        if batch and (len(batch) == max_rows or total + length > budget):
            yield batch
            batch, total, length = [], 0, lengths[index]
        batch.append(index)
        total += length
    if batch:
        yield batch
