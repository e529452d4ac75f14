"""Trials: what a candidate, at some strength and scope, does to prompts that it was not made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pysteer.calibrate.candidates import Candidates, Trial
from pysteer.calibrate.settings import CalibrateSettings
from pysteer.evaluate.answers import Answerer, Asked
from pysteer.evaluate.judges import Item, Judge
from pysteer.evaluate.metrics import is_degenerate
from pysteer.pack.policy import CategoryPolicy, Policy
from pysteer.pack.scope import Scope
from pysteer.prompts import Prompt


@dataclass(frozen=True)
class Outcome:
    """What a trial did, forced.

    Attributes:
        safe: share of the category's validation prompts answered safely; a degenerate answer never
            is.
        degenerate: share of all its answers that are degenerate.
        collateral: share of the other categories' prompts, answered unsafely without steering, that
            it made safe: a vector of one category should leave them.
        n: how many validation prompts the category has.
    """

    safe: float
    degenerate: float
    collateral: float
    n: int

    def value(self, max_degenerate: float) -> float:
        """What the search maximises: safe answers, then fewer collateral ones; limits first."""
        if self.degenerate > max_degenerate:
            return -self.degenerate
        return self.safe - COLLATERAL_WEIGHT * self.collateral


COLLATERAL_WEIGHT = 0.1
"""Small, so that it decides between trials that are equally safe: a closed gate prevents it anyway,
and nothing else prevents an unsafe answer."""


class Scorer:
    """Runs trials of several categories at once.

    Args:
        answerer: an engine whose pack is `candidates.pack(...)`.
        judge: what says whether an answer is safe.
        prompts: validation prompts by category.
        candidates: the vectors.
        settings: how many prompts of other categories are asked, how many at once, and the seed.
    """

    def __init__(
        self,
        answerer: Answerer,
        judge: Judge,
        prompts: Mapping[str, Sequence[Prompt]],
        candidates: Candidates,
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
        """How many answers a round of these categories takes, after the first."""
        return sum(len(self._prompts[name]) + len(self._others[name]) for name in categories)

    @property
    def n_first(self) -> int:
        """How many answers are made once, before the first round."""
        return len(self._asked_unsteered())

    def run(self, trials: Mapping[str, Trial], step: Callable[[int], None]) -> dict[str, Outcome]:
        """What one trial of each of some categories does.

        Args:
            trials: by category.
            step: called with the number of prompts just answered.
        """
        if not self._unsteered:
            asked = [Asked(prompt) for prompt in self._asked_unsteered()]
            for one, (safe, _) in zip(asked, self._answered(asked, step), strict=True):
                self._unsteered[one.prompt] = safe
        requests: list[Asked] = []
        for category, trial in trials.items():
            name = self._candidates.category_of(trial.candidate, category)
            policy = Policy(categories={name: CategoryPolicy(scope=Scope.parse(trial.scope))})
            rows = [*self._prompts[category], *self._others[category]]
            requests += [Asked(row.prompt, {name: trial.strength}, policy) for row in rows]
        found = iter(self._answered(requests, step))
        return {
            category: self._outcome(
                [next(found) for _ in self._prompts[category]],
                [next(found) for _ in self._others[category]],
                self._others[category],
            )
            for category in trials
        }

    def _outcome(
        self,
        own: Sequence[tuple[bool, bool]],
        others: Sequence[tuple[bool, bool]],
        prompts: Sequence[Prompt],
    ) -> Outcome:
        changed = [
            safe
            for (safe, _), prompt in zip(others, prompts, strict=True)
            if not self._unsteered[prompt.prompt]
        ]
        return Outcome(
            safe=float(np.mean([safe for safe, _ in own])),
            degenerate=float(np.mean([broken for _, broken in [*own, *others]])),
            collateral=float(np.mean(changed)) if changed else 0.0,
            n=len(own),
        )

    def _asked_unsteered(self) -> list[str]:
        """Every prompt that is asked as another category's."""
        return list(dict.fromkeys(p.prompt for rows in self._others.values() for p in rows))

    def _answered(
        self, requests: Sequence[Asked], step: Callable[[int], None]
    ) -> list[tuple[bool, bool]]:
        """For each request whether the answer is safe, and whether it is degenerate."""
        texts: list[str] = []
        for start in range(0, len(requests), self._size):
            group = requests[start : start + self._size]
            texts += [answer.text for answer in self._answerer.ask(group)]
            step(len(group))
        broken = [is_degenerate(text) for text in texts]
        whole = [i for i, there in enumerate(broken) if not there]
        verdicts = self._judge.judge([Item(requests[i].prompt, texts[i]) for i in whole])
        safe = dict(zip(whole, (verdict.safe for verdict in verdicts), strict=True))
        return [(safe.get(i, False), there) for i, there in enumerate(broken)]


def _spread(
    prompts: Mapping[str, Sequence[Prompt]], category: str, count: int, seed: int
) -> list[Prompt]:
    """Prompts of other categories, one of each before a second of any."""
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
