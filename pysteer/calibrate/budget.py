"""Time of a calibration: the share of each stage, and the prompts that fit."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from pysteer.calibrate.split import MIN_TRAIN, MIN_VALIDATION, PromptSet, Split
from pysteer.extract.capture import Capture, Row
from pysteer.prompts import Prompt, grouped

_log = logging.getLogger(__name__)

T = TypeVar("T")

ROUTER_SHARE = 0.3
"""Largest share of the time for the activations of the routers."""

LEARNING_SHARE = 0.55
"""Share of the time after which no direction is learned further: trials and validation need the
rest."""

VALIDATION_MARGIN = 1.3
"""Time of an answer in the validation over its time in trials: 1.2 on the default model, plus a
margin."""

_FRACTIONS = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.0)
_PROBED = 12
_LEAST_SHARE = 1 / 16
_ALWAYS = 100  # prompts that are run in any time


@dataclass(frozen=True)
class Size:
    """Numbers of answered prompts.

    Attributes:
        unsafe: most unsafe prompts of each category, in a trial and in the validation.
        others: prompts of other categories, in a trial.
        benign: benign prompts, in the validation.
    """

    unsafe: int
    others: int
    benign: int

    def scaled(self, fraction: float) -> Size:
        """Return a share of the size, with at least the fewest prompts of a trial."""
        return Size(
            max(min(self.unsafe, MIN_VALIDATION), round(self.unsafe * fraction)),
            round(self.others * fraction),
            round(self.benign * fraction),
        )

    def trial_answers(self, counts: Mapping[str, int]) -> int:
        """Return the number of answers in the first round, unsteered and steered.

        Args:
            counts: category to its number of validation prompts.
        """
        return sum(min(n, self.unsafe) + 2 * self.others for n in counts.values())

    def validation_answers(self, counts: Mapping[str, int]) -> int:
        """Return the number of validation answers: two arms, and benign prompts once more."""
        return 2 * sum(min(n, self.unsafe) for n in counts.values()) + 3 * self.benign


def fitting_size(
    full: Size, counts: Mapping[str, int], seconds: float, left: float, *, trial: bool
) -> Size | None:
    """Return the largest size whose answers fit in the time left; None if none does.

    Args:
        full: the size with enough time.
        counts: category to its number of validation prompts.
        seconds: time of an answer.
        left: the time left, in seconds.
        trial: True: a round of trials comes before the validation.
    """
    for fraction in _FRACTIONS:
        size = full.scaled(fraction)
        answers = size.validation_answers(counts) * VALIDATION_MARGIN
        answers += size.trial_answers(counts) if trial else 0
        if answers * seconds <= left:
            return size
    return None


def affordable(parts: Split, capture: Capture, seconds: float) -> Split:
    """Return the parts, with no more prompts to learn from than the time allows.

    The time of a prompt is measured on a few. The prompts are halved until they fit, so that runs
    under similar load learn from the same prompts; the test part is left alone.

    Args:
        parts: the prompts.
        capture: the model.
        seconds: time for one run over the training and validation prompts.
    """
    whole = parts.train + parts.validation
    prompts = [*whole.unsafe, *whole.safe, *whole.benign]
    if len(prompts) <= _ALWAYS:
        return parts
    each = _seconds_per_prompt(capture, prompts[:: -(-len(prompts) // _PROBED)])
    train, validation, share = parts.train, parts.validation, 1.0
    while share > _LEAST_SHARE and each * _n_prompts(train + validation) > seconds:
        share /= 2
        train, validation = _some(parts.train, share), _some(parts.validation, share)
    if share < 1:
        _log.warning(
            "the time suffices to learn from 1 in %d of the prompts (%.1f prompts a second); more "
            "--minutes, more --threads or a free machine would take them all",
            round(1 / share),
            1 / each,
        )
    return replace(parts, train=train, validation=validation)


def _n_prompts(prompts: PromptSet) -> int:
    return sum(map(len, vars(prompts).values()))


def _seconds_per_prompt(capture: Capture, prompts: Sequence[Prompt]) -> float:
    tokens = [capture.prompt_tokens(prompt.prompt) for prompt in prompts]
    rows = [Row(t, 0, len(t)) for t in tokens if t and len(t) <= capture.n_ctx]
    layers = capture.sites["residual"]
    at = min(layers[-1], round(0.6 * capture.base_model.n_layer))  # no router reads above
    started = time.monotonic()
    for _ in capture.activations(rows, site="residual", layers=[at]):
        pass
    return (time.monotonic() - started) / max(1, len(rows))


def _some(prompts: PromptSet, share: float) -> PromptSet:
    """Return a share of the prompts, evenly over categories, with the twins of the kept prompts."""
    unsafe = [
        prompt
        for rows in grouped(prompts.unsafe).values()
        for prompt in _first(rows, max(MIN_TRAIN, round(share * len(rows))))
    ]
    pairs = {prompt.pair_id for prompt in prompts.unsafe} - {None}
    kept = {prompt.pair_id for prompt in unsafe}
    single = [prompt for prompt in prompts.safe if prompt.pair_id not in pairs]
    chosen = {id(prompt) for prompt in _first(single, round(share * len(single)))}
    return PromptSet(
        unsafe,
        [p for p in prompts.safe if p.pair_id in kept & pairs or id(p) in chosen],
        _first(prompts.benign, max(MIN_TRAIN, round(share * len(prompts.benign)))),
    )


def _first(rows: Sequence[T], n: int) -> list[T]:
    """Return n rows, evenly spread."""
    n = min(n, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)] if n else []
