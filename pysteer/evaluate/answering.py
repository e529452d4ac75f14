"""Which groups of prompts are asked in which arm, and what need not be asked.

- Prompts are grouped by category, in their order, `group_size` at a time; every arm answers the
  same groups, so that an answer that no steering touched is the same text in all of them.
- Where steering changes one answer of a group, it becomes longer or shorter, and the others are
  computed in other batches: their text may change although nothing steered them. So the answers of
  a benign group that no category acted on are compared with those of the same group in which they
  are not steered, and all else is as it was.
- A single category, gated, leaves the answer as it is where its gate is closed. So only prompts
  whose gate opens are answered; of the others one group for each category is, to see that this
  holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from pysteer.evaluate.answers import Answer, Answerer, Asked
from pysteer.evaluate.arms import Arm, Steered
from pysteer.evaluate.isolation import Mode, arm_name, opens
from pysteer.evaluate.report import STEERED, UNSTEERED
from pysteer.pack.resolved import AUTO
from pysteer.prompts import Prompt

NOISE_PROMPTS = 100
"""Unsteered prompts that are answered once more, batched otherwise."""

_Named = dict[str, Answer]


class _Progress(Protocol):
    def start(self, what: str, total: int) -> Callable[[int], None]: ...


@dataclass
class Answers:
    """Everything that was answered.

    Attributes:
        harmful: the harmful prompts.
        benign: the benign ones.
        answers: for each of them, harmful first, name of the arm to answer.
        unchanged: of benign prompts, by number and arm, whether the answer is the unsteered one.
        scores: by number, what the router saw.
        ranks: by number, what it compared the categories by.
        fired: by number, for which categories a gate opened with all of them gated.
        noise: of some prompts, whether the unsteered answer differs when batched otherwise.
        checked: of answers that a closed gate leaves as they are, whether some differ after all.
    """

    harmful: list[Prompt]
    benign: list[Prompt]
    answers: list[_Named]
    unchanged: dict[tuple[int, str], bool] = field(default_factory=dict)
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    ranks: dict[int, dict[str, float]] = field(default_factory=dict)
    fired: dict[int, list[str]] = field(default_factory=dict)
    noise: list[bool] = field(default_factory=list)
    checked: dict[str, list[bool]] = field(default_factory=dict)

    def rows(self) -> Iterator[tuple[Prompt, bool, _Named]]:
        """Each prompt, whether it is benign, and its answers."""
        for number, prompt in enumerate([*self.harmful, *self.benign]):
            yield prompt, number >= len(self.harmful), self.answers[number]


@dataclass(frozen=True)
class _Group:
    """Numbers of prompts that are asked together."""

    numbers: list[int]
    prompts: list[Prompt]
    benign: bool


def answer_everything(
    answerer: Answerer,
    steered: Steered,
    arms: Sequence[Arm],
    harmful: list[Prompt],
    benign: list[Prompt],
    *,
    isolation: Sequence[Mode],
    group_size: int,
    progress: _Progress,
) -> Answers:
    """Ask all that is to be asked; see the module.

    Args:
        answerer: whom.
        steered: pack and policy.
        arms: the arms, unsteered first.
        harmful: prompts with categories.
        benign: harmless prompts.
        isolation: the matrices wanted.
        group_size: prompts asked at once.
        progress: told what is being done.

    Raises:
        SteeringError: the engine cannot do what is asked.
    """
    found = Answers(harmful, benign, [{} for _ in range(len(harmful) + len(benign))])
    work = _Work(answerer, steered, found, group_size)
    step = progress.start("answering", len(arms) * len(found.answers))
    for group in work.groups:
        work.answer(group, arms, step)
    chosen = work.noise_numbers()
    work.measure_noise(chosen, progress.start("answering again, batched otherwise", len(chosen)))
    if steered.gated:
        work.route(arms, progress)
    for mode in isolation:
        work.isolate(mode, progress)
    return found


class _Work:
    def __init__(
        self, answerer: Answerer, steered: Steered, found: Answers, group_size: int
    ) -> None:
        self._answerer = answerer
        self._steered = steered
        self._found = found
        self._size = group_size
        n = len(found.harmful)
        self.groups = [
            *self._grouped(found.harmful, 0, benign=False),
            *self._grouped(found.benign, n, benign=True),
        ]

    def _grouped(self, prompts: Sequence[Prompt], start: int, *, benign: bool) -> Iterator[_Group]:
        by_category: dict[str, list[int]] = {}
        for number, prompt in enumerate(prompts):
            by_category.setdefault(prompt.category, []).append(number)
        for numbers in by_category.values():
            for first in range(0, len(numbers), self._size):
                part = numbers[first : first + self._size]
                yield _Group([start + i for i in part], [prompts[i] for i in part], benign)

    def answer(self, group: _Group, arms: Sequence[Arm], step: Callable[[int], None]) -> None:
        """Ask one group in all arms."""
        plain = self._asked(group, Arm(UNSTEERED, None))
        for arm in arms:
            asked = self._asked(group, arm)
            against = plain if group.benign and arm.steering is not None else None
            answers = self._answerer.ask(asked, against)
            for number, answer in zip(group.numbers, answers, strict=True):
                self._found.answers[number][arm.name] = answer
            if against is not None:
                self._compare(group, arm, asked, answers)
            elif group.benign:
                self._found.unchanged.update(((number, arm.name), True) for number in group.numbers)
            step(len(group.numbers))

    def _asked(self, group: _Group, arm: Arm) -> list[Asked]:
        asked = []
        for number, prompt in zip(group.numbers, group.prompts, strict=True):
            asked += self._steered.asked(arm, [prompt], number)
        return asked

    def _compare(
        self, group: _Group, arm: Arm, asked: Sequence[Asked], answers: Sequence[Answer]
    ) -> None:
        """Which of a benign group's answers are the unsteered ones, in the same company."""
        before = [self._found.answers[number][UNSTEERED] for number in group.numbers]
        touched = [bool(answer.active) for answer in answers]
        if any(touched) and not all(touched):
            # The same company: those that nothing acted on are asked without steering.
            company = [
                one if there else replace(one, steering=None, policy=None)
                for one, there in zip(asked, touched, strict=True)
            ]
            again = self._answerer.ask(company, asked)
            for i, number in enumerate(group.numbers):
                if not touched[i]:
                    before[i] = again[i]
                    # The other way round, which makes no difference to what is to be 0.
                    self._found.answers[number][arm.name] = replace(
                        answers[i], first_token_kl=again[i].first_token_kl
                    )
        for number, answer, there in zip(group.numbers, answers, before, strict=True):
            self._found.unchanged[number, arm.name] = answer.text == there.text

    def noise_numbers(self) -> list[int]:
        """Prompts to answer in other company: benign ones, if there are any."""
        n = len(self._found.harmful)
        numbers = range(n, n + len(self._found.benign)) if self._found.benign else range(n)
        chosen = list(numbers)[:NOISE_PROMPTS]
        return chosen if self._size > 1 and len(chosen) > 1 else []

    def measure_noise(self, numbers: Sequence[int], step: Callable[[int], None]) -> None:
        """Answer these prompts once more, each beside others than before."""
        stride = -(-len(numbers) // self._size) if numbers else 0
        rows = [prompt for prompt, _, _ in self._found.rows()]
        for start in range(stride):
            part = numbers[start::stride]
            again = self._answerer.ask([Asked(rows[number].prompt) for number in part])
            for number, answer in zip(part, again, strict=True):
                before = self._found.answers[number][UNSTEERED]
                self._found.noise.append(answer.text != before.text)
            step(len(part))

    def route(self, arms: Sequence[Arm], progress: _Progress) -> None:
        """What the router says of every prompt: from the steered arm, if that asked it."""
        arm = next(arm for arm in arms if arm.name == STEERED)
        step = None
        if not self._steered.routes_all(arm.steering):
            arm = Arm("gates", AUTO)
            step = progress.start("asking the router", len(self._found.answers))
        for group in self.groups:
            if step is None:
                answers = [self._found.answers[number][STEERED] for number in group.numbers]
            else:
                answers = self._answerer.ask(self._asked(group, arm), max_tokens=1)
                step(len(group.numbers))
            for number, answer in zip(group.numbers, answers, strict=True):
                self._found.scores[number] = answer.scores
                self._found.ranks[number] = answer.ranks
                self._found.fired[number] = answer.fired

    def isolate(self, mode: Mode, progress: _Progress) -> None:
        """Switch on one category at a time, over the harmful prompts."""
        harmful = [group for group in self.groups if not group.benign]
        if mode == "forced":
            names = list(self._steered.pack.categories)
            step = progress.start("isolation, forced", len(names) * len(self._found.harmful))
            for name in names:
                arm = Arm(arm_name(mode, name), {name: self._steered.strength(name)})
                for group in harmful:
                    self.answer(group, [arm], step)
            return
        plan = {name: self._open(name, harmful) for name in self._steered.gated}
        checks = {
            name: self._closed(number, harmful, plan[name]) for number, name in enumerate(plan)
        }
        asked = [group for name in plan for group in (*plan[name], *checks[name])]
        total = sum(len(group.numbers) for group in asked)
        step = progress.start("isolation, gated", total)
        differs = self._found.checked.setdefault(mode, [])
        for name, groups in plan.items():
            arm = Arm(arm_name(mode, name), {name: AUTO})
            for group in groups:
                self.answer(group, [arm], step)
            for group in checks[name]:
                for number, answer in zip(
                    group.numbers, self._answerer.ask(self._asked(group, arm)), strict=True
                ):
                    differs.append(answer.text != self._found.answers[number][UNSTEERED].text)
                step(len(group.numbers))

    def _open(self, name: str, harmful: Sequence[_Group]) -> list[_Group]:
        """The prompts whose gate opens, grouped anew; with re-checks all, as it may open later."""
        if self._steered.policy.recheck is not None:
            return list(harmful)
        rows = self._found.harmful
        fires = [n for n in range(len(rows)) if opens(self._steered, name, self._found.scores[n])]
        parts = (fires[start : start + self._size] for start in range(0, len(fires), self._size))
        return [_Group(part, [rows[number] for number in part], False) for part in parts]

    def _closed(
        self, number: int, harmful: Sequence[_Group], opened: Sequence[_Group]
    ) -> list[_Group]:
        """A group of which no gate opens: its answers should be the unsteered ones.

        Args:
            number: of the category, so that the choice is not the same for all.
            harmful: all groups.
            opened: the prompts whose gate opens.
        """
        fires = {prompt for group in opened for prompt in group.numbers}
        closed = [group for group in harmful if not fires & set(group.numbers)]
        return [closed[number % len(closed)]] if closed else []
