"""The groups of prompts that each arm answers, and the answers that are skipped.

- Prompts are grouped by category, in their order, `group_size` at a time. Every arm answers the
  same groups, so that an answer that no steering touched is the same text in all arms.
- Where steering changes one answer of a group, that answer becomes longer or shorter, and the other
  answers are computed in other batches: their text may change although nothing steered them. So the
  answers of a benign group on which no category acted are compared with answers of the same group
  in which these prompts are not steered, and all else is equal.
- A single category, gated, leaves an answer unchanged where its gate is closed. So only prompts
  whose gate opens are answered, and one group of the others for each category, as a check.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from pysteer.evaluate.answers import Answer, Answerer, Query
from pysteer.evaluate.arms import Arm, asks_router, query
from pysteer.evaluate.isolation import arm_name
from pysteer.evaluate.report import STEERED, UNSTEERED
from pysteer.evaluate.settings import IsolationMode
from pysteer.pack.resolved import AUTO, ResolvedPolicy
from pysteer.progress import Advance, Progress
from pysteer.prompts import Prompt

NOISE_PROMPTS = 100
"""Unsteered prompts answered again in other batches."""

_ByArm = dict[str, Answer]


@dataclass
class AnswerSet:
    """All answers of an evaluation.

    Prompts are numbered from 0, harmful prompts first.

    Attributes:
        harmful: harmful prompts.
        benign: benign prompts.
        answers: by number, name of the arm to answer.
        unchanged: by number and arm, of benign prompts: True if the answer is the unsteered answer.
        scores: by number, category to the router's score.
        ranks: by number, category to the value by which the router compared the categories.
        fired: by number, categories whose gate opened with all of them gated.
        noise: of some prompts: True if the unsteered answer differs in other batches.
        checked: by isolation mode, of answers behind a closed gate: True if the answer differs.
    """

    harmful: list[Prompt]
    benign: list[Prompt]
    answers: list[_ByArm]
    unchanged: dict[tuple[int, str], bool] = field(default_factory=dict)
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    ranks: dict[int, dict[str, float]] = field(default_factory=dict)
    fired: dict[int, list[str]] = field(default_factory=dict)
    noise: list[bool] = field(default_factory=list)
    checked: dict[str, list[bool]] = field(default_factory=dict)

    def rows(self) -> Iterator[tuple[Prompt, bool, _ByArm]]:
        """Yield each prompt, True if the prompt is benign, and the prompt's answers by arm."""
        for number, prompt in enumerate([*self.harmful, *self.benign]):
            yield prompt, number >= len(self.harmful), self.answers[number]


@dataclass(frozen=True)
class _Group:
    """Prompts that are answered together."""

    numbers: list[int]
    prompts: list[Prompt]
    benign: bool


def answer_everything(
    answerer: Answerer,
    resolved: ResolvedPolicy,
    arms: Sequence[Arm],
    harmful: list[Prompt],
    benign: list[Prompt],
    *,
    isolation: Sequence[IsolationMode],
    group_size: int,
    progress: Progress,
) -> AnswerSet:
    """Answer all prompts in all arms; see the module.

    Args:
        answerer: the model.
        resolved: pack and policy.
        arms: the arms, the unsteered first.
        harmful: prompts with categories.
        benign: harmless prompts.
        isolation: isolation matrices to answer for.
        group_size: prompts answered at once.
        progress: receives the progress.

    Raises:
        SteeringError: the engine rejects a query.
    """
    answers = AnswerSet(harmful, benign, [{} for _ in range(len(harmful) + len(benign))])
    run = _AnswerRun(answerer, resolved, answers, group_size)
    advance = progress.start("answering", len(arms) * len(answers.answers), "answers")
    for group in run.groups:
        run.answer(group, arms, advance)
    noisy = run.noise_numbers()
    stage = "answering again in other batches"
    run.measure_noise(noisy, progress.start(stage, len(noisy), "answers"))
    if resolved.gateable:
        run.route(arms, progress)
    for mode in isolation:
        if mode == "forced":
            run.isolate_forced(progress)
        else:
            run.isolate_gated(progress)
    return answers


class _AnswerRun:
    """One pass over all groups, which fills an `AnswerSet`."""

    def __init__(
        self, answerer: Answerer, resolved: ResolvedPolicy, answers: AnswerSet, group_size: int
    ) -> None:
        self._answerer = answerer
        self._resolved = resolved
        self._answers = answers
        self._size = group_size
        n = len(answers.harmful)
        self._harmful = list(self._grouped(answers.harmful, 0, benign=False))
        self.groups = [*self._harmful, *self._grouped(answers.benign, n, benign=True)]

    def _grouped(self, prompts: Sequence[Prompt], start: int, *, benign: bool) -> Iterator[_Group]:
        by_category: dict[str, list[int]] = {}
        for number, prompt in enumerate(prompts):
            by_category.setdefault(prompt.category, []).append(number)
        for numbers in by_category.values():
            for first in range(0, len(numbers), self._size):
                part = numbers[first : first + self._size]
                yield _Group([start + i for i in part], [prompts[i] for i in part], benign)

    def answer(self, group: _Group, arms: Sequence[Arm], advance: Advance) -> None:
        """Answer a group in some arms."""
        unsteered = self._queries(group, Arm(UNSTEERED, None))
        for arm in arms:
            queries = self._queries(group, arm)
            reference = unsteered if group.benign and arm.steering is not None else None
            answers = self._answerer.ask(queries, reference)
            for number, answer in zip(group.numbers, answers, strict=True):
                self._answers.answers[number][arm.name] = answer
            if reference is not None:
                self._compare(group, arm, queries, answers)
            elif group.benign:
                for number in group.numbers:
                    self._answers.unchanged[number, arm.name] = True
            advance(len(group.numbers))

    def _queries(self, group: _Group, arm: Arm) -> list[Query]:
        rows = zip(group.numbers, group.prompts, strict=True)
        return [query(self._resolved, arm, prompt, number) for number, prompt in rows]

    def _compare(
        self, group: _Group, arm: Arm, queries: Sequence[Query], answers: Sequence[Answer]
    ) -> None:
        """Compare a benign group's answers with unsteered answers from the same batches."""
        before = [self._answers.answers[number][UNSTEERED] for number in group.numbers]
        touched = [bool(answer.active) for answer in answers]
        if any(touched) and not all(touched):
            # The same batches: the same group, without steering for the prompts that nothing acted
            # on.
            company = [
                each if active else replace(each, steering=None, policy=None)
                for each, active in zip(queries, touched, strict=True)
            ]
            again = self._answerer.ask(company, queries)
            for i, number in enumerate(group.numbers):
                if not touched[i]:
                    before[i] = again[i]
                    # KL(steered || unsteered): the direction does not matter where 0 is expected.
                    self._answers.answers[number][arm.name] = replace(
                        answers[i], first_token_kl=again[i].first_token_kl
                    )
        for number, answer, unsteered in zip(group.numbers, answers, before, strict=True):
            self._answers.unchanged[number, arm.name] = answer.whole == unsteered.whole

    def noise_numbers(self) -> list[int]:
        """Return the prompts to answer in other groups: benign prompts, if there are any."""
        n = len(self._answers.harmful)
        numbers = range(n, n + len(self._answers.benign)) if self._answers.benign else range(n)
        chosen = list(numbers)[:NOISE_PROMPTS]
        return chosen if self._size > 1 and len(chosen) > 1 else []

    def measure_noise(self, numbers: Sequence[int], advance: Advance) -> None:
        """Answer prompts again, each in a group of other prompts than before."""
        stride = -(-len(numbers) // self._size) if numbers else 0
        rows = [prompt for prompt, _, _ in self._answers.rows()]
        for start in range(stride):
            part = numbers[start::stride]
            again = self._answerer.ask([Query(rows[number].prompt) for number in part])
            for number, answer in zip(part, again, strict=True):
                before = self._answers.answers[number][UNSTEERED]
                self._answers.noise.append(answer.whole != before.whole)
            advance(len(part))

    def route(self, arms: Sequence[Arm], progress: Progress) -> None:
        """Record the router's scores of all prompts, from the steered arm where possible."""
        arm = next(arm for arm in arms if arm.name == STEERED)
        advance = None
        if not asks_router(self._resolved, arm.steering):
            arm = Arm("gates", AUTO)
            advance = progress.start("asking the router", len(self._answers.answers), "prompts")
        for group in self.groups:
            if advance is None:
                answers = [self._answers.answers[number][STEERED] for number in group.numbers]
            else:
                answers = self._answerer.ask(self._queries(group, arm), max_tokens=1)
                advance(len(group.numbers))
            for number, answer in zip(group.numbers, answers, strict=True):
                self._answers.scores[number] = answer.scores
                self._answers.ranks[number] = answer.ranks
                self._answers.fired[number] = answer.fired

    def isolate_forced(self, progress: Progress) -> None:
        """Answer the harmful prompts with one category forced at a time."""
        names = list(self._resolved.pack.categories)
        total = len(names) * len(self._answers.harmful)
        advance = progress.start("isolation, forced", total, "answers")
        for name in names:
            steering = {name: self._resolved.settings(name).strength}
            for group in self._harmful:
                self.answer(group, [Arm(arm_name("forced", name), steering)], advance)

    def isolate_gated(self, progress: Progress) -> None:
        """Answer the harmful prompts with one category gated at a time, where its gate opens."""
        opened = {name: self._opened(name) for name in self._resolved.gateable}
        closed = {name: self._closed(i, opened[name]) for i, name in enumerate(opened)}
        groups = [group for name in opened for group in (*opened[name], *closed[name])]
        total = sum(len(group.numbers) for group in groups)
        advance = progress.start("isolation, gated", total, "answers")
        differs = self._answers.checked.setdefault("gated", [])
        for name in opened:
            arm = Arm(arm_name("gated", name), {name: AUTO})
            for group in opened[name]:
                self.answer(group, [arm], advance)
            for group in closed[name]:
                answers = self._answerer.ask(self._queries(group, arm))
                for number, answer in zip(group.numbers, answers, strict=True):
                    unsteered = self._answers.answers[number][UNSTEERED]
                    differs.append(answer.whole != unsteered.whole)
                advance(len(group.numbers))

    def _opened(self, name: str) -> list[_Group]:
        """Return the prompts whose gate opens; all prompts if a recheck may open it later."""
        if self._resolved.policy.recheck is not None:
            return self._harmful
        rows, scores = self._answers.harmful, self._answers.scores
        numbers = [n for n in range(len(rows)) if self._resolved.opens(name, scores[n])]
        parts = (numbers[i : i + self._size] for i in range(0, len(numbers), self._size))
        return [_Group(part, [rows[number] for number in part], False) for part in parts]

    def _closed(self, turn: int, opened: Sequence[_Group]) -> list[_Group]:
        """Return a group in which no gate opens, if there is one.

        Args:
            turn: number of the category, so that categories get different groups.
            opened: prompts whose gate opens.
        """
        numbers = {number for group in opened for number in group.numbers}
        closed = [group for group in self._harmful if not numbers & set(group.numbers)]
        return [closed[turn % len(closed)]] if closed else []
