"""The margin gate: one ridge regression, and the thresholds of its gates.

One linear map W h + b with a row for each class. Row 0 scores how harmless a prompt is, and alone
decides whether a category acts; the differences between the other rows decide the categories.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve  # type: ignore[import-untyped]
from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]

from pysteer.extract.routers.settings import FALSE_POSITIVE_RATE, LOOK_ALIKE_RATE, MAX_LEAK
from pysteer.pack.arrays import Floats

Indices: TypeAlias = npt.NDArray[np.intp]
Fold: TypeAlias = tuple[Indices, Indices]

PENALTIES = (0.1, 0.3, 1.0, 3.0)
"""Candidate ridge penalties, in units of the mean squared length of a row."""

_BENIGN_MASS = 0.5  # weight of all benign prompts together; the categories share the rest equally

SMALLEST_SCALE = 1e-3
"""Smallest scale of a dimension in standardisation, relative to the median scale."""


@dataclass(frozen=True)
class MarginFit:
    """Arrays for `pysteer.pack.router.Router.margin_scores`.

    Attributes:
        weight: float64 (k + 1, w), for activations as they are.
        bias: float64 (k + 1,); in its row 0 is the harm threshold.
        allowances: float64 (k,), at least 0.
        penalties: the chosen penalties, for harm and for the categories.
    """

    weight: Floats
    bias: Floats
    allowances: Floats
    penalties: tuple[float, float]


def fit_margin(
    h: Floats,
    classes: Indices,
    folds: Sequence[Fold],
    *,
    false_positive_rate: float | None = None,
    max_leak: float = MAX_LEAK,
    look_alikes: npt.NDArray[np.bool_] | None = None,
    look_alike_rate: float = LOOK_ALIKE_RATE,
) -> MarginFit:
    """Fit the map, its harm threshold and the categories' allowances.

    Weighted least squares to one-hot classes, on activations standardised as
    `pysteer.extract.routers.probes` does. Benign prompts weigh as much as all others together; all
    categories weigh the same. Row 0 and the other rows are independent, and each has the penalty of
    `PENALTIES` that does best on the folds: by the area under the ROC curve of harm, and by the
    balanced accuracy of the category among harmful prompts.

    Thresholds come from scores of the same folds, so the prompts that a threshold is chosen on are
    unknown to the weights that score them:

    - *harm*: the lowest that at most `false_positive_rate` of the benign prompts reach, look-alikes
      aside, and at most `look_alike_rate` of the look-alikes.
    - *allowance* of a category: minus the lead over all others that at most `max_leak` of the
      other categories' prompts reach; 0 if that lead is not negative.

    Args:
        h: (n, w).
        classes: (n,), 0 benign, 1 to k; every class occurs.
        folds: indices to fit and to test; every prompt is tested once.
        false_positive_rate: from 0 to below 1; None is `FALSE_POSITIVE_RATE`.
        max_leak: from 0 to 1.
        look_alikes: bool (n,), benign prompts that sound harmful; None: no look-alikes.
        look_alike_rate: from 0 to 1.

    Raises:
        ValueError: no fold tests some prompt.
    """
    k = int(classes.max())
    # NaN: a prompt that no fold tests must not seem scored.
    scores = {penalty: np.full((len(h), k + 1), np.nan) for penalty in PENALTIES}
    for fit, test in folds:
        for penalty, (w, b) in _ridge(h[fit], classes[fit], k, PENALTIES).items():
            scores[penalty][test] = h[test] @ w.T + b
    harmful = classes > 0
    of_harm = max(PENALTIES, key=lambda p: roc_auc_score(harmful, -scores[p][:, 0]))
    of_category = max(
        PENALTIES, key=lambda p: _balanced_accuracy(scores[p][harmful, 1:], classes[harmful])
    )
    chosen = _ridge(h, classes, k, {of_harm, of_category})
    # Row 0 is the harm fit's, the other rows are the category fit's.
    weight = np.vstack([chosen[of_harm][0][:1], chosen[of_category][0][1:]])
    bias = np.concatenate([chosen[of_harm][1][:1], chosen[of_category][1][1:]])
    harm = -scores[of_harm][:, 0]
    sounds = np.zeros(len(h), bool) if look_alikes is None else look_alikes & ~harmful
    rate = FALSE_POSITIVE_RATE if false_positive_rate is None else false_positive_rate
    bounds = [
        _quantile(harm[group], share)
        for group, share in ((~harmful & ~sounds, rate), (sounds, look_alike_rate))
        if group.any()
    ]
    bias[0] += max(bounds)
    leads = leads_of(scores[of_category][:, 1:])
    allowances = np.zeros(k)
    for c in range(1, k + 1):
        others = harmful & (classes != c)
        if others.any():
            allowances[c - 1] = max(0.0, -_quantile(leads[others, c - 1], max_leak))
    return MarginFit(weight, bias, allowances, (of_harm, of_category))


def leads_of(scores: Floats) -> Floats:
    """Return each category's score minus the largest of the others, (n, k); 0 if k is 1."""
    if scores.shape[1] == 1:
        return np.zeros_like(scores)
    ordered = np.sort(scores, axis=1)
    largest, second = ordered[:, -1:], ordered[:, -2:-1]
    return np.asarray(scores - np.where(scores == largest, second, largest))


def _ridge(
    h: Floats, classes: Indices, k: int, penalties: Iterable[float]
) -> dict[float, tuple[Floats, Floats]]:
    """Return weight and bias for each penalty: weighted least squares to one-hot classes."""
    mean, deviation = h.mean(axis=0), h.std(axis=0)
    if deviation.any():  # dimensions that hardly vary are not blown up
        smallest = SMALLEST_SCALE * np.median(deviation[deviation > 0])
        deviation = np.maximum(deviation, smallest)
    else:
        deviation = np.ones_like(deviation)
    mass = np.where(classes == 0, _BENIGN_MASS, (1 - _BENIGN_MASS) / k)
    weights = mass / np.bincount(classes, minlength=k + 1)[classes]
    weights /= weights.sum()
    z = (h - mean) / deviation
    targets = np.eye(k + 1)[classes]
    centre, level = weights @ z, weights @ targets
    root = np.sqrt(weights)[:, None]
    rows, wanted = (z - centre) * root, (targets - level) * root
    dual = len(rows) <= rows.shape[1]
    gram = rows @ rows.T if dual else rows.T @ rows
    unit = max(float(np.trace(gram)) / len(rows), np.finfo(np.float64).tiny)
    right = wanted if dual else rows.T @ wanted
    found = {}
    for penalty in penalties:
        regular = gram.copy()
        regular.flat[:: len(gram) + 1] += penalty * unit
        solved = cho_solve(cho_factor(regular, lower=True, overwrite_a=True), right)
        slopes = ((rows.T @ solved) if dual else solved).T
        w = slopes / deviation
        found[penalty] = w, level - w @ mean - slopes @ centre
    return found


def _balanced_accuracy(scores: Floats, classes: Indices) -> float:
    right = scores.argmax(axis=1) + 1 == classes
    return float(np.mean([right[classes == c].mean() for c in np.unique(classes)]))


def _quantile(scores: Floats, share: float) -> float:
    """Return the threshold that at most this share of the scores reaches."""
    return float(np.nextafter(np.quantile(scores, 1 - share, method="higher"), np.inf))
