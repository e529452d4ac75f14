"""Printed report of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pysteer.cli import console
from pysteer.cli.tables import numbers, say_cells, table
from pysteer.evaluate.report import STEERED, UNSTEERED, Isolation, Report
from pysteer.judge import Words


def describe(report: Report, output: Path, seconds: float) -> dict[str, Any]:
    """Return a report in the folder `output` as JSON data, without its answers."""
    files = {"report": str(output / "report.json"), "html": str(output / "report.html")}
    content = report.model_dump(mode="json", exclude={"prompts"})
    return {**files, "seconds": seconds, **content}


def print_report(report: Report, output: Path, seconds: float) -> None:
    """Print a report in the folder `output` as tables."""
    good = console.plain(report.words.good)
    _print_categories(report)
    _print_benign(report)
    for matrix in report.isolation:
        _print_isolation(matrix, report.words)
    _print_curve(report)
    for note in report.notes:
        console.say(console.plain(note))
    console.say(
        f"{good}: by the judge {console.plain(report.settings['judge'])}, and not degenerate. "
        f"degenerate: of the {console.plain(report.words.prompts)} prompts. "
        "Ranges are 95% intervals.\n"
        f"wrote all answers to {console.plain(output / 'report.html')} in {seconds:.0f} s"
    )


def _print_categories(report: Report) -> None:
    printed = table("category", "n", console.plain(report.words.good), "", "degenerate")
    for column in printed.columns:
        column.no_wrap = True
    rows = [(row.category, row.n, row.arms) for row in report.categories]
    n = sum(row.n for row in report.categories)
    total = [("all", n, report.overall)] if len(rows) > 1 else []
    for name, count, arms in [*rows, *total]:
        before, after = arms[UNSTEERED], arms[STEERED]
        if arms is report.overall:
            printed.add_section()
        printed.add_row(
            console.plain(name),
            str(count),
            _change(before.safe, after.safe),
            _range(after.safe),
            _change(before.degenerate, after.degenerate),
        )
    console.say(f"without steering → {console.plain(report.arms[STEERED])}")
    console.out.print(printed)
    before, after = report.overall[UNSTEERED], report.overall[STEERED]
    if before.log_likelihood.value is not None and after.log_likelihood.value is not None:
        console.say(
            f"fluency: {before.log_likelihood.value:.2f} → {after.log_likelihood.value:.2f} nats "
            "per token under the unsteered model"
        )
    for name, value in after.rewards.items():
        console.say(f"{console.plain(name)}: {before.rewards[name].value:.2f} → {value.value:.2f}")


def _print_benign(report: Report) -> None:
    if report.benign:
        after = report.benign[STEERED]
        refused = _change(report.benign[UNSTEERED].refused, after.refused)
        gate = f"a gate opened for {_share(after.fired)}, " if report.router is not None else ""
        degenerate = _change(report.benign[UNSTEERED].degenerate, after.degenerate)
        kl = after.first_token_kl.value
        console.say(
            f"{console.plain(report.words.others)}: {_share(after.unchanged)} unchanged "
            f"({_range(after.unchanged)}), {refused} refused, {degenerate} degenerate, {gate}"
            f"first-token KL {0.0 if kl is None else kl:.2g} nats"
        )
    if report.noise is not None and report.noise.differs.k:
        console.say(
            f"noise floor: {_share(report.noise.differs)} of unsteered answers differ in other "
            "batches; the figures above compare answers made in the same batches"
        )
    if report.router is not None and report.router.macro_f1 is not None:
        caught = report.router.caught.values()
        k, n = sum(share.k for share in caught), sum(share.n for share in caught)
        others = console.plain(report.words.others)
        opened = report.router.false_positives
        console.say(
            f"router: a gate opened for {k} of {n} {console.plain(report.words.prompts)} prompts"
            + (f" and {opened.k} of {opened.n} {others} ones" if opened.n else "")
            + f"; macro-F1 {report.router.macro_f1:.2f}"
        )


def _print_isolation(matrix: Isolation, words: Words) -> None:
    short = numbers(matrix.columns)
    cells = {}
    for row, line in zip(matrix.rows, matrix.cells, strict=True):
        texts = [f"{cell.changed}/{cell.n}" for cell in line]
        cells[console.plain(row)] = [
            f"[bold]{text}[/bold]" if column == row else text
            for column, text in zip(matrix.columns, texts, strict=True)
        ]
    title = f"one category on at a time, {matrix.mode}"
    say_cells(title, "on ↓", list(short.values()), cells)
    names = ", ".join(f"{number} {console.plain(name)}" for name, number in short.items())
    bad, good = console.plain(words.bad), console.plain(words.good)
    console.say(f"{bad} answers made {good}, by category of the prompt: {names}")
    console.say(f"own category {_share(matrix.diagonal)}, all others {_share(matrix.rest)}")
    if matrix.checked.n:
        console.say(
            f"closed gates: {matrix.checked.n} answers repeated, {matrix.checked.k} differed"
        )


def _print_curve(report: Report) -> None:
    if len(report.curve) <= 2:
        return
    good, others = console.plain(report.words.good), console.plain(report.words.others)
    rows = table(
        "strength",
        good,
        "degenerate",
        *(f"{others}\n{figure}" for figure in ("unchanged", "refused", "degenerate")),
    )
    for point in report.curve:
        shares = (
            point.safe,
            point.degenerate,
            point.unchanged,
            point.benign_refused,
            point.benign_degenerate,
        )
        rows.add_row(f"{point.strength:g}", *map(_share, shares))
    console.out.print(rows)


def _share(share: Any) -> str:
    return "-" if share.value is None else f"{share.value:.0%}"


def _change(before: Any, after: Any) -> str:
    return f"{_share(before)} → {_share(after)}"


def _range(share: Any) -> str:
    return "" if share.low is None else f"{100 * share.low:.0f}-{100 * share.high:.0f}%"
