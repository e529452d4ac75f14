"""Changes to the directions that a method found. The steps compose.

Steps take a `SteeringVector` or a plain mapping of layer to direction, of shape (n_embd,) and any
real dtype, and return the same kind: a new vector of the same site, or a dict of float32 arrays.
Arguments are not changed. Arithmetic is in float64.

All raise SteeringError for directions that are not finite arrays of one width, for a layer without
the data that the step needs, and where nothing would be left of a direction.

The order matters where two steps touch the same thing: mask before `top_k`, and scale last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from pysteer.errors import SteeringError, quoted
from pysteer.pack.vector import SteeringVector

LayerDirections: TypeAlias = Mapping[int, npt.NDArray[Any]]
"""Layer to direction, shape (n_embd,)."""

_Floats: TypeAlias = npt.NDArray[np.float64]
_V = TypeVar("_V", SteeringVector, LayerDirections)

# A remainder shorter than this, relative to the direction, is rounding of float32 values: the
# direction lay in the span that was taken out.
_NOTHING_LEFT = 1e-5


def massive_dimensions(
    typical: Mapping[int, npt.ArrayLike], *, ratio: float = 10.0
) -> dict[int, npt.NDArray[np.intp]]:
    """Return the dimensions whose activations dwarf the others, by layer.

    Dimension j of a layer is massive if typical[j] > ratio x median over all j of typical[j].

    Source: arXiv 2402.17762 calls a single activation massive if its magnitude is above 100 and
    about 1,000 times the median magnitude in its hidden state. Here a whole dimension is judged
    by its mean magnitude over prompts and tokens, which dilutes the few tokens with the extremes:
    hence the smaller ratio, and no absolute bound, which would depend on the model. On
    SmolLM2-135M, averaged over all tokens but the first, 10 finds 1 to 4 of 576 in each layer.

    Args:
        typical: layer to mean |activation| of each dimension there, shape (n_embd,).
        ratio: multiple of the median, above 1.

    Returns:
        Layer to indices of its massive dimensions, ascending; often empty.
    """
    if not (np.isfinite(ratio) and ratio > 1):
        raise SteeringError(
            f"the ratio for massive dimensions is {quoted(ratio)}; it must exceed 1"
        )
    found = {}
    for layer, magnitudes in typical.items():
        values = np.asarray(magnitudes, np.float64)
        if values.ndim != 1 or values.size == 0 or not (values >= 0).all():
            raise SteeringError(
                f"the typical activations of layer {layer} must be one mean magnitude for each "
                f"dimension, not an array of shape {values.shape}"
            )
        found[layer] = np.flatnonzero(values > ratio * np.median(values))
    return found


def mask_massive(
    directions: _V, typical: Mapping[int, npt.ArrayLike], *, ratio: float = 10.0
) -> _V:
    """Set the massive dimensions of each layer to 0; see `massive_dimensions`.

    Massive dimensions hold most of the energy of a difference of activations, and little of its
    meaning: adding them wrecks the text before the rest can act.
    """
    massive = massive_dimensions(typical, ratio=ratio)

    def mask(layer: int, row: _Floats) -> _Floats:
        width = np.size(typical[layer]) if layer in massive else None
        if width != row.size:
            raise SteeringError(
                f"typical activations of layer {layer} are needed for {row.size} dimensions, "
                f"not for {width or 0}"
            )
        row[massive[layer]] = 0
        if not row.any():
            raise SteeringError(
                f"the direction of layer {layer} lies wholly in massive dimensions; raise the ratio"
            )
        return row

    return _map(directions, mask)


def top_k(directions: _V, k: int) -> _V:
    """Keep the k dimensions of largest magnitude in each direction, and set the others to 0.

    Of equal magnitudes the lower dimension is kept. k >= n_embd changes nothing.
    """
    if k < 1:
        raise SteeringError(f"k of top-k must be 1 or more, not {quoted(k)}")

    def keep(layer: int, row: _Floats) -> _Floats:
        order = np.argsort(-np.abs(row), kind="stable")
        row[order[k:]] = 0
        return row

    return _map(directions, keep)


def orthogonalise(categories: Mapping[str, _V]) -> dict[str, _V]:
    """Remove from each category's directions their part in the span of the others' directions.

    Per layer: d_c <- d_c - O x, with the other categories' directions as columns of O and x the
    least-squares solution of O x = d_c. Each result is orthogonal to all *original* directions of
    the others, and does not depend on the order of the categories, as results of Gram-Schmidt
    would. Directions lose their common part: restore their lengths afterwards, if wanted, with
    `unit_norm` or `scale_to`. Vectors at different sites live in different spaces and leave each
    other alone; so do layers that only one category has.

    Raises:
        SteeringError: also if nothing is left: a direction is in the span of the others.
    """
    return {
        name: _map(mine, _rejecting(name, _others(name, categories)))
        for name, mine in categories.items()
    }


def project_out(directions: _V, reference: SteeringVector | LayerDirections) -> _V:
    """Remove from each direction its part along the reference of the same layer.

    d <- d - (d . r / r . r) r, with r for example the mean of benign activations, so that steering
    leaves the projection on the reference as it was.

    Raises:
        SteeringError: also if the reference is 0, or nothing is left of a direction.
    """
    along = {layer: np.asarray(row, np.float64) for layer, row in reference.items()}
    if _site(directions) is not None and _site(reference) not in (None, _site(directions)):
        raise SteeringError("the directions and the reference are of different sites")

    def reject(layer: int, row: _Floats) -> _Floats:
        if layer not in along or not along[layer].any():
            raise SteeringError(f"there is no reference direction for layer {layer}")
        return _reject(row, [along[layer]], f"layer {layer}")

    return _map(directions, reject)


def unit_norm(directions: _V) -> tuple[_V, dict[int, float]]:
    """Return directions of L2 norm 1, and their norms before: norm x unit is the direction."""
    scales = norms(directions)

    def divide(layer: int, row: _Floats) -> _Floats:
        return row / scales[layer]

    _check_lengths(scales)
    return _map(directions, divide), scales


def norms(directions: SteeringVector | LayerDirections) -> dict[int, float]:
    """Return the L2 norm of each direction, by layer, in the units of the activations."""
    return {
        layer: float(np.linalg.norm(np.asarray(row, np.float64)))
        for layer, row in directions.items()
    }


def relative_strength(
    directions: SteeringVector | LayerDirections, residual_norm: Mapping[int, float]
) -> dict[int, float]:
    """Return each direction's norm over the typical norm of the residual stream at its layer.

    This makes strengths comparable between layers, models and sets of prompts.

    Args:
        directions: layer to direction.
        residual_norm: layer to typical (median) L2 norm of the residual stream there.
    """
    return {
        layer: length / _typical(residual_norm, layer)
        for layer, length in norms(directions).items()
    }


def scale_to(directions: _V, residual_norm: Mapping[int, float], *, fraction: float) -> _V:
    """Give each direction the norm fraction x typical norm of the residual stream at its layer.

    The default scale of an extraction: strength 1 adds this fraction of the residual stream. With
    n layers steered at once, fraction / sqrt(n) has about the effect of one layer at `fraction`.

    Args:
        directions: layer to direction other than 0.
        residual_norm: layer to typical (median) L2 norm of the residual stream there.
        fraction: above 0; 0.5 is usual for one layer, and from 0.9 the text tends to degenerate.
    """
    if not (np.isfinite(fraction) and fraction > 0):
        raise SteeringError(f"the fraction must be a number above 0, not {quoted(fraction)}")
    lengths = norms(directions)
    _check_lengths(lengths)

    def scale(layer: int, row: _Floats) -> _Floats:
        return row / lengths[layer] * (fraction * _typical(residual_norm, layer))

    return _map(directions, scale)


def _typical(residual_norm: Mapping[int, float], layer: int) -> float:
    value = residual_norm.get(layer)
    if value is None or not (np.isfinite(value) and value > 0):
        raise SteeringError(
            f"the typical norm of the residual stream at layer {layer} must be a number above 0, "
            f"not {quoted(value)}"
        )
    return float(value)


def _check_lengths(lengths: Mapping[int, float]) -> None:
    for layer, length in lengths.items():
        if not (np.isfinite(length) and length > 0):
            raise SteeringError(
                f"the length of the direction of layer {layer} must be above 0, not {length}"
            )


def _others(name: str, categories: Mapping[str, _V]) -> list[dict[int, Any]]:
    """Return the other categories' directions at the same site."""
    site = _site(categories[name])
    return [
        dict(other.items())
        for key, other in categories.items()
        if key != name and _site(other) == site
    ]


def _rejecting(name: str, others: list[dict[int, Any]]) -> Callable[[int, _Floats], _Floats]:
    def reject(layer: int, row: _Floats) -> _Floats:
        span = [other[layer] for other in others if layer in other]
        return _reject(row, span, f"category {quoted(name)}, layer {layer}")

    return reject


def _reject(row: _Floats, span: Iterable[npt.ArrayLike], whose: str) -> _Floats:
    """Return the part of `row` that is orthogonal to the span."""
    columns = [np.asarray(other, np.float64) for other in span]
    for column in columns:
        if column.shape != row.shape:
            raise SteeringError(
                f"{whose}: directions must have one shape, not {row.shape} and {column.shape}"
            )
    # Unit lengths keep the cut-off for dependent columns independent of their lengths.
    units = [column / np.linalg.norm(column) for column in columns if column.any()]
    if not units:
        return row
    basis = np.stack(units, axis=1)
    left = row - basis @ np.linalg.lstsq(basis, row, rcond=_NOTHING_LEFT)[0]
    if not np.linalg.norm(left) > _NOTHING_LEFT * np.linalg.norm(row):
        raise SteeringError(
            f"{whose}: nothing is left of the direction: it lies in the span of the directions "
            "that are taken out"
        )
    return np.asarray(left, np.float64)


def _site(directions: object) -> str | None:
    return directions.site if isinstance(directions, SteeringVector) else None


def _map(directions: _V, change: Callable[[int, _Floats], _Floats]) -> _V:
    """Apply a function to a float64 copy of each direction."""
    if not isinstance(directions, SteeringVector):
        # Vectors are checked already.
        SteeringVector(directions)
    changed = {layer: change(layer, np.array(row, np.float64)) for layer, row in directions.items()}
    site = _site(directions)
    vector = SteeringVector(changed, site=site or "residual")
    return vector if site is not None else {layer: row.copy() for layer, row in vector.items()}  # type: ignore[return-value]
