"""Routers from prompts: the choice of prompts, and their activations."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pysteer.errors import quoted
from pysteer.extract.inputs import TokenizedPrompt, rows_of
from pysteer.extract.reader import Reader
from pysteer.extract.routers.reads import default_reads
from pysteer.extract.routers.settings import (
    FEW_EVERYDAY,
    FEW_UNSAFE,
    MAX_PROMPTS,
    MIN_PROMPTS,
    RouterSettings,
)
from pysteer.intervals import wilson
from pysteer.pack.router import Read, Router

if TYPE_CHECKING:
    from pysteer.extract.routers.fit import HeldOut

_log = logging.getLogger(__name__)


class LabelledPrompt(NamedTuple):
    """A prompt that a router learns from.

    Attributes:
        prompt: the prompt.
        label: its category; "" for harmless prompts.
        everyday: True for an everyday prompt, False for unsafe and safe prompts.
    """

    prompt: TokenizedPrompt
    label: str
    everyday: bool = False


class FittedToPrompts(NamedTuple):
    """A router fitted to prompts.

    Attributes:
        router: the router.
        reader: the reader, with the activations in memory.
        figures: held-out figures as JSON data, each a share with its 95% interval ("k", "n",
            "low", "high"). "everyday" and "safe": such prompts for which a gate opened; "caught":
            unsafe prompts for which a gate opened; "category": unsafe prompts whose category was
            found. A figure without held-out prompts is missing.
    """

    router: Router
    reader: Reader
    figures: dict[str, dict[str, float]]


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
    unsafe: Sequence[TokenizedPrompt],
    safe: Sequence[TokenizedPrompt],
    everyday: Sequence[TokenizedPrompt],
) -> list[LabelledPrompt]:
    """Return each distinct text and label once, so that no prompt is both held out and learned."""
    found = {}
    for prompts, harmless in ((unsafe, False), (safe, True), (everyday, True)):
        for p in prompts:
            label = "" if harmless else p.prompt.category or "unsafe"
            found[p.prompt.prompt, label] = LabelledPrompt(p, label, prompts is everyday)
    return list(found.values())


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


def warn_of_few(prompts: Sequence[LabelledPrompt]) -> None:
    """Log a warning of prompts that are too few for a router's decisions, or for its figures."""
    counts = Counter(p.label for p in prompts if p.label)
    few = {name: n for name, n in counts.items() if MIN_PROMPTS <= n < FEW_UNSAFE}
    if few:
        _log.warning(
            "fewer than %d prompts in %s: a router learns their style rather than the category; "
            "add prompts",
            FEW_UNSAFE,
            ", ".join(f"{quoted(name)} ({n})" for name, n in few.items()),
        )
    n_everyday = sum(p.everyday for p in prompts)
    if n_everyday < FEW_EVERYDAY:
        _log.warning(
            "%s everyday prompts: the router may open gates for prompts about anything else; give "
            "%d or more benign prompts",
            f"only {n_everyday}" if n_everyday else "no",
            FEW_EVERYDAY,
        )


def fit_to_prompts(
    reader: Reader,
    prompts: Sequence[LabelledPrompt],
    settings: RouterSettings,
    *,
    layers: Sequence[int] = (),
) -> FittedToPrompts:
    """Fit a router to the residual stream of prompts.

    Prompts that share a `pair_id` are learned from or tested with together. Harmless prompts with
    the category of unsafe prompts count as look-alikes.

    Args:
        reader: the model.
        prompts: prompts, from `labelled`.
        settings: of the fit.
        layers: layers that are wanted later, captured in the same pass.
    """
    from pysteer.extract.routers.fit import fit_router  # scikit-learn takes a while to import

    if len(prompts) > MAX_PROMPTS:
        _log.warning("the router is fitted to %d of %d prompts", MAX_PROMPTS, len(prompts))
        chosen = np.random.default_rng(settings.seed).permutation(len(prompts))
        prompts = [prompts[i] for i in sorted(chosen[:MAX_PROMPTS].tolist())]
    reads, h, reader = read_prompts(reader, [p.prompt for p in prompts], layers=layers)
    labels = [p.label for p in prompts]
    categories = set(labels)
    rows = [p.prompt.prompt for p in prompts]
    router, held_out = fit_router(
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
    return FittedToPrompts(router, reader, _figures(held_out, prompts))


def _figures(held_out: HeldOut, prompts: Sequence[LabelledPrompt]) -> dict[str, dict[str, float]]:
    everyday = np.array([prompts[row].everyday for row in held_out.rows], bool)
    unsafe = held_out.classes > 0
    figures = {}
    for name, hits, among in (
        ("everyday", held_out.opened, everyday),
        ("safe", held_out.opened, ~unsafe & ~everyday),
        ("caught", held_out.opened, unsafe),
        ("category", held_out.found == held_out.classes, unsafe),
    ):
        k, n = int((hits & among).sum()), int(among.sum())
        if n:
            low, high = wilson(k, n)
            figures[name] = {"k": k, "n": n, "low": low, "high": high}
    return figures


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
