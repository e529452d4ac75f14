"""Routers from prompts: the choice of prompts, and their activations."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pysteer.extract.inputs import TokenizedPrompt, rows_of
from pysteer.extract.reader import Reader
from pysteer.extract.routers.reads import default_reads
from pysteer.extract.routers.settings import MAX_PROMPTS, MIN_PROMPTS, RouterSettings
from pysteer.pack.router import Read, Router

_log = logging.getLogger(__name__)


class LabelledPrompt(NamedTuple):
    """A prompt that a router learns from.

    Attributes:
        prompt: the prompt.
        label: its category; "" for harmless prompts.
    """

    prompt: TokenizedPrompt
    label: str


class RouterActivations(NamedTuple):
    """Activations that a router is fitted to.

    Attributes:
        reads: where they are from.
        h: shape (n, len(reads), n_embd), float32.
        reader: the reader, with the activations in memory.
    """

    reads: tuple[Read, ...]
    h: npt.NDArray[np.float32]
    reader: Reader


def labelled(
    unsafe: Sequence[TokenizedPrompt], harmless: Sequence[TokenizedPrompt]
) -> list[LabelledPrompt]:
    """Return each distinct text and label once, so that no prompt is both held out and learned."""
    found = {(p.prompt.prompt, p.prompt.category or "unsafe"): p for p in unsafe}
    found |= {(p.prompt.prompt, ""): p for p in harmless}
    return [LabelledPrompt(prompt, label) for (_, label), prompt in found.items()]


def enough(labels: Sequence[str]) -> bool:
    """Return True if a router can be fitted to prompts with these labels; log a warning otherwise.

    Args:
        labels: categories of distinct prompts; "" for harmless ones.
    """
    counts = Counter(labels)
    benign = counts.pop("", 0)
    if benign >= MIN_PROMPTS and max(counts.values()) >= MIN_PROMPTS:
        return True
    _log.warning(
        "no router is fitted: a router needs %d prompts of a category and %d harmless prompts",
        MIN_PROMPTS,
        MIN_PROMPTS,
    )
    return False


def fit_to_prompts(
    reader: Reader,
    prompts: Sequence[LabelledPrompt],
    settings: RouterSettings,
    *,
    layers: Sequence[int] = (),
) -> tuple[Router, Reader]:
    """Fit a router to the residual stream of prompts.

    Prompts that share a `pair_id` are learned from or tested with together. Harmless prompts with
    the category of unsafe prompts count as look-alikes.

    Args:
        reader: the model.
        prompts: prompts, from `labelled`.
        settings: of the fit.
        layers: layers that are wanted later, captured in the same pass.

    Returns:
        The router, and the reader with the activations in memory.
    """
    from pysteer.extract.routers.fit import fit_router  # scikit-learn takes a while to import

    if len(prompts) > MAX_PROMPTS:
        _log.warning("the router is fitted to %d of %d prompts", MAX_PROMPTS, len(prompts))
        chosen = np.random.default_rng(settings.seed).permutation(len(prompts))
        prompts = [prompts[i] for i in sorted(chosen[:MAX_PROMPTS].tolist())]
    reads, h, reader = read_prompts(reader, [p.prompt for p in prompts], layers=layers)
    labels = [label for _, label in prompts]
    categories = set(labels)
    rows = [p.prompt.prompt for p in prompts]
    router = fit_router(
        h,
        labels,
        reads=reads,
        site="residual",
        groups=[p.pair_id if p.pair_id is not None else i for i, p in enumerate(rows)],
        look_alikes=[
            not label and p.category != "" and p.category in categories
            for label, p in zip(labels, rows, strict=True)
        ],
        settings=settings,
    )
    return router, reader


def read_prompts(
    reader: Reader, prompts: Sequence[TokenizedPrompt], *, layers: Sequence[int] = ()
) -> RouterActivations:
    """Return the default reads of a router in a model, and the activations of prompts there.

    Args:
        reader: the model.
        prompts: n prompts.
        layers: layers that are wanted later, captured in the same pass.
    """
    capture = reader.capture
    available = set(capture.sites["residual"])
    reads = default_reads(capture.base_model.n_layer)
    reads = tuple(read for read in reads if read.layer in available)
    captured = sorted({read.layer for read in reads} | (set(layers) & available))
    poolings: list[Any] = list(dict.fromkeys(read.pooling for read in reads))
    # All poolings at once, so that each prompt is run once.
    rows = [row for pooling in poolings for row in rows_of(capture, prompts, pooling)]
    activations = reader.activations(rows, "residual", captured)
    n = len(prompts)
    h = np.stack(
        [
            activations[poolings.index(read.pooling) * n :][:n, captured.index(read.layer)]
            for read in reads
        ],
        axis=1,
    )
    return RouterActivations(reads, h, reader.knowing(rows, captured, activations))
