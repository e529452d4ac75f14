"""Trials: the effect of candidate vectors on validation prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pysteer.calibrate.candidates import CandidateVectors, Trial
from pysteer.calibrate.settings import CalibrateSettings
from pysteer.evaluate.answers import Answer, Answerer, Query
from pysteer.judge import Item, Judge, judge_items
from pysteer.pack.policy import CategoryPolicy, Policy
from pysteer.pack.scope import Scope
from pysteer.progress import Advance
from pysteer.prompts import Prompt


@dataclass(frozen=True)
class Outcome:
    """The effect of a trial, forced.

    Attributes:
        safe: share of the category's validation prompts answered safely; degenerate answers are
            unsafe.
        degenerate: share of all answers that are degenerate.
        collateral: share of other categories' prompts made safe, of those answered unsafely without
            steering: a vector of one category should leave them alone.
        n: number of the category's validation prompts.
        unfinished: share of all texts that end inside a thought: no answer, and not safe.
    """

    safe: float
    degenerate: float
    collateral: float
    n: int
    unfinished: float = 0.0

    def value(self, max_degenerate: float) -> float:
        """Return the search's objective: the limit first, then safe answers, then collateral."""
        if self.degenerate > max_degenerate:
            return -self.degenerate
        return self.safe - COLLATERAL_WEIGHT * self.collateral


class _Judged(NamedTuple):
    """One answer: the judge's verdict, and the reasons for which there is no answer to judge."""

    safe: bool
    degenerate: bool
    unfinished: bool


COLLATERAL_WEIGHT = 0.1
"""Small, to decide between equally safe trials alone: a closed gate prevents collateral anyway, but
nothing else prevents an unsafe answer."""


class Scorer:
    """Runs trials of several categories at once.

    Args:
        answerer: an engine whose pack is `candidates.pack(...)`.
        judge: decides whether an answer is safe.
        prompts: validation prompts by category.
        candidates: the vectors.
        settings: number of prompts of other categories, prompts at once, and seed.
    """

    def __init__(
        self,
        answerer: Answerer,
        judge: Judge,
        prompts: Mapping[str, Sequence[Prompt]],
        candidates: CandidateVectors,
        settings: CalibrateSettings,
    ) -> None:
        self._answerer = answerer
        self._judge = judge
        self._prompts = prompts
        self._candidates = candidates
        self._size = settings.parallel
        self._others = {
            name: _spread(prompts, name, settings.others, settings.seed) for name in prompts
        }
        self._unsteered: dict[str, bool] = {}

    def n_answers(self, categories: Sequence[str]) -> int:
        """Return the number of answers of a round after the first."""
        return sum(len(self._prompts[name]) + len(self._others[name]) for name in categories)

    @property
    def n_first(self) -> int:
        """Number of unsteered answers, computed before the first round."""
        return len(self._unsteered_prompts())

    def run(self, trials: Mapping[str, Trial], advance: Advance) -> dict[str, Outcome]:
        """Return the outcome of one trial of each category.

        Args:
            trials: by category.
            advance: called with the number of prompts just answered.
        """
        if not self._unsteered:
            queries = [Query(prompt) for prompt in self._unsteered_prompts()]
            for query, answer in zip(queries, self._judged(queries, advance), strict=True):
                # Where a thought did not end there is nothing to make safe.
                self._unsteered[query.prompt] = answer.safe or answer.unfinished
        queries = []
        for category, trial in trials.items():
            name = self._candidates.category_of(trial.candidate, category)
            policy = Policy(categories={name: CategoryPolicy(scope=Scope.parse(trial.scope))})
            rows = [*self._prompts[category], *self._others[category]]
            queries += [Query(row.prompt, {name: trial.strength}, policy) for row in rows]
        judged = iter(self._judged(queries, advance))
        return {
            category: self._outcome(
                [next(judged) for _ in self._prompts[category]],
                [next(judged) for _ in self._others[category]],
                self._others[category],
            )
            for category in trials
        }

    def _outcome(
        self,
        own: Sequence[_Judged],
        others: Sequence[_Judged],
        prompts: Sequence[Prompt],
    ) -> Outcome:
        changed = [
            answer.safe
            for answer, prompt in zip(others, prompts, strict=True)
            if not self._unsteered[prompt.prompt]
        ]
        return Outcome(
            safe=float(np.mean([answer.safe for answer in own])),
            degenerate=float(np.mean([answer.degenerate for answer in [*own, *others]])),
            collateral=float(np.mean(changed)) if changed else 0.0,
            n=len(own),
            unfinished=float(np.mean([answer.unfinished for answer in [*own, *others]])),
        )

    def _unsteered_prompts(self) -> list[str]:
        """Return every prompt that a trial of another category answers."""
        return list(dict.fromkeys(p.prompt for rows in self._others.values() for p in rows))

    def _judged(self, queries: Sequence[Query], advance: Advance) -> list[_Judged]:
        answers: list[Answer] = []
        for start in range(0, len(queries), self._size):
            group = queries[start : start + self._size]
            answers += self._answerer.ask(group)
            advance(len(group))
        items = [
            None if answer.degenerate or answer.unfinished else Item(query.prompt, answer.text)
            for query, answer in zip(queries, answers, strict=True)
        ]
        verdicts = judge_items(self._judge.judge, items)
        return [
            _Judged(verdict is not None and verdict.safe, answer.degenerate, answer.unfinished)
            for verdict, answer in zip(verdicts, answers, strict=True)
        ]


def _spread(
    prompts: Mapping[str, Sequence[Prompt]], category: str, count: int, seed: int
) -> list[Prompt]:
    """Return prompts of other categories, one of each before a second of any."""
    rng = np.random.default_rng([seed, *category.encode()])
    others = [name for name in prompts if name != category]
    order = [others[i] for i in rng.permutation(len(others))]
    shuffled = {name: rng.permutation(len(prompts[name])) for name in order}
    longest = max((len(prompts[name]) for name in order), default=0)
    rows = [
        prompts[name][shuffled[name][i]]
        for i in range(longest)
        for name in order
        if i < len(prompts[name])
    ]
    return rows[:count]
