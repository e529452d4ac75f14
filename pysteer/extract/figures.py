"""What is said about a pack: how well its directions separate, and where it came from."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pysteer.extract.session import Run, slices
from pysteer.pack.vector import SteeringVector
from pysteer.prompts import Prompt


def separation(run: Run, vectors: Mapping[str, SteeringVector]) -> dict[str, dict[str, float]]:
    """AUC of held-out prompts' projections: in what share of pairs the safe prompt is ahead."""
    from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]

    # Over the prompt, where a response is not there to be averaged.
    pooling = run.settings.pooling
    if pooling == "response" or run.settings.on_answers:
        pooling = "user"
    sides = [run.sides.held_out_unsafe, run.sides.held_out_safe]
    prompts = [p for side in sides for group in side.values() for p in group]
    if not prompts:
        return {}
    activations = run.activations(run.rows(prompts, pooling), run.settings.site, run.layers)
    parts = slices(sides)
    auc: dict[str, dict[str, float]] = {}
    for name, vector in vectors.items():
        unsafe = activations[parts[0][name]]
        safe_name = name if run.sides.matched else ""
        safe = activations[parts[1][safe_name]] if safe_name in parts[1] else unsafe[:0]
        if not len(unsafe) or not len(safe):
            continue
        labels = np.repeat([0, 1], [len(unsafe), len(safe)])
        auc[name] = {}
        for i, layer in enumerate(run.layers):
            both = np.concatenate([unsafe[:, i], safe[:, i]]).astype(np.float64)
            auc[name][str(layer)] = float(roc_auc_score(labels, both @ vector.direction(layer)))
    return auc


def provenance(run: Run) -> dict[str, Any]:
    """What the pack keeps of the extraction, as JSON data."""
    return {
        "method": run.settings.method,
        "settings": run.settings.content(),
        "layers": list(run.layers),
        "data": {
            name: {"prompts": len(prompts), "sha256": _digest(prompts)}
            for name, prompts in vars(run.data).items()
            if prompts
        },
        "counts": {
            name: {"used": len(prompts), "held_out": len(run.sides.held_out_unsafe[name])}
            for name, prompts in run.sides.unsafe.items()
        },
        "safe_data": "matched" if run.sides.matched else "generic",
        "engine": type(run.capture).__name__,
        "weights": run.capture.weights,
        "versions": dict(_versions()),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        **run.figures,
    }


def _digest(prompts: Sequence[Prompt]) -> str:
    sha = hashlib.sha256()
    for p in prompts:
        sha.update(repr((p.prompt, p.category, p.response, p.pair_id, p.label)).encode())
    return sha.hexdigest()


def _versions() -> Iterator[tuple[str, str]]:
    for name in ("pysteer", "llama-cpp-python", "torch", "transformers", "scikit-learn"):
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
