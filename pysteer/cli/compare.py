"""`pysteer compare`: cosine and ratio of norms between two packs or control-vector files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pysteer.cli import console, options
from pysteer.cli.settings_options import with_options


@with_options()
def compare(
    first: Annotated[Path, typer.Argument(help="Pack, or llama.cpp control vector.")],
    second: Annotated[Path, typer.Argument(help="Pack or control vector to compare with.")],
    json: options.Json = False,
) -> None:
    """Compare two packs or control-vector files.

    The report has the cosine and the ratio of norms by category and layer. Categories are matched
    by name; two files with one category each are matched under any names.
    """
    from pysteer.cli.reports.compare import describe, print_comparison
    from pysteer.inspect import compare as comparing
    from pysteer.pack.pack import SteeringPack

    comparison = comparing.compare(SteeringPack.load(first), SteeringPack.load(second))
    if json:
        console.print_json({"first": str(first), "second": str(second), **describe(comparison)})
    else:
        print_comparison(first, second, comparison)
