"""Arithmetic that methods share: checked activations of one layer, means, and directions.

The functions of the methods' modules take activations of one layer and one site: `unsafe` of shape
(n, n_embd) and `safe` of shape (m, n_embd), of any real dtype, one row a prompt. Slices of a
memory-mapped file serve: `mean`, `pruned`, `guided` and `contrast` read them in blocks; `pca`,
`logistic` and `lda` hold the one layer in float64.

Each function returns one direction of shape (n_embd,), float32, in the units of the activations.
The direction points from unsafe to safe. At strength 1 it moves the mean of the unsafe activations
onto the mean of the safe ones: wholly for the methods that average, along the axis found for `pca`,
`logistic` and `lda`. Arithmetic is in float64.

Each function raises SteeringError for activations of another shape or of differing widths, for NaN
or infinity, for fewer rows than the method needs, and where there is no direction.

In the formulas u_i and s_i are rows of `unsafe` and `safe`, and omega = mean(s) - mean(u).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pysteer.errors import SteeringError

Activations: TypeAlias = npt.NDArray[Any]
"""Rows of activations, shape (n, n_embd), any real dtype."""

Direction: TypeAlias = npt.NDArray[np.float32]
"""One direction, shape (n_embd,)."""

Floats: TypeAlias = npt.NDArray[np.float64]

BLOCK = 1024
"""Rows in float64 at a time."""

# Rounding the activations to float32 leaves this much uncertain, relative to their size. A smaller
# difference is noise, and so would be a direction made of it.
ROUNDING = 1e-7

EQUAL = "the unsafe and the safe activations are equal"


def from_means(unsafe_mean: npt.ArrayLike, safe_mean: npt.ArrayLike) -> Direction:
    """Return `mean`, `guided` or `contrast` from running means, each of shape (n_embd,).

    Examples:
        >>> from_means([1.0, 2.0], [1.5, 2.0])
        array([0.5, 0. ], dtype=float32)
    """
    low, high = np.asarray(unsafe_mean, np.float64), np.asarray(safe_mean, np.float64)
    if low.ndim != 1 or low.size == 0 or low.shape != high.shape:
        raise SteeringError(f"means of shape {low.shape} and {high.shape}; both must be (n_embd,)")
    for values, side in ((low, "unsafe"), (high, "safe")):
        check_finite(values, side)
    return direction_of(high - low, size_of(low, high), EQUAL)


def check_activations(
    unsafe: Activations,
    safe: Activations,
    *,
    least_unsafe: int = 1,
    least_safe: int = 1,
    names: tuple[str, str] = ("unsafe", "safe"),
) -> None:
    """Raise SteeringError for other shapes and types, too few rows, or differing widths."""
    sides = zip(names, (unsafe, safe), (least_unsafe, least_safe), strict=True)
    for side, rows, least in sides:
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise SteeringError(
                f"{side} activations of shape {rows.shape}; they must be (prompts, n_embd)"
            )
        if rows.dtype.kind not in "fiu":
            raise SteeringError(f"{side} activations of type {rows.dtype}; they must be real")
        if len(rows) < least:
            raise SteeringError(f"{len(rows)} {side} prompts; this method needs {least} or more")
    if unsafe.shape[1] != safe.shape[1]:
        raise SteeringError(
            f"{names[0]} activations of width {unsafe.shape[1]}, "
            f"{names[1]} activations of width {safe.shape[1]}; they must come from the same model"
        )


def check_pairs(
    unsafe: Activations,
    safe: Activations,
    method: str,
    names: tuple[str, str] = ("unsafe", "safe"),
) -> None:
    """Raise SteeringError unless there are as many rows on both sides."""
    if len(unsafe) != len(safe):
        raise SteeringError(
            f"{method} needs pairs, but there are {len(unsafe)} {names[0]} and {len(safe)} "
            f"{names[1]} prompts; pair them, or use a method without pairs"
        )


def check_finite(values: Floats, side: str) -> None:
    """Raise SteeringError for NaN or infinity."""
    if not np.isfinite(values).all():
        raise SteeringError(f"the {side} activations hold NaN or infinity")


def mean_of(rows: Activations, side: str) -> Floats:
    """Return the mean of rows, shape (n_embd,)."""
    with np.errstate(all="ignore"):  # checked below
        values = np.asarray(rows.mean(axis=0, dtype=np.float64))
    check_finite(values, side)
    return values


def loaded(rows: Activations, side: str) -> Floats:
    """Return rows in memory, in float64."""
    values = np.array(rows, np.float64)
    check_finite(values, side)
    return values


def along(axis: Floats, unsafe_mean: Floats, safe_mean: Floats) -> Direction:
    """Return the difference of the means, projected on an axis of any length and sign."""
    why = "the unsafe and the safe mean do not differ along the axis found; use mean"
    norm = float(np.linalg.norm(axis))
    if not (np.isfinite(norm) and norm > 0):
        raise SteeringError(f"no direction: {why}")
    unit = np.asarray(axis, np.float64) / norm
    gap = float(unit @ (safe_mean - unsafe_mean))
    return direction_of(gap * unit, size_of(unsafe_mean, safe_mean), why)


def size_of(unsafe_mean: Floats, safe_mean: Floats) -> float:
    """Return the size of activations, to tell a difference from a rounding error."""
    return float(np.linalg.norm(unsafe_mean) + np.linalg.norm(safe_mean))


def direction_of(values: Floats, size: float, why: str) -> Direction:
    """Return values as a direction.

    Args:
        values: shape (n_embd,).
        size: from `size_of`.
        why: the reason there is no direction if the values are rounding errors.
    """
    if not float(np.linalg.norm(values)) > ROUNDING * size:
        raise SteeringError(f"no direction: {why}")
    with np.errstate(over="ignore"):  # checked below
        direction = values.astype(np.float32)
    if not np.isfinite(direction).all():
        raise SteeringError("the direction is too large for float32")
    return direction
