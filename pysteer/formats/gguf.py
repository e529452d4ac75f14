"""The home format: control vectors that llama.cpp accepts, and packs.

A control vector is a file for `llama-cli --control-vector`: architecture "controlvector", tensors
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

Both kinds of file hold their digest, `pysteer.sha256`; see `pysteer.formats.container`.

A pack with a router also has the tensors of each kind of gate that the router has (margin:
`router.margin.weight`, `router.margin.bias` and `router.allowances`; multinomial: `router.weight`
and `router.bias`; probe: `router.probe.weight` and `router.probe.bias`; centroid:
`router.centroids`; cast: `router.conditions`), and the metadata

- `pysteer.router.site`, `pysteer.router.layers` (uint32), `pysteer.router.poolings`: the places
  that the router reads, one layer and pooling for each part of its tensors' rows;
- `pysteer.router.categories`: the router's categories, in the order of its tensors' rows;
- `pysteer.router.tables`: a JSON object with thresholds, rates and the confusion table.

`pysteer.pack.router.Router` gives these values their meaning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pysteer import strict_json
from pysteer.errors import FormatError, SteeringError, naming, quoted
from pysteer.files import check_replaceable
from pysteer.formats.container import DIGEST, Container, read, read_metadata

Directions: TypeAlias = dict[int, npt.NDArray[np.float32]]
"""Layer to direction, shape (n_embd,), or (rows, n_embd) in a pack."""

VECTOR_ARCHITECTURE = "controlvector"
PACK_ARCHITECTURE = "pysteer"
PACK_VERSION = 2  # newest readable version; version 1 is written where it suffices

OPERATORS = "pysteer.operators"
POLICY = "pysteer.policy"
ROUTER = "pysteer.router."
ROUTER_TENSOR = "router."

_BASE_MODEL = {"architecture": str, "name": str, "n_layer": int, "n_embd": int, "n_vocab": int}
_DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")
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

    @classmethod
    def of_vector(cls, path: Path, directions: Directions) -> PackContent:
        """Return a plain control vector as a pack of one category, named by the file's stem."""
        name = path.stem.strip() or "vector"
        return cls({name: CategoryContent("residual", directions)}, None, {}, {})

    @property
    def version(self) -> int:
        """The lowest format version that can hold this content."""
        operators = any(category.operator for category in self.categories.values())
        return 2 if operators or self.policy is not None else 1


def is_ours(path: Path) -> bool:
    """Return True for a pack, and for a control vector that pysteer wrote."""
    try:
        metadata = read_metadata(path, architectures=(VECTOR_ARCHITECTURE, PACK_ARCHITECTURE))
    except FormatError:
        return False
    return metadata["general.architecture"] == PACK_ARCHITECTURE or DIGEST in metadata


def check_target(path: Path, *, overwrite: bool) -> None:
    """Check that a pack or control vector can be written at a path.

    Args:
        path: the path.
        overwrite: True if a file that pysteer did not write may be replaced.

    Raises:
        SteeringError: another ending than .gguf, something that is not a regular file, or a file
            that must stay.
    """
    if path.suffix.lower() != ".gguf":
        raise SteeringError(
            f"cannot write {path}: pysteer writes GGUF; give the file a name that ends in .gguf"
        )
    check_replaceable(path, None if overwrite else is_ours)


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


def read_pack(path: Path) -> PackContent:
    """Read a pack, or a plain control vector as a pack of one category named by the file's stem.

    Raises:
        FormatError: the file is damaged, or neither of the two.
    """
    container = read(path, architectures=(VECTOR_ARCHITECTURE, PACK_ARCHITECTURE))
    with naming(path):
        if container.metadata["general.architecture"] == VECTOR_ARCHITECTURE:
            return PackContent.of_vector(path, _vector(container))
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
    newer = [key for key in (OPERATORS, POLICY) if key in container.metadata]
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
        if router is not None and tensor_name.startswith(ROUTER_TENSOR):
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
        _json(container, POLICY) if POLICY in container.metadata else None,
    )


def _operators(container: Container, count: int) -> list[dict[str, Any]]:
    if OPERATORS not in container.metadata:
        return [{} for _ in range(count)]
    found = _parsed(container, OPERATORS)
    if not isinstance(found, list) or len(found) != count:
        raise FormatError(f"metadata value {OPERATORS!r} is not a JSON list, one per category")
    for operator in found:
        if not isinstance(operator, dict):
            raise FormatError(f"metadata value {OPERATORS!r} holds {quoted(operator)}")
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
    if not any(key.startswith(ROUTER) for key in container.metadata):
        return None  # so that tensors named like a router's belong to no category
    site = container.metadata.get(ROUTER + "site")
    if not isinstance(site, str):
        raise FormatError(f"metadata value {ROUTER + 'site'!r} is missing or wrong")
    layers = container.metadata.get(ROUTER + "layers")
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise FormatError(f"metadata value {ROUTER + 'layers'!r} is not a list of whole numbers")
    poolings = _strings(container, ROUTER + "poolings")
    if len(layers) != len(poolings):
        raise FormatError("the router's layers and poolings do not match")
    return RouterContent(
        site=site,
        layers=[int(layer) for layer in layers],
        poolings=poolings,
        categories=_strings(container, ROUTER + "categories"),
        tensors={
            name.removeprefix(ROUTER_TENSOR): tensor
            for name, tensor in container.tensors.items()
            if name.startswith(ROUTER_TENSOR)
        },
        tables=_json(container, ROUTER + "tables"),
    )


def _json(container: Container, key: str) -> dict[str, Any]:
    value = _parsed(container, key)
    if not isinstance(value, dict):
        raise FormatError(f"metadata value {key!r} is not a JSON object")
    return value


def _parsed(container: Container, key: str) -> Any:
    """Return the JSON of a metadata value; None also for a value that is not text."""
    text = container.metadata.get(key)
    try:
        return strict_json.loads(text) if isinstance(text, str) else None
    except ValueError as error:
        raise FormatError(f"metadata value {key!r} is not JSON: {error}") from None
