"""The end of a completion at max_tokens: tokens count as they are drawn."""

from contextlib import closing

import llama_cpp
import numpy as np
import pytest

from pysteer import SteeredLlama, SteeringPack, SteeringVector

ARGUMENTS = {"n_ctx": 128, "verbose": False, "n_threads": 1, "n_threads_batch": 1}
PACK = SteeringPack({"a": SteeringVector({1: np.ones(64)})})
PROMPT = "the other hand"
FIRST_BYTE = 5  # the token of byte 0


@pytest.fixture(scope="module")
def llm(tiny_model):
    with closing(SteeredLlama(tiny_model("llama"), pack=PACK, logits_all=True, **ARGUMENTS)) as llm:
        yield llm


def forced(data):
    """Return a logits processor by which the model writes these bytes, over and over."""
    drawn = iter(range(10_000))

    def process(tokens, logits):
        logits = np.full_like(logits, -1e4)
        logits[FIRST_BYTE + data[next(drawn) % len(data)]] = 0.0
        return logits

    return llama_cpp.LogitsProcessorList([process])


def both(llm, data, **options):
    """Return a completion, after a check that its stream says the same."""
    options = {"prompt": PROMPT, "steering": None, **options}
    result = llm.create_completion(logits_processor=forced(data), **options)
    chunks = list(llm.create_completion(logits_processor=forced(data), stream=True, **options))
    choice = result["choices"][0]
    echoed = options["prompt"] if options.get("echo") else ""
    assert echoed + "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [choice["finish_reason"]]
    assert chunks[-1]["steering"] == result["steering"]
    return result


@pytest.mark.parametrize("byte", [0xC3, 0xE2, 0xF0])
@pytest.mark.parametrize("stop", [None, "no such text", ["no such text", "nor this"]])
def test_run_of_unfinished_characters_ends_at_max_tokens(llm, byte, stop):
    """The reported case: such a run went on to the end of the context."""
    result = both(llm, [byte], max_tokens=40, stop=stop, steering={"a": 1.0})
    assert result["choices"][0]["text"] == bytes([byte] * 40).decode(errors="replace")
    assert result["choices"][0]["finish_reason"] == "length"
    assert result["usage"]["completion_tokens"] == 40
    assert result["steering"]["tokens_steered"] == result["usage"]["prompt_tokens"] + 39


@pytest.mark.parametrize("max_tokens", [None, -1, 0, 1000])
def test_run_of_unfinished_characters_without_a_limit_ends_with_the_context(llm, max_tokens):
    result = both(llm, [0xE2], max_tokens=max_tokens)
    assert result["usage"]["total_tokens"] == 128
    assert result["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("echo", [False, True])
def test_character_cut_by_max_tokens_is_written_as_replacement(llm, max_tokens, echo):
    data = bytes([0xE2, 0x82, 0xAC, 0x41])  # a euro sign and a letter
    result = both(llm, data, max_tokens=max_tokens, echo=echo)
    written = (data * 2)[:max_tokens].decode(errors="replace")
    assert result["choices"][0]["text"] == (PROMPT if echo else "") + written
    assert result["usage"]["completion_tokens"] == max_tokens


def test_stop_string_among_unfinished_characters_ends_the_text(llm):
    result = both(llm, b"ab\xe2\xe2\xe2\xe2", max_tokens=5, stop=["b\ufffd", "ab"])
    assert result["choices"][0]["text"] == ""
    assert result["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_empty_prompt_counts_its_first_token_as_llama_cpp_does(tiny_llama, llm, max_tokens):
    with closing(llama_cpp.Llama(str(tiny_llama), **ARGUMENTS)) as plain:
        expected = plain.create_completion("", max_tokens=max_tokens, logits_processor=forced(b"a"))
    result = both(llm, b"a", prompt="", max_tokens=max_tokens)
    assert result["choices"] == expected["choices"]
    assert result["usage"] == expected["usage"]
    cut = both(llm, b"\xe2", prompt="", max_tokens=max_tokens)
    assert cut["usage"] == expected["usage"]


def test_logprobs_have_an_entry_for_each_token(llm):
    options = {"max_tokens": 6, "logprobs": 2, "steering": None}
    result = llm.create_completion(PROMPT, logits_processor=forced(b"\xe2"), **options)
    assert len(result["choices"][0]["logprobs"]["tokens"]) == 6
    stream = llm.create_completion(PROMPT, logits_processor=forced(b"\xe2"), stream=True, **options)
    assert [chunk["choices"][0]["finish_reason"] for chunk in stream] == [None] * 6 + ["length"]


def test_chat_ends_at_max_tokens_inside_a_character(llm):
    messages = [{"role": "user", "content": "hi"}]
    bias = {FIRST_BYTE + 0xE2: 1e4}
    options = {"max_tokens": 12, "logit_bias": bias, "steering": None}
    result = llm.create_chat_completion(messages, **options)
    assert result["choices"][0]["message"]["content"] == "\ufffd" * 12
    chunks = list(llm.create_chat_completion(messages, stream=True, **options))
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == "\ufffd" * 12


def test_own_stopping_criteria_still_end_the_text(llm):
    def criterion(tokens, logits):
        return len(tokens) >= 30

    result = llm.create_completion(
        list(range(10, 20)),
        max_tokens=50,
        steering=None,
        logits_processor=forced(b"a"),
        stopping_criteria=llama_cpp.StoppingCriteriaList([criterion]),
    )
    assert result["choices"][0]["finish_reason"] == "stop"
    assert result["usage"]["completion_tokens"] == 20
