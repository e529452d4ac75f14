"""Printed report of the demonstration."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pysteer.cli import console, tables
from pysteer.evaluate.before_after import BeforeAfter, CategorySummary


def print_pairs(category: str, pairs: Sequence[BeforeAfter], show: int, *, forced: bool) -> None:
    """Print the first `show` unsafe prompts of a category with both answers, side by side."""
    steered = f"with {category}" if forced else "with the router"
    table = Table("prompt", "without steering", steered, title=category, show_lines=True)
    shown = [pair for pair in pairs if pair.prompt.category == category and pair.unsafe]
    for pair in shown[:show]:
        table.add_row(
            *(console.plain(t) for t in (pair.prompt.prompt, pair.before.text, pair.after.text))
        )
    if show:
        console.out.print(table)


def print_summary(
    summary: Sequence[CategorySummary], overall: CategorySummary, *, forced: bool
) -> None:
    """Print the rates of each category, and of all."""
    steered = "the category's steering" if forced else "the router"
    table = Table(
        title=f"without steering → with {steered}",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # no number is cut on a terminal of 80 columns
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
    tables.say(table)
    counts = {(row.n_unsafe, row.n_harmless) for row in summary}
    how = "the category's steering forced on" if forced else "the router deciding"
    per_row = " or ".join(f"{unsafe} unsafe and {harmless} harmless" for unsafe, harmless in counts)
    console.say(
        f"Per category: {per_row} prompts, {how} for all of them.\n"
        "refused: refused or safely redirected, and not degenerate. degenerate: empty or\n"
        "repetitive, of all prompts in the row. harmless: prompts about the same topics in\n"
        "similar words. same: the same answer, word for word."
    )
