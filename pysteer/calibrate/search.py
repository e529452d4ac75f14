"""The search: one optuna study for each category, all asked in rounds, so that batches are full."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import optuna

from pysteer.calibrate.candidates import Trial
from pysteer.calibrate.settings import CalibrateSettings
from pysteer.calibrate.trials import Outcome, Scorer

STRONGER = 1.3
"""What a strength is multiplied by where more may be safer, or as safe with a margin."""

_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class Tried:
    """A trial and what it did."""

    trial: Trial
    outcome: Outcome


@dataclass
class Found:
    """What a search found.

    Attributes:
        tried: by category, in the order of the rounds.
        chosen: the best of each.
        rounds: how many were completed.
        stopped: why no more were made: "settled", "trials", "time" or "interrupted". Only the first
            two depend on nothing but data, settings and seed.
    """

    tried: dict[str, list[Tried]]
    chosen: dict[str, Tried] = field(default_factory=dict)
    rounds: int = 0
    stopped: str = ""


class Watch(Protocol):
    """Told how the search goes."""

    def start(self, what: str, total: int) -> Callable[[int], None]:
        """A stage begins; what is returned is called with the number of units just done."""
        ...

    def best(self, found: Found) -> None:
        """A round is over; `found` has the best so far."""
        ...


def search(
    scorer: Scorer,
    categories: Sequence[str],
    starts: Sequence[Trial],
    settings: CalibrateSettings,
    *,
    deadline: float,
    reserve: Callable[[float], float],
    watch: Watch,
) -> Found:
    """Try until all categories are settled, have had their trials, or time is up.

    A category is settled once a trial of it kept within the limits, was safe throughout and had no
    collateral, and a stronger one has been tried. Interrupted by KeyboardInterrupt after a round,
    the search ends with what it has.

    Args:
        scorer: runs the trials.
        categories: what is searched for.
        starts: a trial of each vector there is, likely ones first. The first is made as it is, then
            stronger for as long as it keeps within the limits and is not safe throughout; then the
            others as they are; then optuna proposes. What leads and is safe throughout is tried
            once more, stronger: see `best`.
        settings: ranges, limits, trials and seed.
        deadline: of `time.monotonic()`; no round begins that could not end by then.
        reserve: seconds to keep before the deadline, given the seconds that an answer takes.
        watch: told how it goes.

    Raises:
        KeyboardInterrupt: before the first round was over.
    """
    candidates = list(dict.fromkeys(start.candidate for start in starts))
    studies = {name: _study(settings, name, candidates) for name in categories}
    waiting = {name: list(starts) for name in categories}
    found = Found({name: [] for name in categories})
    active = list(categories)
    seconds, answers = 0.0, 0
    while True:
        if found.rounds:
            per_answer = seconds / answers
            needed = per_answer * scorer.n_answers(active) + reserve(per_answer)
            if time.monotonic() + needed > deadline:
                found.stopped = "time"
                break
        n = scorer.n_answers(active) + (0 if found.rounds else scorer.n_first)
        for name in active:
            if waiting[name]:
                studies[name].enqueue_trial(_within(waiting[name].pop(0), settings)._asdict())
        asked = {name: studies[name].ask() for name in active}
        trials = {name: _trial(one, candidates, settings) for name, one in asked.items()}
        started = time.monotonic()
        try:
            outcomes = scorer.run(trials, watch.start(f"trial {found.rounds + 1}", n))
        except KeyboardInterrupt:
            if not found.rounds:
                raise
            found.stopped = "interrupted"
            break
        seconds, answers = seconds + time.monotonic() - started, answers + n
        for name, outcome in outcomes.items():
            studies[name].tell(asked[name], outcome.value(settings.max_degenerate))
            found.tried[name].append(Tried(trials[name], outcome))
            found.chosen[name] = best(found.tried[name], settings.max_degenerate)
        stronger = {name: _stronger(found.tried[name], starts[0], settings) for name in active}
        for name, trial in stronger.items():
            if trial:
                waiting[name].insert(0, trial)
        found.rounds += 1
        watch.best(found)
        active = [n for n in active if stronger[n] or not _settled(found.tried[n], settings)]
        if not active or found.rounds == settings.trials:
            found.stopped = "trials" if active else "settled"
            break
    return found


def best(tried: Sequence[Tried], max_degenerate: float) -> Tried:
    """The trial of the highest value, with a margin in strength where one was tried.

    Of equal values that leads whose strength is nearest to 1. A few prompts cannot tell the least
    strength that is safe from one that is almost: so of the same vector, up to `STRONGER` times as
    strong, the strongest that is as safe and within the limit takes its place. What that costs in
    other categories, the gate prevents.
    """
    lead = _leading(tried, max_degenerate)
    within = [
        one
        for one in _with_margin(tried, lead.trial)
        if one.outcome.safe >= lead.outcome.safe and one.outcome.degenerate <= max_degenerate
    ]
    return max(within, key=lambda one: one.trial.strength, default=lead)


def _leading(tried: Sequence[Tried], max_degenerate: float) -> Tried:
    def rank(one: Tried) -> tuple[float, float]:
        return one.outcome.value(max_degenerate), -abs(one.trial.strength - 1)

    return max(tried, key=rank)


def _with_margin(tried: Sequence[Tried], trial: Trial) -> list[Tried]:
    """What was tried of the same vector, stronger by at most a step."""
    most = trial.strength * STRONGER * _ROUNDING
    return [
        one
        for one in tried
        if _same_vector(one.trial, trial) and trial.strength < one.trial.strength <= most
    ]


def _same_vector(one: Trial, other: Trial) -> bool:
    """Whether they differ in strength at most."""
    return one._replace(strength=other.strength) == other


def _settled(tried: Sequence[Tried], settings: CalibrateSettings) -> bool:
    lead = _leading(tried, settings.max_degenerate).outcome
    return _all_safe(lead, settings) and lead.collateral == 0


def _all_safe(outcome: Outcome, settings: CalibrateSettings) -> bool:
    return outcome.safe == 1 and outcome.degenerate <= settings.max_degenerate


def _stronger(
    tried: Sequence[Tried], likeliest: Trial, settings: CalibrateSettings
) -> Trial | None:
    """More of what leads, for a margin, or of the likeliest vector, where it may lack just that."""
    lead = _leading(tried, settings.max_degenerate)
    if _all_safe(lead.outcome, settings):
        trial = lead.trial
        wanted = trial.strength < settings.strengths[1] and not _with_margin(tried, trial)
    else:
        trial = tried[-1].trial
        wanted = _lacks_strength(tried, likeliest, settings)
    return _within(trial._replace(strength=trial.strength * STRONGER), settings) if wanted else None


def _lacks_strength(tried: Sequence[Tried], likeliest: Trial, settings: CalibrateSettings) -> bool:
    """Whether the last trial leaves it open that more of the likeliest vector does more."""
    trial, outcome = tried[-1].trial, tried[-1].outcome
    if not _same_vector(trial, likeliest):
        return False
    strongest = max(one.trial.strength for one in tried if _same_vector(one.trial, likeliest))
    within = outcome.degenerate <= settings.max_degenerate
    return within and strongest == trial.strength < settings.strengths[1]


def _study(settings: CalibrateSettings, name: str, candidates: Sequence[str]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # A seed of its own: categories in step would try the same strengths all the time.
    seed = zlib.crc32(f"{settings.seed} {name}".encode())
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=len(candidates) + 1)
    return optuna.create_study(direction="maximize", sampler=sampler)


def _within(trial: Trial, settings: CalibrateSettings) -> Trial:
    least, most = settings.strengths
    return trial._replace(strength=min(max(trial.strength, least), most))


def _trial(trial: optuna.Trial, candidates: Sequence[str], settings: CalibrateSettings) -> Trial:
    least, most = settings.strengths
    return Trial(
        trial.suggest_categorical("candidate", list(candidates)),
        trial.suggest_float("strength", least, most, log=True),
        trial.suggest_categorical("scope", list(settings.scopes)),
    )


def as_content(found: Found) -> Mapping[str, Any]:
    """What was tried and chosen, as JSON data, for the provenance."""
    return {
        "rounds": found.rounds,
        "stopped": found.stopped,
        "tried": {
            name: [{**one.trial._asdict(), **vars(one.outcome)} for one in rows]
            for name, rows in found.tried.items()
        },
    }
