"""Several packs as one, as llama.cpp adds up several `--control-vector` files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pysteer.errors import ModelMismatchError, SteeringError, quoted
from pysteer.pack.pack import BaseModel, SteeringPack

PackSource: TypeAlias = "SteeringPack | str | os.PathLike[str]"
"""A pack, a pack file, or a plain llama.cpp control-vector file."""


def read_packs(packs: Sequence[PackSource]) -> SteeringPack:
    """Return the categories of several packs as one pack.

    All packs that name a base model must name the same. Of several typical norms for a layer, the
    smallest holds. A router decides about its own categories; a policy holds for the categories
    of all packs.

    Args:
        packs: packs, pack files, and plain control-vector files, whose category is the file's
            stem.

    Raises:
        FormatError: a file is not a pack.
        ModelMismatchError: packs for different models.
        SteeringError: no packs, a category that two packs have, two routers, or two policies.

    Examples:
        >>> import numpy as np
        >>> from pysteer import SteeringVector
        >>> for name in ("calm", "formal"):
        ...     SteeringVector({8: np.ones(4)}).save(f"{name}.gguf")
        >>> list(read_packs(["calm.gguf", "formal.gguf"]).categories)
        ['calm', 'formal']
    """
    if not packs:
        raise SteeringError("the list of packs is empty; give at least one pack")
    read: list[tuple[str, SteeringPack]] = []
    for number, source in enumerate(packs, 1):
        if isinstance(source, SteeringPack):
            read.append((f"pack {number}", source))
        elif isinstance(source, (str, os.PathLike)):
            read.append((str(source), SteeringPack.load(source)))
        else:
            raise SteeringError(f"{quoted(source)} is neither a pack nor the path of a file")
    if len(read) == 1:
        return read[0][1]
    return SteeringPack(
        _categories(read),
        base_model=_base_model(read),
        residual_norm=_residual_norm([pack for _, pack in read]),
        provenance={
            "method": "merged",
            "packs": [
                {"categories": list(pack.categories), "provenance": pack.provenance}
                for _, pack in read
            ],
        },
        router=_only(read, "router"),
        policy=_only(read, "policy"),
    )


def _categories(packs: Sequence[tuple[str, SteeringPack]]) -> dict[str, Any]:
    owners: dict[str, str] = {}
    found = {}
    for name, pack in packs:
        for category, vector in pack.categories.items():
            if category in owners:
                raise SteeringError(
                    f"category {quoted(category)} is in {owners[category]} and in {name}; give one "
                    "of the two, or rename a control-vector file, whose name is its category"
                )
            owners[category] = name
            found[category] = vector
    return found


def _base_model(packs: Sequence[tuple[str, SteeringPack]]) -> BaseModel | None:
    known = [(name, pack.base_model) for name, pack in packs if pack.base_model is not None]
    if not known:
        return None
    first, model = known[0]
    for name, other in known[1:]:
        if difference := model.difference(other):
            what, ours, theirs = difference
            raise ModelMismatchError(
                f"{first} was made for a model with {what} {ours}, {name} for one with {what} "
                f"{theirs}; give packs of one model"
            )
    return model


def _residual_norm(packs: Sequence[SteeringPack]) -> Mapping[int, float]:
    norms: dict[int, float] = {}
    for pack in packs:
        for layer, norm in pack.residual_norm.items():
            norms[layer] = min(norm, norms.get(layer, norm))
    return norms


def _only(packs: Sequence[tuple[str, SteeringPack]], what: str) -> Any:
    """Return the router or the policy of the one pack that has it, or None."""
    having = [(name, pack) for name, pack in packs if getattr(pack, what) is not None]
    if len(having) > 1:
        raise SteeringError(
            f"{' and '.join(name for name, _ in having)} each have a {what}, and one {what} "
            "decides; give one of these packs"
        )
    return getattr(having[0][1], what) if having else None
