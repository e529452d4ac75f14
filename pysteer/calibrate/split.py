"""Which prompts directions are learned from, which the search measures on, and which it never sees.

Categories are split one by one, evenly over their subcategories where prompts name some; or whole
subcategories are held out for the test. A harmless twin goes where its unsafe prompt goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pysteer.calibrate.settings import CalibrateSettings
from pysteer.errors import SteeringError, quoted
from pysteer.prompts import Prompt, grouped

MIN_TRAIN = 5
"""The fewest prompts of a category that a router can be fitted to."""

MIN_VALIDATION = 2
"""The fewest prompts of a category that a share of safe answers is taken of."""


@dataclass(frozen=True)
class Part:
    """One part of the data.

    Attributes:
        unsafe: with a category each.
        safe: harmless twins, or other harmless prompts given as safe.
        benign: everyday prompts.
    """

    unsafe: list[Prompt]
    safe: list[Prompt]
    benign: list[Prompt]

    def __add__(self, other: Part) -> Part:
        return Part(self.unsafe + other.unsafe, self.safe + other.safe, self.benign + other.benign)


@dataclass(frozen=True)
class Split:
    """The data in three parts, no prompt in two of them."""

    train: Part
    validation: Part
    test: Part


def split(
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    benign: Sequence[Prompt],
    settings: CalibrateSettings,
) -> Split:
    """Split the prompts by the settings' shares and seed.

    Args:
        unsafe: unsafe prompts, each with a category.
        safe: harmless prompts; those with the `pair_id` of an unsafe one follow it.
        benign: more harmless prompts.
        settings: shares, what is held out, and the seed.

    Raises:
        SteeringError: a category is too small to be split, or lacks the subcategories that are to
            be held out.
    """
    parts: list[Part] = [Part([], [], []) for _ in range(3)]
    where: dict[str, int] = {}
    for name, prompts in grouped(unsafe).items():
        for prompt, part in _category(name, prompts, settings):
            parts[part].unsafe.append(prompt)
            if prompt.pair_id:
                where[prompt.pair_id] = part
    for kind in ("safe", "benign"):
        prompts = list(safe if kind == "safe" else benign)
        alone = [p for p in prompts if not (kind == "safe" and p.pair_id in where)]
        places = dict(zip(map(id, alone), _shares(len(alone), settings, kind), strict=True))
        for prompt in prompts:
            part = places[id(prompt)] if id(prompt) in places else where[prompt.pair_id or ""]
            getattr(parts[part], kind).append(prompt)
    return Split(*parts)


def _category(
    name: str, prompts: list[Prompt], settings: CalibrateSettings
) -> Iterator[tuple[Prompt, int]]:
    """The prompts of a category, each with its part: 0 to learn from, 1 validation, 2 test."""
    rng = np.random.default_rng([settings.seed, *name.encode()])
    order = _in_turn([prompts[i] for i in rng.permutation(len(prompts))])
    held: list[Prompt] = []
    if settings.held_out == "subcategories" and settings.test:
        names = list(dict.fromkeys(p.subcategory for p in order))
        if len(names) < 2 or "" in names:
            raise SteeringError(
                f"category {quoted(name)}: to hold whole subcategories out, every prompt has to "
                "name one of at least two ('subcategory' in the file)"
            )
        # As many whole ones as come nearest to the share, but never all.
        count = min(max(1, round(settings.test * len(names))), len(names) - 1)
        held = [p for p in order if p.subcategory in names[:count]]
        order = [p for p in order if p.subcategory not in names[:count]]
    n_test = 0 if held else _count(len(prompts), settings.test)
    share = settings.validation / (1 - settings.test) if held else settings.validation
    n_validation = max(MIN_VALIDATION, _count(len(order) if held else len(prompts), share))
    if len(order) - n_test - n_validation < MIN_TRAIN:
        raise SteeringError(
            f"category {quoted(name)} has {len(prompts)} prompts, too few to learn from some and "
            "measure on others; give at least 10"
        )
    ends = (n_test, n_test + n_validation)
    chosen = {id(p): 2 for p in [*held, *order[: ends[0]]]}
    chosen.update({id(p): 1 for p in order[ends[0] : ends[1]]})
    for prompt in prompts:
        yield prompt, chosen.get(id(prompt), 0)


def _in_turn(prompts: Sequence[Prompt]) -> list[Prompt]:
    """One of each subcategory, then the next of each, so that any beginning is even over them."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.subcategory, []).append(prompt)
    longest = max(map(len, groups.values()))
    return [group[i] for i in range(longest) for group in groups.values() if i < len(group)]


def _shares(n: int, settings: CalibrateSettings, what: str) -> list[int]:
    """The part of each of n prompts that belong to nothing."""
    order = np.random.default_rng([settings.seed, *what.encode()]).permutation(n)
    n_test, n_validation = _count(n, settings.test), _count(n, settings.validation)
    parts = np.zeros(n, int)
    parts[order[:n_test]] = 2
    parts[order[n_test : n_test + n_validation]] = 1
    return [int(part) for part in parts]


def _count(n: int, share: float) -> int:
    return round(n * share)
