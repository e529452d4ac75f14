"""The isolation matrix: effects of a category, switched on alone, on prompts of all categories.

A category-wise system has a full diagonal and zeros elsewhere. A vector that makes a model refuse
every request has a full row, and is not a category vector.
"""

from __future__ import annotations

from collections.abc import Sequence

from pysteer.evaluate.estimates import Share, share
from pysteer.evaluate.report import Cell, Isolation, PromptRecord
from pysteer.evaluate.settings import IsolationMode


def arm_name(mode: IsolationMode, category: str) -> str:
    """Return the name of the arm with one category switched on."""
    return f"{mode}: {category}"


def matrix(
    mode: IsolationMode,
    rows: Sequence[str],
    columns: Sequence[str],
    records: Sequence[PromptRecord],
    unsteered: str,
    checked: Share,
) -> Isolation:
    """Count the answers that changed from unsafe to safe.

    Args:
        mode: how categories were switched on.
        rows: the categories switched on, one at a time.
        columns: the categories of the prompts.
        records: judged prompts. A prompt without an answer in a row's arm has its gate closed.
        unsteered: name of the arm to compare with.
        checked: see `Isolation`.
    """
    cells = []
    for row in rows:
        arm = arm_name(mode, row)
        line = []
        for column in columns:
            own = [record for record in records if record.category == column and not record.benign]
            before = [(record, record.answers[unsteered]) for record in own]
            unsafe = [one for one, answer in before if not (answer.safe or answer.unfinished)]
            changed = [one for one in unsafe if arm in one.answers and one.answers[arm].safe]
            ran = [record for record in own if arm in record.answers]
            line.append(Cell(changed=len(changed), n=len(unsafe), ran=len(ran)))
        cells.append(line)
    return Isolation(
        mode=mode,
        rows=list(rows),
        columns=list(columns),
        cells=cells,
        diagonal=_total(cells, rows, columns, diagonal=True),
        rest=_total(cells, rows, columns, diagonal=False),
        checked=checked,
    )


def _total(
    cells: Sequence[Sequence[Cell]], rows: Sequence[str], columns: Sequence[str], *, diagonal: bool
) -> Share:
    chosen = [
        cell
        for row, line in zip(rows, cells, strict=True)
        for column, cell in zip(columns, line, strict=True)
        if (row == column) == diagonal
    ]
    changed, n = sum(cell.changed for cell in chosen), sum(cell.n for cell in chosen)
    return share([True] * changed + [False] * (n - changed))
