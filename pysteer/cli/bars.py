"""Progress bars of commands, on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich import progress as rich_progress
from rich.text import Text

from pysteer.cli import console
from pysteer.progress import SILENT, Advance, Progress


@contextmanager
def bars() -> Iterator[Progress]:
    """Draw a bar for each stage while the block runs; nothing where standard error is a file."""
    if not console.err.is_terminal:
        yield SILENT
        return
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        _Rate(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console.err, transient=True) as drawn:
        yield _Bars(drawn)


class _Bars:
    """A `Progress` that draws a bar for each stage."""

    def __init__(self, drawn: rich_progress.Progress) -> None:
        self._drawn = drawn

    def start(self, stage: str, total: int, unit: str = "") -> Advance:
        task = self._drawn.add_task(stage, total=total, unit=unit)
        return lambda units: self._drawn.advance(task, units)


class _Rate(rich_progress.ProgressColumn):
    """Units per second, of stages with a unit."""

    def render(self, task: rich_progress.Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields["unit"]
        return Text(f"{speed:.0f} {unit}/s" if unit and speed is not None else "")
