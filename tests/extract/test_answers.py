"""Answers: safe answers by prompt, the model's own answers, and verdicts on them."""

import json
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import pytest
from extraction import FakeJudge
from hypothesis import given, settings
from hypothesis import strategies as st

from pysteer import SteeringError
from pysteer.extract.answers import SAFE_ANSWERS, own_answers, safe_answers
from pysteer.extract.inputs import TokenizedPrompt
from pysteer.extract.llama_capture import LlamaCapture
from pysteer.extract.methods.guided import judged_safe
from pysteer.extract.reader import Reader
from pysteer.journal import Journal
from pysteer.prompts import Prompt


class StopError(Exception):
    """Interrupts a test."""


@dataclass
class FakeCapture:
    """Answers with the prompt's tokens backwards, last prompt first."""

    stop_after: int | None = None
    asked: list = field(default_factory=list)
    identity = "a file"

    def prompt_tokens(self, prompt):
        return tuple(prompt.encode())

    def text(self, tokens):
        return bytes(tokens).decode()

    def answers(self, prompts, n_tokens):
        for number, index in enumerate(reversed(range(len(prompts)))):
            if number == self.stop_after:
                raise StopError
            self.asked.append(prompts[index])
            yield index, prompts[index][::-1][:n_tokens]


# ---- safe answers ----------------------------------------------------------------------------


def test_safe_answer_for_the_prompt_beats_category_and_default():
    prompts = [Prompt("p1", "a"), Prompt("p2", "a"), Prompt("p3", "b")]
    for_any = Prompt("", response="any")
    for_a = Prompt("", "a", "for a")
    for_p2 = Prompt("p2", response="for p2")
    answers = [for_any, for_a, for_p2]
    assert safe_answers(prompts, answers) == ["for a", "for p2", "any"]
    assert safe_answers(prompts, [for_a, for_p2])[:2] == ["for a", "for p2"]
    assert safe_answers(prompts, [for_a, for_p2])[2] in SAFE_ANSWERS
    assert safe_answers(prompts, [for_any]) == ["any"] * 3


def test_several_fitting_answers_take_turns():
    prompts = [Prompt(str(i), "a") for i in range(7)]
    answers = [Prompt("", response=text) for text in ("x", "y", "z")]
    assert safe_answers(prompts, answers) == list("xyzxyzx")
    assert set(safe_answers(prompts, [])) == set(SAFE_ANSWERS)


@pytest.mark.parametrize("response", [None, "", "  "])
def test_answer_without_text_raises_with_line(response):
    row = Prompt("", response=response, source="answers.jsonl, line 4")
    with pytest.raises(SteeringError, match=r"answers.jsonl, line 4: needs a 'response'"):
        safe_answers([Prompt("p")], [row])


# ---- the model's own -------------------------------------------------------------------------


def test_own_answers_are_greedy_by_the_logits(tiny_llama):
    # Greedy by hand: for each token evaluate the whole sequence and take the largest logit.
    with closing(LlamaCapture(tiny_llama, n_ctx=256, n_threads=1, n_threads_batch=1)) as capture:
        prompts = [capture.prompt_tokens(text) for text in ("the sea", "a ring of oil in it")]
        found = own_answers(capture, prompts, 5)
        llm = capture.llm
        for prompt, answer in zip(prompts, found, strict=True):
            assert 0 < len(answer) <= 5
            tokens = list(prompt)
            for token in answer:
                llm.reset()
                llm.eval(tokens)
                logits = np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),))
                assert int(np.argmax(logits)) == token
                tokens.append(token)


@settings(max_examples=20, deadline=None)
@given(stops=st.lists(st.integers(0, 6), max_size=4))
def test_interrupted_runs_answer_each_prompt_once(stops, tmp_path_factory):
    kept = tmp_path_factory.mktemp("a") / "answers.jsonl"
    prompts = [(i, i + 1, 7) for i in range(6)]
    asked = []
    for stop in [*stops, None]:
        capture = FakeCapture(stop_after=stop)
        try:
            found = own_answers(capture, prompts, 2, journal=Journal(kept))
        except StopError:
            found = None
        asked += capture.asked
    assert found == [(7, i + 1) for i in range(6)]
    assert sorted(asked) == prompts


def test_repeated_prompt_is_answered_once():
    capture = FakeCapture()
    seen = []
    found = own_answers(capture, [(1, 2), (3,), (1, 2)], 9, advance=seen.append)
    assert found == [(2, 1), (3,), (2, 1)]
    assert sorted(capture.asked) == [(1, 2), (3,)]
    assert sum(seen) == 3


@pytest.mark.parametrize("cut", range(1, 14))
def test_torn_line_costs_its_answer_only(cut, tmp_path):
    kept = tmp_path / "answers.jsonl"
    prompts = [(1, 2), (3, 4), (5, 6)]
    own_answers(FakeCapture(), prompts, 2, journal=Journal(kept))
    kept.write_bytes(kept.read_bytes()[:-cut])
    capture = FakeCapture()
    assert own_answers(capture, prompts, 2, journal=Journal(kept)) == [(2, 1), (4, 3), (6, 5)]
    assert len(capture.asked) <= 1  # without its line break alone it is whole
    capture = FakeCapture()
    assert own_answers(capture, prompts, 2, journal=Journal(kept)) == [(2, 1), (4, 3), (6, 5)]
    assert capture.asked == []


@pytest.mark.parametrize(
    "line",
    [
        "7",
        "null",
        "[[1]]",
        "[1, 2]",
        "[[1, [2]], [3]]",
        '"[[1],[2]]"',
        '["[1]", 2]',
        '["[1]", ["2"]]',
    ],
)
def test_malformed_lines_are_answered_again(line, tmp_path):
    kept = tmp_path / "answers.jsonl"
    kept.write_text(line + "\n")
    assert own_answers(FakeCapture(), [(1,)], 2, journal=Journal(kept)) == [(1,)]


def test_kept_answer_is_used(tmp_path):
    kept = tmp_path / "answers.jsonl"
    kept.write_text(json.dumps(["[1, 2]", [9]]) + "\n")
    capture = FakeCapture()
    assert own_answers(capture, [(1, 2)], 2, journal=Journal(kept)) == [(9,)]
    assert capture.asked == []


# ---- judging ---------------------------------------------------------------------------------


def judged(capture, folder, prompts, judge, **options):
    tokenized = [TokenizedPrompt(p, capture.prompt_tokens(p.prompt), (), (0, 1)) for p in prompts]
    return judged_safe(Reader(capture, folder), tokenized, judge, **options)


def test_labels_decide_without_a_judge(tmp_path):
    prompts = [Prompt("a", label="unsafe"), Prompt("b", label="safe")]
    capture = FakeCapture()
    assert judged(capture, tmp_path, prompts, None) == [False, True]
    assert capture.asked == []


def test_missing_label_raises_with_line(tmp_path):
    prompts = [Prompt("a", label="safe"), Prompt("b", source="u.jsonl, line 9")]
    with pytest.raises(SteeringError, match=r"u.jsonl, line 9: has no label"):
        judged(FakeCapture(), tmp_path, prompts, None)


def test_judge_reads_given_response_or_own_answer(tmp_path):
    prompts = [Prompt("abc"), Prompt("x", response="given"), Prompt("y", response="")]
    read = []

    def is_safe(prompt, answer):
        read.append((prompt, answer))
        return answer != "given"

    judge = FakeJudge(is_safe)
    assert judged(FakeCapture(), tmp_path, prompts, judge, n_tokens=2) == [True, False, True]
    assert read == [("abc", "cb"), ("x", "given"), ("y", "")]


def test_judge_reads_answers_without_thoughts(tmp_path):
    texts = ["<think>no</think>given", "<think>I must not", "plain"]
    prompts = [Prompt(str(i), response=text) for i, text in enumerate(texts)]
    read = []

    def is_safe(prompt, answer):
        read.append(answer)
        return answer == "plain"

    found = judged(FakeCapture(), tmp_path, prompts, FakeJudge(is_safe))
    assert found == [False, None, True]
    assert read == ["given", "plain"]


class ThinkingCapture(FakeCapture):
    """A model whose template begins a thought, which the model ends for some prompts."""

    def prompt_tokens(self, prompt):
        return tuple(f"{prompt}<think>\n".encode())

    def answers(self, prompts, n_tokens):
        for index, prompt in enumerate(prompts):
            ending = b"</think>yes" if bytes(prompt).startswith(b"ends") else b""
            yield index, tuple(b"no" + ending)


def test_own_answers_are_read_behind_a_thought_that_the_prompt_began(tmp_path):
    read = []
    judge = FakeJudge(lambda prompt, answer: read.append(answer) or True)
    prompts = [Prompt("ends"), Prompt("goes on")]
    assert judged(ThinkingCapture(), tmp_path, prompts, judge) == [True, None]
    assert read == ["yes"]


def test_judged_answers_are_kept(tmp_path):
    prompts = [Prompt(text) for text in ("ab", "cd", "ef")]
    judge = FakeJudge(lambda *_: False)
    with pytest.raises(StopError):
        judged(FakeCapture(stop_after=2), tmp_path, prompts, judge)
    capture = FakeCapture()
    judged(capture, tmp_path, prompts, judge)
    assert capture.asked == [tuple(b"ab")]
