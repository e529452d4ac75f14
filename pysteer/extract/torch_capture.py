"""Activations of a transformers model, read by forward hooks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pysteer.chat.spans import shared_start
from pysteer.errors import SteeringError
from pysteer.extract.capture import Row, Tokens, run_once, token_batches
from pysteer.extract.passes import MIN_SHARED, TOLERANCE, Done, states_of
from pysteer.extract.torch_model import TorchModel
from pysteer.pack.pack import BaseModel

_log = logging.getLogger(__name__)

_MAX_ROWS = 256

_COPIES = 4
"""Tokens of shared starts whose keys and values are held at once, in token budgets."""


class _Target(NamedTuple):
    site: str
    layers: tuple[int, ...]


class _Start(NamedTuple):
    """Start that all rows share: its length, its states by layer, its keys and values."""

    length: int = 0
    states: Mapping[int, Tensor] = MappingProxyType({})
    past: Any = None


class TorchCapture:
    """A `Capture` by transformers.

    Rows are sorted by length and padded on the right to batches of at most `token_budget` tokens.
    The start that all rows share, the system message of many chat templates, runs once; the rest of
    each row reads its keys and values. A first run checks that this leaves the activations as they
    are; for other models the start runs with each row. Nothing above the last of the layers is
    computed, the output head included.

    Args:
        model: the model.
        token_budget: tokens per batch, padding included.
    """

    def __init__(self, model: TorchModel, *, token_budget: int = 1024) -> None:
        self.model = model
        self.token_budget = token_budget
        self._shares: bool | None = None  # None until tried

    @property
    def base_model(self) -> BaseModel:
        """Identity of the model."""
        return self.model.base_model

    @property
    def weights(self) -> str:
        """Name of the file or repository, and precision."""
        return self.model.weights

    @property
    def identity(self) -> str:
        """The rest of what activations depend on."""
        return self.model.identity

    @property
    def sites(self) -> Mapping[str, tuple[int, ...]]:
        """Site to the layers that have it, ascending."""
        return self.model.sites

    @property
    def n_ctx(self) -> int:
        """Most tokens of a sequence."""
        return self.model.n_ctx

    @property
    def has_chat_template(self) -> bool:
        """True if prompts are put into a chat template."""
        return self.model.has_chat_template

    def prompt_tokens(self, prompt: str) -> Tokens:
        """Return a user's message in the chat template, up to where the response starts."""
        return self.model.prompt_tokens(prompt)

    def response_tokens(self, text: str) -> Tokens:
        """Return the tokens of text that continues a prompt."""
        return self.model.response_tokens(text)

    def text(self, tokens: Tokens) -> str:
        """Return the text of a response, special tokens included."""
        return self.model.text(tokens)

    def answers(self, prompts: Sequence[Tokens], n_tokens: int) -> Iterator[tuple[int, Tokens]]:
        """Yield the model's own greedy answers; see `Capture.answers`."""
        return self.model.answers(prompts, n_tokens)

    def activations(
        self, rows: Sequence[Row], *, site: str, layers: Sequence[int]
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield mean activations, averaged in float32; see `Capture.activations`.

        Raises:
            SteeringError: the model has no such site there.
        """
        target = _Target(site, tuple(layers))
        start = self._start(rows, target)
        # Every row gets a copy of the keys and values of its start.
        copies = _COPIES * self.token_budget // start.length if start.length else _MAX_ROWS
        groups = run_once(rows, disjoint=False)
        lengths = [len(rows[group[0]].tokens) - start.length for group in groups]
        max_rows = max(1, min(_MAX_ROWS, copies))
        for batch in token_batches(lengths, self.token_budget, max_rows, padded=True):
            chosen = [i for group in batch for i in groups[group]]
            found = self._means([rows[i] for i in chosen], target, start)
            yield from zip(chosen, found, strict=True)

    def _start(self, rows: Sequence[Row], target: _Target) -> _Start:
        """Run the start that all rows share; return an empty start if it is short, or fails."""
        shortest = min((row.tokens for row in rows), key=len, default=())
        length = min(shared_start([row.tokens for row in rows]), len(shortest) - 1)
        if len(rows) < 2 or length < MIN_SHARED or self._shares is False:
            return _Start()
        inputs = self.model.padded([rows[0].tokens[:length]])
        try:
            states, out = self._run(
                target, {**inputs, "use_cache": True}, lambda _layer, states: states, stop=False
            )
            start = _Start(length, states, out.past_key_values)
            if self._shares is None:
                self._shares = self._agrees(rows, target, start)
                if not self._shares:
                    _log.info("the shared start of prompts cannot run once: activations change")
        except SteeringError:
            raise
        except Exception as error:  # models without such a cache fail in many ways
            _log.info("the shared start of prompts cannot run once: %r", error)
            self._shares = False
        return start if self._shares else _Start()

    def _agrees(self, rows: Sequence[Row], target: _Target, start: _Start) -> bool:
        """Return True if two rows give the same activations as when run whole."""
        by_length = sorted(rows, key=lambda row: len(row.tokens))
        two = [by_length[0], by_length[-1]]
        whole = self._means(two, target, _Start())
        apart = np.linalg.norm(self._means(two, target, start) - whole, axis=-1)
        return bool((apart < TOLERANCE * np.linalg.norm(whole, axis=-1)).all())

    def _means(
        self, rows: Sequence[Row], target: _Target, start: _Start
    ) -> npt.NDArray[np.float32]:
        """Return the means, shape (len(rows), len(layers), n_embd)."""
        sequences: dict[Tokens, int] = {}
        owners = [sequences.setdefault(row.tokens, len(sequences)) for row in rows]
        inputs = self.model.padded([tokens[start.length :] for tokens in sequences])
        mask = inputs["attention_mask"]
        weights = torch.zeros(len(rows), start.length + mask.shape[1])
        for i, row in enumerate(rows):
            weights[i, row.start : row.stop] = 1 / (row.stop - row.start)

        def pool(layer: int, states: Tensor) -> Tensor:
            shares = weights.to(states.device)
            if len(sequences) < len(rows):
                states = states[owners]
            mean = torch.bmm(shares[:, None, start.length :], states.float())[:, 0]
            if start.length:
                mean += shares[:, : start.length] @ start.states[layer][0].float()
            return mean.cpu()

        if start.length:
            past = copy.deepcopy(start.past)
            past.batch_repeat_interleave(len(sequences))
            before = mask.new_ones(len(sequences), start.length)
            inputs["attention_mask"] = torch.cat([before, mask], 1)
            found, _ = self._run(target, {**inputs, "past_key_values": past}, pool, stop=True)
        else:
            found, _ = self._run(target, {**inputs, "use_cache": False}, pool, stop=True)
        means: npt.NDArray[np.float32] = torch.stack(
            [found[layer] for layer in target.layers], dim=1
        ).numpy()
        return means

    def _run(
        self,
        target: _Target,
        inputs: dict[str, Any],
        pool: Callable[[int, Tensor], Tensor],
        *,
        stop: bool,
    ) -> tuple[dict[int, Tensor], Any]:
        """Return the result of `pool` for each layer and its states, and the model's output.

        With `stop` nothing above the last of the layers runs, and there is no output.
        """
        found: dict[int, Tensor] = {}
        out = None

        def keep(layer: int, _module: Any, _inputs: Any, output: Any) -> None:
            found[layer] = pool(layer, states_of(output))
            if stop and layer == max(target.layers):
                raise Done

        handles = [
            self.model.module(target.site, layer).register_forward_hook(partial(keep, layer))
            for layer in target.layers
        ]
        try:
            with torch.inference_mode():
                out = self.model.model.base_model(**inputs)  # without the output head
        except Done:
            pass
        finally:
            for handle in handles:
                handle.remove()
        missing = sorted(set(target.layers) - set(found))
        if missing:
            raise SteeringError(f"the model did not run its layers {missing}")
        return found, out
