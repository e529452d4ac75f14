"""`pysteer calibrate`: search for the best steering of each category."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pysteer.calibrate.settings import CalibrateSettings
from pysteer.cli import console, options
from pysteer.cli.bars import bars
from pysteer.cli.capturing import (
    CaptureOptions,
    check_output,
    choose_engine,
    choose_threads,
    layers_of,
    let_waiting_threads_sleep,
    open_capture,
    parse_layers,
    quiet_bars,
)
from pysteer.cli.loading import require
from pysteer.cli.settings_options import with_options
from pysteer.cli.spellings import INTERVAL, Spelling, items
from pysteer.files import check_replaceable
from pysteer.prompts import load_prompts, write_prompts

if TYPE_CHECKING:
    from pysteer.calibrate.split import PromptSet

_TEST_FILES = {kind: f"test_{kind}.jsonl" for kind in ("unsafe", "safe", "benign")}


@dataclass(frozen=True)
class Files:
    """Files of a calibration."""

    unsafe: options.UnsafePrompts
    benign: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Everyday prompts, which steering should not touch."),
    ]
    output: options.PackOutput
    safe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Harmless twins of the unsafe prompts, by pair_id."),
    ] = None
    answers: options.SafeAnswers = None
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Folder of finished steps; by default beside the output."
        ),
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Picture of the trade-off to draw (.png, .svg, .pdf)."),
    ] = None

    @property
    def inputs(self) -> tuple[Path | None, ...]:
        """The files that the command reads."""
        return self.unsafe, self.safe, self.benign, self.answers

    def prompts(self) -> PromptSet:
        """Read the prompts."""
        from pysteer.calibrate.split import PromptSet

        return PromptSet(
            load_prompts(self.unsafe),
            [] if self.safe is None else load_prompts(self.safe),
            load_prompts(self.benign),
        )


_LLAMA = options.Llama()


@with_options(
    leave_out=("layers", "validation", "test", "limit", "others"),
    held_out=Spelling(("--hold-out",)),
    methods=items("learned,contrast"),
    scopes=items("all; first 4", separator=";", metavar="A; B; ..."),
    strengths=INTERVAL,
)
def calibrate(
    files: Files,
    settings: CalibrateSettings,
    model: options.Model = None,
    engine: options.Engine = "auto",
    layers: options.Layers = None,
    judge: options.Judge = "refusal",
    llama: options.Llama = _LLAMA,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Search for the best steering of each category.

    Methods, layers, strengths and scopes are tried within the limits. Part of the prompts measures
    the trials; another part is never seen, and written beside the cache, for pysteer evaluate.
    Ctrl-C ends the search with the best so far.
    """
    quiet_bars()
    started = time.monotonic()
    for module in ("optuna", "sklearn", "scipy", "jinja2"):
        require(module, "calibrate")
    let_waiting_threads_sleep()
    from pysteer.calibrate.calibration import calibrate as run_calibration
    from pysteer.calibrate.picture import plot_search
    from pysteer.cli.reports import calibrate as reports
    from pysteer.evaluate.judges import open_judge
    from pysteer.extract.threads import limited_threads
    from pysteer.inspect.plots import open_figure

    console.show_warnings()
    path = options.model_path(model)
    capture_options = CaptureOptions(path, engine, context=settings.context, **vars(llama))
    chosen = choose_engine(capture_options, path, settings.methods)
    prompts = files.prompts()
    answers = [] if files.answers is None else load_prompts(files.answers, answers=True)
    layer_ranges = None if layers is None else parse_layers(layers)
    if files.plot is not None:
        open_figure(files.plot, overwrite=force)  # refuses the file now, not after the search
    check_output(files.output, (Path(path), *files.inputs), force=force)
    folder = files.cache or files.output.with_name(f"{files.output.name}.calibration")
    _check_folder(folder, force=force)
    n_threads = choose_threads(llama.threads)
    capture_options = replace(capture_options, threads=n_threads)
    arguments = options.hardware(n_threads, llama.gpu_layers, llama.rpc)
    with ExitStack() as stack:
        opened = stack.enter_context(closing(open_judge(judge, **arguments)))
        words = opened.words
        capture = open_capture(capture_options, path, chosen)
        stack.enter_context(limited_threads(n_threads))
        if layers is not None:
            settings = replace(settings, layers=layers_of(layer_ranges, "residual", capture))
        stack.enter_context(console.resumable(folder))
        settings = _less(settings, time.monotonic() - started)
        result = run_calibration(
            capture,
            path,
            prompts,
            folder,
            answers=answers,
            settings=settings,
            judge=opened,
            progress=stack.enter_context(bars()),
            on_round=lambda best: reports.print_best(best, settings.max_degenerate, words),
            **{**llama.arguments, **arguments},
        )
    result.pack.save(files.output, overwrite=force)
    test = {kind: folder / _TEST_FILES[kind] for kind, held in vars(result.test).items() if held}
    for kind, file in test.items():
        write_prompts(getattr(result.test, kind), file)
    if files.plot is not None:
        limit = settings.max_degenerate
        plot_search(result.search, limit, files.plot, good=words.good, overwrite=force)
    seconds = time.monotonic() - started
    command = reports.evaluate_command(
        model, files.output, test, settings=settings, judge=judge, llama=llama
    )
    if json:
        console.print_json(reports.describe(result, files.output, test, command, seconds))
    else:
        reports.print_result(result, files.output, test, command, seconds, words)


def _check_folder(folder: Path, *, force: bool) -> None:
    """Refuse a folder with a foreign file in the place of a file of the calibration."""
    from pysteer.formats.gguf import check_target

    for name in _TEST_FILES.values():
        check_replaceable(folder / name, None if force else _in_our_folder)
    for name in ("pack.gguf", "validated.gguf"):
        check_target(folder / name, overwrite=False)


def _less(settings: CalibrateSettings, seconds: float) -> CalibrateSettings:
    """Return settings without the time of loading, a good part of a short calibration."""
    return replace(settings, minutes=max(0.0, settings.minutes - seconds / 60))


def _in_our_folder(path: Path) -> bool:
    return path.with_name("trials.jsonl").exists()
