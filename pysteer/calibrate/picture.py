"""A plot of a search, by matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from pysteer.calibrate.search import SearchResult, TrialRecord, best
from pysteer.inspect.plots import open_figure, save_figure

if TYPE_CHECKING:
    import os

_INCHES = (12.8, 5.4)


def plot_search(
    result: SearchResult,
    max_degenerate: float,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    good: str = "safe",
) -> None:
    """Draw the trade-off of a search.

    Left, every trial: the share of safe answers over the share of other categories' prompts that
    the forced vector changed, or over the strength if none was changed, as with one category;
    crosses exceed the limit on degenerate answers, rings were chosen. Right, the progress by
    rounds: safe answers of the best trials so far, mean and worst category.

    Args:
        result: the search.
        max_degenerate: limit of the search.
        path: file to write; the suffix (.png, .svg, .pdf, ...) decides the format.
        overwrite: replace any older file; otherwise pictures by pysteer alone.
        good: the judge's word for a safe answer.

    Raises:
        SteeringError: matplotlib is not installed, does not know the suffix, or cannot write.
    """
    figure, path = open_figure(path, overwrite=overwrite)
    figure.set_size_inches(_INCHES)
    left, right = figure.subplots(1, 2)
    records = [record for rows in result.trials.values() for record in rows]
    leaks = any(record.outcome.collateral for record in records)

    def points(shown: Sequence[TrialRecord]) -> tuple[list[float], list[float]]:
        across = [each.outcome.collateral if leaks else each.trial.strength for each in shown]
        return across, [each.outcome.safe for each in shown]

    for number, name in enumerate(dict.fromkeys(record.trial.candidate for record in records)):
        own = [record for record in records if record.trial.candidate == name]
        for within, marker in ((True, "o"), (False, "x")):
            shown = [each for each in own if (each.outcome.degenerate <= max_degenerate) == within]
            left.scatter(
                *points(shown),
                color=f"C{number}",
                marker=marker,
                alpha=0.6,
                label=name if within else None,
            )
    left.scatter(
        *points(list(result.chosen.values())),
        facecolors="none",
        edgecolors="black",
        s=90,
        label="chosen",
    )
    left.set_xlabel(f"other categories' prompts made {good}, forced" if leaks else "strength")
    left.set_ylabel(f"own prompts {good}")
    left.set_ylim(-0.04, 1.04)
    left.set_title("trials (crosses: over the limit on degenerate answers)")
    left.legend()
    rounds = range(1, result.rounds + 1)
    history = [
        [best(rows[:n], max_degenerate).outcome.safe for rows in result.trials.values()]
        for n in rounds
    ]
    if len(result.trials) > 1:
        right.plot(rounds, [fmean(row) for row in history], marker="o", label="mean")
        right.plot(rounds, [min(row) for row in history], marker="o", label="worst category")
    else:
        right.plot(rounds, [min(row) for row in history], marker="o", label="own prompts")
    right.set_xlabel("trials of each category")
    right.set_ylabel(f"own prompts {good}, best so far")
    right.set_ylim(-0.04, 1.04)
    right.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    right.set_title("progress of the search")
    right.legend()
    save_figure(figure, path, overwrite=overwrite)
