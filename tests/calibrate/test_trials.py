"""Outcomes of trials, on a model that says the letter it is steered to."""

from dataclasses import replace

import numpy as np
import pytest
from chats import towards
from templates import TEMPLATES
from tiny_models import write_tiny

from pysteer import SteeringPack, SteeringVector
from pysteer.calibrate.candidates import CandidateVectors, Trial
from pysteer.calibrate.settings import CalibrateSettings
from pysteer.calibrate.trials import Outcome, Scorer
from pysteer.engine import Engine
from pysteer.evaluate.answers import Answerer
from pysteer.evaluate.judges import CallableJudge
from pysteer.evaluate.settings import Sampling
from pysteer.journal import Journal
from pysteer.prompts import Prompt

OPTIONS = {"n_threads": 1, "n_threads_batch": 1, "verbose": False, "type_k": 0, "type_v": 0}
PROMPTS = {
    "a": [Prompt(f"the sea {i}", "a") for i in range(5)],
    "b": [Prompt(f"oil and ring {i}", "b") for i in range(3)],
    "c": [Prompt(f"of it all {i}", "c") for i in range(3)],
}
JUDGE = CallableJudge(lambda prompt, answer: ("QQQ" in answer, "letters"))


@pytest.fixture(scope="module")
def candidates(tiny_llama):
    q, z = (SteeringVector({3: towards(letter, tiny_llama)}) for letter in "QZ")
    return CandidateVectors(
        {"q": dict.fromkeys("abc", q), "z": dict.fromkeys("abc", z)},
        scopes={"q": "all", "z": "all"},
        residual_norm={},
        provenance={},
    )


@pytest.fixture
def scorer(tiny_llama, candidates, tmp_path, monkeypatch):
    monkeypatch.setattr("pysteer.evaluate.answers.is_degenerate", lambda text: "ZZZ" in text)
    base = SteeringPack(candidates.vectors["q"])
    settings = CalibrateSettings(others=4, parallel=4)
    engine = Engine(tiny_llama, pack=candidates.pack(base), max_sequences=4, n_ctx=512, **OPTIONS)
    with engine:
        answerer = Answerer(engine, Sampling(8), Journal(tmp_path / "answers.jsonl"), {})
        yield Scorer(answerer, JUDGE, PROMPTS, candidates, settings)


def test_outcomes_are_shares_of_model_answers(scorer):
    counted = []
    trials = {
        "a": Trial("q", 20.0, "all"),  # says Q to every prompt
        "b": Trial("z", 20.0, "all"),  # says Z
        "c": Trial("q", 1e-6, "all"),  # does nothing
    }
    found = scorer.run(trials, counted.append)
    assert found["a"] == Outcome(safe=1.0, degenerate=0.0, collateral=1.0, n=5)
    assert found["b"] == Outcome(safe=0.0, degenerate=1.0, collateral=0.0, n=3)
    assert found["c"] == Outcome(safe=0.0, degenerate=0.0, collateral=0.0, n=3)
    assert sum(counted) == scorer.n_first + scorer.n_answers(["a", "b", "c"])
    counted.clear()
    scorer.run({"b": trials["b"]}, counted.append)
    assert sum(counted) == scorer.n_answers(["b"]) == 3 + 4


def test_trial_steers_only_its_scope(scorer):
    outcome = scorer.run({"a": Trial("q", 20.0, "prompt")}, lambda n: None)["a"]
    assert outcome.safe == 0.0  # no token of the response is steered


def test_trial_in_thoughts_without_end_is_unfinished_and_not_safe(candidates, tmp_path):
    template = TEMPLATES["deepseek-r1"]  # the template begins a thought, which the model never ends
    model = tmp_path / "thinking.gguf"
    write_tiny("llama", model, chat_template=template.source, control=template.control)
    vectors = {"q": dict.fromkeys("abc", SteeringVector({3: towards("Q", model)}))}
    thinking = replace(candidates, vectors=vectors, scopes={"q": "all"})
    pack = thinking.pack(SteeringPack(vectors["q"]))
    with Engine(model, pack=pack, max_sequences=4, n_ctx=512, **OPTIONS) as engine:
        answerer = Answerer(engine, Sampling(4), Journal(tmp_path / "answers.jsonl"), {})
        scorer = Scorer(answerer, JUDGE, PROMPTS, thinking, CalibrateSettings(others=4, parallel=4))
        found = scorer.run({"a": Trial("q", 20.0, "all")}, lambda n: None)["a"]
    assert found == Outcome(safe=0.0, degenerate=0.0, collateral=0.0, n=5, unfinished=1.0)


def test_other_prompts_are_spread_over_categories(scorer):
    for name, rows in scorer._others.items():
        counts = {other: sum(p.category == other for p in rows) for other in PROMPTS}
        assert counts.pop(name) == 0
        assert sorted(counts.values()) == [2, 2]


def test_outcome_value_ranks_limit_before_safety():
    assert Outcome(1.0, 0.02, 0.0, 9).value(0.01) == -0.02
    assert Outcome(0.0, 0.0, 1.0, 9).value(0.01) > Outcome(1.0, 0.02, 0.0, 9).value(0.01) - 0.1
    np.testing.assert_allclose(Outcome(0.9, 0.01, 0.5, 9).value(0.01), 0.85)
