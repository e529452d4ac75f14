"""From prompt files to what is run: categories, held-out prompts, pairs, tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pysteer.chat.messages import Message, user_message
from pysteer.chat.spans import TemplateEnds, message_span, template_ends
from pysteer.errors import SteeringError, quoted
from pysteer.extract.capture import Capture, Pooling, Row, Tokens, pooled_row
from pysteer.prompts import Prompt, grouped

_log = logging.getLogger(__name__)

MIN_TO_HOLD_OUT = 5
"""Groups with fewer prompts hold none out."""

MAX_HELD_OUT = 200
"""Per group: more would not make the figures better, and their activations are kept."""


@dataclass(frozen=True)
class Sides:
    """The prompts of an extraction, split.

    Attributes:
        unsafe: category to the prompts that directions are found from.
        safe: the same for safe prompts; key "" where they are shared by all categories.
        held_out_unsafe: as `unsafe`, kept for the figures that are reported.
        held_out_safe: as `safe`.
    """

    unsafe: Mapping[str, Sequence[Prompt]]
    safe: Mapping[str, Sequence[Prompt]]
    held_out_unsafe: Mapping[str, Sequence[Prompt]]
    held_out_safe: Mapping[str, Sequence[Prompt]]

    def safe_for(self, category: str) -> Sequence[Prompt]:
        """The safe prompts that a category is held against."""
        return self.safe[category if "" not in self.safe else ""]

    def held_out_safe_for(self, category: str) -> Sequence[Prompt]:
        """The same, of those held out."""
        return self.held_out_safe.get(category if "" not in self.safe else "", ())

    @property
    def matched(self) -> bool:
        """Whether each category has safe prompts of its own."""
        return "" not in self.safe


def split_sides(
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    *,
    matched: bool | None,
    paired: bool,
    held_out: float,
    seed: int,
) -> Sides:
    """Group the prompts by category and hold some of each group out.

    Args:
        unsafe: unsafe prompts; those without a category are the category "unsafe".
        safe: safe prompts.
        matched: whether each category is held against the safe prompts of the same category (its
            harmless twins); None is where every category has some.
        paired: whether unsafe prompt i belongs to safe prompt i, by `pair_id` (within a category,
            where the safe prompts have it). Unpaired prompts are left out, which is logged.
        held_out: the share of each group to hold out, in [0, 1). At least one prompt stays.
        seed: of the choice.

    Raises:
        SteeringError: a side or a category is empty, there are no pairs, or a safe prompt has the
            pair_id of another.
    """
    if not 0 <= held_out < 1:
        raise SteeringError(f"the share to hold out is {held_out}; it must be in [0, 1)")
    for prompts, what in ((unsafe, "unsafe"), (safe, "safe")):
        if not prompts:
            raise SteeringError(f"there are no {what} prompts")
        for prompt in prompts:
            if prompt.category and not prompt.category.strip():
                raise SteeringError(f"{_where(prompt)}the category is blank; name it or leave it")
    if any(not p.category for p in unsafe):
        _log.warning("unsafe prompts without a category are taken as the category 'unsafe'")
        unsafe = [p if p.category else replace(p, category="unsafe") for p in unsafe]
    by_category = grouped(unsafe)
    safe_by_category = grouped(safe)
    lacking = [name for name in by_category if name not in safe_by_category]
    if matched is None:
        matched = paired or not lacking
        _log.info("safe prompts are %s", "matched by category" if matched else "generic")
        if not matched and len(lacking) < len(by_category):
            _log.warning(
                "there are no safe prompts of category %s, so every category is held against all "
                "safe prompts",
                ", ".join(map(quoted, lacking)),
            )
    if paired:
        by_category, safe_by_category = _pairs(by_category, safe)
    elif not matched:
        safe_by_category = {"": list(safe)}
    elif lacking:
        raise SteeringError(
            f"there are no safe prompts of category {', '.join(map(quoted, lacking))}; add some, "
            "or use generic safe data"
        )
    else:
        left = [
            p for name, group in safe_by_category.items() if name not in by_category for p in group
        ]
        if left:
            _log.warning(
                "%d safe prompts are of none of the categories and are left out, because each "
                "category is held against its own; the first is at %s",
                len(left),
                left[0].source or quoted(left[0].prompt),
            )
        safe_by_category = {name: safe_by_category[name] for name in by_category}
    split = {}
    for name, prompts in by_category.items():
        order = _chosen(len(prompts), held_out, seed, name)
        split[name] = order
        if held_out and not order.any():
            _log.warning("category %s has %d prompts, too few to hold any out", name, len(prompts))
    safe_split = {
        # Pairs stay together.
        name: split[name] if paired else _chosen(len(prompts), held_out, seed, f"safe {name}")
        for name, prompts in safe_by_category.items()
    }
    return Sides(
        _part(by_category, split, held=False),
        _part(safe_by_category, safe_split, held=False),
        _part(by_category, split, held=True),
        _part(safe_by_category, safe_split, held=True),
    )


def rows_of(
    capture: Capture, prompts: Sequence[Prompt], pooling: Pooling, *, respond: bool = False
) -> list[Row]:
    """What to run for each prompt, and the tokens of it to average.

    Args:
        capture: the model.
        prompts: prompts; with pooling "response" each has one.
        pooling: which tokens are averaged.
        respond: whether a range of positions may reach into the response.

    Raises:
        SteeringError: names file and line of a prompt that is empty, has no response where one is
            needed, or is longer than the model's context.
    """
    ends = prompt_ends(capture)
    rows = []
    for prompt in prompts:
        where = _where(prompt)
        if not prompt.prompt.strip():
            raise SteeringError(f"{where}the prompt is empty")
        response = prompt.response if pooling == "response" or respond else None
        tokens = capture.prompt_tokens(prompt.prompt)
        try:
            row = pooled_row(
                tokens,
                capture.response_tokens(response or ""),
                pooling,
                message_span(tokens, ends),
            )
        except SteeringError as error:
            raise SteeringError(f"{where}{error}") from None
        require_fits(row, capture, where)
        rows.append(row)
    return rows


def prompt_ends(capture: Capture) -> TemplateEnds | None:
    """Return the tokens around the message in every prompt of a capture."""

    def render(messages: Sequence[Message]) -> Tokens:
        return capture.prompt_tokens(messages[0]["content"])

    return template_ends(render, [user_message("any")])


def require_fits(row: Row, capture: Capture, where: str, *, more: int = 0) -> None:
    """Raise SteeringError if the row, and `more` tokens, are longer than the model's context."""
    if len(row.tokens) + more > capture.n_ctx:
        answer = f" and an answer of {more}" if more else ""
        raise SteeringError(
            f"{where}{len(row.tokens)} tokens{answer}, and the context holds {capture.n_ctx}; "
            "shorten the prompt, or with --engine llama raise --context"
        )


def require_room(
    capture: Capture, prompts: Sequence[Prompt], rows: Sequence[Row], more: int
) -> None:
    """Raise SteeringError, naming file and line, where the context has no room for an answer."""
    for prompt, row in zip(prompts, rows, strict=True):
        require_fits(row, capture, _where(prompt), more=more)


def distinct(prompts: Sequence[Prompt], what: str) -> list[Prompt]:
    """The prompts without repeats, of which there is a warning."""
    kept: dict[Prompt, None] = {}
    again: list[Prompt] = []
    for prompt in prompts:
        if prompt in kept:
            again.append(prompt)
        kept[prompt] = None
    if again:
        _log.warning(
            "%d %s prompts repeat others and are left out, the first at %s",
            len(again),
            what,
            again[0].source or quoted(again[0].prompt),
        )
    return list(kept)


def warn_of_both(unsafe: Sequence[Prompt], safe: Sequence[Prompt]) -> None:
    """Log prompts that are on both sides, with the same response or none."""
    known = {(p.prompt, p.response) for p in unsafe}
    both = [p for p in safe if (p.prompt, p.response) in known]
    if both:
        _log.warning(
            "%d prompts are both unsafe and safe, the first at %s",
            len(both),
            both[0].source or quoted(both[0].prompt),
        )


def _where(prompt: Prompt) -> str:
    return f"{prompt.source}: " if prompt.source else ""


def _pairs(
    unsafe: Mapping[str, Sequence[Prompt]], safe: Sequence[Prompt]
) -> tuple[dict[str, list[Prompt]], dict[str, list[Prompt]]]:
    twins = _twins(unsafe, safe)
    ours: dict[str, list[Prompt]] = {}
    theirs: dict[str, list[Prompt]] = {}
    for name, prompts in unsafe.items():
        paired = [p for p in prompts if (name, p.pair_id) in twins]
        if not paired:
            raise SteeringError(
                f"no unsafe prompt of category {quoted(name)} shares a pair_id with a safe one, "
                "and this method needs pairs"
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
    """The safe prompt of each category and pair_id; its own category's goes before others'."""
    by_id: dict[str, list[Prompt]] = {}
    for prompt in safe:
        if prompt.pair_id is not None:
            by_id.setdefault(prompt.pair_id, []).append(prompt)
    twins = {}
    names = set(categories)
    for name in names:
        for pair_id, prompts in by_id.items():
            # Data whose pairs are numbered within each category is as common as the other kind.
            fitting = [p for p in prompts if p.category == name]
            fitting = fitting or [p for p in prompts if p.category not in names]
            if not fitting:
                continue
            if len(fitting) > 1:
                raise SteeringError(
                    f"{_where(fitting[1])}the pair_id {quoted(pair_id)} is that of another safe "
                    f"prompt ({fitting[0].source or quoted(fitting[0].prompt)})"
                )
            twins[name, pair_id] = fitting[0]
    return twins


def _chosen(count: int, share: float, seed: int, name: str) -> np.ndarray:
    """Which of `count` prompts are held out, shape (count,), bool."""
    chosen = np.zeros(count, bool)
    if share and count >= MIN_TO_HOLD_OUT:
        random = np.random.default_rng([seed, *name.encode()])
        number = min(max(1, round(share * count)), MAX_HELD_OUT, count - 1)
        chosen[random.permutation(count)[:number]] = True
    return chosen


def _part(
    groups: Mapping[str, Sequence[Prompt]], chosen: Mapping[str, np.ndarray], *, held: bool
) -> dict[str, list[Prompt]]:
    return {
        name: [p for p, out in zip(prompts, chosen[name], strict=True) if bool(out) == held]
        for name, prompts in groups.items()
    }
