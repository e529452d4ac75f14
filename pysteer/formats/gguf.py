"""The home format: control vectors that llama.cpp accepts, and packs.

A control vector is what `llama-cli --control-vector` loads: architecture "controlvector", tensors
`direction.N`, float32, N >= 1, added to the output of block N.

A pack is one GGUF file of architecture "pysteer". Its tensors are called
`category.<index>.direction.<layer>`, so that llama.cpp, which looks at tensor names only, refuses
the file instead of adding all categories at once. Metadata:

- `pysteer.format_version`: 2 for a pack with operators or a policy (below), so that a pysteer
  without them refuses the pack instead of adding its directions plainly; 1 for any other;
- `pysteer.categories` and `pysteer.sites`: one string per category;
- `pysteer.base_model.*`: `architecture`, `name`, `n_layer`, `n_embd`, `n_vocab`, if known;
- `pysteer.residual_norm.layers`, `pysteer.residual_norm.values` (float64): typical L2 norms, if
  known;
- `pysteer.provenance`: a JSON object;
- `pysteer.operators`: a JSON list of objects, one per category, which
  `pysteer.pack.operators.Operator` reads. Without it all categories are plainly added. The tensors
  of operators with several rows per layer have the shape (rows, n_embd) instead of (n_embd,);
- `pysteer.policy`: a JSON object, if the pack has a policy; `pysteer.pack.policy.Policy` reads it.

A pack with a router also has the tensors of each kind of gate that the router has (margin:
`router.margin.weight`, `router.margin.bias` and `router.allowances`; multinomial: `router.weight`
and `router.bias`; probe: `router.probe.weight` and `router.probe.bias`; centroid:
`router.centroids`; cast: `router.conditions`), and the metadata

- `pysteer.router.site`, `pysteer.router.layers` (uint32), `pysteer.router.poolings`: the places
  that the router reads, one layer and pooling for each part of its tensors' rows;
- `pysteer.router.categories`: the categories it knows, in the order of its tensors' rows;
- `pysteer.router.tables`: a JSON object with thresholds, rates and the confusion table.

`pysteer.pack.router.Router` gives them their meaning.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from gguf import GGUFValueType, GGUFWriter

from pysteer.errors import FormatError, SteeringError, naming, quoted
from pysteer.formats.container import Container, read

Directions: TypeAlias = dict[int, npt.NDArray[np.float32]]
"""Layer to direction, shape (n_embd,), or (rows, n_embd) in a pack."""

VECTOR_ARCHITECTURE = "controlvector"
PACK_ARCHITECTURE = "pysteer"
PACK_VERSION = 2  # the newest that is read; version 1 is written where it suffices

_OPERATORS = "pysteer.operators"
_POLICY = "pysteer.policy"
_BASE_MODEL = {"architecture": str, "name": str, "n_layer": int, "n_embd": int, "n_vocab": int}
_DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")
_ROUTER = "pysteer.router."
_ROUTER_TENSOR = "router."
_PACK_DIRECTION = re.compile(r"category\.(0|[1-9][0-9]{0,5})\.direction\.(0|[1-9][0-9]{0,5})")


@dataclass(frozen=True)
class RouterContent:
    """The router of a pack file as plain data; `Router` gives it its meaning.

    Attributes:
        site: where in a block the router reads.
        layers: the layers that it reads.
        poolings: for each of these layers, the tokens whose activations are averaged.
        categories: the categories that the router knows.
        tensors: the arrays that the file holds, by name without `router.`.
        tables: numbers and text as JSON holds them.
    """

    site: str
    layers: list[int]
    poolings: list[str]
    categories: list[str]
    tensors: dict[str, npt.NDArray[np.float32]]
    tables: dict[str, Any]


@dataclass(frozen=True)
class CategoryContent:
    """One category of a pack file.

    Attributes:
        site: where in a block the category acts.
        directions: its tensors.
        operator: a JSON object, {} for a plain addition.
    """

    site: str
    directions: Directions
    operator: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PackContent:
    """A pack file as plain data; `SteeringPack` gives it its meaning.

    Attributes:
        categories: the categories by name.
        base_model: the fields of `BaseModel`, or None.
        residual_norm: layer to typical L2 norm.
        provenance: a JSON object.
        router: the router, or None.
        policy: a JSON object, or None.
    """

    categories: dict[str, CategoryContent]
    base_model: dict[str, str | int] | None
    residual_norm: dict[int, float]
    provenance: dict[str, Any]
    router: RouterContent | None = None
    policy: dict[str, Any] | None = None

    @property
    def version(self) -> int:
        """The lowest format version that can hold this content."""
        operators = any(category.operator for category in self.categories.values())
        return 2 if operators or self.policy is not None else 1


def write_vector(path: Path, directions: Directions, *, model_hint: str) -> None:
    """Write a plain control vector: residual, layers >= 1."""

    def fill(writer: GGUFWriter) -> None:
        _add_string(writer, "controlvector.model_hint", model_hint)
        writer.add_uint32("controlvector.layer_count", len(directions))
        for layer, direction in directions.items():
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(direction))

    _write(path, VECTOR_ARCHITECTURE, fill)


def read_vector(path: Path) -> Directions:
    """Read a plain control vector.

    Raises:
        FormatError: the file is damaged, or not a control vector.
    """
    container = read(path, architectures=(VECTOR_ARCHITECTURE, PACK_ARCHITECTURE))
    with naming(path):
        if container.metadata["general.architecture"] == PACK_ARCHITECTURE:
            raise FormatError("this is a pack; load it with SteeringPack.load")
        return _vector(container)


def write_pack(path: Path, content: PackContent) -> None:
    """Write a pack."""

    def fill(writer: GGUFWriter) -> None:
        categories = content.categories.values()
        writer.add_uint32("pysteer.format_version", content.version)
        writer.add_array("pysteer.categories", list(content.categories))
        writer.add_array("pysteer.sites", [category.site for category in categories])
        if any(category.operator for category in categories):
            _add_json(writer, _OPERATORS, [category.operator for category in categories])
        if content.policy is not None:
            _add_json(writer, _POLICY, content.policy)
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


def read_pack(path: Path) -> PackContent:
    """Read a pack, or a plain control vector as a pack of one category named by the file's stem.

    Raises:
        FormatError: the file is damaged, or neither of the two.
    """
    container = read(path, architectures=(VECTOR_ARCHITECTURE, PACK_ARCHITECTURE))
    with naming(path):
        if container.metadata["general.architecture"] == VECTOR_ARCHITECTURE:
            name = path.stem.strip() or "vector"
            return PackContent(
                {name: CategoryContent("residual", _vector(container))}, None, {}, {}
            )
        return _pack(container)


def _vector(container: Container) -> Directions:
    directions = {}
    for name, tensor in container.tensors.items():
        match = _DIRECTION.fullmatch(name)
        if match is None:
            raise FormatError(f"tensor {quoted(name)} does not belong in a control vector")
        if match[1] == "0":
            raise FormatError("a control vector cannot have a direction for layer 0")
        directions[int(match[1])] = tensor
    return directions


def _pack(container: Container) -> PackContent:
    version = container.metadata.get("pysteer.format_version")
    if type(version) is not int or not 1 <= version <= PACK_VERSION:
        raise FormatError(
            f"the pack has format version {quoted(version)}; this pysteer reads 1 to {PACK_VERSION}"
        )
    newer = [key for key in (_OPERATORS, _POLICY) if key in container.metadata]
    if (version == 2) != bool(newer):
        raise FormatError(
            f"the pack has format version {version}, which "
            + (f"does not allow {newer[0]}" if newer else "requires operators or a policy")
        )
    names = _strings(container, "pysteer.categories")
    sites = _strings(container, "pysteer.sites")
    if len(names) != len(sites) or len(set(names)) != len(names):
        raise FormatError("the lists of categories and sites do not match")
    directions: list[Directions] = [{} for _ in names]
    router = _router(container)
    for tensor_name, tensor in container.tensors.items():
        if router is not None and tensor_name.startswith(_ROUTER_TENSOR):
            continue
        match = _PACK_DIRECTION.fullmatch(tensor_name)
        if match is None or int(match[1]) >= len(names):
            raise FormatError(f"tensor {quoted(tensor_name)} belongs to no category")
        directions[int(match[1])][int(match[2])] = tensor
    parts = zip(sites, directions, _operators(container, len(names)), strict=True)
    return PackContent(
        {name: CategoryContent(*part) for name, part in zip(names, parts, strict=True)},
        _base_model(container),
        _residual_norm(container),
        _json(container, "pysteer.provenance")
        if "pysteer.provenance" in container.metadata
        else {},
        router,
        _json(container, _POLICY) if _POLICY in container.metadata else None,
    )


def _operators(container: Container, count: int) -> list[dict[str, Any]]:
    if _OPERATORS not in container.metadata:
        return [{} for _ in range(count)]
    found = _parsed(container, _OPERATORS)
    if not isinstance(found, list) or len(found) != count:
        raise FormatError(f"metadata value {_OPERATORS!r} is not a JSON list, one per category")
    for operator in found:
        if not isinstance(operator, dict):
            raise FormatError(f"metadata value {_OPERATORS!r} holds {quoted(operator)}")
    return found


def _strings(container: Container, key: str) -> list[str]:
    value = container.metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise FormatError(f"metadata value {key!r} is not a list of strings")
    return [str(item) for item in value]


def _base_model(container: Container) -> dict[str, str | int] | None:
    prefix = "pysteer.base_model."
    if not any(key.startswith(prefix) for key in container.metadata):
        return None
    values: dict[str, str | int] = {}
    for name, expected in _BASE_MODEL.items():
        value = container.metadata.get(prefix + name)
        if not isinstance(value, (str, int)) or type(value) is not expected:
            raise FormatError(f"metadata value {prefix + name!r} is missing or wrong")
        values[name] = value
    return values


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


def _router(container: Container) -> RouterContent | None:
    if not any(key.startswith(_ROUTER) for key in container.metadata):
        return None  # so that tensors named like a router's belong to no category
    site = container.metadata.get(_ROUTER + "site")
    if not isinstance(site, str):
        raise FormatError(f"metadata value {_ROUTER + 'site'!r} is missing or wrong")
    layers = container.metadata.get(_ROUTER + "layers")
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise FormatError(f"metadata value {_ROUTER + 'layers'!r} is not a list of whole numbers")
    poolings = _strings(container, _ROUTER + "poolings")
    if len(layers) != len(poolings):
        raise FormatError("the router's layers and poolings do not match")
    return RouterContent(
        site=site,
        layers=[int(layer) for layer in layers],
        poolings=poolings,
        categories=_strings(container, _ROUTER + "categories"),
        tensors={
            name.removeprefix(_ROUTER_TENSOR): tensor
            for name, tensor in container.tensors.items()
            if name.startswith(_ROUTER_TENSOR)
        },
        tables=_json(container, _ROUTER + "tables"),
    )


def _add_router(writer: GGUFWriter, router: RouterContent) -> None:
    _add_string(writer, _ROUTER + "site", router.site)
    writer.add_key_value(
        _ROUTER + "layers", router.layers, GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT32
    )
    writer.add_array(_ROUTER + "poolings", router.poolings)
    writer.add_array(_ROUTER + "categories", router.categories)
    _add_json(writer, _ROUTER + "tables", router.tables)
    for name, tensor in router.tensors.items():
        writer.add_tensor(_ROUTER_TENSOR + name, np.ascontiguousarray(tensor))


def _json(container: Container, key: str) -> dict[str, Any]:
    value = _parsed(container, key)
    if not isinstance(value, dict):
        raise FormatError(f"metadata value {key!r} is not a JSON object")
    return value


def _parsed(container: Container, key: str) -> Any:
    """Return the JSON of a metadata value; None also for text that is not JSON."""
    text = container.metadata.get(key)
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


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
