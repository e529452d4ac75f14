"""Every judge reads the answer, and not the thought before it."""

from contextlib import closing

import pytest

from pysteer.evaluate.judges import CallableJudge, RefusalJudge
from pysteer.evaluate.judges.endpoint import parse_scores, parse_verdict
from pysteer.evaluate.judges.guard import GuardJudge
from pysteer.evaluate.judges.refusal import is_refusal
from pysteer.judge import NO_ANSWER, Item, Verdict

REFUSAL, HELP = "I can't help with that.", "Sure. First, mix the two."
HARMFUL = f"<think>\nI should not help with this. {REFUSAL}\n</think>\n\n{HELP}"
SAFE = f"<think>\nHere is how: first, mix the two. But I should not say so.\n</think>\n\n{REFUSAL}"
ENDLESS = f"<think>\n{REFUSAL} I should not"


@pytest.mark.parametrize(
    ("text", "refuses"),
    [(HARMFUL, False), (SAFE, True), (ENDLESS, False), (f"{REFUSAL}</think>{HELP}", False)],
)
def test_refusal_is_in_the_answer(text, refuses):
    assert is_refusal(text) == refuses
    (verdict,) = RefusalJudge().judge([Item("x", text)])
    assert verdict.safe == refuses


def test_thought_without_end_is_no_answer_and_no_judge_reads_it():
    read = []

    def judge(prompt, answer):
        read.append(answer)
        return answer == REFUSAL

    items = [Item("a", ENDLESS), Item("b", SAFE), Item("c", HARMFUL), Item("d", REFUSAL)]
    found = CallableJudge(judge).judge(items)
    assert found == [NO_ANSWER, Verdict(True), Verdict(False), Verdict(True)]
    assert read == [REFUSAL, HELP, REFUSAL]
    assert not NO_ANSWER.safe
    assert CallableJudge(judge).judge([]) == []


@pytest.mark.parametrize("form", ["llama-guard-3", "shieldgemma"])
def test_guard_reads_the_answer_alone(form, tiny_llama, monkeypatch):
    monkeypatch.setattr(
        "pysteer.evaluate.judges.guard.parse_llama_guard",
        lambda text, version: Verdict(True, text),  # the tiny model writes no verdict
    )
    options = {"n_ctx": 2048, "max_sequences": 2, "n_threads": 1, "type_k": 0, "type_v": 0}
    with closing(GuardJudge(tiny_llama, form, **options)) as judge:
        plain = judge.judge([Item("x", HELP)])
        assert judge.judge([Item("x", ENDLESS), Item("x", HARMFUL)]) == [NO_ANSWER, *plain]


def test_endpoint_that_thinks_gives_its_verdict_behind_the_thought():
    assert parse_verdict("<think>\nsafe?\n</think>\n\nunsafe\nHelps.") == Verdict(False, "Helps.")
    thought = '<think>{"helpfulness": 1, "coherence": 1}</think>'
    scores = parse_scores(thought + '{"helpfulness": 5, "coherence": 4}')
    assert scores == {"helpfulness": 5.0, "coherence": 4.0}
