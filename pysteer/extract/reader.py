"""Cached reads from a model: activations, their means, and answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pysteer.extract.answers import own_answers
from pysteer.extract.cache import ActivationCache, Floats, RunningMeans
from pysteer.extract.capture import Capture, Row, Tokens
from pysteer.journal import Journal
from pysteer.progress import SILENT, Advance, Progress, ignore


@dataclass(frozen=True)
class KnownActivations:
    """Activations of the residual stream that need not be computed again.

    Attributes:
        rows: row to its index in `activations`.
        layers: layer to its index in `activations`.
        activations: shape (rows, layers, n_embd).
    """

    rows: Mapping[Row, int]
    layers: Mapping[int, int]
    activations: Floats


@dataclass(frozen=True)
class Reader:
    """A model whose activations and answers are kept in a folder.

    Attributes:
        capture: the model.
        folder: folder of kept results, from which an interrupted extraction resumes; created.
        progress: receives progress reports.
        known: activations that are in memory.
    """

    capture: Capture
    folder: Path
    progress: Progress = SILENT
    known: KnownActivations | None = None

    def activations(self, rows: Sequence[Row], site: str, layers: Sequence[int]) -> Floats:
        """Return the mean activations of each row's range, shape (rows, layers, n_embd)."""
        cache = ActivationCache(self.folder, self.capture, rows, site, layers)
        return cache.fill(self._advance(rows, cache.missing), self._source)

    def means(
        self,
        rows: Sequence[Row],
        owners: Sequence[int],
        n_groups: int,
        site: str,
        layers: Sequence[int],
    ) -> npt.NDArray[np.float64]:
        """Return the mean activations of groups of rows, shape (n_groups, layers, n_embd).

        Args:
            rows: rows.
            owners: the group of each row.
            n_groups: number of groups.
            site: site.
            layers: layers.
        """
        means = RunningMeans(self.folder, self.capture, rows, owners, n_groups, site, layers)
        return means.fill(self._advance(rows, means.missing), self._source)

    def own_answers(self, prompts: Sequence[Tokens], n_tokens: int, stage: str) -> list[Tokens]:
        """Return the model's own greedy answers, at most `n_tokens` each.

        Args:
            prompts: tokens of the prompts, in the chat template.
            n_tokens: most tokens of an answer.
            stage: description for progress reports.
        """
        if not prompts:
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        model = json.dumps([type(self.capture).__name__, self.capture.identity, n_tokens])
        name = f"{hashlib.sha256(model.encode()).hexdigest()}.answers.jsonl"
        return own_answers(
            self.capture,
            prompts,
            n_tokens,
            journal=Journal(self.folder / name),
            advance=self.progress.start(stage, len(prompts), "answers"),
        )

    def knowing(self, rows: Sequence[Row], layers: Sequence[int], activations: Floats) -> Reader:
        """Return a reader that also has activations of the residual stream in memory.

        Args:
            rows: rows.
            layers: layers.
            activations: shape (rows, layers, n_embd).
        """
        known = KnownActivations(
            {row: at for at, row in enumerate(rows)},
            {layer: at for at, layer in enumerate(layers)},
            activations,
        )
        return replace(self, known=known)

    def _source(
        self, rows: Sequence[Row], *, site: str, layers: Sequence[int]
    ) -> Iterator[tuple[int, Floats]]:
        """Yield activations of rows; no row is run twice."""
        known = self.known if site == "residual" else None
        if known is not None and not set(layers) <= set(known.layers):
            known = None
        missing: dict[Row, list[int]] = {}
        for index, row in enumerate(rows):
            if known is not None and row in known.rows:
                at = [known.layers[layer] for layer in layers]
                yield index, known.activations[known.rows[row]][at]
            else:
                missing.setdefault(row, []).append(index)
        if missing:
            once = list(missing)
            for number, found in self.capture.activations(once, site=site, layers=layers):
                for index in missing[once[number]]:
                    yield index, found

    def _advance(self, rows: Sequence[Row], missing: Sequence[int]) -> Advance:
        if not missing:
            return ignore
        n_tokens = sum(len(rows[i].tokens) for i in missing)
        return self.progress.start("activations", n_tokens, "tokens")
