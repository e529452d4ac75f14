"""A strict reader of the GGUF container, safe on files from strangers.

The rules, each because a file that breaks it can crash, hang or mislead a reader:

- every length, count and offset is compared with the bytes that are there before it is used;
- keys and tensor names occur once;
- arrays hold scalars or strings, never arrays;
- strings are UTF-8; the file is little-endian, version 2 or 3;
- tensors lie one behind the other, aligned, inside the file, which bounds their total size.

The file is read from its beginning to its end, and never mapped into memory: a program that
shortens a mapped file ends the process that reads the map. Damage that leaves the layout whole,
such as a file half overwritten, shows in the digest. The digest, `pysteer.sha256`, is a string of
64 hexadecimal digits: the SHA-256 of the file with 64 zeros in their place. Files by pysteer have
it, right behind the architecture; files without it are read all the same.

Only float32 tensors are read: nothing that pysteer or llama.cpp writes for steering has another
type. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from pysteer.errors import FormatError, naming, quoted
from pysteer.files import opened

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
DIGEST = "pysteer.sha256"
NO_DIGEST = "0" * 64
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
    """Reads a file from its beginning to its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha = hashlib.sha256()
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0

    def remaining(self) -> int:
        return self.size - self.at

    def take(self, size: int, what: str, *, hashed: bool = True) -> bytes:
        """Return the next bytes; zeros take their place in the digest unless `hashed`."""
        raw = self._file.read(size) if size <= self.remaining() else b""
        if len(raw) != size:
            raise FormatError(f"the file ends inside {what}")
        self.at += size
        self._sha.update(raw if hashed else b"0" * size)
        return raw

    def floats(self, count: int, what: str) -> npt.NDArray[np.float32]:
        raw = bytearray(4 * count)
        if self._file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
            raise FormatError(f"the file ends inside {what}")
        self.at += len(raw)
        self._sha.update(raw)
        return np.frombuffer(raw, "<f4").astype(np.float32, copy=False)

    def check_digest(self, digest: Value) -> None:
        """Read to the end of the file, and compare its content with the digest in it."""
        while block := self._file.read(1 << 20):
            self._sha.update(block)
        if digest != self._sha.hexdigest():
            raise FormatError(
                "the content does not match the digest in the file: the file is damaged, or was "
                "overwritten while it was read"
            )

    def unpack(self, layout: str, what: str) -> int | float:
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout), what))
        return value  # type: ignore[no-any-return]

    def count(self, layout: str, smallest: int, what: str) -> int:
        value = int(self.unpack(layout, f"the number of {what}"))
        if value < 0 or value * smallest > self.remaining():
            raise FormatError(f"the file claims {value} {what} and is too short to hold them")
        return value

    def string(self, what: str) -> str:
        length = self.count("<Q", 1, f"bytes of {what}")
        try:
            return self.take(length, what).decode("utf-8")
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
        values: list[Scalar] = np.frombuffer(self.take(count * size, what), layout).tolist()
        return values

    def digest(self) -> Value:
        what = "the digest"
        if self.value_type(what) != ValueType.STRING or self.unpack("<Q", what) != len(NO_DIGEST):
            raise FormatError(f"metadata value {DIGEST!r} is not a digest")
        return self.take(len(NO_DIGEST), what, hashed=False).decode("latin-1")


def read(path: Path, *, architectures: tuple[str, ...]) -> Container:
    """Read a GGUF file whole.

    Args:
        path: the file.
        architectures: accepted values of `general.architecture`. Other files are refused before a
            tensor is read, so that a 5 GB model costs no time.

    Raises:
        FormatError: the file cannot be read, breaks a rule above, or is of another architecture.
    """
    with naming(path), opened(path) as file:
        cursor = _Cursor(file)
        n_tensors, metadata = _head(cursor, architectures)
        tensors = _tensors(cursor, n_tensors, metadata)
        if DIGEST in metadata:
            cursor.check_digest(metadata[DIGEST])
        return Container(metadata, tensors)


def read_metadata(path: Path, *, architectures: tuple[str, ...] | None = None) -> dict[str, Value]:
    """Read the metadata of a GGUF file, such as a model.

    Args:
        path: the file.
        architectures: accepted values of `general.architecture`; None accepts all.

    Raises:
        FormatError: the file cannot be read, breaks a rule above, or is of another architecture.
    """
    with naming(path), opened(path) as file:
        return _head(_Cursor(file), architectures)[1]


def _head(cursor: _Cursor, architectures: tuple[str, ...] | None) -> tuple[int, dict[str, Value]]:
    """Return the number of tensors, and the metadata."""
    if not cursor.size:
        raise FormatError("the file is empty")
    if cursor.take(min(4, cursor.size), "the header") != b"GGUF":
        raise FormatError("not a GGUF file")
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
        if key == DIGEST:
            metadata[key] = cursor.digest()
        else:
            metadata[key] = cursor.value(f"metadata value {quoted(key)}")
        # The architecture comes first in every ordinary file: refuse other files at once.
        if key == _ARCHITECTURE and architectures is not None:
            _check_architecture(metadata, architectures)
    if architectures is not None:
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
        what = f"the data of tensor {quoted(name)}"
        count = prod(shape)
        if offset != expected or start + offset + 4 * count > cursor.size:
            raise FormatError(f"{what} is outside of the file or unaligned")
        expected = _aligned(offset + 4 * count, alignment)
        cursor.take(start + offset - cursor.at, what)  # padding
        tensors[name] = cursor.floats(count, what).reshape(shape)
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
    if prod(sizes) * 4 > cursor.size:
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
