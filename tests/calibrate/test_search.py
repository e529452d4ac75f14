"""The search, on functions with a known optimum."""

import time

import pytest

from pysteer.calibrate.candidates import Trial
from pysteer.calibrate.search import STRONGER, Deadline, TrialRecord, best, search
from pysteer.calibrate.settings import CalibrateSettings
from pysteer.calibrate.trials import Outcome

NEVER = float("inf")


class Formula:
    """Fake scorer: outcomes by a formula, and a record of the trials."""

    n_first = 3

    def __init__(self, outcome, *, interrupt=None):
        self.outcome = outcome
        self.interrupt = interrupt
        self.asked = []

    def n_answers(self, categories):
        return len(categories)

    def run(self, trials, step):
        if len(self.asked) == self.interrupt:
            raise KeyboardInterrupt
        self.asked.append(dict(trials))
        return {name: self.outcome(name, trial) for name, trial in trials.items()}


def run(
    scorer,
    categories=("a", "b"),
    candidates=("one", "two"),
    scopes=("all", "all"),
    **options,
):
    given = {"deadline": Deadline(NEVER), **options}
    settings = CalibrateSettings(**given.pop("settings", {}))
    starts = [
        Trial(candidate, 1.0, scope) for candidate, scope in zip(candidates, scopes, strict=False)
    ]
    return search(scorer, list(categories), starts, settings, **given)


def narrow(name, trial):
    """Safe around a strength that depends on the category, for "two" alone; broken above 1.3."""
    centre = {"a": 0.8, "b": 1.2}[name]
    if trial.strength > 1.3:
        return Outcome(1.0, 0.5, 0.0, 10)
    good = trial.candidate == "two" and trial.scope == "all"
    return Outcome(max(0.0, 1 - abs(trial.strength - centre)) * good, 0.0, 0.5, 10)


def test_search_finds_best_of_each_category_within_limits():
    scorer = Formula(narrow)
    found = run(scorer, settings={"trials": 60})
    assert (found.rounds, found.stopped) == (60, "trials")
    for name, centre in (("a", 0.8), ("b", 1.2)):
        trial = found.chosen[name].trial
        assert (trial.candidate, trial.scope) == ("two", "all")
        assert abs(trial.strength - centre) < 0.1
        assert found.chosen[name].outcome.degenerate == 0
        # More than by chance: the search concentrates on the good candidate.
        late = [one.trial for one in found.trials[name][30:]]
        assert sum(t.candidate == "two" and t.scope == "all" for t in late) > 10  # by chance: 5


def test_likeliest_vector_is_tried_stronger_before_others():
    """Category "a" breaks at once, "b" is safe at the second strength, "c" never."""

    def outcome(name, trial):
        safe = {"a": 0.5, "b": float(trial.strength > 1.1), "c": 0.5}[name]
        return Outcome(safe, 0.5 if name == "a" else 0.0, 0.5, 10)

    scorer = Formula(outcome)
    limits = {"trials": 4, "strengths": (0.6, 1.5)}
    run(scorer, "abc", scopes=("prompt", "response"), settings=limits)
    tried = {name: [asked[name] for asked in scorer.asked] for name in "abc"}
    first, second = Trial("one", 1.0, "prompt"), Trial("one", STRONGER, "prompt")
    other = Trial("two", 1.0, "response")
    assert tried["a"][:2] == [first, other]
    strongest = Trial("one", 1.5, "prompt")
    assert tried["b"] == [first, second, strongest, other]  # 1.5 as a margin
    assert tried["c"] == [first, second, strongest, other]


def test_settled_category_is_not_tried_again():
    def outcome(name, trial):
        return Outcome(1.0 if name == "a" else 0.5, 0.0, 0.0, 10)

    scorer = Formula(outcome)
    found = run(scorer, settings={"trials": 4})
    assert [sorted(asked) for asked in scorer.asked] == [["a", "b"], ["a", "b"], ["b"], ["b"]]
    assert found.stopped == "trials"
    settled = run(Formula(lambda name, trial: Outcome(1.0, 0.0, 0.0, 9)))
    assert (settled.rounds, settled.stopped) == (2, "settled")


def test_safe_strength_is_chosen_with_margin_if_as_safe_there():
    """Six prompts cannot tell whether strengths are safe from 0.95 or from 0.6."""

    def outcome(name, trial):
        safe = 1.0 if name != "falls" or trial.strength < 1.2 else 0.9
        broken = 0.1 if name == "breaks" and trial.strength > 1.2 else 0.0
        return Outcome(safe, broken, 0.5 * trial.strength, 6)

    names = ("safe", "falls", "breaks")
    found = run(Formula(outcome), names, ["one"], settings={"trials": 2})
    chosen = {name: one.trial.strength for name, one in found.chosen.items()}
    assert chosen == {"safe": STRONGER, "falls": 1.0, "breaks": 1.0}
    narrow = run(Formula(outcome), names, ["one"], settings={"trials": 2, "strengths": (0.5, 1.1)})
    assert narrow.chosen["safe"].trial.strength == 1.1
    one = run(Formula(outcome), names, ["one"], settings={"trials": 1})
    assert one.chosen["safe"].trial.strength == 1.0  # an untried strength is not chosen


def test_margin_is_same_vector_within_one_step():
    def tried(strength, collateral, candidate="one", scope="all"):
        return TrialRecord(Trial(candidate, strength, scope), Outcome(1.0, 0.0, collateral, 6))

    lead, near, far = tried(0.7, 0.1), tried(0.7 * STRONGER, 0.4), tried(1.0, 0.4)
    other, scoped = tried(0.8, 0.4, "two"), tried(0.8, 0.4, scope="response")
    assert best([far, lead, other, scoped], 0.01) is lead
    assert best([far, near, lead, other, scoped], 0.01) is near


@pytest.mark.parametrize("outcome", [Outcome(1.0, 0.02, 0.0, 9), Outcome(1.0, 0.0, 0.1, 9)])
def test_category_beyond_limit_or_with_collateral_is_not_settled(outcome):
    assert run(Formula(lambda name, trial: outcome), settings={"trials": 3}).rounds == 3


def test_search_with_same_seed_makes_same_trials():
    scorers = [Formula(narrow) for _ in range(3)]
    for scorer, seed in zip(scorers, (5, 5, 6), strict=True):
        run(scorer, settings={"trials": 8, "seed": seed})
    assert scorers[0].asked == scorers[1].asked
    assert scorers[0].asked != scorers[2].asked


def test_search_interrupted_after_round_keeps_best():
    rounds = []

    def note(result):
        rounds.append({name: record.trial for name, record in result.chosen.items()})

    found = run(Formula(narrow, interrupt=3), on_round=note, settings={"trials": 9})
    assert (found.rounds, found.stopped) == (3, "interrupted")
    assert {name: one.trial for name, one in found.chosen.items()} == rounds[-1]
    with pytest.raises(KeyboardInterrupt):
        run(Formula(narrow, interrupt=0))


def test_round_that_cannot_end_in_time_does_not_begin():
    def slow(name, trial):
        time.sleep(0.02)
        return Outcome(0.5, 0.0, 0.0, 9)

    found = run(Formula(slow), deadline=Deadline(time.monotonic()))
    assert (found.rounds, found.stopped) == (1, "time")  # the first round always runs
    reserved = run(Formula(slow), deadline=Deadline(time.monotonic() + 60, lambda seconds: 61.0))
    assert reserved.rounds == 1
    assert (
        run(Formula(slow), deadline=Deadline(time.monotonic() + 60), settings={"trials": 3}).rounds
        == 3
    )


def test_best_ranks_limits_before_safety_and_strength_last():
    def tried(strength, *outcome):
        return TrialRecord(Trial("one", strength, "all"), Outcome(*outcome, 10))

    broken, fair = tried(1.0, 1.0, 0.1, 0.0), tried(1.0, 0.2, 0.01, 1.0)
    assert best([broken, fair], 0.01) is fair
    quiet, loud = tried(1.5, 0.9, 0.0, 0.0), tried(1.0, 0.9, 0.0, 1.0)
    assert best([loud, quiet], 0.01) is quiet
    far, near = tried(0.7, 0.9, 0.0, 0.5), tried(1.1, 0.9, 0.0, 0.5)
    assert best([far, near], 0.01) is near
    least = [tried(1.0, 1.0, 0.5, 0.0), tried(1.0, 1.0, 0.2, 0.0)]
    assert best(least, 0.01) is least[1]
