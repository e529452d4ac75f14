"""Writes the files that `pysteer.formats.gguf` reads, each in one step."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGUFValueType, GGUFWriter

from pysteer.errors import SteeringError, quoted
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
)


def write_vector(path: Path, directions: Directions, *, model_hint: str) -> None:
    """Write a plain control vector: residual, layers >= 1."""

    def fill(writer: GGUFWriter) -> None:
        _add_string(writer, "controlvector.model_hint", model_hint)
        writer.add_uint32("controlvector.layer_count", len(directions))
        for layer, direction in directions.items():
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(direction))

    _write(path, VECTOR_ARCHITECTURE, fill)


def write_pack(path: Path, content: PackContent) -> None:
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

    _write(path, PACK_ARCHITECTURE, fill)


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


def _write(path: Path, architecture: str, fill: Callable[[GGUFWriter], None]) -> None:
    """Write beside the target and move into place, so that a failure keeps an older file whole."""
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
    except ValueError as error:  # an invalid path or text
        raise SteeringError(f"cannot write {quoted(str(path))}: {error}") from None
