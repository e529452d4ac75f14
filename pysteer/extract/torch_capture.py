"""Activations of a transformers model, read by forward hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pysteer.errors import SteeringError
from pysteer.extract.capture import Row, Tokens, token_batches
from pysteer.extract.torch_model import TorchModel
from pysteer.pack import BaseModel

_MAX_ROWS = 256


class _Done(Exception):
    """Ends a forward pass: everything wanted has been computed."""


class TorchCapture:
    """`Capture` by transformers; see there.

    Rows are sorted by length and padded on the right to batches of at most `token_budget` tokens.
    Nothing behind the last site wanted is computed, the output head included.

    Args:
        model: the model.
        token_budget: tokens per batch, padding included.
    """

    def __init__(self, model: TorchModel, *, token_budget: int = 1024) -> None:
        self.model = model
        self.token_budget = token_budget

    @property
    def base_model(self) -> BaseModel:
        """What identifies the model."""
        return self.model.base_model

    @property
    def weights(self) -> str:
        """Name of the file or repository, and precision."""
        return self.model.weights

    @property
    def identity(self) -> str:
        """What else activations depend on."""
        return self.model.identity

    @property
    def sites(self) -> Mapping[str, tuple[int, ...]]:
        """Site to the layers that have it, ascending."""
        return self.model.sites

    @property
    def n_ctx(self) -> int:
        """How many tokens a sequence may have."""
        return self.model.n_ctx

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts are put into a chat template."""
        return self.model.has_chat_template

    def prompt_tokens(self, prompt: str) -> Tokens:
        """A user's message in the chat template, up to where the response starts."""
        return self.model.prompt_tokens(prompt)

    def response_tokens(self, text: str) -> Tokens:
        """Text as it continues a prompt."""
        return self.model.response_tokens(text)

    def text(self, tokens: Tokens) -> str:
        """What tokens of a response say."""
        return self.model.text(tokens)

    def answers(self, prompts: Sequence[Tokens], n_tokens: int) -> Iterator[tuple[int, Tokens]]:
        """The model's own greedy answers; see `Capture.answers`."""
        return self.model.answers(prompts, n_tokens)

    def activations(
        self, rows: Sequence[Row], *, site: str, layers: Sequence[int]
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Mean activations of each row's range, averaged in float32; see `Capture.activations`.

        Raises:
            SteeringError: the model has no such site there.
        """
        lengths = [len(row.tokens) for row in rows]
        for batch in token_batches(lengths, self.token_budget, _MAX_ROWS, padded=True):
            means = self._means([rows[i] for i in batch], site, layers)
            yield from zip(batch, means, strict=True)

    def _means(
        self, rows: Sequence[Row], site: str, layers: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        """Shape (len(rows), len(layers), n_embd)."""
        inputs = self.model.padded([row.tokens for row in rows])
        weights = torch.zeros(len(rows), 1, inputs["input_ids"].shape[1])
        for i, row in enumerate(rows):
            weights[i, 0, row.start : row.stop] = 1 / (row.stop - row.start)
        found: dict[int, Tensor] = {}

        def keep(layer: int, _module: Any, _inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            means = torch.bmm(weights.to(states.device), states.float())
            found[layer] = means[:, 0].cpu()
            if layer == max(layers):
                raise _Done

        handles = [
            self.model.module(site, layer).register_forward_hook(partial(keep, layer))
            for layer in layers
        ]
        try:
            with torch.inference_mode():
                self.model.model(**inputs, use_cache=False)
        except _Done:
            pass
        finally:
            for handle in handles:
                handle.remove()
        missing = sorted(set(layers) - set(found))
        if missing:
            raise SteeringError(f"the model did not run its layers {missing}")
        means: npt.NDArray[np.float32] = torch.stack([found[i] for i in layers], dim=1).numpy()
        return means
