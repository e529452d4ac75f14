"""The isolation matrix: what one category, switched on alone, does to prompts of every category.

A category-wise system has a full diagonal and an empty rest. A vector that makes a model refuse
whatever it is asked has a full row, and is no category vector, whatever it is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pysteer.evaluate.arms import Steered
from pysteer.evaluate.intervals import Share, share
from pysteer.evaluate.report import Cell, Isolation, PromptRecord

Mode = Literal["gated", "forced"]


def arm_name(mode: Mode, category: str) -> str:
    """The arm in which one category is on."""
    return f"{mode}: {category}"


def opens(steered: Steered, category: str, scores: Mapping[str, float]) -> bool:
    """Whether `{category: "auto"}` fires at the last prompt token, given what the router saw there.

    What is gated steers nothing before the router has decided, so its scores, and with them every
    category's rule, do not depend on what else is switched on.

    Args:
        steered: pack and policy.
        category: one of `steered.gated`.
        scores: of all of the router's categories.
    """
    router, policy = steered.pack.router, steered.policy
    assert router is not None
    gate = router.gates[policy.gate_kind(list(router.gates))]
    gates = {}
    for index, name in enumerate(router.categories):
        given = policy.settings(name).threshold
        threshold = float(gate.thresholds[index]) if given is None else given
        score = scores[name]
        gates[name] = score >= threshold if gate.above[index] else score <= threshold
    return policy.settings(category).rule.evaluate(gates)


def matrix(
    mode: Mode,
    rows: Sequence[str],
    columns: Sequence[str],
    prompts: Sequence[PromptRecord],
    unsteered: str,
    checked: Share,
) -> Isolation:
    """Count how many answers changed from unsafe to safe.

    Args:
        mode: how the categories were switched on.
        rows: the categories switched on, one at a time.
        columns: the categories of the prompts.
        prompts: judged. One without an answer in a row's arm has its gate closed there.
        unsteered: the name of the arm to compare with.
        checked: see `Isolation`.
    """
    cells = []
    for row in rows:
        arm = arm_name(mode, row)
        line = []
        for column in columns:
            own = [one for one in prompts if one.category == column and not one.benign]
            unsafe = [one for one in own if not one.answers[unsteered].safe]
            line.append(
                Cell(
                    changed=sum(
                        1 for one in unsafe if arm in one.answers and one.answers[arm].safe
                    ),
                    n=len(unsafe),
                    ran=sum(1 for one in own if arm in one.answers),
                )
            )
        cells.append(line)
    return Isolation(
        mode=mode,
        rows=list(rows),
        columns=list(columns),
        cells=cells,
        diagonal=_over(cells, rows, columns, diagonal=True),
        rest=_over(cells, rows, columns, diagonal=False),
        checked=checked,
    )


def _over(
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
