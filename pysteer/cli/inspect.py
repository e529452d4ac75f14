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
    json: options.Json = False,
) -> None:
    """Show the content of a pack or control-vector file."""
    from pysteer.cli.reports.inspect import describe, print_pack
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
    print_pack(file, pack, data)
    if plot is not None:
        console.say(f"plot: {console.plain(str(plot))}")
