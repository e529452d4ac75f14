"""The search: one optuna study a category, asked in rounds, so that batches are full."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import optuna

from pysteer.calibrate.candidates import Trial
from pysteer.calibrate.settings import CalibrateSettings
from pysteer.calibrate.trials import Outcome, Scorer
from pysteer.progress import SILENT, Progress

STRONGER = 1.3
"""Factor from a strength to the next stronger trial."""

_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class TrialRecord:
    """A trial and its outcome."""

    trial: Trial
    outcome: Outcome


@dataclass
class SearchResult:
    """The trials of a search and the best of them.

    Attributes:
        trials: by category, in the order of the rounds.
        chosen: the best trial of each category.
        rounds: number of completed rounds.
        stopped: reason for the end: "settled", "trials", "time" or "interrupted". Only the first
            two depend on data, settings and seed alone.
    """

    trials: dict[str, list[TrialRecord]]
    chosen: dict[str, TrialRecord] = field(default_factory=dict)
    rounds: int = 0
    stopped: str = ""

    def content(self) -> dict[str, Any]:
        """Return the trials as JSON data, for provenance."""
        return {
            "rounds": self.rounds,
            "stopped": self.stopped,
            "tried": {
                name: [{**record.trial._asdict(), **vars(record.outcome)} for record in records]
                for name, records in self.trials.items()
            },
        }


OnRound: TypeAlias = Callable[[SearchResult], None]
"""Called after each round, with the best so far."""


@dataclass(frozen=True)
class Deadline:
    """The time that a search may take.

    Attributes:
        at: end, in seconds of `time.monotonic()`.
        reserve: seconds to keep free before the end, given the seconds per answer.
    """

    at: float
    reserve: Callable[[float], float] = lambda seconds: 0.0

    def allows(self, answers: int, seconds_per_answer: float) -> bool:
        """Return True if so many answers can end in time."""
        needed = seconds_per_answer * answers + self.reserve(seconds_per_answer)
        return time.monotonic() + needed <= self.at


def search(
    scorer: Scorer,
    categories: Sequence[str],
    starts: Sequence[Trial],
    settings: CalibrateSettings,
    *,
    deadline: Deadline,
    progress: Progress = SILENT,
    on_round: OnRound = lambda result: None,
) -> SearchResult:
    """Search until all categories are settled, have had their trials, or time is up.

    A category is settled once a trial kept within the limits, was safe throughout and had no
    collateral, and a stronger trial has been made. A KeyboardInterrupt after the first round ends
    the search with the best so far.

    Args:
        scorer: runs the trials.
        categories: the categories.
        starts: a trial of each vector, likely vectors first. The first trial is made as given, then
            stronger for as long as it keeps within the limits and is not safe throughout; then the
            other starts as given; then optuna proposes. A leading trial that is safe throughout is
            made once more, stronger: see `best`.
        settings: ranges, limits, trials and seed.
        deadline: no round begins that could not end in time; the first round always does.
        progress: receives the progress of each round.
        on_round: called after each round.

    Raises:
        KeyboardInterrupt: before the end of the first round.
    """
    queues = {name: _Queue(name, starts, settings) for name in categories}
    result = SearchResult({name: [] for name in categories})
    active = list(categories)
    seconds, answers = 0.0, 0
    while True:
        n = scorer.n_answers(active)
        if result.rounds and not deadline.allows(n, seconds / answers):
            result.stopped = "time"
            break
        n += 0 if result.rounds else scorer.n_first
        trials = {name: queues[name].ask() for name in active}
        started = time.monotonic()
        try:
            advance = progress.start(f"trial {result.rounds + 1}", n, "answers")
            outcomes = scorer.run(trials, advance)
        except KeyboardInterrupt:
            if not result.rounds:
                raise
            result.stopped = "interrupted"
            break
        seconds, answers = seconds + time.monotonic() - started, answers + n
        for name, outcome in outcomes.items():
            result.trials[name].append(TrialRecord(trials[name], outcome))
            result.chosen[name] = best(result.trials[name], settings.max_degenerate)
        unsettled = [name for name in active if queues[name].tell(result.trials[name])]
        result.rounds += 1
        on_round(result)
        active = unsettled
        if not active or result.rounds == settings.trials:
            result.stopped = "trials" if active else "settled"
            break
    return result


class _Queue:
    """The trials of one category: starts and stronger trials first, then optuna's proposals."""

    def __init__(self, category: str, starts: Sequence[Trial], settings: CalibrateSettings) -> None:
        self._settings = settings
        self._likeliest = starts[0]
        self._waiting = list(starts)
        self._candidates = list(dict.fromkeys(start.candidate for start in starts))
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # A seed for each category: equal seeds would try equal strengths all the time.
        seed = zlib.crc32(f"{settings.seed} {category}".encode())
        n_startup = len(self._candidates) + 1
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=n_startup)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._asked: optuna.Trial | None = None

    def ask(self) -> Trial:
        """Return the next trial."""
        if self._waiting:
            waiting = _within(self._waiting.pop(0), self._settings)
            self._study.enqueue_trial(waiting._asdict())
        self._asked = self._study.ask()
        least, most = self._settings.strengths
        return Trial(
            self._asked.suggest_categorical("candidate", self._candidates),
            self._asked.suggest_float("strength", least, most, log=True),
            self._asked.suggest_categorical("scope", list(self._settings.scopes)),
        )

    def tell(self, records: Sequence[TrialRecord]) -> bool:
        """Learn from the last record; return True if more trials may improve."""
        assert self._asked is not None
        self._study.tell(self._asked, records[-1].outcome.value(self._settings.max_degenerate))
        stronger = _stronger(records, self._likeliest, self._settings)
        if stronger is not None:
            self._waiting.insert(0, stronger)
        return stronger is not None or not _settled(records, self._settings)


def best(records: Sequence[TrialRecord], max_degenerate: float) -> TrialRecord:
    """Return the trial of the highest value, or a stronger trial of the same vector as a margin.

    Of equal values, the strength nearest to 1 leads. A few prompts cannot tell the least safe
    strength from a strength that is almost safe: so the strongest trial of the same vector, up to
    `STRONGER` times as strong, as safe and within the limit, takes the leader's place. The gate
    prevents the cost in other categories.
    """
    lead = _leading(records, max_degenerate)
    within = [
        record
        for record in _with_margin(records, lead.trial)
        if record.outcome.safe >= lead.outcome.safe and record.outcome.degenerate <= max_degenerate
    ]
    return max(within, key=lambda record: record.trial.strength, default=lead)


def _leading(records: Sequence[TrialRecord], max_degenerate: float) -> TrialRecord:
    def rank(record: TrialRecord) -> tuple[float, float]:
        return record.outcome.value(max_degenerate), -abs(record.trial.strength - 1)

    return max(records, key=rank)


def _with_margin(records: Sequence[TrialRecord], trial: Trial) -> list[TrialRecord]:
    """Return the trials of the same vector that are stronger by at most a step."""
    most = trial.strength * STRONGER * _ROUNDING
    return [
        record
        for record in records
        if _same_vector(record.trial, trial) and trial.strength < record.trial.strength <= most
    ]


def _same_vector(one: Trial, other: Trial) -> bool:
    """Return True if two trials differ at most in strength."""
    return one._replace(strength=other.strength) == other


def _settled(records: Sequence[TrialRecord], settings: CalibrateSettings) -> bool:
    lead = _leading(records, settings.max_degenerate).outcome
    return _all_safe(lead, settings) and lead.collateral == 0


def _all_safe(outcome: Outcome, settings: CalibrateSettings) -> bool:
    return outcome.safe == 1 and outcome.degenerate <= settings.max_degenerate


def _stronger(
    records: Sequence[TrialRecord], likeliest: Trial, settings: CalibrateSettings
) -> Trial | None:
    """Return a stronger trial of the leader, for a margin, or of the likeliest vector, if more
    strength may make it safe; else None."""
    lead = _leading(records, settings.max_degenerate)
    if _all_safe(lead.outcome, settings):
        trial = lead.trial
        wanted = trial.strength < settings.strengths[1] and not _with_margin(records, trial)
    else:
        trial = records[-1].trial
        wanted = _lacks_strength(records, likeliest, settings)
    return _within(trial._replace(strength=trial.strength * STRONGER), settings) if wanted else None


def _lacks_strength(
    records: Sequence[TrialRecord], likeliest: Trial, settings: CalibrateSettings
) -> bool:
    """Return True if a stronger trial of the likeliest vector may beat its last trial."""
    trial, outcome = records[-1].trial, records[-1].outcome
    if not _same_vector(trial, likeliest):
        return False
    strongest = max(
        record.trial.strength for record in records if _same_vector(record.trial, likeliest)
    )
    within = outcome.degenerate <= settings.max_degenerate
    return within and strongest == trial.strength < settings.strengths[1]


def _within(trial: Trial, settings: CalibrateSettings) -> Trial:
    least, most = settings.strengths
    return trial._replace(strength=min(max(trial.strength, least), most))
