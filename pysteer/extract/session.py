"""One extraction under way: its data, its settings, and what every step of it needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pysteer.extract.answers import Judge
from pysteer.extract.cache import ActivationCache, Floats, Progress, RunningMeans, no_progress
from pysteer.extract.capture import Capture, Pooling, Row
from pysteer.extract.examples import Sides, rows_of
from pysteer.extract.settings import ExtractSettings
from pysteer.prompts import Prompt


class Reporter(Protocol):
    """Told what is going on; the command line draws bars."""

    def start(self, what: str, total: int, unit: str) -> Progress:
        """Begin a stage of `total` units; returns what to call with (units, rows) done."""
        ...


class Silent:
    """A `Reporter` that tells nobody."""

    def start(self, what: str, total: int, unit: str) -> Progress:
        """Begin a stage."""
        return no_progress


@dataclass(frozen=True)
class Data:
    """The prompts of an extraction.

    Attributes:
        unsafe: with a category each.
        safe: harmless ones: twins of the unsafe prompts, generic instructions, or both.
        benign: more harmless prompts, for the router alone.
        answers: safe answers for `contrast` and `learned`; see `safe_answers`.
    """

    unsafe: Sequence[Prompt]
    safe: Sequence[Prompt]
    benign: Sequence[Prompt] = ()
    answers: Sequence[Prompt] = ()


class _Known(NamedTuple):
    """Activations by row and layer: where in the array each of them is."""

    rows: Mapping[Row, int]
    layers: Mapping[int, int]
    activations: Floats


@dataclass
class Run:
    """One extraction under way."""

    capture: Capture
    data: Data
    settings: ExtractSettings
    judge: Judge | None
    cache: Path
    report: Reporter
    layers: tuple[int, ...] = ()
    sides: Sides = field(init=False)
    figures: dict[str, Any] = field(default_factory=dict)
    _known: _Known | None = field(default=None, init=False)

    def activations(self, rows: Sequence[Row], site: str, layers: Sequence[int]) -> Floats:
        """Every row's, from the cache as far as it holds them."""
        cache = ActivationCache(self.cache, self.capture, rows, site, layers)
        return cache.fill(self._bar(rows, cache.missing), self._source)

    def means(
        self, rows: Sequence[Row], owners: Sequence[int], n_groups: int
    ) -> npt.NDArray[np.float64]:
        """Mean activations of each group of rows, shape (n_groups, len(layers), n_embd)."""
        means = RunningMeans(
            self.cache, self.capture, rows, owners, n_groups, self.settings.site, self.layers
        )
        return means.fill(self._bar(rows, means.missing), self._source)

    def remember(self, rows: Sequence[Row], layers: Sequence[int], activations: Floats) -> None:
        """Residual activations that need not be computed again, (rows, layers, n_embd)."""
        self._known = _Known(
            dict(zip(rows, range(len(rows)), strict=True)),
            {layer: at for at, layer in enumerate(layers)},
            activations,
        )

    def answers_file(self, n_tokens: int) -> Path:
        """Where the model's own answers of that length are kept."""
        self.cache.mkdir(parents=True, exist_ok=True)
        which = json.dumps([type(self.capture).__name__, self.capture.identity, n_tokens])
        return self.cache / f"{hashlib.sha256(which.encode()).hexdigest()}.answers.jsonl"

    def _source(
        self, rows: Sequence[Row], *, site: str, layers: Sequence[int]
    ) -> Iterator[tuple[int, Floats]]:
        """Activations of rows, none of which is run twice."""
        known = self._known if site == "residual" else None
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

    def _bar(self, rows: Sequence[Row], missing: Sequence[int]) -> Progress:
        if not missing:
            return no_progress
        return self.report.start("activations", sum(len(rows[i].tokens) for i in missing), "tokens")

    def rows(self, prompts: Sequence[Prompt], pooling: Pooling) -> list[Row]:
        """What to run for each prompt; see `rows_of`."""
        return rows_of(self.capture, prompts, pooling, respond=isinstance(pooling, tuple))


def slices(
    sides: Sequence[Mapping[str, Sequence[Prompt]]],
) -> list[dict[str, slice]]:
    """Where each side's groups are, once all are laid end to end."""
    parts: list[dict[str, slice]] = []
    start = 0
    for side in sides:
        parts.append({})
        for name, prompts in side.items():
            parts[-1][name] = slice(start, start + len(prompts))
            start += len(prompts)
    return parts
