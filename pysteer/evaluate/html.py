"""`report.html`: the report as a page, in one file without dependencies."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pysteer.evaluate.estimates import Mean, Share
from pysteer.evaluate.report import (
    STEERED,
    UNSTEERED,
    CurvePoint,
    PromptRecord,
    Report,
)
from pysteer.files import begins_with, write_text
from pysteer.judge import SAFETY, Words

_TEMPLATE = "report.html.j2"
_WIDTH, _HEIGHT = 640, 300  # of the plot, without its margins


@dataclass(frozen=True)
class Line:
    """One line of the chart, in the SVG's units.

    Attributes:
        name: for the legend.
        points: SVG points of the line.
        band: SVG points of the outline of the interval.
        marks: x, y and title of each point.
    """

    name: str
    points: str
    band: str
    marks: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Chart:
    """The trade-off curves.

    Attributes:
        width: of the plot.
        height: of the plot.
        lines: one for each measure.
        ticks: x and label of each strength.
    """

    width: int
    height: int
    lines: Sequence[Line]
    ticks: Sequence[tuple[float, str]]


def render(report: Report) -> str:
    """Return the HTML of a report, with prompts, answers and names escaped: they may be hostile."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, number=number, range=interval)
    template = environment.get_template(_TEMPLATE)
    return template.render(
        report=report,
        chart=chart(report.curve, report.words),
        unsteered=UNSTEERED,
        steered=STEERED,
        shade=shade,
        words=report.words,
        outcome=partial(outcome, words=report.words),
        harmful=[record for record in report.prompts if not record.benign],
        benign=[record for record in report.prompts if record.benign],
    )


is_page = begins_with(b'<meta name="generator" content="pysteer">')
"""Recognises pages of reports."""


def save(report: Report, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the HTML; an older file is replaced in one step.

    Args:
        report: the report.
        path: the file.
        overwrite: replace any older file; otherwise pages of reports alone.

    Raises:
        SteeringError: the file cannot be written.
    """
    write_text(Path(path), render(report), None if overwrite else is_page)


def percent(value: Share | None) -> str:
    """Return a share as a percentage; a dash for a share of no cases."""
    return "-" if value is None or value.value is None else f"{value.value:.0%}"


def interval(value: Share | Mean) -> str:
    """Return the 95% interval of a share or a mean; empty without an interval."""
    if value.low is None or value.high is None:
        return ""
    if isinstance(value, Share):
        return f"{100 * value.low:.0f}-{100 * value.high:.0f}%"
    return f"{value.low:.3g} to {value.high:.3g}"


def number(value: Mean | float | None) -> str:
    """Return a number with three digits; a dash for None."""
    figure = value.value if isinstance(value, Mean) else value
    return "-" if figure is None else f"{figure:.3g}"


def shade(part: int, whole: int) -> int:
    """Return a cell's percentage of colour, visible for every count above 0."""
    return 0 if part == 0 or whole == 0 else round(12 + 68 * part / whole)


def outcome(record: PromptRecord, words: Words = SAFETY) -> str:
    """Return the effect of steering on a prompt in a word or two, for the filter of answers."""
    before, after = record.answers[UNSTEERED], record.answers[STEERED]
    if after.degenerate:
        return "degenerate"
    if after.unfinished:
        return "no answer"
    if record.benign:
        if after.unchanged:
            return "unchanged"
        return "refused" if after.refused else "changed"
    if after.safe:
        return f"{words.good} before" if before.safe else f"now {words.good}"
    return f"now {words.bad}" if before.safe else f"still {words.bad}"


def chart(points: Sequence[CurvePoint], words: Words = SAFETY) -> Chart | None:
    """Return the curves in the SVG's units; None for fewer than two points."""
    if len(points) < 2:
        return None
    low, high = points[0].strength, points[-1].strength
    measures: list[tuple[str, Callable[[CurvePoint], Share]]] = [
        (words.good, lambda point: point.safe),
        ("degenerate", lambda point: point.degenerate),
        (f"{words.others} unchanged", lambda point: point.unchanged),
    ]

    def x(point: CurvePoint) -> float:
        return round(_WIDTH * (point.strength - low) / (high - low), 1)

    lines = []
    for name, measure in measures:
        shares = [(x(point), measure(point), point) for point in points if measure(point).n]
        if not shares:
            continue
        outline = [(at, share.high) for at, share, _ in shares]
        outline += [(at, share.low) for at, share, _ in reversed(shares)]
        lines.append(
            Line(
                name=name,
                points=_path((at, share.value) for at, share, _ in shares),
                band=_path(outline),
                marks=[
                    (
                        at,
                        _y(share.value),
                        f"{name} at strength {point.strength:g}: {percent(share)} "
                        f"({interval(share)}), {share.k} of {share.n}",
                    )
                    for at, share, point in shares
                ],
            )
        )
    ticks = [(x(point), f"{point.strength:g}") for point in points]
    return Chart(_WIDTH, _HEIGHT, lines, ticks)


def _path(points: Any) -> str:
    return " ".join(f"{x:g},{_y(y):g}" for x, y in points)


def _y(value: float | None) -> float:
    return round(_HEIGHT * (1 - (value or 0.0)), 1)
