"""Directions of every category: what each method is fed with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypeAlias

from pysteer.errors import SteeringError, quoted
from pysteer.extract import directions as methods
from pysteer.extract.answers import (
    JUDGED_TOKENS,
    judge_answers,
    own_answers,
    require_labels,
    safe_answers,
)
from pysteer.extract.cache import Progress, no_progress
from pysteer.extract.capture import Row
from pysteer.extract.directions import Direction
from pysteer.extract.examples import Sides, require_fits, require_room
from pysteer.extract.session import Run, slices
from pysteer.extract.settings import LearnedSettings
from pysteer.prompts import Prompt

_log = logging.getLogger(__name__)

Found: TypeAlias = dict[str, dict[int, Direction]]
"""Category to layer to direction."""


def check(run: Run) -> None:
    """Look for what would stop the method, before anything is computed.

    Raises:
        SteeringError: names file and line where it is in the data.
    """
    method, data, sides = run.settings.method, run.data, run.sides
    answered = run.settings.on_answers
    if method == "learned":
        _torch_model(run)
    if data.answers and not answered:
        raise SteeringError(f"safe answers are for contrast and learned, not for {method}")
    if run.judge is not None and method != "guided":
        raise SteeringError(f"a judge is for guided, not for {method}")
    # Those held out too: what is wrong with the data should not depend on the seed.
    both_sides = (
        (False, sides.unsafe, sides.held_out_unsafe),
        (True, sides.safe, sides.held_out_safe),
    )
    groups = [
        (is_safe, [*group, *held_out.get(name, ())])
        for is_safe, side, held_out in both_sides
        for name, group in side.items()
    ]
    used = [p for _, group in groups for p in group]
    if not answered:
        run.rows(used, run.settings.pooling)
    unsafe = [p for is_safe, group in groups if not is_safe for p in group]
    if answered:
        safe_answers(unsafe, data.answers)
        _warn_of_unused_answers(run, unsafe)
    if method == "contrast":
        require_room(run.capture, unsafe, run.rows(unsafe, "prompt"), run.settings.response_tokens)
    if method == "guided" and run.judge is None:
        for is_safe, group in groups:
            if not _taken_as_they_are(run, is_safe, group):
                require_labels(group)
    elif method == "guided":
        silent = [p for p in used if p.response is None]
        require_room(run.capture, silent, run.rows(silent, "prompt"), JUDGED_TOKENS)


def _warn_of_unused_answers(run: Run, unsafe: Sequence[Prompt]) -> None:
    known = {p.prompt for p in unsafe}
    unused = [
        a
        for a in run.data.answers
        if (a.prompt and a.prompt not in known)
        or (not a.prompt and a.category and a.category not in run.sides.unsafe)
    ]
    if unused:
        _log.warning(
            "%d answers fit no prompt and no category, the first at %s",
            len(unused),
            unused[0].source or quoted(unused[0].response),
        )


def find_directions(run: Run) -> Found:
    """Category to layer to direction."""
    if run.settings.method == "learned":
        return _learned(run)
    if run.settings.method == "contrast":
        return _contrast(run)
    if run.settings.method == "guided":
        _keep_what_was_confirmed(run)
    if methods.METHODS[run.settings.method].needs_all:
        return _from_all(run)
    return _from_means(run)


def _from_means(run: Run) -> Found:
    """`mean` and `guided`: no row is kept."""
    groups = [("unsafe", name) for name in run.sides.unsafe]
    groups += [("safe", name) for name in run.sides.safe]
    rows: list[Row] = []
    owners: list[int] = []
    for number, (side, name) in enumerate(groups):
        prompts = getattr(run.sides, side)[name]
        rows += run.rows(prompts, run.settings.pooling)
        owners += [number] * len(prompts)
    means = run.means(rows, owners, len(groups))
    by_group = dict(zip(groups, means, strict=True))

    def one(name: str, index: int) -> Direction:
        safe = by_group["safe", name if run.sides.matched else ""]
        return methods.from_means(by_group["unsafe", name][index], safe[index])

    return _each(run, one)


def _from_all(run: Run) -> Found:
    """Methods that look at every activation, layer by layer."""
    method = methods.METHODS[run.settings.method]
    sides = [run.sides.unsafe, run.sides.safe]
    rows = [
        row
        for side in sides
        for prompts in side.values()
        for row in run.rows(prompts, run.settings.pooling)
    ]
    activations = run.activations(rows, run.settings.site, run.layers)
    parts = slices(sides)
    options = dict(run.settings.options)
    if run.settings.method == "pruned":
        options.setdefault("paired", False)

    def one(name: str, index: int) -> Direction:
        safe = parts[1][name if run.sides.matched else ""]
        return method.function(
            activations[parts[0][name], index], activations[safe, index], **options
        )

    return _each(run, one)


def _each(run: Run, find: Callable[[str, int], Direction]) -> Found:
    """What `find` gives for each category and each index into the layers."""
    found: Found = {}
    for name in run.sides.unsafe:
        found[name] = {}
        for index, layer in enumerate(run.layers):
            try:
                found[name][layer] = find(name, index)
            except SteeringError as error:
                where = f"category {quoted(name)}, layer {layer}, method {run.settings.method}"
                raise SteeringError(f"{where}: {error}") from None
    return found


def _keep_what_was_confirmed(run: Run) -> None:
    """`guided`: leave only prompts whose answers were what their side says."""
    kept: dict[str, dict[str, list[Prompt]]] = {"unsafe": {}, "safe": {}}
    for side, groups in kept.items():
        for name, prompts in getattr(run.sides, side).items():
            if _taken_as_they_are(run, side == "safe", prompts):
                groups[name] = list(prompts)
                continue
            silent = sum(p.response is None for p in prompts) if run.judge is not None else 0
            progress = (
                run.report.start("answers to judge", silent, "answers") if silent else no_progress
            )
            verdicts = judge_answers(
                run.capture,
                prompts,
                run.judge,
                kept=run.answers_file(JUDGED_TOKENS) if silent else None,
                progress=partial(_count_rows, progress),
            )
            groups[name] = [
                p for p, bad in zip(prompts, verdicts, strict=True) if bad == (side == "unsafe")
            ]
            if not groups[name]:
                raise SteeringError(
                    f"the judge found none of {len(prompts)} answers of "
                    f"{name or 'the safe prompts'} {side}; use other prompts, another judge, or "
                    "the method mean"
                )
    run.figures["confirmed"] = {
        side: {name: len(prompts) for name, prompts in groups.items()}
        for side, groups in kept.items()
    }
    run.sides = Sides(
        kept["unsafe"], kept["safe"], run.sides.held_out_unsafe, run.sides.held_out_safe
    )


def _taken_as_they_are(run: Run, safe: bool, prompts: Sequence[Prompt]) -> bool:
    """Whether nobody judges these: safe prompts are what they are said to be without a label."""
    return safe and run.judge is None and all(p.label is None for p in prompts)


def _contrast(run: Run) -> Found:
    """The same prompts continued by a safe answer and by the model's own."""
    k = run.settings.response_tokens
    names = list(run.sides.unsafe)
    prompts = [p for name in names for p in run.sides.unsafe[name]]
    tokens = [row.tokens for row in run.rows(prompts, "prompt")]
    progress = run.report.start("the model's own answers", len(tokens), "answers")
    own = own_answers(
        run.capture,
        tokens,
        k,
        kept=run.answers_file(k),
        progress=partial(_count_rows, progress),
    )
    safe = [
        run.capture.response_tokens(text)[:k] for text in safe_answers(prompts, run.data.answers)
    ]
    rows: list[Row] = []
    owners: list[int] = []
    group = {name: 2 * number for number, name in enumerate(names)}
    same = 0
    for prompt, before, complying, refusing in zip(prompts, tokens, own, safe, strict=True):
        if not complying or complying == refusing[: len(complying)]:
            same += 1  # the model refuses by itself, or says nothing: nothing to hold against
            continue
        for offset, answer in ((0, complying), (1, refusing)):
            row = Row(before + answer, len(before), len(before) + len(answer))
            require_fits(row, run.capture, f"{prompt.source}: " if prompt.source else "")
            rows.append(row)
            owners.append(group[prompt.category or "unsafe"] + offset)
    if same:
        _log.warning("%d of %d own answers are no contrast and are left out", same, len(prompts))
    for name in names:
        if group[name] not in owners:
            raise SteeringError(
                f"category {quoted(name)}: the model complies with none of its prompts, so that "
                "there is no contrast; use another method"
            )
    means = run.means(rows, owners, 2 * len(names))

    def one(name: str, index: int) -> Direction:
        return methods.from_means(means[group[name]][index], means[group[name] + 1][index])

    return _each(run, one)


def _torch_model(run: Run) -> Any:
    try:
        from pysteer.extract.torch_capture import TorchCapture
    except ImportError:
        raise SteeringError(
            "learned directions need torch; run: pip install 'pysteer[extract]'"
        ) from None
    if not isinstance(run.capture, TorchCapture):
        raise SteeringError("learned directions need torch; use --engine torch")
    return run.capture.model


def _learned(run: Run) -> Found:
    """By gradient descent, which needs torch; safe prompts are what the model is held still on."""
    model = _torch_model(run)
    from pysteer.extract.learned import Example, learn

    examples = {}
    for name, prompts in run.sides.unsafe.items():
        texts = safe_answers(prompts, run.data.answers)
        examples[name] = [
            Example(row.tokens, model.response_tokens(text) + model.end_of_turn)
            for row, text in zip(run.rows(prompts, "prompt"), texts, strict=True)
        ]
    benign = [row.tokens for group in run.sides.safe.values() for row in run.rows(group, "prompt")]
    settings = LearnedSettings(seed=run.settings.seed, **run.settings.options)
    advance: Progress | None = None
    last = 0

    def progress(done: int, total: int, _text: str) -> None:
        nonlocal advance, last
        if advance is None:
            advance = run.report.start("learning", total, "steps")
        advance(done - last, 0)
        last = done

    found = learn(
        model,
        examples,
        benign,
        layers=run.layers,
        site=run.settings.site,
        settings=settings,
        progress=progress,
        kept=run.cache,
    )
    run.figures["learned"] = {
        "settings": asdict(settings),
        "categories": {
            name: {
                "steps": one.steps,
                "best_step": one.best_step,
                "validation_loss": one.validation_loss,
                "validation_kl": one.validation_kl,
            }
            for name, one in found.categories.items()
        },
    }
    return {name: one.directions for name, one in found.categories.items()}


def _count_rows(progress: Progress, _tokens: int, rows: int) -> None:
    progress(rows, rows)
