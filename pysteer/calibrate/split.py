"""The split of prompts into training, validation and test.

Categories are split one by one, evenly over their subcategories if prompts name some; or whole
subcategories are held out for the test. A harmless twin follows its unsafe prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pysteer.calibrate.settings import CalibrateSettings
from pysteer.errors import SteeringError, quoted
from pysteer.prompts import Prompt, grouped

MIN_TRAIN = 5
"""Fewest training prompts of a category, for the router."""

MIN_VALIDATION = 2
"""Fewest validation prompts of a category, for its share of safe answers."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts for a calibration, or one part of them.

    Attributes:
        unsafe: unsafe prompts with categories.
        safe: harmless twins of unsafe prompts (by `pair_id`, or by category), or other harmless
            prompts.
        benign: everyday prompts, whose answers must stay as they are.
    """

    unsafe: Sequence[Prompt]
    safe: Sequence[Prompt]
    benign: Sequence[Prompt]

    def __add__(self, other: PromptSet) -> PromptSet:
        return PromptSet(
            [*self.unsafe, *other.unsafe],
            [*self.safe, *other.safe],
            [*self.benign, *other.benign],
        )


@dataclass(frozen=True)
class Split:
    """Prompts in three disjoint parts.

    Attributes:
        train: for directions and the router.
        validation: for the search.
        test: unseen by the calibration.
    """

    train: PromptSet
    validation: PromptSet
    test: PromptSet


def split(prompts: PromptSet, settings: CalibrateSettings) -> Split:
    """Split prompts by the settings' shares and seed.

    Args:
        prompts: the prompts, all unsafe prompts with a category. Safe prompts with the `pair_id` of
            an unsafe prompt follow it.
        settings: shares, kind of held-out prompts, and seed.

    Raises:
        SteeringError: a category is too small, or lacks subcategories to hold out.
    """
    parts: list[dict[str, list[Prompt]]] = [
        {"unsafe": [], "safe": [], "benign": []} for _ in range(3)
    ]
    part_of_pair: dict[str, int] = {}
    for name, rows in grouped(prompts.unsafe).items():
        for prompt, part in _category(name, rows, settings):
            parts[part]["unsafe"].append(prompt)
            if prompt.pair_id:
                part_of_pair[prompt.pair_id] = part
    for kind, rows in (("safe", list(prompts.safe)), ("benign", list(prompts.benign))):
        twins = part_of_pair if kind == "safe" else {}
        single = iter(_shares(sum(p.pair_id not in twins for p in rows), settings, kind))
        for prompt in rows:
            part = twins[prompt.pair_id or ""] if prompt.pair_id in twins else next(single)
            parts[part][kind].append(prompt)
    return Split(*(PromptSet(**part) for part in parts))


def _category(
    name: str, prompts: list[Prompt], settings: CalibrateSettings
) -> Iterator[tuple[Prompt, int]]:
    """Yield the prompts of a category with their parts: 0 training, 1 validation, 2 test."""
    rng = np.random.default_rng([settings.seed, *name.encode()])
    order = _in_turn([prompts[i] for i in rng.permutation(len(prompts))])
    held: list[Prompt] = []
    if settings.held_out == "subcategories" and settings.test:
        names = list(dict.fromkeys(p.subcategory for p in order))
        if len(names) < 2 or "" in names:
            raise SteeringError(
                f"category {quoted(name)}: holding out whole subcategories needs a subcategory on "
                "every prompt, and at least two of them; add 'subcategory' to the file"
            )
        # The number of subcategories nearest to the share, but never all.
        count = min(max(1, round(settings.test * len(names))), len(names) - 1)
        held = [p for p in order if p.subcategory in names[:count]]
        order = [p for p in order if p.subcategory not in names[:count]]
    n_test = 0 if held else _count(len(prompts), settings.test)
    share = settings.validation / (1 - settings.test) if held else settings.validation
    n_validation = max(MIN_VALIDATION, _count(len(order) if held else len(prompts), share))
    if len(order) - n_test - n_validation < MIN_TRAIN:
        raise SteeringError(
            f"category {quoted(name)} has {len(prompts)} prompts, too few to split; give at least "
            "10"
        )
    ends = (n_test, n_test + n_validation)
    chosen = {id(p): 2 for p in [*held, *order[: ends[0]]]}
    chosen.update({id(p): 1 for p in order[ends[0] : ends[1]]})
    for prompt in prompts:
        yield prompt, chosen.get(id(prompt), 0)


def _in_turn(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Interleave the subcategories, so that any beginning is even over them."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.subcategory, []).append(prompt)
    longest = max(map(len, groups.values()))
    return [group[i] for i in range(longest) for group in groups.values() if i < len(group)]


def _shares(n: int, settings: CalibrateSettings, kind: str) -> list[int]:
    """Return the part of each of n prompts without a twin."""
    order = np.random.default_rng([settings.seed, *kind.encode()]).permutation(n)
    n_test, n_validation = _count(n, settings.test), _count(n, settings.validation)
    parts = np.zeros(n, int)
    parts[order[:n_test]] = 2
    parts[order[n_test : n_test + n_validation]] = 1
    return [int(part) for part in parts]


def _count(n: int, share: float) -> int:
    return round(n * share)
