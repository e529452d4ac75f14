"""A strict reader of the GGUF container, safe on files from strangers.

The rules, each because a file that breaks it can crash, hang or mislead a reader:

- every length, count and offset is compared with the bytes that are there before it is used;
- keys and tensor names occur once;
- arrays hold scalars or strings, never arrays;
- strings are UTF-8; the file is little-endian, version 2 or 3;
- tensors lie one behind the other, aligned, inside the file, which bounds their total size. Tensors
  are copied, so that no array refers to the file after reading.

Only float32 tensors are read: nothing that pysteer or llama.cpp writes for steering has another
type. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pysteer.errors import FormatError, naming, quoted

Scalar: TypeAlias = "int | float | bool | str"
Value: TypeAlias = "Scalar | list[Scalar]"


class ValueType(IntEnum):
    """The types of metadata values, by their numbers in a file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_SCALARS = {
    ValueType.UINT8: "<B",
    ValueType.INT8: "<b",
    ValueType.UINT16: "<H",
    ValueType.INT16: "<h",
    ValueType.UINT32: "<I",
    ValueType.INT32: "<i",
    ValueType.FLOAT32: "<f",
    ValueType.UINT64: "<Q",
    ValueType.INT64: "<q",
    ValueType.FLOAT64: "<d",
}
_F32 = 0  # in the numbering of tensor types
_ARCHITECTURE = "general.architecture"
_MAX_DIMENSIONS = 4
_MAX_ARRAY = 1 << 22  # far above any vocabulary
_SMALLEST_ENTRY = 12  # bytes: an empty name and a type


@dataclass(frozen=True)
class Container:
    """Metadata of a file, and every tensor as float32 in numpy's order of dimensions."""

    metadata: dict[str, Value]
    tensors: dict[str, npt.NDArray[np.float32]]


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def remaining(self) -> int:
        return len(self.data) - self.at

    def unpack(self, layout: str, what: str) -> int | float:
        size = struct.calcsize(layout)
        if size > self.remaining():
            raise FormatError(f"the file ends inside {what}")
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += size
        return value  # type: ignore[no-any-return]

    def count(self, layout: str, smallest: int, what: str) -> int:
        value = int(self.unpack(layout, f"the number of {what}"))
        if value < 0 or value * smallest > self.remaining():
            raise FormatError(f"the file claims {value} {what} and is too short to hold them")
        return value

    def string(self, what: str) -> str:
        length = self.count("<Q", 1, f"bytes of {what}")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{what} is not UTF-8") from None

    def value_type(self, what: str) -> ValueType:
        number = int(self.unpack("<I", what))
        try:
            return ValueType(number)
        except ValueError:
            raise FormatError(f"{what} has the unknown type {number}") from None

    def scalar(self, kind: ValueType, what: str) -> Scalar:
        if kind == ValueType.STRING:
            return self.string(what)
        if kind == ValueType.BOOL:
            number = int(self.unpack("<B", what))
            if number > 1:
                raise FormatError(f"{what} is neither true nor false")
            return bool(number)
        return self.unpack(_SCALARS[kind], what)

    def value(self, what: str) -> Value:
        kind = self.value_type(what)
        return self.array(what) if kind == ValueType.ARRAY else self.scalar(kind, what)

    def array(self, what: str) -> list[Scalar]:
        kind = self.value_type(what)
        if kind == ValueType.ARRAY:
            raise FormatError(f"{what} holds an array of arrays")
        layout = _SCALARS.get(kind)
        size = struct.calcsize(layout) if layout else 8 if kind == ValueType.STRING else 1
        count = self.count("<Q", size, f"values of {what}")
        if count > _MAX_ARRAY:
            raise FormatError(f"{what} has {count} values; at most {_MAX_ARRAY} are read")
        if layout is None:
            return [self.scalar(kind, what) for _ in range(count)]
        values: list[Scalar] = np.frombuffer(self.data, layout, count, self.at).tolist()
        self.at += count * size
        return values


def read(path: Path, *, architectures: tuple[str, ...]) -> Container:
    """Read a GGUF file whole.

    Args:
        path: the file.
        architectures: accepted values of `general.architecture`. Other files are refused before a
            tensor is read, so that a 5 GB model costs no time.

    Raises:
        FormatError: the file cannot be read, breaks a rule above, or is of another architecture.
    """
    with naming(path), opened(path) as data:
        cursor = _Cursor(data)
        n_tensors, metadata = _head(cursor, architectures)
        _check_architecture(metadata, architectures)
        return Container(metadata, _tensors(cursor, n_tensors, metadata))


def read_metadata(path: Path) -> dict[str, Value]:
    """Read the metadata of a GGUF file of any architecture, such as a model.

    Raises:
        FormatError: the file cannot be read, or breaks a rule above.
    """
    with naming(path), opened(path) as data:
        return _head(_Cursor(data), None)[1]


@contextmanager
def opened(path: Path) -> Iterator[mmap.mmap]:
    """Map a file into memory.

    Raises:
        FormatError: the path is not a regular file, or the file is empty.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait, a device never end
        raise FormatError("not a file")
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            raise FormatError("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def _head(cursor: _Cursor, architectures: tuple[str, ...] | None) -> tuple[int, dict[str, Value]]:
    """Return the number of tensors, and the metadata."""
    if cursor.data[:4] != b"GGUF":
        raise FormatError("not a GGUF file")
    cursor.at = 4
    version = cursor.unpack("<I", "the header")
    if version not in (2, 3):
        raise FormatError(f"GGUF version {version} is not supported; versions 2 and 3 are")
    n_tensors = cursor.count("<q", _SMALLEST_ENTRY, "tensors")
    n_values = cursor.count("<q", _SMALLEST_ENTRY, "metadata values")

    metadata: dict[str, Value] = {}
    for _ in range(n_values):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise FormatError(f"metadata key {quoted(key)} occurs twice")
        metadata[key] = cursor.value(f"metadata value {quoted(key)}")
        # The architecture comes first in every ordinary file: refuse other files at once.
        if key == _ARCHITECTURE and architectures is not None:
            _check_architecture(metadata, architectures)
    return n_tensors, metadata


def _tensors(
    cursor: _Cursor, n_tensors: int, metadata: dict[str, Value]
) -> dict[str, npt.NDArray[np.float32]]:
    infos: dict[str, tuple[tuple[int, ...], int]] = {}
    for _ in range(n_tensors):
        name = cursor.string("a tensor name")
        if name in infos:
            raise FormatError(f"tensor {quoted(name)} occurs twice")
        infos[name] = _tensor_info(cursor, f"tensor {quoted(name)}")

    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise FormatError(f"alignment {quoted(alignment)} is not a power of two")
    start = _aligned(cursor.at, alignment)
    expected = 0
    tensors = {}
    for name, (shape, offset) in infos.items():
        count = prod(shape)
        if offset != expected or start + offset + 4 * count > len(cursor.data):
            raise FormatError(
                f"the data of tensor {quoted(name)} is outside of the file or unaligned"
            )
        expected = _aligned(offset + 4 * count, alignment)
        flat = np.frombuffer(cursor.data, "<f4", count, start + offset)
        tensors[name] = flat.reshape(shape).astype(np.float32, copy=True)
        del flat  # a view would keep the mapping from closing
    return tensors


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _check_architecture(metadata: dict[str, Value], architectures: tuple[str, ...]) -> None:
    architecture = metadata.get(_ARCHITECTURE)
    if architecture not in architectures:
        raise FormatError(
            f"the file holds {quoted(architecture)}, not a steering pack or a control vector"
        )


def _tensor_info(cursor: _Cursor, tensor: str) -> tuple[tuple[int, ...], int]:
    n_dimensions = int(cursor.unpack("<I", f"the shape of {tensor}"))
    if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
        raise FormatError(f"{tensor} has {n_dimensions} dimensions")
    sizes = [int(cursor.unpack("<Q", f"the shape of {tensor}")) for _ in range(n_dimensions)]
    if prod(sizes) * 4 > len(cursor.data):
        raise FormatError(f"{tensor} claims the shape {sizes} and the file is too short")
    if 0 in sizes:
        raise FormatError(f"{tensor} is empty")
    kind = int(cursor.unpack("<I", f"the type of {tensor}"))
    if kind != _F32:
        raise FormatError(f"{tensor} is {_type_name(kind)}; directions are F32")
    # GGUF counts dimensions from the fastest, numpy from the slowest.
    return tuple(reversed(sizes)), int(cursor.unpack("<Q", f"the offset of {tensor}"))


def _type_name(kind: int) -> str:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # imports YAML

    return GGMLQuantizationType(kind).name if kind in GGML_QUANT_SIZES else f"type {kind}"
