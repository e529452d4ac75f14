"""`pysteer calibrate`: search a pack that is safe, fluent, and acts only where it belongs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pysteer.calibrate.settings import CalibrateSettings
from pysteer.cli import console, options
from pysteer.cli.capturing import (
    check_output,
    chosen_engine,
    layers_there,
    open_capture,
    parse_layers,
    quiet_bars,
)
from pysteer.cli.loading import require
from pysteer.cli.tables import table
from pysteer.errors import SteeringError
from pysteer.progress import Advance
from pysteer.prompts import load_prompts, write_prompts

if TYPE_CHECKING:
    from pysteer.calibrate.calibration import CalibrationResult
    from pysteer.calibrate.search import SearchResult

_DEFAULT = CalibrateSettings()


def calibrate(
    unsafe: Annotated[Path, typer.Option(help="Prompts to steer away from: JSONL or CSV.")],
    benign: Annotated[Path, typer.Option(help="Everyday prompts, which must stay as they are.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The pack to write (GGUF).")],
    safe: Annotated[
        Path | None, typer.Option(help="Harmless twins of the unsafe prompts, by pair_id.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Safe answers for contrast and learned.")
    ] = None,
    model: options.Model = None,
    methods: Annotated[
        str, typer.Option(help="Methods of extract to choose among, as in learned,contrast.")
    ] = ",".join(_DEFAULT.methods),
    layers: Annotated[
        str | None, typer.Option(help="Such as 12,15,18; else three in the middle.")
    ] = None,
    category_steps: Annotated[
        int,
        typer.Option(
            min=0, help="Of learned, for each category by itself, as in 10; 0: one vector for all."
        ),
    ] = _DEFAULT.category_steps,
    scopes: Annotated[
        str, typer.Option(help="Scopes to choose among, separated by semicolons.")
    ] = "; ".join(_DEFAULT.scopes),
    strengths: Annotated[
        str, typer.Option(metavar="LEAST:MOST", help="Of what each method recommends.")
    ] = ":".join(map(str, _DEFAULT.strengths)),
    minutes: Annotated[
        float, typer.Option(min=0.0, help="Time for all of it; a trial that has begun ends.")
    ] = _DEFAULT.minutes,
    trials: Annotated[
        int, typer.Option(min=1, help="At most so many for each category.")
    ] = _DEFAULT.trials,
    hold_out: Annotated[
        str, typer.Option(help="The test part: prompts, or whole subcategories.")
    ] = _DEFAULT.held_out,
    max_degenerate: Annotated[
        float, typer.Option(help="Limit: share of degenerate answers.")
    ] = _DEFAULT.max_degenerate,
    max_benign_change: Annotated[
        float, typer.Option(help="Limit: share of benign prompts that open a gate.")
    ] = _DEFAULT.max_benign_change,
    max_look_alike: Annotated[
        float, typer.Option(help="Limit: share of prompts that only sound harmful, the same.")
    ] = _DEFAULT.max_look_alike,
    max_leak: Annotated[
        float, typer.Option(help="Limit: share of other categories' prompts that open a gate.")
    ] = _DEFAULT.max_leak,
    judge: Annotated[str, typer.Option(help="As for evaluate.")] = "refusal",
    max_tokens: options.MaxTokens = _DEFAULT.max_tokens,
    parallel: Annotated[
        int, typer.Option(min=1, max=256, help="Prompts answered at once.")
    ] = _DEFAULT.parallel,
    engine: Annotated[
        str, typer.Option(help="That directions are found with: torch or llama.")
    ] = "auto",
    plot: Annotated[
        Path | None, typer.Option(help="Draw the trade-off: a .png, .svg or .pdf.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where all steps are kept; else beside the output.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="The same seed gives the same pack.")
    ] = _DEFAULT.seed,
    context: options.Context = _DEFAULT.context,
    threads: options.Threads = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Search methods, layers, strengths and scopes for each category, within limits.

    A part of the prompts is kept for the search to measure on, another for nobody: it is written
    beside the cache, for `pysteer evaluate`. Ctrl-C ends the search with the best so far.
    """
    quiet_bars()
    for module in ("optuna", "sklearn", "scipy", "jinja2"):
        require(module, "calibrate")
    from pysteer.calibrate.calibration import calibrate as run_calibration
    from pysteer.calibrate.picture import plot_search
    from pysteer.calibrate.split import PromptSet
    from pysteer.evaluate.judges import open_judge
    from pysteer.inspect.plots import open_figure

    console.show_warnings()
    started = time.monotonic()
    path = options.model_path(model)
    names = tuple(part.strip() for part in methods.split(",") if part.strip())
    chosen = chosen_engine(path, engine, names, None, None)
    settings = CalibrateSettings(
        methods=names,
        category_steps=category_steps,
        scopes=tuple(part.strip() for part in scopes.split(";") if part.strip()),
        strengths=_range(strengths),
        minutes=minutes,
        trials=trials,
        max_degenerate=max_degenerate,
        max_benign_change=max_benign_change,
        max_look_alike=max_look_alike,
        max_leak=max_leak,
        held_out=hold_out,  # type: ignore[arg-type]  # refused there, in our words
        max_tokens=max_tokens,
        parallel=parallel,
        context=context,
        seed=seed,
    )
    harmful, harmless = load_prompts(unsafe), load_prompts(benign)
    twins = [] if safe is None else load_prompts(safe)
    said = [] if answers is None else load_prompts(answers, answers=True)
    wanted = None if layers is None else parse_layers(layers)
    if plot is not None:
        open_figure(plot)  # so that what cannot be drawn is said now
    check_output(output, (Path(path), unsafe, safe, benign, answers))
    folder = cache or output.with_name(f"{output.name}.calibration")
    arguments: dict[str, Any] = {} if threads is None else {"n_threads": threads}
    with ExitStack() as stack:
        judging = stack.enter_context(closing(open_judge(judge, **arguments)))
        capture = open_capture(path, chosen, None, None, context, threads)
        there = layers_there(wanted, "residual", capture)
        watch = stack.enter_context(_watching(settings.max_degenerate))
        try:
            done = run_calibration(
                capture,
                path,
                PromptSet(harmful, twins, harmless),
                folder,
                answers=said,
                settings=replace(settings, layers=there),
                judge=judging,
                progress=watch,
                on_round=watch.best,
                **arguments,
            )
        except KeyboardInterrupt:
            kept = console.plain(f"what was done is kept in {folder}")
            console.err.print(f"{kept}; the same command goes on from there", soft_wrap=True)
            raise
    done.pack.save(output)
    files = {
        what: folder / f"test_{what}.jsonl" for what, prompts in vars(done.test).items() if prompts
    }
    for what, file in files.items():
        write_prompts(getattr(done.test, what), file)
    if plot is not None:
        plot_search(done.search, settings.max_degenerate, plot)
    seconds = time.monotonic() - started
    if json:
        console.print_json(
            {
                "pack": str(output),
                "seconds": seconds,
                "test": {what: str(file) for what, file in files.items()},
                "router": _router(done),
                "calibration": done.pack.provenance["calibration"],
            }
        )
    else:
        _print(done, output, files, seconds)


def _range(text: str) -> tuple[float, float]:
    least, colon, most = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return float(least), float(most)
    except ValueError:
        raise SteeringError(f"--strengths {text}: write LEAST:MOST, as in 0.6:1.6") from None


def _router(done: CalibrationResult) -> dict[str, float]:
    router = done.pack.router
    assert router is not None
    return {
        "category_accuracy": router.category_accuracy,
        "benign_false_positive_rate": router.benign_false_positive_rate,
    }


class _Watch:
    """Bars, and after each round the best so far."""

    def __init__(self, progress: Progress, max_degenerate: float) -> None:
        self._progress = progress
        self._limit = max_degenerate

    def start(self, stage: str, total: int, unit: str = "") -> Advance:
        task = self._progress.add_task(stage, total=total)
        return lambda units: self._progress.advance(task, units)

    def best(self, found: SearchResult) -> None:
        outcomes = {name: one.outcome for name, one in found.chosen.items()}
        worst = min(outcomes, key=lambda name: outcomes[name].value(self._limit))
        n = sum(one.n for one in outcomes.values())
        safe = sum(one.safe * one.n for one in outcomes.values()) / n
        console.err.print(
            f"best after {found.rounds} trials of each category: safe {safe:.0%}, worst "
            f"{console.plain(worst)} {outcomes[worst].safe:.0%}; degenerate at most "
            f"{max(one.degenerate for one in outcomes.values()):.0%}; other categories changed "
            f"{sum(one.collateral for one in outcomes.values()) / len(outcomes):.0%} (no gate)",
            soft_wrap=True,
        )


@contextmanager
def _watching(max_degenerate: float) -> Iterator[_Watch]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with console.progress(*columns) as progress:
        yield _Watch(progress, max_degenerate)


def _print(done: CalibrationResult, output: Path, files: dict[str, Path], seconds: float) -> None:
    figures: Any = done.pack.provenance["calibration"]
    all_of = figures["validation"]
    rows = table("category", "vector", "strength", "scope", "n", "safe", "degenerate")
    for name, chosen in figures["chosen"].items():
        cells = [chosen["candidate"], f"{chosen['strength']:.2f}", chosen["scope"]]
        if all_of is not None:
            found = all_of["categories"][name]
            cells += [
                str(found["n"]),
                f"{found['safe_unsteered']:.0%} → {found['safe']:.0%}",
                f"{found['degenerate']:.0%}",
            ]
        rows.add_row(console.plain(name), *cells)
    console.out.print(rows)
    if all_of is not None:
        _print_validation(all_of)
    router = _router(done)
    console.say(
        f"router, held out: category accuracy {router['category_accuracy']:.2f}, benign false "
        f"positives {router['benign_false_positive_rate']:.3f}"
    )
    search = figures["search"]
    ended = {
        "settled": "nothing was left to better",
        "trials": "every category had its trials",
        "time": "time was up",
        "interrupted": "it was interrupted",
    }[search["stopped"]]
    console.say(f"{search['rounds']} trials of each category; {ended}")
    console.say(f"{console.plain(output)} written in {seconds:.0f} s")
    if "unsafe" in files:
        benign = f" --benign {files['benign']}" if "benign" in files else ""
        command = f"pysteer evaluate -s {output} --prompts {files['unsafe']}{benign} -o report"
        console.say(f"for figures that nothing here has seen: {console.plain(command)}")


def _print_validation(found: Any) -> None:
    console.say(
        f"validation, the router deciding: safe {found['safe']:.0%}, degenerate "
        f"{found['degenerate']:.0%}"
    )
    benign = found["benign"]
    if benign is not None:
        console.say(
            f"benign ({benign['n']}): {benign['unchanged']:.0%} unchanged, "
            f"{benign['refused']:.0%} refused"
        )
    console.say(
        f"one category on at a time: its gate opens for {found['gates']['own']:.0%} of its own "
        f"prompts and {found['gates']['others']:.1%} of the others'"
    )
