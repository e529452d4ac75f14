"""Printed report of an extraction."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.table import Table

from pysteer.cli import console
from pysteer.pack.pack import SteeringPack

_FIGURES = {
    "caught": "a gate opens for unsafe prompts:",
    "category": "the category of unsafe prompts is found:",
    "safe": "a gate opens for safe prompts:",
    "everyday": "a gate opens for everyday prompts:",
}


def describe(pack: SteeringPack, output: Path, seconds: float) -> dict[str, Any]:
    """Return an extraction's result as JSON data."""
    report: dict[str, Any] = {
        "pack": str(output),
        "seconds": seconds,
        "provenance": dict(pack.provenance),
        "router": None,
    }
    if pack.router is not None:
        report["router"] = {
            "layers": [read.layer for read in pack.router.reads],
            "gates": list(pack.router.gates),
            "category_accuracy": pack.router.category_accuracy,
            "benign_false_positive_rate": pack.router.benign_false_positive_rate,
            "held_out": pack.provenance["router"],
        }
    return report


def print_pack(pack: SteeringPack, output: Path, seconds: float) -> None:
    """Print the held-out figures of a pack that was written to `output`."""
    table = Table("category")
    for heading in ("prompts", "held out", "AUC, worst to best layer"):
        table.add_column(heading, justify="right")
    counts: Any = pack.provenance["counts"]
    separation: Any = pack.provenance["separation"]
    for name in pack.categories:
        auc = sorted(separation.get(name, {}).values())
        table.add_row(
            console.plain(name),
            str(counts[name]["used"]),
            str(counts[name]["held_out"]),
            f"{auc[0]:.2f} to {auc[-1]:.2f}" if auc else "",
        )
    console.out.print(table)
    if pack.router is not None:
        print_router(pack.provenance["router"])
    command = shlex.join(["pysteer", "inspect", str(output)])
    console.say(
        f"wrote {console.plain(output)} in {seconds:.0f} s; see it with {console.plain(command)}"
    )


def print_router(shares: Any) -> None:
    """Print the held-out figures of a router, each with its 95% interval.

    Args:
        shares: as `pysteer.extract.routers.prompts.FittedToPrompts` has them.
    """
    console.say("router, on held-out prompts (95% interval):")
    for name, text in _FIGURES.items():
        if name in shares:
            k, n, low, high = (shares[name][key] for key in ("k", "n", "low", "high"))
            console.say(f"  {text} {k} of {n} ({100 * low:.0f}-{100 * high:.0f}%)")
    if "everyday" not in shares:
        console.say("  nothing is known of everyday prompts; name some with --benign")
