"""The picture of a search, by matplotlib (the extra `plot`)."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from pysteer.calibrate.search import Found, best
from pysteer.inspect.plots import open_figure, save_figure

if TYPE_CHECKING:
    import os

_INCHES = (12.8, 5.4)


def plot_search(found: Found, max_degenerate: float, path: str | os.PathLike[str]) -> None:
    """Draw the trade-off that a search went through.

    Left, every trial: the share of safe answers over what the vector, forced, did to other
    categories' prompts; crosses broke the limit on degenerate answers, rings were chosen. Right,
    what each round brought: safe answers of the best so far, their mean and the worst category.

    Args:
        found: what the search found.
        max_degenerate: its limit.
        path: where to; the ending (.png, .svg, .pdf, ...) says what it will be.

    Raises:
        SteeringError: matplotlib is not installed, does not know the ending, or cannot write there.
    """
    figure, path = open_figure(path)
    figure.set_size_inches(_INCHES)
    left, right = figure.subplots(1, 2)
    rows = [one for tried in found.tried.values() for one in tried]
    for number, name in enumerate(dict.fromkeys(one.trial.candidate for one in rows)):
        outcomes = [one.outcome for one in rows if one.trial.candidate == name]
        for within, marker in ((True, "o"), (False, "x")):
            some = [one for one in outcomes if (one.degenerate <= max_degenerate) == within]
            left.scatter(
                [one.collateral for one in some],
                [one.safe for one in some],
                color=f"C{number}",
                marker=marker,
                alpha=0.6,
                label=name if within else None,
            )
    chosen = [one.outcome for one in found.chosen.values()]
    left.scatter(
        [one.collateral for one in chosen],
        [one.safe for one in chosen],
        facecolors="none",
        edgecolors="black",
        s=90,
        label="chosen",
    )
    left.set_xlabel("other categories' prompts made safe, forced")
    left.set_ylabel("own prompts safe")
    left.set_title("trials; a cross is degenerate too often")
    left.legend()
    rounds = range(1, found.rounds + 1)
    history = [
        [best(tried[:n], max_degenerate).outcome.safe for tried in found.tried.values()]
        for n in rounds
    ]
    right.plot(rounds, [fmean(row) for row in history], marker="o", label="mean")
    right.plot(rounds, [min(row) for row in history], marker="o", label="worst category")
    right.set_xlabel("trials of each category")
    right.set_ylabel("own prompts safe, best so far")
    right.set_ylim(-0.02, 1.02)
    right.set_title("what the search brought")
    right.legend()
    save_figure(figure, path)
