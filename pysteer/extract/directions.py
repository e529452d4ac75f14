"""Directions of one layer: one function a method.

Every function takes activations of one layer and one site: `unsafe` of shape (n, n_embd) and `safe`
of shape (m, n_embd), of any real dtype, one row a prompt. Slices of a memory-mapped file will do:
`mean`, `pruned`, `guided` and `contrast` read them block by block, while `pca`, `logistic` and
`lda` hold this one layer in float64.

Every function returns one direction of shape (n_embd,), float32, in the units of the activations.
It points from unsafe to safe, and at strength 1 it moves the mean of the unsafe activations onto
that of the safe ones: all of it for the methods that average, its projection on the axis found for
`pca`, `logistic` and `lda`. Arithmetic is in float64.

Every function raises SteeringError for activations of another shape or of differing widths, for
NaN or infinity, for fewer rows than the method needs, and where no direction is to be found.

Below, u_i and s_i are rows of `unsafe` and `safe`, and omega = mean(s) - mean(u).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pysteer.errors import SteeringError, quoted

Activations: TypeAlias = npt.NDArray[Any]
"""Rows of activations, shape (n, n_embd), any real dtype."""

Direction: TypeAlias = npt.NDArray[np.float32]
"""One direction, shape (n_embd,)."""

_Floats: TypeAlias = npt.NDArray[np.float64]

PCA_VARIANTS = ("pairwise", "centred", "difference")

_BLOCK = 1024  # rows in float64 at a time
_MAX_ITERATIONS = 1000

# Relative to the activations, this is what rounding them to float32 leaves uncertain. Differences
# that are smaller say nothing, and a direction made of them would be noise.
_ROUNDING = 1e-7


def mean(unsafe: Activations, safe: Activations) -> Direction:
    """Difference of the means: omega = mean(s) - mean(u).

    Source: arXiv 2410.01174, all activations. The two sides need not be pairs: `safe` may be the
    harmless twins of the unsafe prompts or generic harmless instructions.

    See `from_means` where the means are known already.
    """
    _check(unsafe, safe)
    return from_means(_mean(unsafe, "unsafe"), _mean(safe, "safe"))


def from_means(unsafe_mean: npt.ArrayLike, safe_mean: npt.ArrayLike) -> Direction:
    """`mean`, `guided` or `contrast` from running means, each of shape (n_embd,)."""
    low, high = np.asarray(unsafe_mean, np.float64), np.asarray(safe_mean, np.float64)
    if low.ndim != 1 or low.size == 0 or low.shape != high.shape:
        raise SteeringError(f"means of shape {low.shape} and {high.shape}; both must be (n_embd,)")
    for values, what in ((low, "unsafe"), (high, "safe")):
        _check_finite(values, what)
    return _direction(high - low, _size(low, high), "the unsafe and the safe activations are equal")


def pruned(unsafe: Activations, safe: Activations, *, paired: bool) -> Direction:
    """Mean of the larger half of the differences: mean(d_i : |d_i| > median of all |d_j|).

    d_i = s_i - u_i with pairs, d_i = mean(s) - u_i without; |.| is the L2 norm, and a difference
    equal to the median is left out, as in "above the median".

    Source: arXiv 2410.01174, pruned activations.

    Args:
        unsafe: shape (n, n_embd), n >= 2.
        safe: shape (m, n_embd); with pairs m == n, and row i belongs to row i of `unsafe`.
        paired: whether the rows are pairs.

    Raises:
        SteeringError: also if all differences are equally long, so that none is above the median.
    """
    _check(unsafe, safe, least_unsafe=2)
    if paired:
        _check_pairs(unsafe, safe, "pruned with pairs")
    unsafe_mean, safe_mean = _mean(unsafe, "unsafe"), _mean(safe, "safe")

    def blocks() -> Iterator[_Floats]:
        for start in range(0, len(unsafe), _BLOCK):
            part = slice(start, start + _BLOCK)
            high = safe[part].astype(np.float64) if paired else safe_mean
            yield high - unsafe[part].astype(np.float64)

    norms = np.concatenate([np.linalg.norm(block, axis=1) for block in blocks()])
    keep = norms > np.median(norms)
    if not keep.any():
        raise SteeringError(
            "no difference is longer than their median, so that pruning leaves none; use mean"
        )
    total = np.zeros_like(safe_mean)
    for number, block in enumerate(blocks()):
        total += block[keep[number * _BLOCK :][: len(block)]].sum(axis=0)
    return _direction(
        total / keep.sum(), _size(unsafe_mean, safe_mean), "the differences cancel each other"
    )


def guided(
    unsafe: Activations,
    safe: Activations,
    *,
    really_unsafe: npt.ArrayLike,
    really_safe: npt.ArrayLike | None = None,
) -> Direction:
    """Difference of the means over those prompts whose answers a judge confirmed.

    mean(s_i : the answer was safe) - mean(u_i : the answer was unsafe).

    Source: arXiv 2410.01174, activations guided by an external safety classifier.

    Args:
        unsafe: shape (n, n_embd).
        safe: shape (m, n_embd).
        really_unsafe: shape (n,), bool: the model's answer to this prompt was judged unsafe.
        really_safe: shape (m,), bool: the answer was judged safe; all, if None.

    Raises:
        SteeringError: also if the judge leaves none of a side.
    """
    _check(unsafe, safe)
    sides = {"unsafe": (unsafe, really_unsafe), "safe": (safe, really_safe)}
    means = []
    for what, (rows, verdicts) in sides.items():
        if verdicts is None:
            means.append(_mean(rows, what))
            continue
        mask = np.asarray(verdicts)
        if mask.dtype != np.bool_ or mask.shape != (len(rows),):
            raise SteeringError(
                f"verdicts on the {what} side of shape {mask.shape} and type {mask.dtype}; "
                f"needed is one bool for each of its {len(rows)} prompts"
            )
        if not mask.any():
            raise SteeringError(
                f"the judge found none of {len(rows)} answers {what}, so that guided has nothing "
                "to average; use other prompts, another judge, or mean"
            )
        total = sum(
            (
                rows[start : start + _BLOCK][mask[start : start + _BLOCK]].sum(0, dtype=np.float64)
                for start in range(0, len(rows), _BLOCK)
            ),
            np.zeros(rows.shape[1]),
        )
        means.append(total / mask.sum())
    return from_means(*means)


def contrast(refusing: Activations, complying: Activations) -> Direction:
    """Mean of paired differences between two answers to one prompt: mean(r_i - c_i).

    r_i and c_i are taken over the same tokens of the response, such as the mean of its first k: row
    i of `refusing` while the model reads a safe answer to prompt i, row i of `complying` while it
    reads its own compliant one. What the prompts are about cancels.

    Source: contrastive activation addition, arXiv 2312.06681, with whole openings of an answer in
    place of single answer letters.

    Args:
        refusing: shape (n, n_embd), the safe side.
        complying: shape (n, n_embd), the unsafe side, of the same prompts in the same order.
    """
    _check(complying, refusing, names=("complying", "refusing"))
    _check_pairs(complying, refusing, "contrast", names=("complying", "refusing"))
    return from_means(_mean(complying, "complying"), _mean(refusing, "refusing"))


def pca(unsafe: Activations, safe: Activations, *, variant: str = "pairwise") -> Direction:
    """First principal component, given the sign and the length that the class means ask for.

    With the unit component a: direction = (a . omega) a. Its sign is therefore that of the data,
    not the solver's: safe activations project further along it than unsafe ones on average. What
    the component is of depends on the variant:

    - "pairwise": u_i and s_i, each about the midpoint of its pair. The same as the uncentred
      component of the differences s_i - u_i.
    - "centred": all u_i and s_i about the mean of all.
    - "difference": the differences s_i - u_i. They are centred like all input of a PCA, which
      takes their mean, omega, out: this finds how pairs differ from each other, and omega only as
      far as its length varies from pair to pair. Here because others offer it.

    Source: arXiv 2310.01405 (representation reading by PCA). IBM activation-steering calls the
    variants `pca_pairwise`, `pca_center` and `pca_diff`; repeng has the first as `pca_center` and
    the last as `pca_diff`; llama.cpp's `cvector-generator` does not centre the differences, which
    makes it "pairwise". All of them give unit vectors.

    Args:
        unsafe: shape (n, n_embd), n >= 2.
        safe: shape (m, n_embd), m >= 2; for "pairwise" and "difference" m == n, and row i belongs
            to row i of `unsafe`.
        variant: one of `PCA_VARIANTS`.

    Raises:
        SteeringError: also if nothing varies, or the class means do not differ along the component.
    """
    from sklearn.decomposition import PCA  # type: ignore[import-untyped]

    if variant not in PCA_VARIANTS:
        raise SteeringError(
            f"unknown variant of pca {quoted(variant)}; use one of {', '.join(PCA_VARIANTS)}"
        )
    _check(unsafe, safe, least_unsafe=2, least_safe=2)
    if variant != "centred":
        _check_pairs(unsafe, safe, f"pca with the variant {variant}")
    low, high = _loaded(unsafe, "unsafe"), _loaded(safe, "safe")
    low_mean, high_mean = low.mean(axis=0), high.mean(axis=0)
    if variant == "centred":
        rows = np.concatenate([low, high])
    elif variant == "difference":
        rows = high - low
    else:
        rows = np.concatenate([high - low, low - high]) / 2
    spread = np.sqrt(np.square(rows - rows.mean(axis=0)).sum(axis=1).mean())
    length = np.sqrt(np.square(np.concatenate([low, high])).sum(axis=1).mean())
    if not spread > _ROUNDING * length:
        raise SteeringError(
            f"nothing varies, so that pca with the variant {variant} finds no direction; use mean"
        )
    # The full decomposition is exact and fast where one side is short; beyond that the iterative
    # one is exact to rounding too, and unlike the randomised default the same in every run.
    solver = "full" if min(rows.shape) <= 512 else "arpack"
    fit = PCA(n_components=1, svd_solver=solver, random_state=0).fit(rows)
    return _along(fit.components_[0], low_mean, high_mean)


def logistic(unsafe: Activations, safe: Activations, *, C: float = 1.0) -> Direction:
    """Normal of the plane by which logistic regression tells safe from unsafe.

    The regression runs on standardised dimensions z = (h - mean) / sd, so that the penalty treats
    them alike: minimise |v|^2 / 2 + C sum_i w_i log(1 + exp(-y_i (v . z_i + b))), y = 1 for safe
    and -1 for unsafe, w balancing the classes. In the activations' own units the normal is
    a = v / sd; direction = (a . omega) a / |a|^2.

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
        raise SteeringError(f"C of logistic is {quoted(C)}; it must be a number above 0")
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
    return _along(model.coef_[0] / scaler.scale_, low_mean, high_mean)


def lda(unsafe: Activations, safe: Activations) -> Direction:
    """Fisher's linear discriminant: a = S^-1 omega, direction = (a . omega) a / |a|^2.

    S is the mean of the two classes' covariances (so that the classes weigh the same whatever their
    sizes), each shrunk towards its diagonal by the Ledoit-Wolf rule, since there are rarely as many
    prompts as dimensions.

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
    return _along(model.fit(rows, labels).coef_[0], low_mean, high_mean)


@dataclass(frozen=True)
class Method:
    """What a caller has to know about a method to feed it.

    Attributes:
        function: the function of that name.
        needs_all: it needs every activation; otherwise the mean of each side is enough, see
            `from_means`.
        options: the names of its keyword arguments.
        pairs: from the options given to whether row i of one side must belong to row i of the
            other.
    """

    function: Callable[..., Direction]
    needs_all: bool
    options: tuple[str, ...] = ()
    pairs: Callable[[Mapping[str, Any]], bool] = lambda options: False

    def needs_pairs(self, **options: Any) -> bool:
        """Whether the two sides must be pairs with these options."""
        return self.pairs(options)


METHODS: Mapping[str, Method] = {
    "mean": Method(mean, needs_all=False),
    "pruned": Method(
        pruned,
        needs_all=True,
        options=("paired",),
        pairs=lambda options: bool(options.get("paired")),
    ),
    "guided": Method(guided, needs_all=False, options=("really_unsafe", "really_safe")),
    "pca": Method(
        pca,
        needs_all=True,
        options=("variant",),
        pairs=lambda options: options.get("variant", "pairwise") != "centred",
    ),
    "logistic": Method(logistic, needs_all=True, options=("C",)),
    "lda": Method(lda, needs_all=True),
    "contrast": Method(contrast, needs_all=False, pairs=lambda options: True),
}


def _check(
    unsafe: Activations,
    safe: Activations,
    *,
    least_unsafe: int = 1,
    least_safe: int = 1,
    names: tuple[str, str] = ("unsafe", "safe"),
) -> None:
    sides = zip(names, (unsafe, safe), (least_unsafe, least_safe), strict=True)
    for what, rows, least in sides:
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise SteeringError(
                f"{what} activations of shape {rows.shape}; they must be (prompts, n_embd)"
            )
        if rows.dtype.kind not in "fiu":
            raise SteeringError(f"{what} activations of type {rows.dtype}; they must be real")
        if len(rows) < least:
            raise SteeringError(f"{len(rows)} {what} prompts; this method needs {least} or more")
    if unsafe.shape[1] != safe.shape[1]:
        raise SteeringError(
            f"{names[0]} activations of width {unsafe.shape[1]}, "
            f"{names[1]} ones of width {safe.shape[1]}; they must come from the same model"
        )


def _check_pairs(
    unsafe: Activations,
    safe: Activations,
    method: str,
    names: tuple[str, str] = ("unsafe", "safe"),
) -> None:
    if len(unsafe) != len(safe):
        raise SteeringError(
            f"{method} needs pairs, but there are {len(unsafe)} {names[0]} and {len(safe)} "
            f"{names[1]} prompts; pair them, or use a method without pairs"
        )


def _check_finite(values: _Floats, what: str) -> None:
    if not np.isfinite(values).all():
        raise SteeringError(f"the {what} activations hold NaN or infinity")


def _mean(rows: Activations, what: str) -> _Floats:
    with np.errstate(all="ignore"):  # looked at below
        values = np.asarray(rows.mean(axis=0, dtype=np.float64))
    _check_finite(values, what)
    return values


def _loaded(rows: Activations, what: str) -> _Floats:
    values = np.array(rows, np.float64)
    _check_finite(values, what)
    return values


def _labelled(
    unsafe: Activations, safe: Activations
) -> tuple[_Floats, npt.NDArray[np.int64], _Floats, _Floats]:
    """All rows, their labels (0 unsafe, 1 safe), and the means of the two classes."""
    _check(unsafe, safe, least_unsafe=2, least_safe=2)
    low, high = _loaded(unsafe, "unsafe"), _loaded(safe, "safe")
    low_mean, high_mean = low.mean(axis=0), high.mean(axis=0)
    from_means(low_mean, high_mean)  # refuses equal means, before a fit of nothing
    labels = np.repeat([0, 1], [len(low), len(high)])
    return np.concatenate([low, high]), labels, low_mean, high_mean


def _along(axis: _Floats, unsafe_mean: _Floats, safe_mean: _Floats) -> Direction:
    """The difference of the means, projected on the axis: this fixes sign and length at once."""
    why = "the unsafe and the safe mean do not differ along the axis found; use mean"
    norm = float(np.linalg.norm(axis))
    if not (np.isfinite(norm) and norm > 0):
        raise SteeringError(f"no direction: {why}")
    unit = np.asarray(axis, np.float64) / norm
    gap = float(unit @ (safe_mean - unsafe_mean))
    return _direction(gap * unit, _size(unsafe_mean, safe_mean), why)


def _size(unsafe_mean: _Floats, safe_mean: _Floats) -> float:
    """How large the activations are, to tell a difference from a rounding error."""
    return float(np.linalg.norm(unsafe_mean) + np.linalg.norm(safe_mean))


def _direction(values: _Floats, size: float, why_none: str) -> Direction:
    if not float(np.linalg.norm(values)) > _ROUNDING * size:
        raise SteeringError(f"no direction: {why_none}")
    with np.errstate(over="ignore"):  # looked at below
        direction = values.astype(np.float32)
    if not np.isfinite(direction).all():
        raise SteeringError("the direction is too large for float32")
    return direction
