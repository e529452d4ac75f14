"""`pysteer doctor`: trials of steering on this machine and model."""

from __future__ import annotations

import json as json_
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pysteer.cli import console, options
from pysteer.cli.bars import bars
from pysteer.cli.settings_options import with_options
from pysteer.files import begins_with, check_replaceable, write_text

if TYPE_CHECKING:
    from pysteer.runtime.doctor import Diagnosis

_VERDICTS = {True: "[green]ok[/]", False: "[red]FAILED[/]"}
_FORMAT = "pysteer.doctor/1"


@with_options()
def doctor(
    model: options.Model = None,
    threads: options.Threads = None,
    gpu_layers: options.GpuLayers = 0,
    rpc: options.Rpc = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all findings (JSON) to attach to a bug report."),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Check that steering works on this machine and model.

    The model is steered with a known vector, by llama.cpp and by each injection of pysteer, and the
    logits are compared. On each device, every operator is compared with its formula. Exit code 1 if
    a comparison fails.
    """
    from pysteer.runtime.doctor import diagnose

    path = options.model_path(model)
    is_ours = None if force else begins_with(f'{{"format": "{_FORMAT}"'.encode())
    if report is not None:
        check_replaceable(report, is_ours)
    with bars() as progress:
        diagnosis = diagnose(
            path,
            n_threads=threads,
            n_gpu_layers=gpu_layers,
            rpc_servers=rpc or (),
            progress=progress,
        )
    if report is not None:
        content = {"format": _FORMAT, "ok": diagnosis.ok, **asdict(diagnosis)}
        write_text(report, json_.dumps(content) + "\n", is_ours)
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
    for line in [*diagnosis.notes, *diagnosis.hardware]:
        print_(console.plain(line))
    for site, layers in diagnosis.sites.items():
        print_(f"site {site}: {_range(layers)}")
    for device in diagnosis.devices:
        held = sorted({layer for found in device.layers.values() for layer in found})
        reach = "changed in place" if device.on_host else "copied to the host"
        print_(f"memory {console.plain(device.name)}: {_range(held)}, {reach}")
    table = Table("check", "verdict", "largest difference in logits", "")
    for check in diagnosis.checks:
        value = "" if check.value is None else f"{check.value:g}"
        table.add_row(check.name, _VERDICTS[check.ok], value, console.plain(check.detail))
    console.out.print(table)
    _print_ways(diagnosis)


def _print_ways(diagnosis: Diagnosis) -> None:
    """Print one line for each way of each device; the report has a line for each operator."""
    from rich.table import Table

    table = Table("memory", "way", "operators", "verdict", "largest error", "because")
    rows: dict[tuple[str, str, str], list[tuple[str, bool, float]]] = {}
    for way in diagnosis.ways:
        key = (way.device, way.way or "none", way.reason)
        name = f"{way.operator} ({way.site})"
        rows.setdefault(key, []).append((name, way.ok, way.error or 0.0))
    for (device, taken, reason), found in rows.items():
        error = max(value for _, _, value in found)
        names = ", ".join(dict.fromkeys(name for name, ok, _ in found if not ok)) or f"{len(found)}"
        ok = all(ok for _, ok, _ in found)
        row = (console.plain(device), taken, console.plain(names), _VERDICTS[ok], f"{error:.1g}")
        table.add_row(*row, console.plain(reason))
    console.out.print(table)
    for cost in diagnosis.costs:
        console.say(
            f"{console.plain(cost.device)}, {cost.steering} at all layers: "
            f"{cost.milliseconds:.2f} ms a token, {cost.ratio:.2f} of unsteered"
        )


def _range(layers: Sequence[int]) -> str:
    return f"layers {layers[0]} to {layers[-1]} ({len(layers)})" if layers else "not found"
