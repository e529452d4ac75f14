"""Writes the files that `pysteer.formats.gguf` reads, each in one step."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGUFValueType, GGUFWriter

from pysteer.files import replacing
from pysteer.formats.container import DIGEST, NO_DIGEST
from pysteer.formats.gguf import (
    OPERATORS,
    PACK_ARCHITECTURE,
    POLICY,
    ROUTER,
    ROUTER_TENSOR,
    VECTOR_ARCHITECTURE,
    Directions,
    PackContent,
    RouterContent,
    check_target,
    is_ours,
)


def write_vector(
    path: Path, directions: Directions, *, model_hint: str, overwrite: bool = False
) -> None:
    """Write a plain control vector: residual, layers >= 1."""

    def fill(writer: GGUFWriter) -> None:
        _add_string(writer, "controlvector.model_hint", model_hint)
        writer.add_uint32("controlvector.layer_count", len(directions))
        for layer, direction in directions.items():
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(direction))

    _write(path, VECTOR_ARCHITECTURE, fill, overwrite)


def write_pack(path: Path, content: PackContent, *, overwrite: bool = False) -> None:
    """Write a pack."""

    def fill(writer: GGUFWriter) -> None:
        categories = content.categories.values()
        writer.add_uint32("pysteer.format_version", content.version)
        writer.add_array("pysteer.categories", list(content.categories))
        writer.add_array("pysteer.sites", [category.site for category in categories])
        if any(category.operator for category in categories):
            _add_json(writer, OPERATORS, [category.operator for category in categories])
        if content.policy is not None:
            _add_json(writer, POLICY, content.policy)
        for name, value in (content.base_model or {}).items():
            key = f"pysteer.base_model.{name}"
            if isinstance(value, str):
                _add_string(writer, key, value)
            else:
                writer.add_uint32(key, value)
        if content.residual_norm:
            layers, norms = zip(*sorted(content.residual_norm.items()), strict=True)
            writer.add_array("pysteer.residual_norm.layers", [int(layer) for layer in layers])
            writer.add_key_value(
                "pysteer.residual_norm.values",
                [float(norm) for norm in norms],
                GGUFValueType.ARRAY,
                sub_type=GGUFValueType.FLOAT64,
            )
        _add_json(writer, "pysteer.provenance", content.provenance)
        for index, category in enumerate(categories):
            for layer, direction in category.directions.items():
                name = f"category.{index}.direction.{layer}"
                writer.add_tensor(name, np.ascontiguousarray(direction))
        if content.router is not None:
            _add_router(writer, content.router)

    _write(path, PACK_ARCHITECTURE, fill, overwrite)


def _add_router(writer: GGUFWriter, router: RouterContent) -> None:
    _add_string(writer, ROUTER + "site", router.site)
    writer.add_key_value(
        ROUTER + "layers", router.layers, GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT32
    )
    writer.add_array(ROUTER + "poolings", router.poolings)
    writer.add_array(ROUTER + "categories", router.categories)
    _add_json(writer, ROUTER + "tables", router.tables)
    for name, tensor in router.tensors.items():
        writer.add_tensor(ROUTER_TENSOR + name, np.ascontiguousarray(tensor))


def _add_json(writer: GGUFWriter, key: str, value: object) -> None:
    _add_string(writer, key, json.dumps(value, sort_keys=True, allow_nan=False))


def _add_string(writer: GGUFWriter, key: str, value: str) -> None:
    """Add a string; unlike `GGUFWriter.add_string`, an empty one as well."""
    writer.add_key_value(key, value, GGUFValueType.STRING)


def _write(
    path: Path, architecture: str, fill: Callable[[GGUFWriter], None], overwrite: bool
) -> None:
    check_target(path, overwrite=overwrite)
    with replacing(path, None if overwrite else is_ours) as file:
        writer = GGUFWriter(file.name, architecture)
        try:
            _add_string(writer, DIGEST, NO_DIGEST)
            fill(writer)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        _write_digest(file)


def _write_digest(file: BinaryIO) -> None:
    """Put the SHA-256 of a file in the place of `NO_DIGEST`."""
    sha = hashlib.sha256()
    file.seek(0)
    while block := file.read(1 << 20):
        sha.update(block)
    # The digest follows the architecture, which is short.
    file.seek(0)
    entry = DIGEST.encode() + struct.pack("<IQ", GGUFValueType.STRING, len(NO_DIGEST))
    at = file.read(4096).index(entry) + len(entry)
    file.seek(at)
    file.write(sha.hexdigest().encode())
