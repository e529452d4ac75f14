"""The two sides of an extraction: prompts by category, matched or paired, some held out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from pysteer.errors import SteeringError, has_control, quoted
from pysteer.extract.data import where
from pysteer.prompts import Prompt, grouped

_log = logging.getLogger(__name__)

MIN_TO_HOLD_OUT = 5
"""Fewest prompts of a group from which some are held out."""

MAX_HELD_OUT = 200
"""Most prompts held out of a group. More would hardly sharpen the figures, and the activations of
held-out prompts are kept."""

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Sides(Generic[T]):
    """The prompts of an extraction, split.

    Attributes:
        unsafe: category to the prompts that directions are found from.
        safe: the same for safe prompts; the key is "" where all categories share them.
        held_out_unsafe: as `unsafe`, kept for the reported figures.
        held_out_safe: as `safe`, kept for the reported figures.
    """

    unsafe: Mapping[str, Sequence[T]]
    safe: Mapping[str, Sequence[T]]
    held_out_unsafe: Mapping[str, Sequence[T]]
    held_out_safe: Mapping[str, Sequence[T]]

    def safe_for(self, category: str) -> Sequence[T]:
        """Return the safe prompts that a category is held against."""
        return self.safe[self.safe_key(category)]

    def held_out_safe_for(self, category: str) -> Sequence[T]:
        """Return the held-out safe prompts that a category is held against."""
        return self.held_out_safe.get(self.safe_key(category), ())

    def safe_key(self, category: str) -> str:
        """Return the key in `safe` of the prompts that a category is held against."""
        return category if self.matched else ""

    @property
    def matched(self) -> bool:
        """True if each category has its own safe prompts."""
        return "" not in self.safe

    @property
    def all_unsafe(self) -> list[T]:
        """All unsafe prompts by category, each category's held-out prompts last."""
        return _joined(self.unsafe, self.held_out_unsafe)

    @property
    def all_safe(self) -> list[T]:
        """All safe prompts by group, each group's held-out prompts last."""
        return _joined(self.safe, self.held_out_safe)

    def map(self, function: Callable[[T], U]) -> Sides[U]:
        """Return the sides with a function applied to every prompt."""

        def mapped(groups: Mapping[str, Sequence[T]]) -> dict[str, list[U]]:
            return {name: list(map(function, group)) for name, group in groups.items()}

        return Sides(
            mapped(self.unsafe),
            mapped(self.safe),
            mapped(self.held_out_unsafe),
            mapped(self.held_out_safe),
        )


def split_sides(
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    *,
    matched: bool | None,
    paired: bool,
    held_out: float,
    seed: int,
) -> Sides[Prompt]:
    """Group the prompts by category and hold some of each group out.

    Args:
        unsafe: unsafe prompts; prompts without a category are of the category "unsafe".
        safe: safe prompts.
        matched: True: each category is held against the safe prompts of the same category (its
            harmless twins); None means: if every category has safe prompts.
        paired: True: unsafe prompt i belongs to safe prompt i, by `pair_id` (within a category,
            where the safe prompts have one). Prompts without a pair are left out with a warning.
        held_out: the share of each group to hold out, in [0, 1). At least one prompt stays.
        seed: of the choice.

    Raises:
        SteeringError: a side or a category is empty, no prompts are pairs, or two safe prompts
            share a pair_id.
    """
    if not 0 <= held_out < 1:
        raise SteeringError(f"the share to hold out must be in [0, 1), not {held_out}")
    _check(unsafe, "unsafe")
    _check(safe, "safe")
    by_category = grouped(_categorised(unsafe))
    if paired:
        by_category, safe_by_category = _pairs(by_category, safe)
    else:
        safe_by_category = _safe_groups(list(by_category), safe, matched)
    chosen = {}
    for name, prompts in by_category.items():
        chosen[name] = _chosen(len(prompts), held_out, seed, name)
        if held_out and not chosen[name].any():
            _log.warning("category %s has %d prompts, too few to hold any out", name, len(prompts))
    safe_chosen = {
        # Pairs stay together.
        name: chosen[name] if paired else _chosen(len(prompts), held_out, seed, f"safe {name}")
        for name, prompts in safe_by_category.items()
    }
    return Sides(
        _part(by_category, chosen, held=False),
        _part(safe_by_category, safe_chosen, held=False),
        _part(by_category, chosen, held=True),
        _part(safe_by_category, safe_chosen, held=True),
    )


def _check(prompts: Sequence[Prompt], side: str) -> None:
    if not prompts:
        raise SteeringError(f"there are no {side} prompts")
    for prompt in prompts:
        if prompt.category and not prompt.category.strip():
            raise SteeringError(f"{where(prompt)}the category is blank; name it or leave it out")
        if has_control(prompt.category):
            raise SteeringError(
                f"{where(prompt)}the category {quoted(prompt.category)} holds control characters"
            )


def _categorised(unsafe: Sequence[Prompt]) -> Sequence[Prompt]:
    """Return the prompts, each with a category."""
    if all(p.category for p in unsafe):
        return unsafe
    _log.warning("unsafe prompts without a category are taken as the category 'unsafe'")
    return [p if p.category else replace(p, category="unsafe") for p in unsafe]


def _safe_groups(
    categories: Sequence[str], safe: Sequence[Prompt], matched: bool | None
) -> dict[str, list[Prompt]]:
    """Return the safe prompts by category; under "" where all categories share them."""
    groups = grouped(safe)
    lacking = [name for name in categories if name not in groups]
    named = ", ".join(map(quoted, lacking))
    if matched is None:
        matched = not lacking
        _log.info("safe prompts are %s", "matched by category" if matched else "generic")
        if not matched and len(lacking) < len(categories):
            _log.warning(
                "there are no safe prompts of category %s, so every category is held against all "
                "safe prompts",
                named,
            )
    if not matched:
        return {"": list(safe)}
    if lacking:
        raise SteeringError(
            f"there are no safe prompts of category {named}; add some, or use generic safe data"
        )
    unused = [p for name, group in groups.items() if name not in categories for p in group]
    if unused:
        _log.warning(
            "%d safe prompts have another category and are left out, because each category is "
            "held against its own safe prompts; the first is at %s",
            len(unused),
            unused[0].source or quoted(unused[0].prompt),
        )
    return {name: groups[name] for name in categories}


def _pairs(
    unsafe: Mapping[str, Sequence[Prompt]], safe: Sequence[Prompt]
) -> tuple[dict[str, list[Prompt]], dict[str, list[Prompt]]]:
    """Return the unsafe prompts that have a twin, and their twins in the same order."""
    twins = _twins(unsafe, safe)
    ours: dict[str, list[Prompt]] = {}
    theirs: dict[str, list[Prompt]] = {}
    for name, prompts in unsafe.items():
        paired = [p for p in prompts if (name, p.pair_id) in twins]
        if not paired:
            raise SteeringError(
                f"this method needs pairs, but no unsafe prompt of category {quoted(name)} shares "
                "a pair_id with a safe prompt; add pair_ids, or use another method"
            )
        if len(paired) < len(prompts):
            _log.warning(
                "category %s: %d of %d prompts have no pair and are left out",
                name,
                len(prompts) - len(paired),
                len(prompts),
            )
        ours[name] = paired
        theirs[name] = [twins[name, str(p.pair_id)] for p in paired]
    return ours, theirs


def _twins(categories: Iterable[str], safe: Sequence[Prompt]) -> dict[tuple[str, str], Prompt]:
    """Return the safe prompt of each category and pair_id.

    A category's own safe prompts go before prompts of no category.
    """
    by_id: dict[str, list[Prompt]] = {}
    for prompt in safe:
        if prompt.pair_id is not None:
            by_id.setdefault(prompt.pair_id, []).append(prompt)
    twins = {}
    names = set(categories)
    for name in names:
        for pair_id, prompts in by_id.items():
            # Some data number their pairs within each category, others across all.
            fitting = [p for p in prompts if p.category == name]
            fitting = fitting or [p for p in prompts if p.category not in names]
            if not fitting:
                continue
            if len(fitting) > 1:
                first = fitting[0].source or quoted(fitting[0].prompt)
                raise SteeringError(
                    f"{where(fitting[1])}the pair_id {quoted(pair_id)} belongs to another safe "
                    f"prompt ({first}); give each pair its own pair_id"
                )
            twins[name, pair_id] = fitting[0]
    return twins


def _chosen(count: int, share: float, seed: int, name: str) -> npt.NDArray[np.bool_]:
    """Return a mask of the held-out prompts, shape (count,)."""
    chosen = np.zeros(count, bool)
    if share and count >= MIN_TO_HOLD_OUT:
        random = np.random.default_rng([seed, *name.encode()])
        number = min(max(1, round(share * count)), MAX_HELD_OUT, count - 1)
        chosen[random.permutation(count)[:number]] = True
    return chosen


def _part(
    groups: Mapping[str, Sequence[Prompt]],
    chosen: Mapping[str, npt.NDArray[np.bool_]],
    *,
    held: bool,
) -> dict[str, list[Prompt]]:
    return {
        name: [p for p, out in zip(prompts, chosen[name], strict=True) if bool(out) == held]
        for name, prompts in groups.items()
    }


def _joined(used: Mapping[str, Sequence[T]], held_out: Mapping[str, Sequence[T]]) -> list[T]:
    return [p for name, group in used.items() for p in (*group, *held_out.get(name, ()))]
