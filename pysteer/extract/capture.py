"""What extraction asks of a model, whichever library runs it."""

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
    """A model whose activations can be read. Tokens are those of the model's own vocabulary."""

    @property
    def base_model(self) -> BaseModel:
        """What identifies the model."""
        ...

    @property
    def weights(self) -> str:
        """Name of the file or repository, and precision: for the provenance."""
        ...

    @property
    def identity(self) -> str:
        """What else activations depend on: the weights' file, their precision."""
        ...

    @property
    def sites(self) -> Mapping[str, tuple[int, ...]]:
        """Site to the layers that have it, ascending."""
        ...

    @property
    def n_ctx(self) -> int:
        """How many tokens a sequence may have."""
        ...

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts are put into a chat template; otherwise they are taken as they are."""
        ...

    def prompt_tokens(self, prompt: str) -> Tokens:
        """A user's message in the chat template, up to where the response starts."""
        ...

    def response_tokens(self, text: str) -> Tokens:
        """Text as it continues a prompt: no special tokens are added or recognised."""
        ...

    def text(self, tokens: Tokens) -> str:
        """What tokens of a response say."""
        ...

    def answers(self, prompts: Sequence[Tokens], n_tokens: int) -> Iterator[tuple[int, Tokens]]:
        """The model's own greedy answers, at most `n_tokens` each, without the end-of-turn token.

        Yields:
            index into `prompts` and answer, in any order.
        """
        ...

    def activations(
        self, rows: Sequence[Row], *, site: str, layers: Sequence[int]
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Mean activations of each row's range.

        Rows that differ in their range alone are run together, as far as the engine can.

        Yields:
            index into `rows` and a float32 array of shape (len(layers), n_embd), in any order.
        """
        ...


def file_identity(path: Path) -> str:
    """Name, size and time of a file: changes when the file does, and needs no reading of it."""
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def continuation(encode: Callable[[str], Sequence[int]], text: str) -> Tokens:
    """Tokens of a text that follows other text.

    Sentencepiece tokenizers put a space before text that stands alone, so it is encoded behind a
    line break, which is then taken away.
    """
    anchor, both = list(encode("\n")), list(encode("\n" + text))
    if both[: len(anchor)] == anchor:
        return tuple(both[len(anchor) :])
    return tuple(encode(text))  # begins with line breaks of its own, which are one token together


def pooled_row(prompt: Tokens, response: Tokens, pooling: Pooling, message: Span) -> Row:
    """Return the tokens to run, and the range of them to average.

    Args:
        prompt: the prompt's tokens, in the chat template.
        response: the response's, or ().
        pooling: see `Pooling`. Only "response" and a range reach beyond the prompt; the others
            leave the response out, since later tokens do not change earlier ones.
        message: where the user's message is in the prompt; see `pysteer.chat.spans`.

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
    """Which rows are the same tokens, and can be run as one sequence.

    Args:
        rows: rows.
        disjoint: whether the ranges of one sequence must not overlap.

    Returns:
        Indices into `rows`, in groups of the same tokens.
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
    """Rows grouped by length: indices of batches of at most `budget` tokens.

    The longest come first, so that what does not fit into memory shows at once. A row longer than
    the budget is a batch of its own.

    Args:
        lengths: tokens of each row.
        budget: tokens of a batch.
        max_rows: rows of a batch.
        padded: whether the rows of a batch take as many tokens as its longest.
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
