"""Fitting a router: which layer tells the categories apart, the probes, and their thresholds."""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.metrics import (  # type: ignore[import-untyped]
    balanced_accuracy_score,
    confusion_matrix,
    roc_curve,
)
from sklearn.model_selection import (  # type: ignore[import-untyped]
    StratifiedKFold,
    train_test_split,
)
from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

from pysteer.errors import SteeringError, quoted
from pysteer.router import GATES, Floats, Gate, Router

logger = logging.getLogger(__name__)

Indices: TypeAlias = npt.NDArray[np.intp]

MIN_PROMPTS = 5
"""The fewest prompts of a class that can be split: four to learn from, one to test with."""

HELD_OUT = 0.2
"""The share of every class that is kept for the confusion table and the rates."""

_C = 0.1  # inverse strength of the L2 penalty on standardised activations
_SEARCH_ROWS = 2000  # enough to tell layers apart
_SEARCH_LAYERS = 16  # of a deeper model every other one is tried, then those around the best
_MAX_ROWS = 10_000
_MAX_ROTATED = 1000  # rows; with more, finding the rotation takes longer than it saves
_SMALLEST_SCALE = 1e-3


def fit_router(
    activations: npt.NDArray[Any],
    labels: Sequence[str],
    *,
    layers: Sequence[int],
    site: str,
    pooling: str,
    false_positive_rate: float | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Router:
    """Learn which categories a prompt belongs to from its activations.

    The prompts of every class (benign, and each category) are split in two, at random by `seed`:

    - the *training part*, 80 %. The layer is the one where the multinomial probe has the best
      balanced accuracy in stratified cross-validation; at that layer each prompt is scored by
      weights fitted without its fold, and the thresholds are chosen on those scores, as
      scikit-learn's `TunedThresholdClassifierCV` does; then the weights are fitted to all of it.
    - the *held-out part*, 20 %, which no layer, weight or threshold knows. The confusion table and
      all rates of the router come from it, by the stored float32 weights.

    What is fitted, with `Router`'s formulas:

    - *multinomial* and *probe*: `LogisticRegression` (L2 penalty, C = 0.1, balanced classes) on
      activations standardised by `StandardScaler`, which is folded into the weights. Dimensions
      that hardly vary are not blown up: scales below 0.001 of the median scale are raised to it.
    - *centroid*: mean of each class.
    - *cast*: the condition vector of a category is its mean minus the mean of all other prompts, at
      unit length (arXiv 2409.05907 takes the first principal component of paired examples instead,
      which needs pairs).

    A category's threshold is the one with the largest Youden J: the share of its own prompts whose
    gate opens minus the share of all other prompts (benign, and of the other categories) for which
    it does. With `false_positive_rate`, only thresholds count at which at most that share of the
    benign prompts opens the gate. It is put halfway to the next score beyond.

    Memory: the activations of one layer at a time, as float64.

    Args:
        activations: shape (n, len(layers), n_embd), float32 or any real dtype, or a `np.memmap`;
            pooled as `pooling` says, in the units of the model's activations.
        labels: the category of each of the n prompts, "" for benign.
        layers: block index of each of `activations`' layers.
        site: where in a block they were taken.
        pooling: "last", "prompt" or "user", kept in the router.
        false_positive_rate: largest share of benign prompts that may open a gate, from 0 to below
            1; None for no limit.
        folds: of the cross-validation; fewer if a class is smaller.
        seed: of the splits; the same seed gives the same router.

    Returns:
        The router. It lacks categories with fewer than `MIN_PROMPTS` prompts, which are logged as a
        warning and whose prompts are not used. Of more than 10,000 prompts a stratified sample is
        used, which is logged too.

    Raises:
        SteeringError: shapes that do not belong together, NaN or infinity, fewer than `MIN_PROMPTS`
            benign prompts, no category with as many.
    """
    activations, layers = _checked(activations, labels, layers)
    if false_positive_rate is not None and not 0 <= false_positive_rate < 1:
        raise SteeringError(
            f"a false-positive rate of {quoted(false_positive_rate)} is not from 0 to below 1"
        )
    if folds < 2:
        raise SteeringError(f"cross-validation needs 2 folds or more, not {quoted(folds)}")
    categories, rows, classes = _classes(labels)
    if len(rows) > _MAX_ROWS:
        logger.warning("the router is fitted to a sample of %d of %d prompts", _MAX_ROWS, len(rows))
        chosen = _sample(classes, _MAX_ROWS, seed)
        rows, classes = rows[chosen], classes[chosen]
    train, held_out = split(classes, seed)

    search = _Search(activations, layers, rows[train], classes[train], folds, seed)
    best, layer_scores = search.run()
    h = _layer(activations, layers, best, rows[train])
    rule = "youden" if false_positive_rate is None else f"fpr={false_positive_rate:g}"
    train_counts = np.bincount(classes[train])

    def build(h: Floats, of: Indices) -> Router:
        k = len(categories)
        none = np.zeros(k)
        return Router(
            site=site,
            layer=layers[best],
            pooling=pooling,
            categories=categories,
            gates={kind: Gate(none, none == 0, none, none, none) for kind in GATES},
            confusion=np.eye(k + 1, dtype=np.int64),
            threshold_rule=rule,
            train_counts=train_counts,
            layer_scores=layer_scores,
            **_fit(h, of),
        )

    scores = _out_of_fold(build, h, classes[train], folds, seed)
    router = build(h, classes[train])
    h = _layer(activations, layers, best, rows[held_out])
    gates = {}
    for kind in GATES:
        thresholds, above = _thresholds(
            kind, scores[kind], classes[train], categories, false_positive_rate
        )
        gates[kind] = _gate(thresholds, above, router.scores(kind, h), classes[held_out])
    found = router.probabilities(h).argmax(axis=1)
    router = dataclasses.replace(
        router,
        gates=gates,
        confusion=confusion_matrix(classes[held_out], found, labels=range(len(categories) + 1)),
    )
    logger.info(
        "router: layer %d, held-out category accuracy %.3f, benign false-positive rate %.3f",
        router.layer,
        router.category_accuracy,
        router.benign_false_positive_rate,
    )
    return router


def split(classes: npt.ArrayLike, seed: int) -> tuple[Indices, Indices]:
    """Split prompts into a training and a held-out part, each class in the same proportion.

    Args:
        classes: class of each prompt, (n,); every class at least `MIN_PROMPTS` times.
        seed: decides which.

    Returns:
        Two ascending arrays of indices.
    """
    classes = np.asarray(classes)
    train, held_out = train_test_split(
        np.arange(len(classes)), test_size=HELD_OUT, stratify=classes, random_state=seed
    )
    return np.sort(train), np.sort(held_out)


def choose_threshold(
    scores: npt.ArrayLike,
    own: npt.ArrayLike,
    benign: npt.ArrayLike,
    *,
    false_positive_rate: float | None = None,
) -> tuple[float, float]:
    """The threshold with the largest Youden J; of several such the highest.

    J = share of the own prompts with score >= threshold, minus share of all others with it.
    Source: W. J. Youden, Index for rating diagnostic tests, Cancer 3 (1950).

    Args:
        scores: (n,).
        own: bool (n,), True for prompts of the category; both kinds must be there.
        benign: bool (n,), True for benign prompts.
        false_positive_rate: only thresholds count that at most this share of the benign prompts
            reaches.

    Returns:
        The threshold, halfway between the lowest score that reaches it and the next below, and its
        J. If no threshold counts, one above all scores, and 0.
    """
    scores = np.asarray(scores, np.float64)
    own, benign = np.asarray(own, np.bool_), np.asarray(benign, np.bool_)
    others, opened, candidates = roc_curve(own, scores, drop_intermediate=False)
    # The first candidate is infinity, which no score reaches.
    youden, candidates = (opened - others)[1:], candidates[1:]
    if false_positive_rate is not None and benign.any():
        ordered = np.sort(scores[benign])
        reaching = len(ordered) - np.searchsorted(ordered, candidates, side="left")
        youden = np.where(reaching <= false_positive_rate * len(ordered), youden, -np.inf)
    best = int(np.argmax(youden))
    if youden[best] == -np.inf:
        return float(np.nextafter(scores.max(), np.inf)), 0.0
    threshold = candidates[best]
    if best + 1 < len(candidates):
        middle = candidates[best + 1] + (threshold - candidates[best + 1]) / 2
        threshold = middle if middle > candidates[best + 1] else threshold
    return float(threshold), float(youden[best])


@dataclass
class _Search:
    """Cross-validation over layers."""

    activations: npt.NDArray[Any]
    layers: list[int]
    rows: Indices
    classes: Indices
    folds: int
    seed: int

    def run(self) -> tuple[int, dict[int, float]]:
        """Index of the best layer, and the score of every layer that was tried."""
        if len(self.rows) > _SEARCH_ROWS:
            chosen = _sample(self.classes, _SEARCH_ROWS, self.seed)
            self.rows, self.classes = self.rows[chosen], self.classes[chosen]
        n = len(self.layers)
        step = math.ceil(n / _SEARCH_LAYERS)
        scores = {i: self.score(i) for i in range(0, n, step)}
        best = max(scores, key=scores.__getitem__)
        for i in range(max(0, best - step + 1), min(n, best + step)):
            if i not in scores:
                scores[i] = self.score(i)
        best = max(sorted(scores), key=scores.__getitem__)
        return best, {self.layers[i]: score for i, score in scores.items()}

    def score(self, index: int) -> float:
        """Mean balanced accuracy over the folds."""
        h = _layer(self.activations, self.layers, index, self.rows)
        found = []
        for fit, test in _folds(self.classes, self.folds, self.seed):
            standard = _Standardised.of(h[fit])
            probe = _logistic(standard.rows, self.classes[fit], tol=1e-2, max_iter=60)
            predicted = probe.predict(standard.apply(h[test]))
            found.append(balanced_accuracy_score(self.classes[test], predicted))
        return float(np.mean(found))


@dataclass
class _Standardised:
    """Standardised activations in as few coordinates as they have.

    A fit with an L2 penalty stays the same when the rows are rotated, and n rows need no more than
    n coordinates: with wide models and few prompts that is most of the time.
    """

    mean: Floats
    scale: Floats
    basis: Floats | None
    rows: Floats

    @classmethod
    def of(cls, h: Floats) -> _Standardised:
        scaler = StandardScaler().fit(h)
        deviation = np.sqrt(scaler.var_)
        if not deviation.any():
            raise SteeringError(
                "the activations of all prompts are the same; there is nothing to tell apart"
            )
        scale = np.maximum(deviation, _SMALLEST_SCALE * np.median(deviation[deviation > 0]))
        z = (h - scaler.mean_) / scale
        if len(z) >= z.shape[1] or len(z) > _MAX_ROTATED:
            return cls(scaler.mean_, scale, None, z)
        left, singular, basis = np.linalg.svd(z, full_matrices=False)
        return cls(scaler.mean_, scale, basis, left * singular)

    def apply(self, h: Floats) -> Floats:
        z = (h - self.mean) / self.scale
        return z if self.basis is None else np.asarray(z @ self.basis.T)

    def fold(self, weight: Floats, bias: Floats) -> tuple[npt.NDArray[np.float32], Floats]:
        """Weight and bias for activations as they are: W' h + b' = W z + b."""
        weight = (weight if self.basis is None else weight @ self.basis) / self.scale
        stored = weight.astype(np.float32)
        return stored, bias - stored.astype(np.float64) @ self.mean


def _fit(h: Floats, classes: Indices) -> dict[str, Any]:
    """The arrays of a router from activations (n, n_embd) and classes 0 to k."""
    k = int(classes.max())
    standard = _Standardised.of(h)
    multinomial = _logistic(standard.rows, classes)
    weight, bias = multinomial.coef_, multinomial.intercept_
    if k == 1:  # scikit-learn gives two classes one row, the logit of their difference
        weight, bias = np.vstack([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    probes = [_logistic(standard.rows, classes == c) for c in range(1, k + 1)]
    parts = {
        "": standard.fold(weight, bias),
        "probe_": standard.fold(
            np.vstack([probe.coef_ for probe in probes]),
            np.concatenate([probe.intercept_ for probe in probes]),
        ),
    }
    centroids = np.stack([h[classes == c].mean(axis=0) for c in range(k + 1)])
    others = [h.mean(axis=0, where=(classes != c)[:, None]) for c in range(1, k + 1)]
    apart = centroids[1:] - np.stack(others)
    lengths = np.linalg.norm(apart, axis=1, keepdims=True)
    if not lengths.all():
        raise SteeringError(
            "the prompts of a category and all others have the same mean activations; "
            "are they the same prompts?"
        )
    return {
        **{f"{which}weight": weight for which, (weight, _) in parts.items()},
        **{f"{which}bias": bias for which, (_, bias) in parts.items()},
        "centroids": centroids,
        "conditions": apart / lengths,
    }


def _logistic(
    z: Floats, classes: npt.NDArray[Any], *, tol: float = 1e-4, max_iter: int = 1000
) -> LogisticRegression:
    probe = LogisticRegression(C=_C, class_weight="balanced", tol=tol, max_iter=max_iter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told below, where it matters
        probe.fit(z, classes)
    if max_iter >= 1000 and (probe.n_iter_ >= max_iter).any():
        logger.warning("a probe of the router did not converge in %d iterations", max_iter)
    return probe


def _out_of_fold(
    build: Callable[[Floats, Indices], Router], h: Floats, classes: Indices, folds: int, seed: int
) -> dict[str, Floats]:
    """What each kind of gate sees of each prompt when fitted without the prompt's fold."""
    scores = {kind: np.empty((len(h), int(classes.max()))) for kind in GATES}
    for fit, test in _folds(classes, folds, seed):
        router = build(h[fit], classes[fit])
        for kind, found in scores.items():
            found[test] = router.scores(kind, h[test])
    return scores


def _thresholds(
    kind: str,
    scores: Floats,
    classes: Indices,
    categories: list[str],
    false_positive_rate: float | None,
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    thresholds, above = [], []
    for i, category in enumerate(categories):
        own, benign = classes == i + 1, classes == 0
        options = []
        # A condition similarity has no sign, so that CAST's condition may hold on either side.
        for sign in (1, -1) if kind == "cast" else (1,):
            threshold, youden = choose_threshold(
                sign * scores[:, i], own, benign, false_positive_rate=false_positive_rate
            )
            options.append((youden, sign * threshold, sign == 1))
        youden, threshold, side = max(options, key=lambda option: option[0])
        if youden <= 0:
            logger.warning(
                "the %s gate of category %s does not tell it apart in training", kind, category
            )
        thresholds.append(threshold)
        above.append(side)
    return np.array(thresholds), np.array(above)


def _gate(
    thresholds: Floats, above: npt.NDArray[np.bool_], scores: Floats, classes: Indices
) -> Gate:
    """The gate with its rates on held-out prompts."""
    none = np.zeros_like(thresholds)
    opens = Gate(thresholds, above, none, none, none).opens(scores)
    own = classes[:, None] == np.arange(1, len(thresholds) + 1)
    others = (classes[:, None] != 0) & ~own
    return Gate(
        thresholds,
        above,
        true_positive_rates=_share(opens, own),
        false_positive_rates=_share(opens, classes[:, None] == 0),
        leak_rates=_share(opens, others),
    )


def _share(opens: npt.NDArray[np.bool_], among: npt.NDArray[np.bool_]) -> Floats:
    """Share of the rows of each column that are open, among those asked about; 0 if none are."""
    return np.asarray((opens & among).sum(axis=0) / np.maximum(among.sum(axis=0), 1))


def _folds(classes: Indices, folds: int, seed: int) -> Iterator[tuple[Indices, Indices]]:
    folds = min(folds, int(np.bincount(classes).min()))
    yield from StratifiedKFold(folds, shuffle=True, random_state=seed).split(classes, classes)


def _sample(classes: Indices, size: int, seed: int) -> Indices:
    """Indices of a stratified sample, in which every class keeps at least `MIN_PROMPTS`."""
    rng = np.random.default_rng(seed)
    chosen = []
    for c in np.unique(classes):
        (of_class,) = np.nonzero(classes == c)
        count = max(MIN_PROMPTS, int(size * len(of_class) / len(classes)))
        chosen.append(rng.permutation(of_class)[:count])
    return np.sort(np.concatenate(chosen))


def _layer(activations: npt.NDArray[Any], layers: list[int], index: int, rows: Indices) -> Floats:
    h = np.asarray(activations[rows, index], np.float64)
    if not np.isfinite(h).all():
        raise SteeringError(f"the activations of layer {layers[index]} hold NaN or infinity")
    return h


def _checked(
    activations: npt.NDArray[Any], labels: Sequence[str], layers: Sequence[int]
) -> tuple[npt.NDArray[Any], list[int]]:
    if not isinstance(activations, np.ndarray):
        activations = np.asarray(activations)
    if activations.ndim != 3 or activations.dtype.kind not in "fiu" or not activations.size:
        raise SteeringError(
            f"the activations have shape {activations.shape} and type {activations.dtype}; "
            "numbers of shape (prompts, layers, n_embd) are needed"
        )
    layers = [int(layer) for layer in layers]
    if len(labels) != len(activations) or len(layers) != activations.shape[1]:
        raise SteeringError(
            f"{len(labels)} labels and {len(layers)} layers do not belong to activations of shape "
            f"{activations.shape}"
        )
    if len(set(layers)) != len(layers):
        raise SteeringError("a layer is there twice")
    return activations, layers


def _classes(labels: Sequence[str]) -> tuple[list[str], Indices, Indices]:
    """The categories that can be told apart, the rows to use, and the class of each of these."""
    names = np.asarray(labels, dtype=object)
    counts: dict[str, int] = {}
    for name in labels:
        counts[name] = counts.get(name, 0) + 1
    benign = counts.pop("", 0)
    if benign < MIN_PROMPTS:
        raise SteeringError(
            f"a router needs at least {MIN_PROMPTS} benign prompts to tell categories from; "
            f"there are {benign}: add harmless ones"
        )
    few = {name: count for name, count in counts.items() if count < MIN_PROMPTS}
    for name, count in few.items():
        logger.warning(
            "category %s has %d prompts of the %d that a router needs to learn and test it: "
            "left out of the router",
            name,
            count,
            MIN_PROMPTS,
        )
    categories = [name for name in counts if name not in few]
    if not categories:
        raise SteeringError(
            f"no category has the {MIN_PROMPTS} prompts that a router needs "
            f"({quoted(counts)}); add prompts"
        )
    number = {"": 0, **{name: i + 1 for i, name in enumerate(categories)}}
    (rows,) = np.nonzero([name in number for name in names])
    return categories, rows, np.array([number[names[row]] for row in rows], np.intp)
