"""The home format: control vectors that llama.cpp accepts, and packs.

A control vector is what `llama-cli --control-vector` loads: architecture "controlvector", tensors
`direction.N`, float32, N >= 1, added to the output of block N.

A pack is one GGUF file of architecture "pysteer". Its tensors are called
`category.<index>.direction.<layer>`, so that llama.cpp, which looks at tensor names only, refuses
the file instead of adding all categories at once. Metadata:

- `pysteer.format_version` (1), `pysteer.categories` and `pysteer.sites`: one string per category;
- `pysteer.base_model.*`: `architecture`, `name`, `n_layer`, `n_embd`, `n_vocab`, if known;
- `pysteer.residual_norm.layers`, `pysteer.residual_norm.values` (float64): typical L2 norms, if
  known;
- `pysteer.provenance`: a JSON object.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TypeVar

import numpy as np
from gguf import GGUFValueType, GGUFWriter

from pysteer.errors import FormatError, SteeringError, quoted
from pysteer.formats.container import Container, read
from pysteer.pack import BaseModel, SteeringPack
from pysteer.vector import SteeringVector

VECTOR_ARCHITECTURE = "controlvector"
PACK_ARCHITECTURE = "pysteer"
PACK_VERSION = 1

_T = TypeVar("_T")

_DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")
_PACK_DIRECTION = re.compile(r"category\.(0|[1-9][0-9]{0,5})\.direction\.(0|[1-9][0-9]{0,5})")


def save_vector(vector: SteeringVector, path: Path, *, model_hint: str) -> None:
    """Write a plain control vector; see `SteeringVector.save`."""
    if vector.site != "residual":
        raise SteeringError(
            f"llama.cpp would add a vector of site {vector.site!r} to the residual stream; "
            "save it in a SteeringPack"
        )
    if vector.layers[0] == 0:
        raise SteeringError(
            "llama.cpp refuses control vectors with a direction for layer 0; "
            "leave that layer out, or save the vector in a SteeringPack"
        )

    def fill(writer: GGUFWriter) -> None:
        _add_string(writer, "controlvector.model_hint", model_hint)
        writer.add_uint32("controlvector.layer_count", len(vector.layers))
        for layer, direction in vector.items():
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(direction))

    _write(path, VECTOR_ARCHITECTURE, fill)


def load_vector(path: Path) -> SteeringVector:
    """Read a plain control vector; see `SteeringVector.load`."""
    container = read(path, architectures=(VECTOR_ARCHITECTURE, PACK_ARCHITECTURE))
    if container.metadata["general.architecture"] == PACK_ARCHITECTURE:
        raise FormatError(f"{path}: this is a pack; load it with SteeringPack.load")
    return _guard(path, _vector, container)


def save_pack(pack: SteeringPack, path: Path) -> None:
    """Write a pack; see `SteeringPack.save`."""

    def fill(writer: GGUFWriter) -> None:
        writer.add_uint32("pysteer.format_version", PACK_VERSION)
        writer.add_array("pysteer.categories", list(pack.categories))
        writer.add_array("pysteer.sites", [vector.site for vector in pack.categories.values()])
        if pack.base_model is not None:
            for name, value in asdict(pack.base_model).items():
                key = f"pysteer.base_model.{name}"
                if isinstance(value, str):
                    _add_string(writer, key, value)
                else:
                    writer.add_uint32(key, value)
        if pack.residual_norm:
            layers, norms = zip(*sorted(pack.residual_norm.items()), strict=True)
            writer.add_array("pysteer.residual_norm.layers", [int(layer) for layer in layers])
            writer.add_key_value(
                "pysteer.residual_norm.values",
                [float(norm) for norm in norms],
                GGUFValueType.ARRAY,
                sub_type=GGUFValueType.FLOAT64,
            )
        provenance = json.dumps(dict(pack.provenance), sort_keys=True, allow_nan=False)
        _add_string(writer, "pysteer.provenance", provenance)
        for index, vector in enumerate(pack.categories.values()):
            for layer, direction in vector.items():
                name = f"category.{index}.direction.{layer}"
                writer.add_tensor(name, np.ascontiguousarray(direction))

    _write(path, PACK_ARCHITECTURE, fill)


def load_pack(path: Path) -> SteeringPack:
    """Read a pack or a plain control vector; see `SteeringPack.load`."""
    container = read(path, architectures=(VECTOR_ARCHITECTURE, PACK_ARCHITECTURE))
    if container.metadata["general.architecture"] == VECTOR_ARCHITECTURE:
        return SteeringPack({path.stem.strip() or "vector": _guard(path, _vector, container)})
    return _guard(path, _pack, container)


def _guard(path: Path, build: Callable[[Container], _T], container: Container) -> _T:
    """Name the file in whatever is wrong with its content."""
    try:
        return build(container)
    except SteeringError as error:
        raise FormatError(f"{path}: {error}") from None


def _vector(container: Container) -> SteeringVector:
    directions = {}
    for name, tensor in container.tensors.items():
        match = _DIRECTION.fullmatch(name)
        if match is None:
            raise FormatError(f"tensor {quoted(name)} does not belong in a control vector")
        if match[1] == "0":
            raise FormatError("a control vector cannot have a direction for layer 0")
        directions[int(match[1])] = tensor
    return SteeringVector(directions)


def _pack(container: Container) -> SteeringPack:
    metadata = container.metadata
    version = metadata.get("pysteer.format_version")
    if version != PACK_VERSION:
        raise FormatError(
            f"the pack has format version {quoted(version)}; this pysteer reads {PACK_VERSION}"
        )
    names = _strings(container, "pysteer.categories")
    sites = _strings(container, "pysteer.sites")
    if len(names) != len(sites) or len(set(names)) != len(names):
        raise FormatError("the lists of categories and sites do not belong together")
    directions: list[dict[int, np.ndarray]] = [{} for _ in names]
    for tensor_name, tensor in container.tensors.items():
        match = _PACK_DIRECTION.fullmatch(tensor_name)
        if match is None or int(match[1]) >= len(names):
            raise FormatError(f"tensor {quoted(tensor_name)} belongs to no category")
        directions[int(match[1])][int(match[2])] = tensor
    return SteeringPack(
        {
            name: SteeringVector(layers, site=site)
            for name, site, layers in zip(names, sites, directions, strict=True)
        },
        base_model=_base_model(container),
        residual_norm=_residual_norm(container),
        provenance=_provenance(container),
    )


def _strings(container: Container, key: str) -> list[str]:
    value = container.metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise FormatError(f"metadata value {key!r} is not a list of strings")
    return [str(item) for item in value]


def _base_model(container: Container) -> BaseModel | None:
    prefix = "pysteer.base_model."
    if not any(key.startswith(prefix) for key in container.metadata):
        return None
    values = {}
    for entry in fields(BaseModel):
        expected = str if entry.type == "str" else int
        value = container.metadata.get(prefix + entry.name)
        if type(value) is not expected:
            raise FormatError(f"metadata value {prefix + entry.name!r} is missing or wrong")
        values[entry.name] = value
    return BaseModel(**values)  # type: ignore[arg-type]


def _residual_norm(container: Container) -> dict[int, float]:
    layers = container.metadata.get("pysteer.residual_norm.layers", [])
    norms = container.metadata.get("pysteer.residual_norm.values", [])
    if (
        not isinstance(layers, list)
        or not isinstance(norms, list)
        or len(layers) != len(norms)
        or not all(type(layer) is int for layer in layers)
        or len(set(layers)) != len(layers)
        or not all(type(norm) is float for norm in norms)
    ):
        raise FormatError("the residual norms are not pairs of layer and number")
    return {int(layer): float(norm) for layer, norm in zip(layers, norms, strict=True)}


def _provenance(container: Container) -> dict[str, str | int | float]:
    text = container.metadata.get("pysteer.provenance", "{}")
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise FormatError("the provenance is not a JSON object")
    return value


def _add_string(writer: GGUFWriter, key: str, value: str) -> None:
    """Unlike `GGUFWriter.add_string`, also when it is empty."""
    writer.add_key_value(key, value, GGUFValueType.STRING)


def _write(path: Path, architecture: str, fill: Callable[[GGUFWriter], None]) -> None:
    """Write beside the target and move into place, so that a failure never costs an older file."""
    try:
        target = path.resolve()  # write through a symbolic link, not over it
        part = target.parent / f".{secrets.token_hex(8)}.part"
        try:
            writer = GGUFWriter(part, architecture)
            try:
                fill(writer)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
            finally:
                writer.close()
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise SteeringError(f"cannot write {path}: {error.strerror or error}") from None
    except SteeringError:
        raise
    except ValueError as error:  # a path, or a text, that cannot be one
        raise SteeringError(f"cannot write {quoted(str(path))}: {error}") from None
