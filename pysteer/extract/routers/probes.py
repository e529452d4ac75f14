"""Gates other than margin: the fit of each kind, and its thresholds."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.metrics import roc_curve  # type: ignore[import-untyped]
from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

from pysteer.errors import SteeringError
from pysteer.extract.routers.margin import SMALLEST_SCALE, Indices
from pysteer.pack.arrays import Floats

_log = logging.getLogger(__name__)

_C = 0.1  # inverse strength of the L2 penalty on standardised activations
_MAX_ITERATIONS = 1000
_MAX_ROTATED = 1000  # rows; with more, finding the rotation takes longer than it saves


def fit_probes(kinds: tuple[str, ...], h: Floats, classes: Indices) -> dict[str, Any]:
    """Fit the gates of some kinds.

    Args:
        kinds: of `pysteer.pack.router.GATES`, but not margin.
        h: activations, float64 (n, w).
        classes: of each row, (n,): 0 is benign, 1 to k are categories; every class occurs.

    Returns:
        The arrays of a `Router` that these kinds need, by name.

    Raises:
        SteeringError: activations that are all equal, or equal in the mean.
    """
    k = int(classes.max())
    found: dict[str, Any] = {}
    standard = _Standardised.of(h)
    if "multinomial" in kinds:
        multinomial = _logistic(standard.rows, classes)
        weight, bias = multinomial.coef_, multinomial.intercept_
        if k == 1:  # scikit-learn gives two classes one row, the logit of their difference
            weight, bias = np.vstack([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        found["weight"], found["bias"] = standard.fold(weight, bias)
    if "probe" in kinds:
        probes = [_logistic(standard.rows, classes == c) for c in range(1, k + 1)]
        found["probe_weight"], found["probe_bias"] = standard.fold(
            np.vstack([probe.coef_ for probe in probes]),
            np.concatenate([probe.intercept_ for probe in probes]),
        )
    centroids = np.stack([h[classes == c].mean(axis=0) for c in range(k + 1)])
    if "centroid" in kinds:
        found["centroids"] = centroids
    if "cast" in kinds:
        others = [h.mean(axis=0, where=(classes != c)[:, None]) for c in range(1, k + 1)]
        apart = centroids[1:] - np.stack(others)
        lengths = np.linalg.norm(apart, axis=1, keepdims=True)
        if not lengths.all():
            raise SteeringError(
                "the prompts of a category and all others have the same mean activations; "
                "are they the same prompts?"
            )
        found["conditions"] = apart / lengths
    return found


def choose_threshold(
    scores: npt.ArrayLike,
    own: npt.ArrayLike,
    benign: npt.ArrayLike,
    *,
    false_positive_rate: float | None = None,
) -> tuple[float, float]:
    """Return the threshold with the largest Youden J; of equals the highest.

    J = share of own prompts with score >= threshold, minus share of other prompts with it.
    Source: W. J. Youden, Index for rating diagnostic tests, Cancer 3 (1950).

    Args:
        scores: (n,).
        own: bool (n,), True for prompts of the category; both values must occur.
        benign: bool (n,), True for benign prompts.
        false_positive_rate: largest share of the benign prompts that may reach the threshold.

    Returns:
        The threshold, halfway between the lowest score that reaches it and the next below, and its
        J. If no threshold keeps the rate, a threshold above all scores, and 0.
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


def choose_thresholds(
    kind: str,
    scores: Floats,
    classes: Indices,
    categories: list[str],
    false_positive_rate: float | None,
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return the thresholds of one kind of gate, and True for gates that open above, by category.

    Args:
        kind: of the gate.
        scores: its scores of each prompt, (n, k).
        classes: of each prompt, (n,): 0 is benign.
        categories: their names, for warnings.
        false_positive_rate: as for `choose_threshold`.
    """
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
            _log.warning(
                "the %s gate of category %s does not tell the category apart in training",
                kind,
                category,
            )
        thresholds.append(threshold)
        above.append(side)
    return np.array(thresholds), np.array(above)


@dataclass
class _Standardised:
    """Standardised activations in as few coordinates as they have.

    A rotation of the rows leaves a fit with an L2 penalty the same, and n rows need no more than n
    coordinates: with wide models and few prompts this saves most of the time.
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
        scale = np.maximum(deviation, SMALLEST_SCALE * np.median(deviation[deviation > 0]))
        z = (h - scaler.mean_) / scale
        if len(z) >= z.shape[1] or len(z) > _MAX_ROTATED:
            return cls(scaler.mean_, scale, None, z)
        left, singular, basis = np.linalg.svd(z, full_matrices=False)
        return cls(scaler.mean_, scale, basis, left * singular)

    def fold(self, weight: Floats, bias: Floats) -> tuple[npt.NDArray[np.float32], Floats]:
        """Return weight and bias for raw activations: W' h + b' = W z + b."""
        weight = (weight if self.basis is None else weight @ self.basis) / self.scale
        stored = weight.astype(np.float32)
        return stored, bias - stored.astype(np.float64) @ self.mean


def _logistic(z: Floats, classes: npt.NDArray[Any]) -> LogisticRegression:
    probe = LogisticRegression(C=_C, class_weight="balanced", max_iter=_MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # logged below
        probe.fit(z, classes)
    if (probe.n_iter_ >= _MAX_ITERATIONS).any():
        _log.warning("a probe of the router did not converge in %d iterations", _MAX_ITERATIONS)
    return probe
