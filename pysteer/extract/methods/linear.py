"""Linear classifiers: the methods `logistic` and `lda`.

`pysteer.extract.methods.arithmetic` gives shapes, units and errors.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pysteer.errors import SteeringError, quoted
from pysteer.extract.methods.arithmetic import (
    Activations,
    Direction,
    Floats,
    along,
    check_activations,
    from_means,
    loaded,
)
from pysteer.extract.methods.base import ArrayMethod, NoOptions
from pysteer.settings import check, setting

_MAX_ITERATIONS = 1000


def logistic(unsafe: Activations, safe: Activations, *, C: float = 1.0) -> Direction:
    """Return the normal of the plane of a logistic regression between unsafe and safe.

    The regression runs on standardised dimensions z = (h - mean) / sd, for an even penalty:
    minimise |v|^2 / 2 + C sum_i w_i log(1 + exp(-y_i (v . z_i + b))), y = 1 for safe and -1 for
    unsafe, w balancing the classes. In the activations' own units the normal is a = v / sd;
    direction = (a . omega) a / |a|^2.

    Source: linear probes, arXiv 1610.01644; scikit-learn's LogisticRegression.

    Args:
        unsafe: shape (n, n_embd), n >= 2.
        safe: shape (m, n_embd), m >= 2.
        C: inverse strength of the penalty, above 0.

    Raises:
        SteeringError: also if the fit does not converge.
    """
    from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

    if not (np.isfinite(C) and C > 0):
        raise SteeringError(f"C of logistic must be a number above 0, not {quoted(C)}")
    rows, labels, low_mean, high_mean = _labelled(unsafe, safe)
    scaler = StandardScaler().fit(rows)
    model = LogisticRegression(C=C, class_weight="balanced", max_iter=_MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            model.fit(scaler.transform(rows), labels)
        except ConvergenceWarning:
            raise SteeringError(
                f"logistic did not converge in {_MAX_ITERATIONS} steps; use a smaller C than {C:g}"
            ) from None
    return along(model.coef_[0] / scaler.scale_, low_mean, high_mean)


def lda(unsafe: Activations, safe: Activations) -> Direction:
    """Return Fisher's linear discriminant: a = S^-1 omega, direction = (a . omega) a / |a|^2.

    S is the mean of the two classes' covariances (so both weigh the same, at any size), each shrunk
    towards its diagonal by the Ledoit-Wolf rule, because prompts are usually fewer than dimensions.

    Source: Fisher 1936; shrinkage after Ledoit and Wolf 2004; scikit-learn's
    LinearDiscriminantAnalysis with solver "lsqr".

    Args:
        unsafe: shape (n, n_embd), n >= 2.
        safe: shape (m, n_embd), m >= 2.
    """
    from sklearn.discriminant_analysis import (  # type: ignore[import-untyped]
        LinearDiscriminantAnalysis,
    )

    rows, labels, low_mean, high_mean = _labelled(unsafe, safe)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.5, 0.5])
    return along(model.fit(rows, labels).coef_[0], low_mean, high_mean)


@dataclass(frozen=True)
class LogisticOptions:
    """Options of the method `logistic`.

    Attributes:
        C: inverse strength of the penalty.
    """

    C: float = setting(1.0, "Inverse strength of the penalty.", above=0)

    def __post_init__(self) -> None:
        check(self)


class Logistic(ArrayMethod[LogisticOptions]):
    """The method `logistic`; see the function."""

    name = "logistic"
    summary = "normal of the plane of logistic regression"
    options = LogisticOptions

    def direction(
        self, unsafe: Activations, safe: Activations, options: LogisticOptions
    ) -> Direction:
        """See `ArrayMethod.direction`."""
        return logistic(unsafe, safe, C=options.C)


class Lda(ArrayMethod[NoOptions]):
    """The method `lda`; see the function."""

    name = "lda"
    summary = "Fisher's linear discriminant"

    def direction(self, unsafe: Activations, safe: Activations, options: NoOptions) -> Direction:
        """See `ArrayMethod.direction`."""
        return lda(unsafe, safe)


def _labelled(
    unsafe: Activations, safe: Activations
) -> tuple[Floats, npt.NDArray[np.int64], Floats, Floats]:
    """Return all rows, their labels (0 unsafe, 1 safe), and the means of the two classes."""
    check_activations(unsafe, safe, least_unsafe=2, least_safe=2)
    low, high = loaded(unsafe, "unsafe"), loaded(safe, "safe")
    low_mean, high_mean = low.mean(axis=0), high.mean(axis=0)
    from_means(low_mean, high_mean)  # equal means: refused before the fit
    labels = np.repeat([0, 1], [len(low), len(high)])
    return np.concatenate([low, high]), labels, low_mean, high_mean
