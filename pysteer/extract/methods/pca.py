"""The method `pca`: a principal component as the axis.

`pysteer.extract.methods.arithmetic` gives shapes, units and errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pysteer.errors import SteeringError, quoted
from pysteer.extract.methods.arithmetic import (
    ROUNDING,
    Activations,
    Direction,
    along,
    check_activations,
    check_pairs,
    loaded,
)
from pysteer.extract.methods.base import ArrayMethod
from pysteer.settings import check, setting

PCA_VARIANTS = ("pairwise", "centred", "difference")


def pca(unsafe: Activations, safe: Activations, *, variant: str = "pairwise") -> Direction:
    """Return the first principal component, with sign and length by the class means.

    With the unit component a: direction = (a . omega) a. So the data determine the sign, not the
    solver: safe activations project further along the direction than unsafe ones on average. The
    variant determines the rows of the PCA:

    - "pairwise": u_i and s_i, each about the midpoint of its pair. Equal to the uncentred component
      of the differences s_i - u_i.
    - "centred": all u_i and s_i about the mean of all.
    - "difference": the differences s_i - u_i. A PCA centres its rows, which removes their mean,
      omega: the component shows how pairs differ from each other, and omega only as far as its
      length varies between pairs. Included because other libraries offer it.

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
    check_activations(unsafe, safe, least_unsafe=2, least_safe=2)
    if variant != "centred":
        check_pairs(unsafe, safe, f"pca with the variant {variant}")
    low, high = loaded(unsafe, "unsafe"), loaded(safe, "safe")
    low_mean, high_mean = low.mean(axis=0), high.mean(axis=0)
    if variant == "centred":
        rows = np.concatenate([low, high])
    elif variant == "difference":
        rows = high - low
    else:
        rows = np.concatenate([high - low, low - high]) / 2
    spread = np.sqrt(np.square(rows - rows.mean(axis=0)).sum(axis=1).mean())
    length = np.sqrt(np.square(np.concatenate([low, high])).sum(axis=1).mean())
    if not spread > ROUNDING * length:
        raise SteeringError(
            f"nothing varies, so pca with the variant {variant} finds no direction; use mean"
        )
    # The full decomposition is exact, and fast for a short side. The iterative one is exact to
    # rounding too, and unlike the randomised default the same in every run.
    solver = "full" if min(rows.shape) <= 512 else "arpack"
    fit = PCA(n_components=1, svd_solver=solver, random_state=0).fit(rows)
    return along(fit.components_[0], low_mean, high_mean)


@dataclass(frozen=True)
class PcaOptions:
    """Options of the method `pca`.

    Attributes:
        variant: rows whose component is taken; see the function.
    """

    variant: str = setting(
        "pairwise",
        "Rows whose component is taken: pair members about their midpoints, all activations about "
        "their mean, or differences of pairs.",
        choices=PCA_VARIANTS,
    )

    def __post_init__(self) -> None:
        check(self)


class Pca(ArrayMethod[PcaOptions]):
    """The method `pca`; see the function."""

    name = "pca"
    summary = "first principal component"
    options = PcaOptions

    def needs_pairs(self, options: PcaOptions) -> bool:
        """See `Method.needs_pairs`."""
        return options.variant != "centred"

    def direction(self, unsafe: Activations, safe: Activations, options: PcaOptions) -> Direction:
        """See `ArrayMethod.direction`."""
        return pca(unsafe, safe, variant=options.variant)
