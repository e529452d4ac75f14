"""A pack as JSON data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from statistics import fmean
from typing import Any

from pysteer.inspect.compare import category_cosines, norms, separation
from pysteer.pack.operators import ADD
from pysteer.pack.pack import SteeringPack
from pysteer.pack.router import Gate, Router
from pysteer.pack.vector import SteeringVector


def describe(pack: SteeringPack) -> dict[str, Any]:
    """Return a pack as JSON data: categories, layers, L2 norm of each direction, provenance.

    Some keys are there only if they apply: a category's "operator" (kind and options; absent for
    plain addition) and "rows" per layer; "cosines" (category to each later category to the mean
    over common layers and the layers), "separation" (category to layer to AUC), "router", "policy"
    (as in a policy file).
    """
    data = {
        "base_model": asdict(pack.base_model) if pack.base_model else None,
        "n_embd": pack.n_embd,
        "categories": {
            name: {
                "site": vector.site,
                "layers": list(vector.layers),
                "norms": {str(layer): norm for layer, norm in norms(vector).items()},
            }
            | _describe_operator(vector)
            for name, vector in pack.categories.items()
        },
        "residual_norm": {str(layer): norm for layer, norm in pack.residual_norm.items()},
        "provenance": _plain_data(pack.provenance),
    }
    cosines: dict[str, Any] = {}
    for (name, other), layers in category_cosines(pack).items():
        cosines.setdefault(name, {})[other] = {
            "mean": fmean(layers.values()),
            "layers": {str(layer): value for layer, value in layers.items()},
        }
    separated = {
        name: {str(layer): auc for layer, auc in layers.items()}
        for name, layers in separation(pack).items()
    }
    router = _describe_router(pack.router) if pack.router is not None else None
    policy = {"policy": pack.policy.content()} if pack.policy is not None else {}
    more = {"cosines": cosines, "separation": separated, "router": router}
    return data | {key: value for key, value in more.items() if value} | policy


def _describe_operator(vector: SteeringVector) -> dict[str, Any]:
    if vector.operator == ADD:
        return {}
    operator = {"kind": vector.operator.kind} | vector.operator.content()
    return {"operator": operator, "rows": vector.prepared.shape[1]}


def _describe_router(router: Router) -> dict[str, Any]:
    def rates(gate: Gate) -> dict[str, Any]:
        columns = {part.name: getattr(gate, part.name).tolist() for part in fields(gate)}
        return {
            name: {key: column[i] for key, column in columns.items()}
            for i, name in enumerate(router.categories)
        }

    return {
        "site": router.site,
        "reads": [asdict(read) for read in router.reads],
        "categories": list(router.categories),
        "threshold_rule": router.threshold_rule,
        "category_accuracy": router.category_accuracy,
        "benign_false_positive_rate": router.benign_false_positive_rate,
        "confusion": router.confusion.tolist(),
        "train_counts": router.train_counts.tolist(),
        "gates": {kind: rates(gate) for kind, gate in router.gates.items()},
    }


def _plain_data(value: Any) -> Any:
    """Return read-only nested data as dicts and lists."""
    if isinstance(value, Mapping):
        return {key: _plain_data(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain_data(item) for item in value]
    return value
