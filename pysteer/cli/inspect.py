"""`pysteer inspect`: what a pack or control-vector file holds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pysteer.cli import console, options
from pysteer.pack import SteeringPack
from pysteer.shipped import demo_pack_path


def inspect(
    file: Annotated[
        Path | None,
        typer.Argument(help="A pack, or a llama.cpp control-vector file; else the shipped pack."),
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what a pack or control-vector file holds."""
    file = file or demo_pack_path()
    pack = SteeringPack.load(file)
    found = describe(pack)
    if json:
        console.print_json({"file": str(file), **found})
        return
    _print(file, pack, found)


def describe(pack: SteeringPack) -> dict[str, Any]:
    """A pack as plain data: categories, layers, L2 norm of each direction, origin."""
    return {
        "base_model": asdict(pack.base_model) if pack.base_model else None,
        "n_embd": pack.n_embd,
        "categories": {
            name: {
                "site": vector.site,
                "layers": list(vector.layers),
                "norms": {
                    str(i): float(np.linalg.norm(row.astype(np.float64)))
                    for i, row in vector.items()
                },
            }
            for name, vector in pack.categories.items()
        },
        "residual_norm": {str(layer): norm for layer, norm in pack.residual_norm.items()},
        "provenance": dict(pack.provenance),
    }


def _print(file: Path, pack: SteeringPack, found: dict[str, Any]) -> None:
    model = pack.base_model
    made_for = (
        f"{model.name or 'unnamed'} ({model.architecture}, {model.n_layer} layers, "
        f"n_embd {model.n_embd}, {model.n_vocab} tokens)"
        if model
        else f"not stated; any model with n_embd {pack.n_embd}"
    )
    console.say(f"[bold]{console.plain(str(file))}[/]")
    console.say(f"base model: {console.plain(made_for)}")
    table = Table(
        "category", "site", "layers", "norm", "of residual", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.columns[0].no_wrap = True
    for name, category in found["categories"].items():
        norms = list(category["norms"].values())
        relative = [
            category["norms"][layer] / typical
            for layer, typical in found["residual_norm"].items()
            if layer in category["norms"] and typical > 0
        ]
        table.add_row(
            console.plain(name),
            category["site"],
            _ranges(category["layers"]),
            _span(norms),
            _span(relative) if relative else "not stated",
        )
    console.out.print(table)
    for key, value in found["provenance"].items():
        console.say(f"{console.plain(key)}: {console.plain(str(value))}")


def _ranges(layers: list[int]) -> str:
    """Write 1, 2, 3, 7 as 1-3, 7."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], layer]
        else:
            parts.append([layer])
    return ", ".join("-".join(str(end) for end in part) for part in parts)


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
