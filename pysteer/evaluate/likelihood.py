"""Likelihood of answers under the unsteered model: the measure of fluency.

The mean of log p(token | prompt, tokens before) over the tokens of an answer, in nats. A text that
steering has broken is improbable to the unsteered model. The likelihood does not measure quality:
repetition is probable, so degeneration is counted separately.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pysteer.chat.handler import user_prompt
from pysteer.chat.spans import shared_start
from pysteer.errors import SteeringError
from pysteer.llama.batch import LAST_ROW, NO_ROW, DecodeBatch
from pysteer.llama.hooked import HookedLlama
from pysteer.progress import Advance, ignore
from pysteer.thoughts import answered

_SEQUENCES = 16  # answers at once
_PREFIX = 0  # llama.cpp's number of the sequence with the common beginning of all prompts


class _TokenRow(NamedTuple):
    """A token to decode, and next tokens whose probabilities to return."""

    slot: int
    position: int
    token: int
    targets: Sequence[int] = ()


class _PromptAnswers(NamedTuple):
    """A prompt's tokens, and the index and tokens of each answer."""

    prompt: list[int]
    answers: list[tuple[int, list[int]]]

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) + sum(len(tokens) for _, tokens in self.answers)


class Likelihood:
    """Log-likelihoods of answers under the unsteered model. A context manager.

    Computes the common beginning of all prompts once, each prompt once for all its answers, and
    logits only for rows that predict a token of an answer.

    Args:
        model_path: a GGUF model.
        n_ctx: context of a prompt with its answers, tokens.
        **llama_arguments: other arguments of `llama_cpp.Llama`.

    Raises:
        SteeringError: the model cannot be loaded.
    """

    def __init__(
        self, model_path: str | os.PathLike[str], *, n_ctx: int = 4096, **llama_arguments: Any
    ) -> None:
        arguments = {"verbose": False, **llama_arguments}
        self._llm = HookedLlama(model_path, max_sequences=1 + _SEQUENCES, n_ctx=n_ctx, **arguments)
        self._memory = self._llm.context.memory
        self._batch = DecodeBatch(self._llm.n_batch)

    def per_token(
        self,
        items: Sequence[tuple[str, str]],
        advance: Advance = ignore,
    ) -> list[float | None]:
        """Return the mean log-likelihood per token of each answer, in nats.

        Args:
            items: pairs of prompt and answer.
            advance: called with the number of items just read.

        Returns:
            The mean for each item; None for an empty answer.

        Raises:
            SteeringError: a prompt and its answer do not fit the context.
        """
        work: dict[str, _PromptAnswers] = {}
        for index, (prompt, text) in enumerate(items):
            if prompt not in work:
                work[prompt] = _PromptAnswers(self._prompt(prompt), [])
            # In a text with thoughts, markers are the special tokens that the model wrote.
            special = answered(text) != (text, False)
            tokens = self._llm.tokenize(text.encode("utf-8"), add_bos=False, special=special)
            if tokens:
                work[prompt].answers.append((index, tokens))
        found: list[float | None] = [None] * len(items)
        advance(sum(1 for _, text in items if not text))
        pieces = [
            _PromptAnswers(one.prompt, one.answers[start : start + _SEQUENCES])
            for one in work.values()
            for start in range(0, len(one.answers), _SEQUENCES)
        ]
        shared = _shared([piece.prompt for piece in pieces])
        self._memory.clear()
        if shared:
            self._decode([_TokenRow(_PREFIX, at, token) for at, token in enumerate(shared)])
        for chunk in self._chunks(pieces, len(shared)):
            for index, value in self._read(chunk, len(shared)):
                found[index] = value
            advance(sum(len(one.answers) for one in chunk))
        return found

    def _prompt(self, prompt: str) -> list[int]:
        return user_prompt(self._llm, prompt)

    def _chunks(
        self, pieces: Sequence[_PromptAnswers], shared: int
    ) -> Iterator[list[_PromptAnswers]]:
        """Yield as many pieces at a time as fit the sequences and the context."""
        room = min(self._llm.n_ctx() - shared, self._llm.n_batch)
        chunk: list[_PromptAnswers] = []
        for piece in pieces:
            if shared + piece.n_tokens > self._llm.n_ctx():
                raise SteeringError(
                    f"a prompt and its answers have {piece.n_tokens} tokens, more than the context "
                    f"of {self._llm.n_ctx()}; raise --context"
                )
            together = [*chunk, piece]
            answers = sum(len(one.answers) for one in together)
            tokens = sum(one.n_tokens - shared for one in together)
            if chunk and (answers > _SEQUENCES or tokens > room):
                yield chunk
                together = [piece]
            chunk = together
        if chunk:
            yield chunk

    def _read(self, chunk: Sequence[_PromptAnswers], shared: int) -> Iterator[tuple[int, float]]:
        """Yield index and mean of each answer."""
        sums: dict[int, float] = {}
        slots: dict[int, int] = {}
        rows: list[_TokenRow] = []
        for one in chunk:
            for index, _ in one.answers:
                slots[index] = len(slots) + 1
            slot = slots[one.answers[0][0]]
            self._memory.copy(_PREFIX, slot, shared)
            rows += [_TokenRow(slot, at, one.prompt[at]) for at in range(shared, len(one.prompt))]
            rows[-1] = rows[-1]._replace(targets=[tokens[0] for _, tokens in one.answers])
        for one, values in zip(chunk, self._decode(rows), strict=True):
            first, *others = (slots[index] for index, _ in one.answers)
            for slot in others:
                self._memory.copy(first, slot, len(one.prompt))
            sums.update(zip((index for index, _ in one.answers), values, strict=True))
        rows = []
        owners: list[int] = []
        for one in chunk:
            for index, tokens in one.answers:
                for offset, (token, after) in enumerate(pairwise(tokens)):
                    rows.append(_TokenRow(slots[index], len(one.prompt) + offset, token, [after]))
                    owners.append(index)
        for index, (value,) in zip(owners, self._decode(rows), strict=True):
            sums[index] += value
        for slot in slots.values():
            self._memory.cut(slot, 0)
        for one in chunk:
            for index, tokens in one.answers:
                yield index, sums[index] / len(tokens)

    def _decode(self, rows: Sequence[_TokenRow]) -> list[list[float]]:
        """Decode rows, and return the log-probabilities of the targets of each row with targets."""
        found = []
        for start in range(0, len(rows), self._llm.n_batch):
            part = rows[start : start + self._llm.n_batch]
            self._batch.clear()
            for row in part:
                outputs = LAST_ROW if row.targets else NO_ROW
                self._batch.add(row.slot, row.position, [row.token], outputs)
            self._llm.context.decode(self._batch)
            for number, row in enumerate(part):
                if row.targets:
                    logits = self._llm.context.logits(number)
                    found.append(_log_probabilities(logits, row.targets))
        return found

    def close(self) -> None:
        """Free the model."""
        self._llm.close()

    def __enter__(self) -> Likelihood:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _log_probabilities(logits: npt.NDArray[np.float32], tokens: Sequence[int]) -> list[float]:
    """Return l_t - log(sum of exp(l)) for each token t, for logits l of shape (n_vocab,)."""
    largest = logits.max()
    total = float(np.exp(logits - largest).sum(dtype=np.float64))
    return [float(logits[token]) - float(largest) - float(np.log(total)) for token in tokens]


def _shared(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return the common beginning of all prompts, without the last token of any.

    The logits of a prompt's last token are needed, so that the token is decoded for each prompt.
    """
    beginnings = [prompt[:-1] for prompt in prompts]
    return list(beginnings[0][: shared_start(beginnings)]) if beginnings else []
