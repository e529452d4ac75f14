"""Splits of prompts: a held-out part, cross-validation folds, a stratified sample."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import (  # type: ignore[import-untyped]
    StratifiedGroupKFold,
    StratifiedKFold,
    train_test_split,
)

from pysteer.extract.routers.margin import Fold, Indices
from pysteer.extract.routers.settings import MIN_PROMPTS

_log = logging.getLogger(__name__)

HELD_OUT = 0.2
"""Share of every class that the confusion table and the rates come from."""


def split(
    classes: npt.ArrayLike, seed: int, groups: npt.ArrayLike | None = None
) -> tuple[Indices, Indices]:
    """Split prompts into a training and a held-out part, with the same proportions of classes.

    Args:
        classes: class of each prompt, (n,); every class at least `MIN_PROMPTS` times.
        seed: of the choice.
        groups: group of each prompt, (n,); no group is in both parts. None: each prompt for
            itself. Groups that would leave a class without a prompt in one of the parts are
            ignored, which is logged.

    Returns:
        Two ascending arrays of indices.
    """
    classes = np.asarray(classes)
    if groups is not None:
        splitter = StratifiedGroupKFold(round(1 / HELD_OUT), shuffle=True, random_state=seed)
        there = np.unique(classes)
        for train, held_out in splitter.split(classes, classes, np.asarray(groups)):
            if all(np.array_equal(np.unique(classes[part]), there) for part in (train, held_out)):
                return train, held_out
        _log.warning(
            "a class has too few groups to be split by them: prompts of one group are both learned "
            "from and tested with, and the router's rates are too good"
        )
    train, held_out = train_test_split(
        np.arange(len(classes)), test_size=HELD_OUT, stratify=classes, random_state=seed
    )
    return np.sort(train), np.sort(held_out)


def folds_of(classes: Indices, folds: int, seed: int, groups: Indices | None) -> Iterator[Fold]:
    """Yield stratified folds of a cross-validation, by group if there are groups."""
    if groups is None:
        folds = max(2, min(folds, int(np.bincount(classes).min())))
        yield from StratifiedKFold(folds, shuffle=True, random_state=seed).split(classes, classes)
        return
    fewest = min(len(np.unique(groups[classes == c])) for c in np.unique(classes))
    if fewest >= 2:
        splitter = StratifiedGroupKFold(min(folds, fewest), shuffle=True, random_state=seed)
        found = list(splitter.split(classes, classes, groups))
        there = np.unique(classes)
        if all(np.array_equal(np.unique(classes[fit]), there) for fit, _ in found):
            yield from found
            return
    # Without some class there is nothing to fit; `split` has logged it.
    yield from folds_of(classes, folds, seed, None)


def sample(classes: Indices, size: int, seed: int) -> Indices:
    """Return indices of a stratified sample; every class keeps at least `MIN_PROMPTS`."""
    rng = np.random.default_rng(seed)
    chosen = []
    for c in np.unique(classes):
        (of_class,) = np.nonzero(classes == c)
        count = max(MIN_PROMPTS, int(size * len(of_class) / len(classes)))
        chosen.append(rng.permutation(of_class)[:count])
    return np.sort(np.concatenate(chosen))
