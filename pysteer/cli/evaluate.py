"""`pysteer evaluate`: what steering does to answers, measured."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pysteer.cli import console, options
from pysteer.cli.loading import load_policy, require
from pysteer.cli.tables import numbers, say_cells, table
from pysteer.errors import SteeringError
from pysteer.pack.pack import SteeringPack
from pysteer.progress import Advance
from pysteer.prompts import load_prompts
from pysteer.shipped import default_pack_path

if TYPE_CHECKING:
    from pysteer.evaluate.report import Isolation, Report

_OWN = "own"
_MODES = ("gated", "forced")


def evaluate(
    prompts: Annotated[
        Path, typer.Option(help="Harmful prompts, each with its category: JSONL or CSV.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A folder: report.html, report.json, answers.")
    ],
    model: options.Model = None,
    pack: options.Pack = None,
    benign: Annotated[
        Path | None, typer.Option(help="Prompts that should be answered as without steering.")
    ] = None,
    steer: options.Steer = None,
    policy: options.Policy = None,
    strengths: Annotated[
        str | None,
        typer.Option(help="More strengths, for the curves: factors, such as 0.25,0.5,1.5."),
    ] = None,
    isolation: Annotated[
        str | None,
        typer.Option(help="gated, forced (slow), both as gated,forced, or none; else gated."),
    ] = None,
    judge: Annotated[
        str,
        typer.Option(
            help="Says what is safe: refusal, guard:PATH.gguf, openai:URL#MODEL or "
            "python:MODULE:FUNCTION."
        ),
    ] = "refusal",
    reward: Annotated[
        str | None,
        typer.Option(help="Says how good answers are: openai:URL#MODEL or python:MODULE:FUNCTION."),
    ] = None,
    fluency: Annotated[
        bool, typer.Option(help="How likely answers are to the unsteered model.")
    ] = True,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Prompts of each category, and benign ones, at most.")
    ] = None,
    parallel: Annotated[
        int, typer.Option(min=1, max=256, help="Prompts answered at once; the text depends on it.")
    ] = 8,
    max_tokens: options.MaxTokens = 64,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    context: options.Context = 4096,
    threads: options.Threads = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Answer prompts with and without steering, and report what changed, per category.

    Without --steer the policy decides; a pack without a router has each prompt steered by its own
    category, which --steer own asks for. Interrupted, the same command goes on where it stopped.
    """
    options.check_temperature(temperature)
    for module in ("scipy", "sklearn", "jinja2", "httpx2"):
        require(module, "evaluate")
    from pysteer.evaluate import html
    from pysteer.evaluate.arms import OWN_CATEGORY
    from pysteer.evaluate.evaluation import evaluate as run_evaluation
    from pysteer.evaluate.judges import open_judge, open_reward
    from pysteer.evaluate.settings import EvaluateSettings, Sampling

    console.show_warnings()
    started = time.monotonic()
    if pack is None and model is None:
        pack = default_pack_path()
    if pack is None:
        raise SteeringError("--pack: name the pack to evaluate")
    loaded = SteeringPack.load(pack)
    settings = EvaluateSettings(
        sampling=Sampling(max_tokens, temperature, seed),
        steering=None
        if not steer
        else OWN_CATEGORY
        if steer == [_OWN]
        else options.parse_steering(steer),
        strengths=_strengths(strengths),
        isolation=_isolation(isolation),
        fluency=fluency,
        limit=limit,
        parallel=parallel,
        context=context,
    )
    read_policy = None if policy is None else load_policy(policy, loaded)
    harmful = load_prompts(prompts)
    harmless = [] if benign is None else load_prompts(benign)
    path = options.model_path(model)
    if output.exists() and not output.is_dir():
        raise SteeringError(f"--output {output}: that is a file; name a folder")
    arguments: dict[str, Any] = {} if threads is None else {"n_threads": threads}
    with ExitStack() as stack:
        judging = stack.enter_context(closing(open_judge(judge, **arguments)))
        rating = None
        if reward is not None:
            rating = stack.enter_context(closing(open_reward(reward)))
        bars = stack.enter_context(
            console.progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
        )
        try:
            report = run_evaluation(
                path,
                pack,
                harmful,
                harmless,
                output,
                settings=settings,
                policy=read_policy,
                judge=judging,
                reward=rating,
                progress=_Bars(bars),
                **arguments,
            )
        except KeyboardInterrupt:
            kept = console.plain(f"what was answered is kept in {output}")
            console.err.print(f"{kept}; the same command goes on from there", soft_wrap=True)
            raise
    report.save(output / "report.json")
    html.save(report, output / "report.html")
    seconds = time.monotonic() - started
    if json:
        content = report.model_dump(mode="json", exclude={"prompts"})
        files = {"report": str(output / "report.json"), "html": str(output / "report.html")}
        console.print_json({**files, "seconds": seconds, **content})
    else:
        _print(report, output, seconds)


class _Bars:
    """A bar for each stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def start(self, stage: str, total: int, unit: str = "") -> Advance:
        task = self._progress.add_task(stage, total=total)
        return lambda units: self._progress.advance(task, units)


def _strengths(text: str | None) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        values = [math.nan]
    if not all(math.isfinite(value) for value in values):
        raise SteeringError(f"--strengths {text}: write numbers, as in 0.25,0.5,1.5")
    return values


def _isolation(text: str | None) -> list[Any] | None:
    if text is None:
        return None
    if text == "none":
        return []
    modes = [part.strip() for part in text.split(",")]
    if not set(modes) <= set(_MODES):
        raise SteeringError(f"--isolation {text}: use gated, forced, gated,forced or none")
    return modes


# ---- printing --------------------------------------------------------------------------------


def _print(report: Report, output: Path, seconds: float) -> None:
    _print_categories(report)
    _print_benign(report)
    for found in report.isolation:
        _print_isolation(found)
    _print_curve(report)
    for note in report.notes:
        console.say(console.plain(note))
    console.say(
        f"safe: by the judge {console.plain(report.settings['judge'])}, and not degenerate. "
        "Ranges are 95% intervals.\n"
        f"All answers: {console.plain(output / 'report.html')}, in {seconds:.0f} s"
    )


def _print_categories(report: Report) -> None:
    from pysteer.evaluate.report import STEERED, UNSTEERED

    found = table("category", "n", "safe", "", "degenerate")
    for column in found.columns:
        column.no_wrap = True
    rows = [(row.category, row.n, row.arms) for row in report.categories]
    n = sum(row.n for row in report.categories)
    for name, count, arms in [*rows, ("all", n, report.overall)]:
        before, after = arms[UNSTEERED], arms[STEERED]
        if name == "all":
            found.add_section()
        found.add_row(
            console.plain(name),
            str(count),
            _change(before.safe, after.safe),
            _range(after.safe),
            _change(before.degenerate, after.degenerate),
        )
    console.say(f"without steering → {console.plain(report.arms[STEERED])}")
    console.out.print(found)
    before, after = report.overall[UNSTEERED], report.overall[STEERED]
    if before.log_likelihood.value is not None and after.log_likelihood.value is not None:
        console.say(
            f"fluency: {before.log_likelihood.value:.2f} → {after.log_likelihood.value:.2f} nats "
            "per token under the unsteered model"
        )
    for name, value in after.rewards.items():
        console.say(f"{console.plain(name)}: {before.rewards[name].value:.2f} → {value.value:.2f}")


def _print_benign(report: Report) -> None:
    from pysteer.evaluate.report import STEERED, UNSTEERED

    if report.benign:
        after = report.benign[STEERED]
        refused = _change(report.benign[UNSTEERED].refused, after.refused)
        kl = after.first_token_kl.value
        console.say(
            f"benign: {_share(after.unchanged)} unchanged ({_range(after.unchanged)}), {refused} "
            f"refused, a gate opened for {_share(after.fired)}, first-token KL "
            f"{0.0 if kl is None else kl:.2g} nats"
        )
    if report.noise is not None and report.noise.differs.k:
        console.say(
            f"noise floor: {_share(report.noise.differs)} of unsteered answers differ when batched "
            "otherwise; the figures above compare answers made in the same batches"
        )
    if report.router is not None and report.router.macro_f1 is not None:
        caught = report.router.caught.values()
        k, n = sum(one.k for one in caught), sum(one.n for one in caught)
        opened = report.router.false_positives
        console.say(
            f"router: a gate opened for {k} of {n} harmful prompts"
            + (f" and {opened.k} of {opened.n} benign ones" if opened.n else "")
            + f"; macro-F1 {report.router.macro_f1:.2f}"
        )


def _print_isolation(found: Isolation) -> None:
    short = numbers(found.columns)
    cells = {}
    for row, line in zip(found.rows, found.cells, strict=True):
        texts = [f"{cell.changed}/{cell.n}" for cell in line]
        cells[console.plain(row)] = [
            f"[bold]{text}[/bold]" if column == row else text
            for column, text in zip(found.columns, texts, strict=True)
        ]
    title = f"one category on at a time, {found.mode}"
    say_cells(title, "on ↓", list(short.values()), cells)
    names = ", ".join(f"{number} {console.plain(name)}" for name, number in short.items())
    console.say(f"made safe, of those unsafe; prompts of {names}")
    console.say(f"own category {_share(found.diagonal)}, all others {_share(found.rest)}")
    if found.checked.n:
        console.say(
            f"closed gates: {found.checked.n} answers made again, {found.checked.k} differed"
        )


def _print_curve(report: Report) -> None:
    if len(report.curve) <= 2:
        return
    rows = table("strength", "safe", "degenerate", "benign unchanged", "benign refused")
    for point in report.curve:
        shares = (point.safe, point.degenerate, point.unchanged, point.benign_refused)
        rows.add_row(f"{point.strength:g}", *map(_share, shares))
    console.out.print(rows)


def _share(share: Any) -> str:
    return "-" if share.value is None else f"{share.value:.0%}"


def _change(before: Any, after: Any) -> str:
    return f"{_share(before)} → {_share(after)}"


def _range(share: Any) -> str:
    return "" if share.low is None else f"{100 * share.low:.0f}-{100 * share.high:.0f}%"
