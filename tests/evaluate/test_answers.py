"""Answers: recorded, steered, and compared with llama.cpp."""

import json
from contextlib import closing

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr

from pysteer import Engine, SteeredLlama, SteeringError
from pysteer.evaluate.answers import Answerer, Query, kl
from pysteer.evaluate.settings import Sampling
from pysteer.journal import Journal

OPTIONS = {"n_ctx": 512, "n_threads": 1, "verbose": False, "type_k": 0, "type_v": 0}


@pytest.fixture(scope="module")
def engine(tiny_llama, routed_pack):
    with Engine(tiny_llama, pack=routed_pack, max_sequences=4, **OPTIONS) as engine:
        yield engine


@pytest.fixture
def answerer(engine, tmp_path):
    def make(model="x", **sampling):
        journal = Journal(tmp_path / "answers.jsonl")
        settings = Sampling(**{"max_tokens": 8, **sampling})
        return Answerer(engine, settings, journal, {"model": model})

    return make


GROUP = [Query(f"what what what {i}", {"says q": 1.0} if i == 1 else None) for i in range(3)]


def test_answers_are_read_back_from_journal(answerer, tmp_path, monkeypatch):
    first = answerer().ask([Query("a\n\u2028 \U0001f30a", {"says q": 0.5})])
    monkeypatch.setattr(Answerer, "_run", lambda self, *rest: pytest.fail("asked again"))
    assert answerer().ask([Query("a\n\u2028 \U0001f30a", {"says q": 0.5})]) == first


@pytest.mark.parametrize(
    "value", [None, 3, {}, [{"text": "x"}], [3]], ids=["null", "number", "object", "part", "list"]
)
def test_journal_value_of_other_shape_is_answered_again(value, answerer, tmp_path):
    first = answerer().ask(GROUP)
    path = tmp_path / "answers.jsonl"
    (key, _) = json.loads(path.read_text())
    Journal(path).put(key, value)
    assert answerer().ask(GROUP) == first
    assert json.loads(path.read_text().splitlines()[-1])[0] == key


def test_answers_equal_those_of_steered_llama(answerer, tiny_llama, routed_pack):
    found = answerer().ask(GROUP)
    with closing(SteeredLlama(tiny_llama, pack=routed_pack, **OPTIONS)) as llm:
        for asked, answer in zip(GROUP, found, strict=True):
            result = llm.create_chat_completion(
                [{"role": "user", "content": asked.prompt}],
                steering=asked.steering,
                max_tokens=8,
                temperature=0.0,
            )
            # llama-cpp-python leaves out bytes that are no character.
            text = result["choices"][0]["message"]["content"]
            assert answer.text.replace("\ufffd", "") == text.replace("\ufffd", "")
            assert answer.n_tokens == result["usage"]["completion_tokens"]
            assert answer.active == (asked.steering or {})
    assert found[1].text == "Q" * 8


def test_group_is_asked_once(answerer, engine):
    first = answerer().ask(GROUP)
    before = engine.statistics.decodes
    assert answerer().ask(GROUP) == first
    assert engine.statistics.decodes == before
    for other in (GROUP[:2], GROUP[::-1], [*GROUP[:2], Query("x")]):
        answerer().ask(other)
        assert engine.statistics.decodes > before
        before = engine.statistics.decodes
    for changed in ({"seed": 1}, {"max_tokens": 4}, {"model": "another"}):
        answerer(**changed).ask(GROUP)
        assert engine.statistics.decodes > before
        before = engine.statistics.decodes


def test_sampled_answer_depends_on_seed_not_on_neighbours(answerer, tmp_path):
    hot = {"temperature": 3.0, "max_tokens": 8}
    first = answerer(**hot).ask(GROUP)
    (tmp_path / "answers.jsonl").unlink()
    assert answerer(**hot).ask(GROUP) == first
    reordered = answerer(**hot).ask(GROUP[::-1])
    assert [one.text for one in reordered[::-1]] == [one.text for one in first]
    assert answerer(**hot, seed=1).ask(GROUP) != first


def test_first_token_kl_equals_llama_cpp_logits(answerer, tiny_llama, routed_pack):
    reference = [Query(one.prompt) for one in GROUP]
    found = answerer().ask(GROUP, reference)
    rows = []
    with closing(SteeredLlama(tiny_llama, pack=routed_pack, logits_all=True, **OPTIONS)) as llm:
        for steering in (None, {"says q": 1.0}):
            llm.create_chat_completion(
                [{"role": "user", "content": GROUP[1].prompt}], steering=steering, max_tokens=1
            )
            rows.append(log_softmax(np.asarray(llm.scores[llm.n_tokens - 1], np.float64)))
    expected = rel_entr(np.exp(rows[0]), np.exp(rows[1])).sum()
    assert found[1].first_token_kl == pytest.approx(expected, rel=1e-3)
    assert found[1].first_token_kl > 1
    assert found[0].first_token_kl == found[2].first_token_kl == 0.0
    assert kl(rows[0], rows[0]) == 0.0


def test_first_token_kl_after_interruption_is_equal(answerer, tmp_path):
    reference = [Query(one.prompt) for one in GROUP]
    whole = answerer()
    whole.ask(reference)
    first = whole.ask(GROUP, reference)
    path = tmp_path / "answers.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(lines[0] + "\n")  # interrupted before the comparison
    assert len(json.loads(lines[0])[1]) == 3
    again = answerer()
    assert again.ask(GROUP, reference) == first


def test_prompt_beyond_context_raises_with_prompt(answerer):
    with pytest.raises(SteeringError, match="the prompt 'xxxx"):
        answerer().ask([Query("hi"), Query("x" * 2000)])
    assert len(answerer().ask([Query("hi")])) == 1  # the engine still works


def test_reference_is_run_once_for_all_comparisons(answerer, monkeypatch):
    runs, run = [], Answerer._run
    monkeypatch.setattr(Answerer, "_run", lambda self, *rest: runs.append(1) or run(self, *rest))
    asking, reference = answerer(), [Query(one.prompt) for one in GROUP]
    asking.ask(reference)
    for strength in (0.25, 0.5, 0.75, 1.0):
        steered = [Query(one.prompt, {"says q": strength}) for one in GROUP]
        asking.ask(steered, reference)
        asking.ask([*steered[:2], reference[2]], steered)
    assert len(runs) == 1 + 2 * 4
