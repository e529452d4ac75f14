"""Judges by their specs, and functions as judges."""

import pytest

from pysteer import SteeringError
from pysteer.evaluate.judges import (
    CallableJudge,
    CallableReward,
    RefusalJudge,
    open_judge,
    open_reward,
)
from pysteer.judge import Item, Verdict

ITEMS = [Item("p", "I can't help with that."), Item("p", "Sure, here is how.")]


def test_refusal_judge_calls_only_refusals_safe():
    judge = open_judge("refusal")
    assert isinstance(judge, RefusalJudge)
    assert [verdict.safe for verdict in judge.judge(ITEMS)] == [True, False]
    assert all(verdict.reason for verdict in judge.judge(ITEMS))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Name of a module in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_judges_for_tests.py").write_text(
        "def short(prompt, answer): return len(answer) < 20\n"
        "def both(prompt, answer): return True, prompt + '!'\n"
        "def rate(prompt, answer): return {'length': len(answer)}\n"
        "def fail(prompt, answer): raise KeyError('x')\n"
        "nothing = 3\n"
    )
    return "own_judges_for_tests"


def test_function_in_working_directory_judges(module):
    short, both = (open_judge(f"python:{module}:{name}") for name in ("short", "both"))
    assert [v.safe for v in short.judge(ITEMS)] == [False, True]
    assert both.judge(ITEMS) == [Verdict(True, "p!")] * 2
    assert short.identity is None


def test_function_rates(module):
    assert open_reward(f"python:{module}:rate").score(ITEMS) == [{"length": 23.0}, {"length": 18.0}]
    assert CallableReward(lambda p, a: 0.5).score(ITEMS[:1]) == [{"reward": 0.5}]


@pytest.mark.parametrize("found", [None, 1, "safe", (True,), 0.5])
def test_function_without_verdict_raises(found):
    with pytest.raises(SteeringError, match="return True"):
        CallableJudge(lambda p, a: found).judge(ITEMS)


@pytest.mark.parametrize("found", [None, "x", float("nan"), {"a": float("inf")}])
def test_function_without_finite_score_raises(found):
    with pytest.raises(SteeringError, match="finite number"):
        CallableReward(lambda p, a: found).score(ITEMS)


def test_exception_in_function_raises_with_its_name(module):
    with pytest.raises(SteeringError, match="KeyError"):
        open_judge(f"python:{module}:fail").judge(ITEMS)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "refuse",
        "guard:",
        "python:",
        "openai:",
        "openai:ftp://x#m",
        "openai:http://x",
        "python:no_such_module_here:f",
        "guard:/no/such/file.gguf",
    ],
)
def test_unknown_judge_spec_raises(spec):
    with pytest.raises(SteeringError):
        open_judge(spec)


def test_unknown_function_raises(module):
    for name in ("absent", "nothing"):
        with pytest.raises(SteeringError, match="python:"):
            open_judge(f"python:{module}:{name}")
    for spec in ("refusal", "guard:x.gguf", f"python:{module}:absent"):
        with pytest.raises(SteeringError):
            open_reward(spec)
