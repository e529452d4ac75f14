"""Comparison of directions: between two packs, and between the categories of a pack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from pysteer.errors import SteeringError, quoted
from pysteer.pack.pack import SteeringPack
from pysteer.pack.vector import SteeringVector


@dataclass(frozen=True)
class LayerComparison:
    """Comparison of two directions of a layer, a of the first pack and b of the second.

    Attributes:
        cosine: a . b / (|a| |b|), from -1 to 1; None if a or b is 0.
        norm_ratio: |b| / |a|, L2 norms; None if a is 0.
    """

    cosine: float | None
    norm_ratio: float | None


@dataclass(frozen=True)
class CategoryComparison:
    """Comparison of a category in two packs.

    Attributes:
        first: name in the first pack.
        second: name in the second pack.
        site: site in both packs.
        layers: common layers, ascending.
        only_in_first: layers of the first pack only.
        only_in_second: layers of the second pack only.
    """

    first: str
    second: str
    site: str
    layers: Mapping[int, LayerComparison]
    only_in_first: tuple[int, ...]
    only_in_second: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """Comparison of two packs.

    Attributes:
        categories: common categories, by their name in the first pack.
        only_in_first: categories of the first pack only.
        only_in_second: categories of the second pack only.
    """

    categories: Mapping[str, CategoryComparison]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]


def compare(first: SteeringPack, second: SteeringPack) -> Comparison:
    """Compare two packs, category by category and layer by layer.

    Categories are matched by name. Two packs with one category each are matched under any names.

    Raises:
        SteeringError: the widths differ, a category is at different sites or has several rows per
            layer (the operators `rotate` and `low_rank`), or the packs have no layer of any
            category in common.

    Examples:
        >>> from pysteer import SteeringVector
        >>> first = SteeringPack({"a": SteeringVector({1: [1.0, 0.0]})})
        >>> second = SteeringPack({"a": SteeringVector({1: [0.0, 2.0]})})
        >>> compare(first, second).categories["a"].layers[1]
        LayerComparison(cosine=0.0, norm_ratio=2.0)
    """
    if first.n_embd != second.n_embd:
        raise SteeringError(
            f"the first pack has directions of width {first.n_embd}, the second of width "
            f"{second.n_embd}; compare packs of the same model"
        )
    if len(first.categories) == len(second.categories) == 1:
        names = {next(iter(first.categories)): next(iter(second.categories))}
    else:
        names = {name: name for name in first.categories if name in second.categories}
    if not names:
        raise SteeringError(
            f"no category in common: the first pack has {_list(first.categories)}, "
            f"the second {_list(second.categories)}"
        )
    categories = {name: _category(first, name, second, other) for name, other in names.items()}
    if not any(category.layers for category in categories.values()):
        raise SteeringError("the common categories have no layer in common")
    return Comparison(
        categories,
        tuple(name for name in first.categories if name not in names),
        tuple(name for name in second.categories if name not in names.values()),
    )


def cosine(a: npt.ArrayLike, b: npt.ArrayLike) -> float | None:
    """Return a . b / (|a| |b|) in float64, from -1 to 1; None if a or b is 0.

    Args:
        a: shape (n_embd,), any real dtype.
        b: shape (n_embd,), any real dtype.
    """
    left, right = np.asarray(a, np.float64), np.asarray(b, np.float64)
    lengths = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(np.clip(left @ right / lengths, -1, 1)) if lengths > 0 else None


def norms(vector: SteeringVector) -> dict[int, float]:
    """Return the L2 norm of each layer's direction, in the units of the model's activations.

    A layer with several rows (the operators `rotate` and `low_rank`) has the norm of all rows
    together.
    """
    return {layer: float(np.linalg.norm(row.astype(np.float64))) for layer, row in vector.items()}


def category_cosines(pack: SteeringPack) -> dict[tuple[str, str], dict[int, float]]:
    """Return the cosine between the directions of each two categories, by layer.

    Args:
        pack: any pack.

    Returns:
        Layer to cosine for each two categories, in the order of the pack. Only layers of both
        categories count, and only directions other than 0. A pair is left out if no layer is left,
        the sites differ, or a category has several rows per layer (the operators `rotate` and
        `low_rank`).
    """
    cosines = {}
    for (name, vector), (other_name, other) in combinations(pack.categories.items(), 2):
        if vector.site != other.site or not (
            _is_one_direction(vector) and _is_one_direction(other)
        ):
            continue
        values = {
            layer: cosine(row, other.direction(layer))
            for layer, row in vector.items()
            if layer in other.layers
        }
        layers = {layer: value for layer, value in values.items() if value is not None}
        if layers:
            cosines[name, other_name] = layers
    return cosines


def separation(pack: SteeringPack) -> dict[str, dict[int, float]]:
    """Return the held-out separation in a pack's provenance.

    The separation of a direction is the area under the ROC curve of projections on the direction,
    of held-out unsafe prompts against safe prompts.

    Args:
        pack: any pack.

    Returns:
        Category to layer to area, from 0 to 1; 1 is perfect, 0.5 is chance. Empty if the provenance
        has no separation of that shape.
    """
    stored = pack.provenance.get("separation")
    if not isinstance(stored, Mapping):
        return {}
    separations = {}
    for category, by_layer in stored.items():
        if category not in pack.categories or not isinstance(by_layer, Mapping):
            return {}
        if not all(_is_layer(layer) and _is_share(auc) for layer, auc in by_layer.items()):
            return {}
        if by_layer:
            ascending = sorted(by_layer.items(), key=lambda item: int(item[0]))
            separations[category] = {int(layer): float(auc) for layer, auc in ascending}
    return separations


def _category(
    first: SteeringPack, name: str, second: SteeringPack, other_name: str
) -> CategoryComparison:
    one, two = first[name], second[other_name]
    if one.site != two.site:
        raise SteeringError(
            f"category {quoted(name)} steers the site {one.site} in the first pack and {two.site} "
            "in the second; directions of different sites cannot be compared"
        )
    for vector, pack, category in ((one, "first", name), (two, "second", other_name)):
        if not _is_one_direction(vector):
            raise SteeringError(
                f"category {quoted(category)} of the {pack} pack has the operator "
                f"{vector.operator.kind} with several rows per layer, which cannot be compared"
            )
    layers = {}
    for layer in one.layers:
        if layer in two.layers:
            a, b = one.direction(layer), two.direction(layer)
            length = float(np.linalg.norm(a.astype(np.float64)))
            ratio = float(np.linalg.norm(b.astype(np.float64))) / length if length > 0 else None
            layers[layer] = LayerComparison(cosine(a, b), ratio)
    return CategoryComparison(
        name,
        other_name,
        one.site,
        layers,
        tuple(layer for layer in one.layers if layer not in two.layers),
        tuple(layer for layer in two.layers if layer not in one.layers),
    )


def _is_one_direction(vector: SteeringVector) -> bool:
    return vector.operator.rows_per_layer == 1


def _is_layer(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 6


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _list(names: Mapping[str, Any]) -> str:
    return quoted(", ".join(names))
