"""Typical activations of single tokens: norms, and the size of each dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pysteer.extract.capture import Row, Tokens

SAMPLE = 64
"""Number of tokens, each from another prompt if there are enough."""


@dataclass(frozen=True)
class Typical:
    """Single tokens' activations over a sample of prompts.

    Attributes:
        norm: layer to median L2 norm.
        magnitude: layer to mean |activation| of each dimension, float64 of shape (n_embd,).
    """

    norm: dict[int, float]
    magnitude: dict[int, npt.NDArray[np.float64]]


def measure(
    activations: Callable[[Sequence[Row], str, Sequence[int]], npt.NDArray[np.float32]],
    rows: Sequence[Row],
    *,
    site: str,
    layers: Sequence[int],
    seed: int,
) -> Typical:
    """Measure one random token of the pooled range of each of up to `SAMPLE` rows.

    Single tokens, because a mean over tokens is shorter than each of them. Never the first token of
    a sequence, whose norm is unlike any other's (an attention sink), unless the range has no other.

    Args:
        activations: from rows, site and layers to activations, shape (rows, layers, n_embd).
        rows: rows to choose from.
        site: site.
        layers: layers.
        seed: of the choice.
    """
    random = np.random.default_rng(seed)
    chosen = [rows[i % len(rows)] for i in random.permutation(max(len(rows), SAMPLE))[:SAMPLE]]
    picks = [
        (row, int(random.integers(min(max(row.start, 1), row.stop - 1), row.stop)))
        for row in chosen
    ]
    # Tokens of one sequence come from one run of it, up to the last of them: of few prompts, many
    # tokens of each are measured.
    ends: dict[Tokens, int] = {}
    for row, at in picks:
        ends[row.tokens] = max(ends.get(row.tokens, 0), at + 1)
    tokens = [Row(row.tokens[: ends[row.tokens]], at, at + 1) for row, at in picks]
    found = activations(tokens, site, layers)
    norms = np.median(np.linalg.norm(found.astype(np.float64), axis=2), axis=0)
    magnitudes = np.abs(found).mean(axis=0, dtype=np.float64)
    return Typical(
        {layer: float(norm) for layer, norm in zip(layers, norms, strict=True)},
        dict(zip(layers, magnitudes, strict=True)),
    )
