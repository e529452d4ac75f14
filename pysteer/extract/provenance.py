"""Provenance of a pack: separation of its directions, settings, data and versions."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pysteer.chat.form import form_content
from pysteer.distribution import installed_version
from pysteer.extract.data import Data
from pysteer.extract.inputs import rows_of
from pysteer.extract.methods.base import Task, slices
from pysteer.extract.settings import ExtractSettings
from pysteer.pack.vector import SteeringVector
from pysteer.prompts import Prompt
from pysteer.settings import content


def separation(
    task: Task[Any], vectors: Mapping[str, SteeringVector], *, on_prompts: bool
) -> dict[str, dict[str, float]]:
    """Return the AUC of held-out prompts' projections on the directions.

    The AUC is the share of pairs of an unsafe and a safe prompt with the safe prompt ahead.

    Args:
        task: the extraction.
        vectors: category to vector.
        on_prompts: True: average over the user's message instead of the task's pooling.

    Returns:
        Category to layer to AUC. Categories without held-out prompts on both sides are missing.
    """
    sides = [task.sides.held_out_unsafe, task.sides.held_out_safe]
    prompts = [p for side in sides for group in side.values() for p in group]
    if not prompts:
        return {}
    from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]  # takes seconds

    rows = rows_of(task.reader.capture, prompts, "user" if on_prompts else task.pooling)
    activations = task.reader.activations(rows, task.site, task.layers)
    unsafe_parts, safe_parts = slices(sides)
    auc: dict[str, dict[str, float]] = {}
    for name, vector in vectors.items():
        unsafe = activations[unsafe_parts[name]]
        safe_name = task.sides.safe_key(name)
        safe = activations[safe_parts[safe_name]] if safe_name in safe_parts else unsafe[:0]
        if not len(unsafe) or not len(safe):
            continue
        labels = np.repeat([0, 1], [len(unsafe), len(safe)])
        auc[name] = {}
        for i, layer in enumerate(task.layers):
            both = np.concatenate([unsafe[:, i], safe[:, i]]).astype(np.float64)
            auc[name][str(layer)] = float(roc_auc_score(labels, both @ vector.direction(layer)))
    return auc


def provenance(
    task: Task[Any], data: Data, settings: ExtractSettings, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the pack's record of its extraction, as JSON data."""
    capture, sides = task.reader.capture, task.sides
    return {
        "method": settings.method,
        "settings": content(settings),
        "layers": list(task.layers),
        "data": {
            name: {"prompts": len(prompts), "sha256": _digest(prompts)}
            for name, prompts in vars(data).items()
            if prompts
        },
        "counts": {
            name: {"used": len(prompts), "held_out": len(sides.held_out_unsafe[name])}
            for name, prompts in sides.unsafe.items()
        },
        "safe_data": "matched" if sides.matched else "generic",
        "engine": type(capture).__name__,
        "form": form_content(task.inputs.form),
        "weights": capture.weights,
        "versions": dict(_versions()),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        **figures,
    }


def _digest(prompts: Sequence[Prompt]) -> str:
    sha = hashlib.sha256()
    for p in prompts:
        sha.update(repr((p.prompt, p.category, p.response, p.pair_id, p.label)).encode())
    return sha.hexdigest()


def _versions() -> Iterator[tuple[str, str]]:
    yield "pysteer", installed_version()
    for name in ("llama-cpp-python", "torch", "transformers", "scikit-learn"):
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
