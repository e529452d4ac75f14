"""`pysteer compare`: cosine and ratio of norms between two packs or control-vector files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from pysteer.cli import console, options, tables
from pysteer.inspect.compare import CategoryComparison, Comparison
from pysteer.inspect.compare import compare as compare_packs
from pysteer.pack.pack import SteeringPack


def compare(
    first: Annotated[Path, typer.Argument(help="A pack, or a llama.cpp control-vector file.")],
    second: Annotated[Path, typer.Argument(help="What to compare it with.")],
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare two packs or control-vector files, category by category and layer by layer.

    Categories are matched by name; two files with one category each are matched as they are.
    """
    found = compare_packs(SteeringPack.load(first), SteeringPack.load(second))
    if json:
        console.print_json({"first": str(first), "second": str(second), **describe(found)})
        return
    _print(first, second, found)


def describe(found: Comparison) -> dict[str, Any]:
    """A comparison as plain data."""
    return {
        "categories": {
            name: {
                "category_in_second": category.second,
                "site": category.site,
                "layers": {str(layer): asdict(pair) for layer, pair in category.layers.items()},
                "only_in_first": list(category.only_in_first),
                "only_in_second": list(category.only_in_second),
            }
            for name, category in found.categories.items()
        },
        "only_in_first": list(found.only_in_first),
        "only_in_second": list(found.only_in_second),
    }


def _print(first: Path, second: Path, found: Comparison) -> None:
    console.say(f"first: [bold]{console.plain(str(first))}[/]")
    console.say(f"second: [bold]{console.plain(str(second))}[/]")
    short = tables.numbers(list(found.categories))
    summary = tables.table("", "category", "site", "layers", "cosine", "mean", "norm ratio")
    summary.columns[1].no_wrap = True
    for name, category in found.categories.items():
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
    console.out.print(summary)
    if any(len(category.layers) > 1 for category in found.categories.values()):
        for key, title, form in (
            ("cosine", "cosine", ".4f"),
            ("norm_ratio", "norm of the second over norm of the first", ".3g"),
        ):
            values = {name: _values(category, key) for name, category in found.categories.items()}
            tables.say_by_layer(title, short, values, form)
    for which, names in (("first", found.only_in_first), ("second", found.only_in_second)):
        if names:
            console.say(f"only in the {which}: {console.plain(', '.join(names))}")
    for category in found.categories.values():
        for which, layers in (
            ("first", category.only_in_first),
            ("second", category.only_in_second),
        ):
            if layers:
                console.say(
                    f"{console.plain(_title(category))}: layers only in the {which}: "
                    + tables.ranges(layers)
                )


def _title(category: CategoryComparison) -> str:
    same = category.first == category.second
    return category.first if same else f"{category.first} / {category.second}"


def _values(category: CategoryComparison, key: str) -> dict[int, float]:
    values = {layer: getattr(pair, key) for layer, pair in category.layers.items()}
    return {layer: value for layer, value in values.items() if value is not None}
