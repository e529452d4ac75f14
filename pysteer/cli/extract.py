"""`pysteer extract`: learn a pack from prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pysteer.cli import console, options
from pysteer.cli.capturing import (
    check_output,
    chosen_engine,
    layers_there,
    open_capture,
    parse_layers,
)
from pysteer.cli.loading import require
from pysteer.errors import SteeringError
from pysteer.pack.pack import SteeringPack
from pysteer.prompts import load_prompts


def extract(
    unsafe: Annotated[Path, typer.Option(help="Prompts to steer away from: JSONL or CSV.")],
    safe: Annotated[Path, typer.Option(help="Harmless prompts to hold them against.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The pack to write (GGUF).")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A GGUF file, a model folder, or a hub id."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="mean, pruned, guided, pca, logistic, lda, contrast or learned."),
    ] = "mean",
    variant: Annotated[
        str | None, typer.Option(help="pca: pairwise, centred or difference.")
    ] = None,
    paired: Annotated[bool, typer.Option("--paired", help="pruned: by pair_id.")] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NUMBER", help="Of logistic and learned, such as C=0.1."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Such as 12,15,18 or 5-25 or all; else three in the middle.")
    ] = None,
    site: Annotated[str, typer.Option(help="residual, attention or mlp.")] = "residual",
    pooling: Annotated[
        str,
        typer.Option(help="Tokens averaged: last, prompt, user, response, or a range as 3:10."),
    ] = "user",
    safe_data: Annotated[
        str,
        typer.Option(help="matched (by category), generic, or auto."),
    ] = "auto",
    benign: Annotated[
        Path | None, typer.Option(help="More harmless prompts, for the router alone.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Safe answers for contrast and learned.")
    ] = None,
    judge: Annotated[
        str, typer.Option(help="guided: labels (in the data), or refusal (what is none is unsafe).")
    ] = "labels",
    response_tokens: Annotated[
        int | None, typer.Option(min=1, help="contrast: tokens of the answers averaged; else 8.")
    ] = None,
    mask_massive: Annotated[
        bool, typer.Option(help="Leave out dimensions that dwarf the rest.")
    ] = True,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Keep only the k largest dimensions.")
    ] = None,
    orthogonalise: Annotated[
        str, typer.Option(help="categories (against each other), benign (their mean), or none.")
    ] = "none",
    unit_norm: Annotated[bool, typer.Option("--unit-norm", help="Directions of norm 1.")] = False,
    scale: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Strength 1 adds this fraction of the residual's norm; 0 leaves directions be.",
        ),
    ] = None,
    router: Annotated[bool, typer.Option(help="Fit a router.")] = True,
    gates: Annotated[
        str,
        typer.Option(help="Kinds the router gets: margin, multinomial, probe, centroid, cast."),
    ] = "margin",
    false_positive_rate: Annotated[
        float | None,
        typer.Option(help="Router thresholds that let through so many benign prompts."),
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of prompts kept for the figures reported.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="The same seed gives the same pack.")] = 0,
    engine: Annotated[
        str,
        typer.Option(help="torch or llama; auto is llama for GGUF files, torch for others."),
    ] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="torch: float32, bfloat16 or float16; else the processor's fastest."),
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="torch: as transformers takes it, such as auto.")
    ] = None,
    context: Annotated[int, typer.Option(min=16, max=1 << 22, help="llama: tokens.")] = 2048,
    cache: Annotated[
        Path | None, typer.Option(help="Where activations are kept; else beside the output.")
    ] = None,
    threads: options.Threads = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Learn steering vectors and a router from unsafe and harmless prompts.

    Interrupted with Ctrl-C, the same command goes on where it stopped.
    """
    source = options.model_source(model)
    engine = chosen_engine(source, engine, [method], dtype, device_map)
    require("sklearn", "extract" if engine == "torch" else "extract-gguf")
    from pysteer.evaluate.judges import RefusalJudge
    from pysteer.extract.cache import clear
    from pysteer.extract.data import Data
    from pysteer.extract.extraction import extract as run_extraction
    from pysteer.extract.settings import ExtractSettings

    console.show_warnings()
    started = time.monotonic()
    data = Data(
        load_prompts(unsafe),
        load_prompts(safe),
        [] if benign is None else load_prompts(benign),
        [] if answers is None else load_prompts(answers, answers=True),
    )
    wanted: dict[str, Any] = {
        **({"variant": variant} if variant is not None else {}),
        **({"paired": True} if paired else {}),
        **({"response_tokens": response_tokens} if response_tokens is not None else {}),
        **dict(map(_numeric_option, option or ())),
    }
    settings = ExtractSettings(
        method=method,
        options=wanted,
        site=site,
        pooling=_pooling(pooling),
        matched=_choice("safe-data", safe_data, {"auto": None, "matched": True, "generic": False}),
        mask_massive=ExtractSettings.mask_massive if mask_massive else None,
        top_k=top_k,
        orthogonalise="" if orthogonalise == "none" else orthogonalise,
        unit_norm=unit_norm,
        scale=scale,
        router=router,
        gates=tuple(kind.strip() for kind in gates.split(",")),
        false_positive_rate=false_positive_rate,
        held_out=held_out,
        seed=seed,
        layers=None,
    )
    judged = _choice("judge", judge, {"labels": None, "refusal": RefusalJudge()})
    chosen = None if layers is None else parse_layers(layers)
    check_output(output, (Path(source), unsafe, safe, benign, answers))
    folder = cache or output.with_name(f"{output.name}.cache")
    capture = open_capture(source, engine, dtype, device_map, context, threads)
    settings = replace(settings, layers=layers_there(chosen, site, capture))
    try:
        with _reporter() as reporter:
            pack = run_extraction(
                capture, data, settings, cache=folder, judge=judged, progress=reporter
            )
    except BaseException as error:
        kept = f"what was computed is kept in {folder}"
        if folder.is_dir() and isinstance(error, SteeringError):
            raise SteeringError(f"{error} ({kept})") from None
        if folder.is_dir():
            say_kept = f"{console.plain(kept)}; the same command goes on from there"
            console.err.print(say_kept, soft_wrap=True)
        raise
    pack.save(output)
    if cache is None:
        clear(folder)
    seconds = time.monotonic() - started
    if json:
        console.print_json(_report(pack, output, seconds))
    else:
        _print(pack, output, seconds)


def _choice(option: str, value: str, known: dict[str, Any]) -> Any:
    if value not in known:
        raise SteeringError(f"--{option} {value}: use one of {', '.join(known)}")
    return known[value]


def _numeric_option(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    for kind in (int, float):
        with suppress(ValueError):
            return name, kind(number)
    raise SteeringError(f"--option {text}: write NAME=NUMBER, as in kl_weight=2")


def _pooling(text: str) -> Any:
    start, colon, stop = text.partition(":")
    if not colon:
        return text
    if not (start.isdecimal() and stop.isdecimal()) or int(start) >= int(stop):
        raise SteeringError(f"--pooling {text}: a range is START:STOP, as in 3:10")
    return int(start), int(stop)


class _Rate(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f} {task.fields['unit']}/s")


class _Bars:
    """A bar for each stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def start(self, stage: str, total: int, unit: str = "") -> Callable[[int], None]:
        task = self._progress.add_task(stage, total=total, unit=unit)
        return lambda units: self._progress.advance(task, units)


@contextmanager
def _reporter() -> Iterator[_Bars]:
    columns = (TextColumn("{task.description}"), BarColumn(), _Rate(), TimeRemainingColumn())
    with console.progress(*columns) as progress:
        yield _Bars(progress)


def _report(pack: SteeringPack, output: Path, seconds: float) -> dict[str, Any]:
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
        }
    return report


def _print(pack: SteeringPack, output: Path, seconds: float) -> None:
    table = Table("category")
    for heading in ("prompts", "held out", "AUC, worst to best layer"):
        table.add_column(heading, justify="right")
    counts: Any = pack.provenance["counts"]
    separation: Any = pack.provenance["separation"]
    for name in pack.categories:
        found = sorted(separation.get(name, {}).values())
        table.add_row(
            console.plain(name),
            str(counts[name]["used"]),
            str(counts[name]["held_out"]),
            f"{found[0]:.2f} to {found[-1]:.2f}" if found else "",
        )
    console.out.print(table)
    if pack.router is not None:
        console.say(
            f"router, held out: category accuracy "
            f"{pack.router.category_accuracy:.2f}, benign false positives "
            f"{pack.router.benign_false_positive_rate:.3f}"
        )
    console.say(f"wrote {console.plain(output)} in {seconds:.0f} s; pysteer inspect shows it")
