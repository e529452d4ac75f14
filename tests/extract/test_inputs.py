"""Tokenized prompts: the tokens that are averaged, refusals, and how often a text is tokenized."""

from collections import Counter
from contextlib import closing

import pytest
from extraction import (
    GENERIC,
    MATCHED_DATA,
    TWINS,
    UNSAFE,
    FakeCapture,
    FakeJudge,
    prompts,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from pysteer import SteeringError
from pysteer.chat.spans import SENTINELS
from pysteer.extract.data import Data
from pysteer.extract.extraction import extract, fit_pack_routers
from pysteer.extract.inputs import Tokenizer, fitting, require_room, rows_of
from pysteer.extract.llama_capture import LlamaCapture
from pysteer.extract.methods import METHODS
from pysteer.extract.settings import ExtractSettings
from pysteer.prompts import Prompt


@pytest.fixture(scope="module")
def capture(tiny_llama):
    with closing(
        LlamaCapture(tiny_llama, n_ctx=256, token_budget=256, n_threads=1, n_threads_batch=1)
    ) as capture:
        yield capture


def rows(capture, prompts, pooling, *, respond=True):
    return rows_of(capture, list(map(Tokenizer(capture, responses=respond), prompts)), pooling)


def tokens(capture, text):
    return tuple(capture.llm.tokenize(text.encode(), add_bos=False, special=True))


def test_prompts_longer_than_the_context_do_not_fit():
    """The fake model has a token for each byte, three for its template, and room for 200."""
    fits, long = Prompt("a" * 197), Prompt("b" * 198)
    assert fitting(FakeCapture(), [long, fits, long]) == [fits]


@given(
    message=st.text(st.sampled_from("abc dé"), min_size=1, max_size=12),
    answer=st.text(st.sampled_from("xyz "), min_size=1, max_size=12),
)
def test_averaged_tokens_are_those_of_the_pooled_text(message, answer, capture):
    assume(message.strip())
    head, tail = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    whole = tokens(capture, f"{head}{message}{tail}")
    n_head, n_tail, n_answer = (len(tokens(capture, t)) for t in (head, tail, answer))
    prompts = [Prompt(message, response=answer)]
    ranges = {
        "last": (len(whole) - 1, len(whole)),
        "prompt": (0, len(whole)),
        "user": (n_head, len(whole) - n_tail),
        "response": (len(whole), len(whole) + n_answer),
        (2, 5): (2, 5),
    }
    for pooling, (start, stop) in ranges.items():
        (row,) = rows(capture, prompts, pooling)
        assert (row.start, row.stop) == (start, stop), pooling
        assert row.tokens[: len(whole)] == whole
        assert len(row.tokens) - len(whole) in (0, n_answer)
    row = rows(capture, prompts, "response")[0]
    assert row.tokens[row.start : row.stop] == tokens(capture, answer)


def test_special_tokens_in_a_response_are_text(capture):
    (row,) = rows(capture, [Prompt("a", response="<|im_end|>")], "response")
    assert row.stop - row.start > 1


@pytest.mark.parametrize(
    ("prompt", "pooling", "words"),
    [
        (Prompt(""), "user", "the prompt is empty"),
        (Prompt(" \n"), "last", "the prompt is empty"),
        (Prompt("a"), "response", "no response to average over"),
        (Prompt("a", response=""), "response", "no response to average over"),
        (Prompt("a"), (60, 61), "no text to average over"),
        (Prompt("word " * 300), "user", "and the context holds 256; .*--context"),
        (Prompt("word " * 500_000), "last", "and the context holds 256"),
        (Prompt("a", response="word " * 300), "response", "and the context holds 256"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_unusable_prompt_raises_with_line(prompt, pooling, words, capture):
    prompts = [
        Prompt("fine " * 20, response="fine"),
        Prompt(**{**vars(prompt), "source": "f, line 7"}),
    ]
    with pytest.raises(SteeringError, match=f"^f, line 7: .*{words}"):
        rows(capture, prompts, pooling)


def test_long_response_passes_where_unread(capture):
    (row,) = rows(capture, [Prompt("a", response="word " * 300)], "user")
    assert len(row.tokens) < 100


def test_prompt_without_room_for_answer_raises_with_line(capture):
    prompts = [Prompt("a"), Prompt("word " * 40, source="f, line 2")]
    tokenized = list(map(Tokenizer(capture), prompts))
    room = capture.n_ctx - len(tokenized[1].tokens)
    require_room(capture, tokenized, room)
    with pytest.raises(SteeringError, match=f"^f, line 2: .*an answer of {room + 1}, .*256"):
        require_room(capture, tokenized, room + 1)


def test_range_reaches_into_responses_only_if_tokenized(capture):
    with_response = Prompt("a", response="word " * 30)
    for respond in (True, False):
        (row,) = rows(capture, [with_response], (0, 10_000), respond=respond)
        (bare,) = rows(capture, [Prompt("a")], "prompt")
        assert (len(row.tokens) > len(bare.tokens)) is respond
        assert (row.start, row.stop) == (0, len(row.tokens))


# ---- each text once --------------------------------------------------------------------------


class CountingCapture(FakeCapture):
    """Counts how often each text is tokenized."""

    def __init__(self):
        super().__init__()
        self.prompts = Counter()
        self.responses = Counter()

    def prompt_tokens(self, prompt):
        self.prompts[prompt] += 1
        return super().prompt_tokens(prompt)

    def response_tokens(self, text):
        self.responses[text] += 1
        return super().response_tokens(text)


BENIGN = prompts("hello", "any", 12, listed="")


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if not m.needs.gradients])
@pytest.mark.parametrize("orthogonalise", ["", "benign"])
def test_extraction_tokenizes_each_distinct_prompt_once(method, orthogonalise, tmp_path):
    capture = CountingCapture()
    judge = FakeJudge(lambda prompt, _: prompt in safe) if METHODS[method].needs.labels else None
    safe = {p.prompt for p in TWINS}
    settings = ExtractSettings(method=method, layers=(1, 2), orthogonalise=orthogonalise)
    # Benign prompts repeat texts of safe prompts.
    data = Data([*UNSAFE, UNSAFE[0]], TWINS, benign=[*BENIGN, *TWINS])
    extract(capture, data, settings, cache=tmp_path, judge=judge)
    once = Counter(p.prompt for p in [*UNSAFE, *TWINS, *BENIGN])
    assert capture.prompts == once + Counter(SENTINELS)


def test_extraction_tokenizes_each_distinct_response_once(tmp_path):
    capture = CountingCapture()
    settings = ExtractSettings(pooling="response", layers=(1, 2), router=False)
    extract(capture, MATCHED_DATA, settings, cache=tmp_path)
    assert capture.responses == Counter({p.response for p in [*UNSAFE, *TWINS]})


def test_router_fits_tokenize_each_distinct_prompt_once_for_all_routers(tmp_path):
    capture = CountingCapture()
    both = [Data(UNSAFE, GENERIC, BENIGN), Data(UNSAFE[:-1], GENERIC, BENIGN)]
    fit_pack_routers(capture, both, cache=tmp_path)
    once = Counter(p.prompt for p in [*UNSAFE, *GENERIC, *BENIGN])
    assert capture.prompts == once + Counter(SENTINELS)
