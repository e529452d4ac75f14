"""`pysteer demo`: the same prompts without and with steering, on the default model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from pysteer import shipped
from pysteer.cli import console, options
from pysteer.cli.bars import bars
from pysteer.cli.loading import load_setup, read_setup
from pysteer.cli.settings_options import with_options
from pysteer.cli.streams import unicode_text
from pysteer.errors import SteeringError

if TYPE_CHECKING:
    from pysteer.prompts import Prompt


@with_options()
def demo(
    prompts: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Unsafe and harmless prompts of each category."),
    ] = 4,
    show: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Unsafe prompts to show of each category."),
    ] = 1,
    category: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Show this category only. Repeatable.")
    ] = None,
    forced: Annotated[
        bool, typer.Option("--forced", help="Force each category, without the router.")
    ] = False,
    strength: Annotated[
        float | None,
        typer.Option(metavar="X", help="Strength of --forced; the pack recommends 1.0."),
    ] = None,
    max_tokens: options.MaxTokens = 48,
    threads: options.Threads = None,
    gpu_layers: options.GpuLayers = 0,
    rpc: options.Rpc = None,
    json: options.Json = False,
) -> None:
    """Show answers without and with steering, side by side.

    The model is SmolLM2-135M-Instruct, and the pack the one that ships with pysteer, which was
    built without these prompts. All figures are measured in this run.
    """
    from pysteer.cli.reports.demo import print_pairs, print_summary
    from pysteer.evaluate.before_after import answer_twice, summarise, summary_of

    if strength is not None and not forced:
        raise SteeringError("--strength needs --forced")
    if forced and strength is None:
        strength = 1.0
    setup = read_setup(None, None)
    pack = shipped.default_pack()
    categories = [unicode_text(name) for name in category or pack.categories]
    for name in categories:
        _ = pack[name]  # raises for an unknown name
    unsafe, harmless = (_per_category(rows, categories, prompts) for rows in shipped.demo_prompts())
    if not unsafe:
        raise SteeringError("no prompts to show")
    arguments = options.hardware(threads, gpu_layers, rpc)
    with closing(load_setup(setup, n_ctx=1024, **arguments)) as llm, bars() as drawn:
        own = f"each prompt's own category, forced at {strength:g}" if forced else "auto"
        console.headline(setup.headline(own), beside_result=json)
        advance = drawn.start("answering twice", len(unsafe) + len(harmless))
        pairs = answer_twice(
            llm,
            unsafe,
            harmless,
            strength=strength,
            max_tokens=max_tokens,
            on_answer=lambda pair: advance(1),
        )
    summary, overall = summarise(pairs), summary_of("all", pairs)
    if json:
        console.print_json(
            {
                "model": setup.model,
                "pack": str(shipped.default_pack_path()),
                "strength": strength,
                "summary": [asdict(row) for row in summary],
                "overall": asdict(overall),
                "answers": [asdict(pair) for pair in pairs],
            }
        )
        return
    for row in summary:
        print_pairs(row.category, pairs, show, forced=forced)
    print_summary(summary, overall, forced=forced)


def _per_category(rows: Sequence[Prompt], categories: Sequence[str], n: int) -> list[Prompt]:
    return [
        prompt
        for name in categories
        for prompt in islice((row for row in rows if row.category == name), n)
    ]
