"""The router's classes against the prompts' true categories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import (  # type: ignore[import-untyped]
    confusion_matrix,
    f1_score,
)

from pysteer.evaluate.estimates import share
from pysteer.evaluate.report import BENIGN, RouterFigures

NOTHING = "nothing"
"""The column of prompts for which no gate opened."""


@dataclass(frozen=True)
class RoutedPrompt:
    """A prompt and the router's decision.

    Attributes:
        category: true category; "benign" for benign prompts.
        fired: categories whose gate opened.
        ranks: category to the value by which the router compared the categories.
    """

    category: str
    fired: Sequence[str]
    ranks: Mapping[str, float]


def router_figures(
    routed: Sequence[RoutedPrompt], known: Sequence[str], thresholds: Mapping[str, float]
) -> RouterFigures:
    """Return confusion, F1 and false positives.

    Prompts of categories that the router does not know have their own rows and no part in F1: no
    decision about these prompts is right or wrong.

    Args:
        routed: prompts and decisions.
        known: the router's categories.
        thresholds: by category. Where several categories fired, the category furthest past its
            threshold counts as found.
    """
    columns = [*known, NOTHING]
    present = list(dict.fromkeys(prompt.category for prompt in routed))
    rows = [name for name in known if name in present]
    rows += [name for name in present if name not in known and name != BENIGN]
    rows += [BENIGN] if BENIGN in present else []
    decided = [_decision(prompt, thresholds) for prompt in routed]
    true = [prompt.category for prompt in routed]
    # One matrix over all labels, cut to the rows and columns that can have counts.
    labels = list(dict.fromkeys([*rows, *columns]))
    counts = np.zeros((len(labels), len(labels)), np.int64)
    if routed:
        counts = confusion_matrix(true, decided, labels=labels)
    at = {name: i for i, name in enumerate(labels)}
    confusion = counts[np.ix_([at[row] for row in rows], [at[column] for column in columns])]
    classes = [*(name for name in rows if name in known), *([NOTHING] if BENIGN in rows else [])]
    pairs = [
        (NOTHING if t == BENIGN else t, f)
        for t, f in zip(true, decided, strict=True)
        if t == BENIGN or t in known
    ]
    f1: dict[str, float] = {}
    if pairs:
        values = f1_score(
            [t for t, _ in pairs],
            [f for _, f in pairs],
            labels=classes,
            average=None,
            zero_division=0.0,
        )
        names = [BENIGN if name == NOTHING else name for name in classes]
        f1 = dict(zip(names, map(float, values), strict=True))
    benign = [prompt for prompt in routed if prompt.category == BENIGN]
    return RouterFigures(
        rows=rows,
        columns=columns,
        confusion=confusion.tolist(),
        macro_f1=float(np.mean(list(f1.values()))) if f1 else None,
        f1=f1,
        caught={
            name: share(bool(prompt.fired) for prompt in routed if prompt.category == name)
            for name in rows
            if name != BENIGN
        },
        false_positives=share(bool(prompt.fired) for prompt in benign),
        false_positives_of={
            name: sum(1 for prompt in benign if _decision(prompt, thresholds) == name)
            for name in known
        },
    )


def _decision(prompt: RoutedPrompt, thresholds: Mapping[str, float]) -> str:
    def excess(name: str) -> float:
        return abs(prompt.ranks.get(name, 0.0) - thresholds.get(name, 0.0))

    return max(prompt.fired, key=excess) if prompt.fired else NOTHING
