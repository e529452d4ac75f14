"""Checked, read-only arrays, and values made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pysteer.errors import SteeringError, quoted

Floats: TypeAlias = npt.NDArray[np.float64]

_MAX_COUNT = 2**53  # the largest that every JSON reader keeps exact


class ArrayData:
    """Equality and copies for frozen dataclasses that hold arrays."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        pairs = zip(_values(self), _values(other), strict=True)
        return all(_same(mine, theirs) for mine, theirs in pairs)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        # Through the constructor: a copy is as read-only as the original.
        return type(self), tuple(
            dict(value) if isinstance(value, Mapping) else value for value in _values(self)
        )


def _values(instance: Any) -> list[Any]:
    return [getattr(instance, part.name) for part in fields(instance)]


def _same(a: Any, b: Any) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else bool(a == b)


def to_numpy(value: object) -> npt.NDArray[Any]:
    """Return `value` as an array of one of numpy's own types.

    bfloat16 becomes float32. Tensors of torch are taken from their device and graph; torch is not
    imported.

    Raises:
        TypeError, ValueError, OverflowError, RecursionError: `value` is no array.
    """
    try:
        array = np.asarray(value)
    except (TypeError, RuntimeError):
        if not hasattr(value, "detach"):
            raise
        # numpy takes no bfloat16, no tensor with a gradient, and none on a device.
        tensor: Any = value
        array = np.asarray(tensor.detach().cpu().float())
    if array.dtype.isbuiltin == 2:  # a type of another package, such as bfloat16 of ml_dtypes
        array = array.astype(np.float32)
    return array


def as_array(value: object, kinds: str, what: str) -> npt.NDArray[Any]:
    """Return `value` as an array.

    Args:
        value: an array or nested lists.
        kinds: numpy's letters for the kinds of dtype that are valid, such as "fiu" for numbers.
        what: names the array in the error.

    Raises:
        SteeringError: the dtype is of another kind. Text, None and objects are never valid.
    """
    try:
        array = to_numpy(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        array = np.asarray(None)
    if array.dtype.kind not in kinds:
        raise SteeringError(f"{what} are not an array of the right kind of values")
    return array


def as_floats(value: object, shape: tuple[int, ...], what: str, dtype: type) -> npt.NDArray[Any]:
    """Return a read-only copy of `value` as floats.

    Args:
        value: an array or nested lists of numbers.
        shape: the shape that the array must have.
        what: names the array in the error.
        dtype: of the copy.

    Raises:
        SteeringError: not numbers, another shape, no values, or values that are not finite in
            `dtype`.
    """
    array = as_array(value, "fiu", what)
    if array.shape != shape or array.size == 0:
        raise SteeringError(f"{what} have the shape {quoted(array.shape)}, not {shape}")
    with np.errstate(over="ignore", invalid="ignore"):  # checked below
        array = array.astype(dtype)
    if not np.isfinite(array).all():
        raise SteeringError(f"{what} hold NaN or infinity")
    array = np.ascontiguousarray(array) + dtype(0)  # no negative zeros: equal values, equal bits
    array.setflags(write=False)
    return np.asarray(array)


def as_counts(value: object, shape: tuple[int, ...], what: str) -> npt.NDArray[np.int64]:
    """Return a read-only copy of `value` as counts.

    Args:
        value: an array or nested lists of whole numbers.
        shape: the shape that the array must have.
        what: names the array in the error.

    Raises:
        SteeringError: not whole numbers, another shape, or numbers outside of 0 to 2^53.
    """
    counts = np.array(as_array(value, "iu", what))
    if counts.shape != shape or not ((counts >= 0) & (counts <= _MAX_COUNT)).all():
        raise SteeringError(f"{what} are not {shape} counts")
    counts = counts.astype(np.int64)
    counts.setflags(write=False)
    return counts
