"""Printed report of a comparison."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from pysteer.cli import console, tables
from pysteer.inspect.compare import CategoryComparison, Comparison


def describe(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON data."""
    return {
        "categories": {
            name: {
                "category_in_second": category.second,
                "site": category.site,
                "layers": {str(layer): asdict(pair) for layer, pair in category.layers.items()},
                "only_in_first": list(category.only_in_first),
                "only_in_second": list(category.only_in_second),
            }
            for name, category in comparison.categories.items()
        },
        "only_in_first": list(comparison.only_in_first),
        "only_in_second": list(comparison.only_in_second),
    }


def print_comparison(first: Path, second: Path, comparison: Comparison) -> None:
    """Print a comparison of two files as tables."""
    console.say(f"first: [bold]{console.plain(str(first))}[/]")
    console.say(f"second: [bold]{console.plain(str(second))}[/]")
    short = tables.numbers(list(comparison.categories))
    summary = tables.table("", "category", "site", "layers", "cosine", "mean", "norm ratio")
    summary.columns[1].no_wrap = True
    for name, category in comparison.categories.items():
        cosines, ratios = _values(category, "cosine"), _values(category, "norm_ratio")
        summary.add_row(
            short[name],
            console.plain(_title(category)),
            category.site,
            tables.ranges(list(category.layers)) or "none in common",
            tables.span(list(cosines.values()), ".4f") if cosines else "",
            format(fmean(cosines.values()), ".4f") if cosines else "",
            tables.span(list(ratios.values())) if ratios else "",
        )
    tables.say(summary, names=2)
    if any(len(category.layers) > 1 for category in comparison.categories.values()):
        for key, title, form in (
            ("cosine", "cosine", ".4f"),
            ("norm_ratio", "norm of the second over norm of the first", ".3g"),
        ):
            shared = comparison.categories.items()
            values = {name: _values(category, key) for name, category in shared}
            tables.say_by_layer(title, short, values, form)
    for file, names in (("first", comparison.only_in_first), ("second", comparison.only_in_second)):
        if names:
            console.say(f"only in the {file}: {console.plain(', '.join(names))}")
    for category in comparison.categories.values():
        for file, layers in (
            ("first", category.only_in_first),
            ("second", category.only_in_second),
        ):
            if layers:
                console.say(
                    f"{console.plain(_title(category))}: layers only in the {file}: "
                    + tables.ranges(layers)
                )


def _title(category: CategoryComparison) -> str:
    same = category.first == category.second
    return category.first if same else f"{category.first} / {category.second}"


def _values(category: CategoryComparison, key: str) -> dict[int, float]:
    values = {layer: getattr(pair, key) for layer, pair in category.layers.items()}
    return {layer: value for layer, value in values.items() if value is not None}
