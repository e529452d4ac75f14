"""Answers: kept, steered, and compared with what llama.cpp computes."""

import json
from contextlib import closing

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr

from pysteer import Engine, SteeredLlama, SteeringError
from pysteer.evaluate.answers import Answer, Answerer, Asked, KeptAnswers, Sampling, kl

OPTIONS = {"n_ctx": 512, "n_threads": 1, "verbose": False, "type_k": 0, "type_v": 0}
ANSWERS = [Answer("a\n\u2028 \U0001f30a", "stop", 3, ["q"], {"q": 0.5}, {"q": 0.25}, 0.125)] * 2


@pytest.fixture(scope="module")
def engine(tiny_llama, routed_pack):
    with Engine(tiny_llama, pack=routed_pack, max_sequences=4, **OPTIONS) as engine:
        yield engine


@pytest.fixture
def answerer(engine, tmp_path):
    def make(model="x", **sampling):
        kept = KeptAnswers(tmp_path / "answers.jsonl")
        return Answerer(engine, Sampling(**{"max_tokens": 8, **sampling}), kept, {"model": model})

    return make


GROUP = [Asked(f"what what what {i}", {"says q": 1.0} if i == 1 else None) for i in range(3)]


def test_answers_are_kept_whatever_is_in_them(tmp_path):
    path = tmp_path / "a.jsonl"
    KeptAnswers(path).put("one", ANSWERS)
    assert KeptAnswers(path).get("one") == ANSWERS
    assert KeptAnswers(path).get("two") is None


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_was_cut_off_costs_that_line_alone(cut, tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    KeptAnswers(path).put("one", ANSWERS)
    KeptAnswers(path).put("two", ANSWERS)
    path.write_bytes(path.read_bytes()[:-cut])
    kept = KeptAnswers(path)
    assert kept.get("one") == ANSWERS
    assert kept.get("two") == (ANSWERS if cut == 1 else None)
    assert ("damaged" in caplog.text) == (cut > 1)
    kept.put("three", ANSWERS)
    assert KeptAnswers(path).get("three") == ANSWERS


@pytest.mark.parametrize("line", ["[]", "{}", '{"group": "one", "answers": [{"text": "x"}]}', "é"])
def test_lines_that_are_no_answers_are_left_out(line, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n", encoding="latin-1")
    assert KeptAnswers(path).get("one") is None


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(SteeringError, match="--output"):
        KeptAnswers(tmp_path / "absent" / "a.jsonl")


def test_answers_are_what_the_model_says_alone(answerer, tiny_llama, routed_pack):
    found = answerer().ask(GROUP)
    with closing(SteeredLlama(tiny_llama, pack=routed_pack, **OPTIONS)) as llm:
        for asked, answer in zip(GROUP, found, strict=True):
            result = llm.create_chat_completion(
                [{"role": "user", "content": asked.prompt}],
                steering=asked.steering,
                max_tokens=8,
                temperature=0.0,
            )
            assert answer.text == result["choices"][0]["message"]["content"]
            assert answer.n_tokens == result["usage"]["completion_tokens"]
            assert answer.active == (asked.steering or {})
    assert found[1].text == "Q" * 8


def test_a_group_is_asked_once(answerer, engine):
    first = answerer().ask(GROUP)
    before = engine.statistics.decodes
    assert answerer().ask(GROUP) == first
    assert engine.statistics.decodes == before
    for other in (GROUP[:2], GROUP[::-1], [*GROUP[:2], Asked("x")]):
        answerer().ask(other)
        assert engine.statistics.decodes > before
        before = engine.statistics.decodes
    for changed in ({"seed": 1}, {"max_tokens": 4}, {"model": "another"}):
        answerer(**changed).ask(GROUP)
        assert engine.statistics.decodes > before
        before = engine.statistics.decodes


def test_the_seed_decides_whatever_stands_beside(answerer, tmp_path):
    hot = {"temperature": 3.0, "max_tokens": 8}
    first = answerer(**hot).ask(GROUP)
    (tmp_path / "answers.jsonl").unlink()
    assert answerer(**hot).ask(GROUP) == first
    reordered = answerer(**hot).ask(GROUP[::-1])
    assert [one.text for one in reordered[::-1]] == [one.text for one in first]
    assert answerer(**hot, seed=1).ask(GROUP) != first


def test_kl_is_that_of_the_distributions(answerer, tiny_llama, routed_pack):
    reference = [Asked(one.prompt) for one in GROUP]
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


def test_kl_needs_no_reference_from_the_same_run(answerer, tmp_path):
    reference = [Asked(one.prompt) for one in GROUP]
    whole = answerer()
    whole.ask(reference)
    first = whole.ask(GROUP, reference)
    path = tmp_path / "answers.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(lines[0] + "\n")  # interrupted between the two
    assert len(json.loads(lines[0])["answers"]) == 3
    again = answerer()
    assert again.ask(GROUP, reference) == first


def test_an_impossible_prompt_is_named(answerer):
    with pytest.raises(SteeringError, match="the prompt 'xxxx"):
        answerer().ask([Asked("hi"), Asked("x" * 2000)])
    assert len(answerer().ask([Asked("hi")])) == 1  # and the engine goes on


def test_a_reference_is_run_once_for_all_that_is_compared_with_it(answerer, monkeypatch):
    runs, run = [], Answerer._run
    monkeypatch.setattr(Answerer, "_run", lambda self, *rest: runs.append(1) or run(self, *rest))
    asking, reference = answerer(), [Asked(one.prompt) for one in GROUP]
    asking.ask(reference)
    for strength in (0.25, 0.5, 1.0, 2.0):
        steered = [Asked(one.prompt, {"says q": strength}) for one in GROUP]
        asking.ask(steered, reference)
        asking.ask([*steered[:2], reference[2]], steered)
    assert len(runs) == 1 + 2 * 4
