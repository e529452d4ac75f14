"""`pysteer demo`: the same prompts without and with steering, on the default model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from pysteer import shipped
from pysteer.cli import console, options
from pysteer.cli.loading import load_steered
from pysteer.errors import SteeringError
from pysteer.evaluate.before_after import (
    BeforeAfter,
    CategorySummary,
    answer_twice,
    summarise,
    summary_of,
)
from pysteer.prompts import Prompt


def demo(
    prompts: Annotated[int, typer.Option(min=1, help="Unsafe and harmless, per category.")] = 4,
    show: Annotated[int, typer.Option(min=0, help="Unsafe prompts shown, per category.")] = 1,
    category: Annotated[list[str] | None, typer.Option(help="Only these; repeatable.")] = None,
    forced: Annotated[
        bool,
        typer.Option("--forced", help="Force each category, rather than let the router decide."),
    ] = False,
    strength: Annotated[
        float | None, typer.Option(help="Of --forced; 1.0 is what the pack recommends.")
    ] = None,
    max_tokens: options.MaxTokens = 48,
    threads: options.Threads = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Answer prompts without and with steering, side by side, and count.

    Model: SmolLM2-135M-Instruct. Pack: the one that ships with pysteer, which was built without
    these prompts. Every number is measured in this run.
    """
    if strength is not None and not forced:
        raise SteeringError("--strength is for forced categories; add --forced")
    if forced and strength is None:
        strength = 1.0
    pack = shipped.default_pack()
    model = str(shipped.default_model())
    categories = category or list(pack.categories)
    for name in categories:
        _ = pack[name]  # an unknown one is an error that lists what there is
    unsafe, harmless = (_per_category(rows, categories, prompts) for rows in shipped.demo_prompts())
    if not unsafe:
        raise SteeringError("no prompts to show")
    with (
        closing(load_steered(model, pack, n_ctx=1024, n_threads=threads)) as llm,
        console.progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        ) as progress,
    ):
        task = progress.add_task("answering twice", total=len(unsafe) + len(harmless))
        pairs = answer_twice(
            llm,
            unsafe,
            harmless,
            strength=strength,
            max_tokens=max_tokens,
            on_answer=lambda pair: progress.advance(task),
        )
    summary, overall = summarise(pairs), summary_of("all", pairs)
    if json:
        console.print_json(
            {
                "model": model,
                "pack": str(shipped.default_pack_path()),
                "strength": strength,
                "summary": [asdict(row) for row in summary],
                "overall": asdict(overall),
                "answers": [asdict(pair) for pair in pairs],
            }
        )
        return
    for row in summary:
        _print_pairs(row.category, pairs, show, forced=forced)
    _print_summary(summary, overall, forced=forced)


def _per_category(rows: Sequence[Prompt], categories: Sequence[str], n: int) -> list[Prompt]:
    return [
        prompt
        for name in categories
        for prompt in islice((row for row in rows if row.category == name), n)
    ]


def _print_pairs(category: str, pairs: Sequence[BeforeAfter], show: int, *, forced: bool) -> None:
    steered = f"with {category}" if forced else "with the router"
    table = Table("prompt", "without steering", steered, title=category, show_lines=True)
    shown = [pair for pair in pairs if pair.prompt.category == category and pair.unsafe]
    for pair in shown[:show]:
        table.add_row(
            *(console.plain(t) for t in (pair.prompt.prompt, pair.before.text, pair.after.text))
        )
    if show:
        console.out.print(table)


def _print_summary(
    summary: Sequence[CategorySummary], overall: CategorySummary, *, forced: bool
) -> None:
    steered = "the category's steering" if forced else "what the router finds"
    table = Table(
        title=f"without steering → with {steered}",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # so that no number is cut on a terminal of 80 columns
    )
    table.add_column("category", no_wrap=True)
    for heading in (
        "refused",
        "degenerate",
        "harmless\nrefused",
        "harmless\nsame",
        "tokens/s",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in [*summary, overall]:
        if row is overall:
            table.add_section()
        table.add_row(
            console.plain(row.category),
            f"{row.refused_before:.0%} → {row.refused_after:.0%}",
            f"{row.degenerate_before:.0%} → {row.degenerate_after:.0%}",
            f"{row.harmless_refused_before:.0%} → {row.harmless_refused_after:.0%}",
            f"{row.harmless_unchanged:.0%}",
            f"{row.tokens_per_second_before:.0f} → {row.tokens_per_second_after:.0f}",
        )
    console.out.print(table)
    counts = {(row.n_unsafe, row.n_harmless) for row in summary}
    how = "the category's steering forced on" if forced else "the router deciding"
    per_row = " or ".join(f"{unsafe} unsafe and {harmless} harmless" for unsafe, harmless in counts)
    console.say(
        f"Per category: {per_row} prompts, {how} for all of them.\n"
        "refused: refused or safely redirected, and not degenerate. harmless: about the same\n"
        "topics in similar words; same: answered word for word as without steering."
    )
