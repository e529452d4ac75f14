"""`pysteer doctor`: trials of steering on this machine and model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pysteer.cli import console, options
from pysteer.cli.bars import bars
from pysteer.cli.settings_options import with_options

if TYPE_CHECKING:
    from pysteer.runtime.doctor import Diagnosis

_VERDICTS = {True: "[green]ok[/]", False: "[red]FAILED[/]", None: "[yellow]not available[/]"}


@with_options()
def doctor(
    model: options.Model = None,
    threads: options.Threads = None,
    gpu_layers: Annotated[int, typer.Option(metavar="N", help="Blocks to offload; -1 is all.")] = 0,
    json: options.Json = False,
) -> None:
    """Check that steering works on this machine and model.

    The model is steered with a known vector, by llama.cpp and by each injection of pysteer, and the
    logits are compared. Exit code 1 if a comparison fails.
    """
    from pysteer.runtime.doctor import diagnose

    path = options.model_path(model)
    with bars() as progress:
        diagnosis = diagnose(path, n_threads=threads, n_gpu_layers=gpu_layers, progress=progress)
    if json:
        console.print_json({"model_path": path, "ok": diagnosis.ok, **asdict(diagnosis)})
    else:
        _print(path, diagnosis)
    if not diagnosis.ok:
        raise typer.Exit(1)


def _print(path: str, diagnosis: Diagnosis) -> None:
    from rich.table import Table

    print_ = console.say
    model = diagnosis.model
    name = console.plain(model.name or path)
    print_(f"model: {name} ({model.architecture}, {model.n_layer} layers, n_embd {model.n_embd})")
    print_(", ".join(f"{name} {value}" for name, value in diagnosis.versions.items()))
    for site, layers in diagnosis.sites.items():
        where = f"layers {layers[0]} to {layers[-1]} ({len(layers)})" if layers else "not found"
        print_(f"site {site}: {where}")
    print_("memory: " + ", ".join(f"{n} sites in {name}" for name, n in diagnosis.memory.items()))
    table = Table("check", "verdict", "largest difference in logits", "")
    for check in diagnosis.checks:
        value = "" if check.value is None else f"{check.value:g}"
        table.add_row(check.name, _VERDICTS[check.ok], value, console.plain(check.detail))
    console.out.print(table)
