"""Progress of commands on standard error: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as rich_progress
from rich.text import Text

from pysteer.cli import console
from pysteer.progress import Advance, Progress

SECONDS_BETWEEN = 10.0
"""Least time between two lines of progress."""


@contextmanager
def bars() -> Iterator[Progress]:
    """Draw a bar for each stage while the block runs; print lines without a terminal."""
    if not console.err.is_terminal:
        yield Lines()
        return
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        _RateColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console.err, transient=True) as drawn:
        yield _Bars(drawn)


class Lines:
    """A `Progress` that prints a line of a stage at most every `SECONDS_BETWEEN`.

    Args:
        clock: time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._printed = clock()

    def start(self, stage: str, total: int, unit: str = "") -> Advance:
        """Begin a stage; see `Progress`."""
        started, done = self._clock(), 0

        def advance(units: int) -> None:
            nonlocal done
            done += units
            now = self._clock()
            if now - self._printed >= SECONDS_BETWEEN:
                self._printed = now
                of_total = f"{done} of {total} {unit}".rstrip()
                console.note(f"{stage}: {of_total}, {now - started:.0f} s")

        return advance


class Announced:
    """A `Progress` that prints a command's first line before the first stage.

    By then the model is loaded and the inputs are checked: a user's mistake is one line.

    Args:
        progress: receives the progress.
        line: see `pysteer.cli.console.headline`; "" prints nothing.
        beside_result: likewise.
    """

    def __init__(self, progress: Progress, line: str, *, beside_result: bool = False) -> None:
        self._progress = progress
        self._line = line
        self._beside_result = beside_result

    def start(self, stage: str, total: int, unit: str = "") -> Advance:
        """Begin a stage; see `Progress`."""
        line, self._line = self._line, ""
        if line:
            console.headline(line, beside_result=self._beside_result)
        return self._progress.start(stage, total, unit)


class _Bars:
    """A `Progress` that draws a bar for each stage."""

    def __init__(self, drawn: rich_progress.Progress) -> None:
        self._drawn = drawn

    def start(self, stage: str, total: int, unit: str = "") -> Advance:
        rate = Rate()
        task = self._drawn.add_task(stage, total=total, unit=unit, rate=rate)

        def advance(units: int) -> None:
            rate.add(units)
            self._drawn.advance(task, units)

        return advance


class Rate:
    """Units per second of a stage, without its first second.

    Work of an earlier run is reported at once, and would count as fast work.

    Args:
        clock: time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = self._last = clock()
        self._done = 0
        self._mark: tuple[float, int] | None = None

    def add(self, units: int) -> None:
        """Count finished units."""
        self._last = self._clock()
        self._done += units
        if self._mark is None and self._last - self._started >= 1:
            self._mark = self._last, self._done

    def per_second(self) -> float | None:
        """Return the rate; None before a second of measurement."""
        if self._mark is None or self._last - self._mark[0] < 1:
            return None
        return (self._done - self._mark[1]) / (self._last - self._mark[0])


class _RateColumn(rich_progress.ProgressColumn):
    """Units per second, of stages with a unit."""

    def render(self, task: rich_progress.Task) -> Text:
        rate, unit = task.fields["rate"].per_second(), task.fields["unit"]
        return Text(f"{rate:.0f} {unit}/s" if unit and rate is not None else "")
