"""`pysteer inspect`: the content of a pack or control-vector file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pysteer.cli import console, options
from pysteer.cli.settings_options import with_options
from pysteer.shipped import default_pack_path


@with_options()
def inspect(
    file: Annotated[
        Path | None,
        typer.Argument(help="Pack, or llama.cpp control vector; by default the shipped pack."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Picture to draw (.png, .svg, .pdf); needs matplotlib."),
    ] = None,
    force: options.Force = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print every table, and the whole provenance.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Show the content of a pack or control-vector file.

    --verbose adds the figures of each layer, the cosines, all gates, the router's confusion, and
    the provenance.
    """
    from pysteer.cli.reports.inspect import describe
    from pysteer.cli.reports.pack import print_pack, print_summary
    from pysteer.pack.pack import SteeringPack

    file = file or default_pack_path()
    pack = SteeringPack.load(file)
    data = describe(pack)
    if plot is not None:
        from pysteer.inspect.plots import plot_pack

        plot_pack(pack, plot, overwrite=force)
    if json:
        console.print_json({"file": str(file), **data})
        return
    if verbose:
        print_pack(file, pack, data)
    else:
        print_summary(file, pack)
    if plot is not None:
        console.say(f"plot: {console.plain(str(plot))}")
