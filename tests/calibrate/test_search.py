"""The search, over functions whose best point is known."""

import time

import pytest

from pysteer.calibrate.candidates import Trial
from pysteer.calibrate.search import STRONGER, Deadline, TrialRecord, best, search
from pysteer.calibrate.settings import CalibrateSettings
from pysteer.calibrate.trials import Outcome

NEVER = float("inf")


class Formula:
    """Outcomes by a formula in the place of a model; it notes what was asked."""

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
    """Safe around a strength of the category's own, broken above 1.3, and only by 'two'."""
    centre = {"a": 0.8, "b": 1.2}[name]
    if trial.strength > 1.3:
        return Outcome(1.0, 0.5, 0.0, 10)
    good = trial.candidate == "two" and trial.scope == "all"
    return Outcome(max(0.0, 1 - abs(trial.strength - centre)) * good, 0.0, 0.5, 10)


def test_it_finds_each_category_its_own_best_within_the_limits():
    scorer = Formula(narrow)
    found = run(scorer, settings={"trials": 60})
    assert (found.rounds, found.stopped) == (60, "trials")
    for name, centre in (("a", 0.8), ("b", 1.2)):
        trial = found.chosen[name].trial
        assert (trial.candidate, trial.scope) == ("two", "all")
        assert abs(trial.strength - centre) < 0.1
        assert found.chosen[name].outcome.degenerate == 0
        # By luck alone it would not have been that near: what was learned narrows what is tried.
        late = [one.trial for one in found.trials[name][30:]]
        assert sum(t.candidate == "two" and t.scope == "all" for t in late) > 10  # 5


def test_the_likeliest_is_tried_stronger_while_that_may_help_and_then_the_others():
    """In "a" it breaks at once, in "b" it is safe at the second strength, in "c" never."""

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
    assert tried["b"] == [first, second, strongest, other]  # 1.5 for a margin
    assert tried["c"] == [first, second, strongest, other]


def test_a_category_with_nothing_left_to_better_is_left_alone():
    def outcome(name, trial):
        return Outcome(1.0 if name == "a" else 0.5, 0.0, 0.0, 10)

    scorer = Formula(outcome)
    found = run(scorer, settings={"trials": 4})
    assert [sorted(asked) for asked in scorer.asked] == [["a", "b"], ["a", "b"], ["b"], ["b"]]
    assert found.stopped == "trials"
    settled = run(Formula(lambda name, trial: Outcome(1.0, 0.0, 0.0, 9)))
    assert (settled.rounds, settled.stopped) == (2, "settled")


def test_what_is_safe_at_one_strength_is_chosen_a_step_stronger_if_it_is_as_safe_there():
    """Six prompts do not tell apart what is safe from 0.95 on, and what is from 0.6 on."""

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
    assert one.chosen["safe"].trial.strength == 1.0  # what was not tried is not chosen


def test_a_margin_is_of_the_same_vector_and_no_more_than_a_step():
    def tried(strength, collateral, candidate="one", scope="all"):
        return TrialRecord(Trial(candidate, strength, scope), Outcome(1.0, 0.0, collateral, 6))

    lead, near, far = tried(0.7, 0.1), tried(0.7 * STRONGER, 0.4), tried(1.0, 0.4)
    other, scoped = tried(0.8, 0.4, "two"), tried(0.8, 0.4, scope="response")
    assert best([far, lead, other, scoped], 0.01) is lead
    assert best([far, near, lead, other, scoped], 0.01) is near


@pytest.mark.parametrize("outcome", [Outcome(1.0, 0.02, 0.0, 9), Outcome(1.0, 0.0, 0.1, 9)])
def test_beyond_a_limit_or_with_collateral_nothing_is_settled(outcome):
    assert run(Formula(lambda name, trial: outcome), settings={"trials": 3}).rounds == 3


def test_the_same_seed_tries_the_same():
    scorers = [Formula(narrow) for _ in range(3)]
    for scorer, seed in zip(scorers, (5, 5, 6), strict=True):
        run(scorer, settings={"trials": 8, "seed": seed})
    assert scorers[0].asked == scorers[1].asked
    assert scorers[0].asked != scorers[2].asked


def test_interrupted_after_a_round_it_keeps_the_best():
    rounds = []

    def note(result):
        rounds.append({name: record.trial for name, record in result.chosen.items()})

    found = run(Formula(narrow, interrupt=3), on_round=note, settings={"trials": 9})
    assert (found.rounds, found.stopped) == (3, "interrupted")
    assert {name: one.trial for name, one in found.chosen.items()} == rounds[-1]
    with pytest.raises(KeyboardInterrupt):
        run(Formula(narrow, interrupt=0))


def test_no_round_begins_that_cannot_end_in_time():
    def slow(name, trial):
        time.sleep(0.02)
        return Outcome(0.5, 0.0, 0.0, 9)

    found = run(Formula(slow), deadline=Deadline(time.monotonic()))
    assert (found.rounds, found.stopped) == (1, "time")  # one is always made, or there is no pack
    reserved = run(Formula(slow), deadline=Deadline(time.monotonic() + 60, lambda seconds: 61.0))
    assert reserved.rounds == 1
    assert (
        run(Formula(slow), deadline=Deadline(time.monotonic() + 60), settings={"trials": 3}).rounds
        == 3
    )


def test_limits_go_before_safety_and_strength_decides_between_equals():
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
