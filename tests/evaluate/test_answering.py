"""Unchanged answers and skipped questions, with a fake engine."""

from itertools import chain

import pytest

from pysteer import SteeringPack
from pysteer.evaluate.answering import AnswerSet, answer_everything
from pysteer.evaluate.answers import Answer
from pysteer.evaluate.arms import main_arms
from pysteer.pack.resolved import ResolvedPolicy
from pysteer.progress import SILENT
from pysteer.prompts import Prompt
from pysteer.runtime.arguments import INHERIT


class Engine:
    """Fake answerer: steers prompts with a category's mark; texts depend on steered neighbours.

    Attributes:
        leaks: True if a closed gate changes the text too, as no real engine may.
    """

    def __init__(self, leaks=False):
        self.leaks = leaks
        self.groups = []

    def ask(self, group, reference=None, *, max_tokens=None):
        self.groups.append([(one.prompt, one.steering) for one in group])
        active = [self.active(one) for one in group]
        company = sum(map(bool, active))
        answers = []
        for one, names in zip(group, active, strict=True):
            leak = self.leaks and one.steering is not None and not names
            text = "refused" if names else f"{one.prompt}, beside {company}{' leaked' * leak}"
            scores = {f"says {x}": 1.0 if f"*{x}" in one.prompt else 0.0 for x in "qz"}
            # Not 0 where the reference group has another number of steered prompts.
            kl = None if reference is None else 0.0
            if reference is not None and company != sum(map(bool, map(self.active, reference))):
                kl = 0.25
            answers.append(Answer(text, "stop", 1, list(names), names, scores, kl))
        return answers

    def active(self, asked):
        if asked.steering is None:
            return {}
        on = asked.steering if isinstance(asked.steering, dict) else ("says q", "says z")
        return {name: 1.0 for name in on if f"*{name[-1]}" in asked.prompt}


@pytest.fixture
def run(routed_pack):
    resolved = ResolvedPolicy(SteeringPack.load(routed_pack))

    def call(engine, harmful, benign, isolation=()) -> AnswerSet:
        return answer_everything(
            engine,
            resolved,
            main_arms(INHERIT, []),
            harmful,
            benign,
            isolation=isolation,
            group_size=4,
            progress=SILENT,
        )

    return call


HARMFUL = [Prompt(f"{i} *{x}", f"says {x}") for x in "qz" for i in range(8)]
BENIGN = [Prompt(f"benign {i}{' *q' if i == 2 else ''}") for i in range(7)]


def test_answer_changed_by_other_batches_alone_is_unchanged(run):
    engine = Engine()
    found = run(engine, HARMFUL, BENIGN)
    first = len(HARMFUL)
    steered = [found.answers[first + i]["steered"].text for i in range(7)]
    plain = [found.answers[first + i]["unsteered"].text for i in range(7)]
    assert [a == b for a, b in zip(steered, plain, strict=True)] == [False] * 4 + [True] * 3
    unchanged = [found.unchanged[first + i, "steered"] for i in range(7)]
    assert unchanged == [True, True, False, True, True, True, True]
    kl = [found.answers[first + i]["steered"].first_token_kl for i in range(7)]
    assert kl == [0.0, 0.0, 0.25, 0.0, 0.0, 0.0, 0.0]


def test_answer_changed_behind_closed_gate_is_changed(run):
    found = run(Engine(leaks=True), HARMFUL, BENIGN)
    first = len(HARMFUL)
    assert not any(found.unchanged[first + i, "steered"] for i in range(7))


def test_noise_is_measured_on_benign_prompts_in_other_groups(run):
    engine, cold = Engine(), [prompt for prompt in BENIGN if "*" not in prompt.prompt]
    found = run(engine, HARMFUL[:1], cold)
    assert found.noise == [False] * 6  # no prompt is steered, so neighbours do not matter
    groups = [[prompt for prompt, _ in group] for group in engine.groups if group[0][1] is None]
    first, again = groups[1:3], groups[-2:]
    for groups in (first, again):
        assert sorted(chain(*groups)) == sorted(prompt.prompt for prompt in cold)
    assert {frozenset(g) for g in first} != {frozenset(g) for g in again}


def test_gated_isolation_asks_only_where_gates_open_and_checks_others(run, monkeypatch):
    # In place of the router's thresholds: a gate opens above a score of one half.
    monkeypatch.setattr(ResolvedPolicy, "opens", lambda self, name, scores: scores[name] > 0.5)
    engine = Engine()
    found = run(engine, HARMFUL, [], ["gated"])
    for number, prompt in enumerate(HARMFUL):
        arms = {name for name in found.answers[number] if name.startswith("gated")}
        assert arms == {f"gated: {prompt.category}"}
    assert found.checked["gated"] == [False] * 8  # a group of four for each category
    asked = [group for group in engine.groups if isinstance(group[0][1], dict)]
    assert sum(map(len, asked)) == 16 + 8
    leaking = run(Engine(leaks=True), HARMFUL, [], ["gated"])
    assert leaking.checked["gated"] == [True] * 8


def test_forced_isolation_asks_every_harmful_prompt(run):
    found = run(Engine(), HARMFUL, BENIGN, ["forced"])
    for number in range(len(HARMFUL)):
        assert {"forced: says q", "forced: says z"} <= set(found.answers[number])
    assert not any("forced: says q" in answers for answers in found.answers[len(HARMFUL) :])
