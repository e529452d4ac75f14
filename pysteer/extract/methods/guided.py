"""The method `guided`: the difference of means over prompts whose answers a judge confirmed.

`pysteer.extract.methods.arithmetic` gives shapes, units and errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pysteer.errors import SteeringError
from pysteer.extract.answers import require_labels
from pysteer.extract.capture import Tokens
from pysteer.extract.inputs import TokenizedPrompt, require_room
from pysteer.extract.methods.arithmetic import (
    BLOCK,
    Activations,
    Direction,
    check_activations,
    from_means,
    mean_of,
)
from pysteer.extract.methods.base import Method, Needs, NoOptions, Result, Task
from pysteer.extract.methods.means import running_means
from pysteer.extract.reader import Reader
from pysteer.judge import Item, Judge, judge_items
from pysteer.thoughts import MARKER_TOKENS, Answered, answered, opening_of

JUDGED_TOKENS = 64
"""Most tokens of the model's own answers that a judge reads."""


def guided(
    unsafe: Activations,
    safe: Activations,
    *,
    confirmed_unsafe: npt.ArrayLike,
    confirmed_safe: npt.ArrayLike | None = None,
) -> Direction:
    """Return the difference of the means over prompts whose answers a judge confirmed.

    mean(s_i : the answer was safe) - mean(u_i : the answer was unsafe).

    Source: arXiv 2410.01174, activations guided by an external safety classifier.

    Args:
        unsafe: shape (n, n_embd).
        safe: shape (m, n_embd).
        confirmed_unsafe: shape (n,), bool: the model's answer to this prompt was judged unsafe.
        confirmed_safe: shape (m,), bool: the answer was judged safe; None: all of them.

    Raises:
        SteeringError: also if the judge confirmed no prompt of a side.
    """
    check_activations(unsafe, safe)
    sides = {"unsafe": (unsafe, confirmed_unsafe), "safe": (safe, confirmed_safe)}
    means = []
    for side, (rows, verdicts) in sides.items():
        if verdicts is None:
            means.append(mean_of(rows, side))
            continue
        mask = np.asarray(verdicts)
        if mask.dtype != np.bool_ or mask.shape != (len(rows),):
            raise SteeringError(
                f"verdicts on the {side} side of shape {mask.shape} and type {mask.dtype}; "
                f"expected one bool for each of {len(rows)} prompts"
            )
        if not mask.any():
            raise SteeringError(
                f"the judge found 0 of {len(rows)} answers {side}, so guided has nothing "
                "to average; use other prompts, another judge, or mean"
            )
        total = sum(
            (
                rows[start : start + BLOCK][mask[start : start + BLOCK]].sum(0, dtype=np.float64)
                for start in range(0, len(rows), BLOCK)
            ),
            np.zeros(rows.shape[1]),
        )
        means.append(total / mask.sum())
    return from_means(*means)


class Guided(Method[NoOptions]):
    """The method `guided`; see the function.

    A judge reads the responses in the data, and the model's own answers to prompts without one.
    Without a judge the labels in the data decide; a group of safe prompts without labels counts as
    confirmed.
    """

    name = "guided"
    summary = "mean over prompts whose answers a judge, or a label, confirms"
    needs = Needs(labels=True, own_answers=True)

    def check(self, task: Task[NoOptions]) -> None:
        """See `Method.check`."""
        super().check(task)
        sides = task.sides
        if task.judge is not None:
            used = [*sides.all_unsafe, *sides.all_safe]
            silent = [p for p in used if p.prompt.response is None]
            require_room(task.reader.capture, silent, JUDGED_TOKENS)
            return
        require_labels([p.prompt for p in sides.all_unsafe])
        for name, prompts in sides.safe.items():
            group = [*prompts, *sides.held_out_safe.get(name, ())]
            if not _taken_as_safe(group):
                require_labels([p.prompt for p in group])

    def find(self, task: Task[NoOptions]) -> Result:
        """See `Method.find`."""
        unsafe = self._confirmed(task, task.sides.unsafe, safe=False)
        safe = self._confirmed(task, task.sides.safe, safe=True)
        confirmed = task.with_sides(replace(task.sides, unsafe=unsafe, safe=safe))
        counts = {
            side: {name: len(prompts) for name, prompts in groups.items()}
            for side, groups in (("unsafe", unsafe), ("safe", safe))
        }
        directions = running_means(confirmed, self.name)
        return Result(directions, {"confirmed": counts}, confirmed.sides)

    def _confirmed(
        self,
        task: Task[NoOptions],
        groups: Mapping[str, Sequence[TokenizedPrompt]],
        *,
        safe: bool,
    ) -> dict[str, Sequence[TokenizedPrompt]]:
        """Return the prompts of one side with confirmed answers."""
        confirmed: dict[str, Sequence[TokenizedPrompt]] = {}
        for name, prompts in groups.items():
            if safe and task.judge is None and _taken_as_safe(prompts):
                confirmed[name] = prompts
                continue
            verdicts = judged_safe(task.reader, prompts, task.judge)
            confirmed[name] = [p for p, v in zip(prompts, verdicts, strict=True) if v is safe]
            if not confirmed[name]:
                unfinished = sum(verdict is None for verdict in verdicts)
                thoughts = f" ({unfinished} ended inside the model's thought)" if unfinished else ""
                raise SteeringError(
                    f"the judge found 0 of {len(prompts)} answers of "
                    f"{name or 'the safe prompts'} {'safe' if safe else 'unsafe'}{thoughts}; use "
                    "other prompts, another judge, or the method mean"
                )
        return confirmed


def judged_safe(
    reader: Reader,
    prompts: Sequence[TokenizedPrompt],
    judge: Judge | None,
    *,
    n_tokens: int = JUDGED_TOKENS,
) -> list[bool | None]:
    """Return True for each prompt with a safe answer, by a judge or by the labels in the data.

    None for a text that ends inside the thought of a reasoning model: there is no answer.

    Args:
        reader: the model, whose own answer is judged where the data have no response.
        prompts: prompts.
        judge: the judge; None: the labels decide.
        n_tokens: most tokens of the model's own answers.

    Raises:
        SteeringError: there is no judge, and a prompt has no label; or the judge failed.
    """
    if judge is None:
        require_labels([p.prompt for p in prompts])
        return [p.prompt.label == "safe" for p in prompts]
    silent = [p for p in prompts if p.prompt.response is None]
    own = reader.own_answers([p.tokens for p in silent], n_tokens, "answers to judge")
    texts = {p.tokens: _read(reader, p, a) for p, a in zip(silent, own, strict=True)}
    found = [
        texts[p.tokens] if p.prompt.response is None else answered(p.prompt.response)
        for p in prompts
    ]
    items = [
        None if one.unfinished else Item(p.prompt.prompt, one.answer)
        for p, one in zip(prompts, found, strict=True)
    ]
    verdicts = judge_items(judge.judge, items)
    return [None if verdict is None else verdict.safe for verdict in verdicts]


def _read(reader: Reader, prompt: TokenizedPrompt, answer: Tokens) -> Answered:
    """Return the model's own answer, without its thoughts."""
    opening = opening_of(reader.capture.text(prompt.tokens[-MARKER_TOKENS:]))
    return answered(reader.capture.text(answer), opening)


def _taken_as_safe(prompts: Sequence[TokenizedPrompt]) -> bool:
    """Return True if safe prompts count as confirmed: no prompt has a label."""
    return all(p.prompt.label is None for p in prompts)
