"""Activations of a GGUF model as llama.cpp runs it, quantised and without torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from pysteer.chat.handler import user_prompt
from pysteer.chat.spans import shared_start
from pysteer.chat.template import renders_chats
from pysteer.extract.capture import (
    Row,
    Tokens,
    continuation,
    file_identity,
    run_once,
    token_batches,
)
from pysteer.llama.hooked import HookedLlama, quiet_arguments
from pysteer.pack.pack import BaseModel

_log = logging.getLogger(__name__)

_MAX_SEQUENCES = 64


class LlamaCapture:
    """A `Capture` by llama.cpp.

    Many rows are decoded as one batch, as separate sequences. Recurrent and hybrid models take one
    at a time.

    Args:
        model_path: a GGUF model.
        n_ctx: most tokens of a sequence.
        token_budget: tokens per batch; not more than `n_ctx`.
        **llama_arguments: other arguments of `llama_cpp.Llama`.

    Raises:
        HookError: the llama.cpp or the model cannot be hooked.
        SteeringError: the model cannot be loaded.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_ctx: int = 2048,
        token_budget: int = 512,
        **llama_arguments: Any,
    ) -> None:
        arguments = quiet_arguments(**llama_arguments)
        batch = min(token_budget, n_ctx)
        arguments.update(n_batch=batch, n_ubatch=batch, n_ctx=n_ctx)
        self.llm = HookedLlama(model_path, max_sequences=_MAX_SEQUENCES, **arguments)
        self._path = Path(model_path)
        self._identity = file_identity(self._path)
        if not self.has_chat_template:
            _log.warning(
                "%s has no chat template; prompts are taken as they are, unless a chat format is "
                "given",
                model_path,
            )

    def close(self) -> None:
        """Free the model."""
        self.llm.close()

    @property
    def base_model(self) -> BaseModel:
        """Identity of the model."""
        return self.llm.base_model

    @property
    def weights(self) -> str:
        """Name of the file, which usually includes its quantisation."""
        return self._path.name

    @property
    def identity(self) -> str:
        """The rest of what activations depend on."""
        return self._identity

    @property
    def sites(self) -> Mapping[str, tuple[int, ...]]:
        """Site to the layers that have it, ascending."""
        return self.llm.sites

    @property
    def n_ctx(self) -> int:
        """Most tokens of a sequence."""
        return int(self.llm.n_ctx())

    @property
    def has_chat_template(self) -> bool:
        """True if prompts are put into a chat template."""
        return renders_chats(self.llm)

    def prompt_tokens(self, prompt: str) -> Tokens:
        """Return a user's message in the chat template, up to where the response starts."""
        return tuple(user_prompt(self.llm, prompt))

    def response_tokens(self, text: str) -> Tokens:
        """Return the tokens of text that continues a prompt."""

        def encode(text: str) -> list[int]:
            return self.llm.tokenize(text.encode(), add_bos=False, special=False)

        return continuation(encode, text)

    def text(self, tokens: Tokens) -> str:
        """Return the text of a response, special tokens included."""
        return self.llm.detokenize(list(tokens), special=True).decode("utf-8", errors="replace")

    def answers(self, prompts: Sequence[Tokens], n_tokens: int) -> Iterator[tuple[int, Tokens]]:
        """Yield the model's own greedy answers; see `Capture.answers`."""
        vocabulary = llama_cpp.llama_model_get_vocab(self.llm.model)
        for index, prompt in enumerate(prompts):
            answer: list[int] = []
            for token in self.llm.generate(list(prompt), temp=0.0, repeat_penalty=1.0):
                if llama_cpp.llama_vocab_is_eog(vocabulary, token):
                    break
                answer.append(int(token))
                if len(answer) == n_tokens:
                    break
            yield index, tuple(answer)

    def activations(
        self, rows: Sequence[Row], *, site: str, layers: Sequence[int]
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield mean activations, averaged in float64; see `Capture.activations`.

        Raises:
            HookError: the model has no such site there.
        """
        # Sequences are not padded, so the budget counts real tokens, and sorting puts many short
        # rows into one batch. The start that all rows share, up to the first averaged token, is
        # decoded once a batch.
        limit = min([self.llm.n_batch // 2, *(row.start for row in rows)])
        shared = shared_start([row.tokens[:limit] for row in rows])
        groups = run_once(rows, disjoint=True)
        lengths = [len(rows[group[0]].tokens) - shared for group in groups]
        room = self.llm.n_batch - shared
        context = self.llm.context
        max_rows = context.max_sequences if context.batches_sequences else 1
        for batch in token_batches(lengths, room, max_rows, padded=False):
            chosen = [i for group in batch for i in groups[group]]
            found = self.llm.capture_means(
                [rows[groups[group][0]].tokens for group in batch],
                [(rows[i].start, rows[i].stop) for i in chosen],
                owners=[n for n, group in enumerate(batch) for _ in groups[group]],
                sites=[site],
                layers=layers,
                shared=shared if len(batch) > 1 else 0,
            )[site]
            means = np.stack([found[layer] for layer in layers], axis=1)
            yield from zip(chosen, means, strict=True)
