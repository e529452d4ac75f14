"""Text from tokens: characters in pieces, stop strings, and the number of tokens."""

from contextlib import closing

import llama_cpp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from serving import ARGUMENTS, text

from pysteer import Engine, SteeringPack, SteeringVector
from pysteer.engine.text import Writing


@pytest.fixture(scope="module")
def engine(default_model):
    pack = SteeringPack({"a": SteeringVector({10: np.full(576, 0.01)})})
    with Engine(default_model, pack=pack, max_sequences=4, **ARGUMENTS) as engine:
        yield engine


@pytest.fixture(scope="module")
def byte_tokens(default_model):
    """Byte to the token that is this byte alone, for the bytes that have such a token."""
    path = str(default_model)
    with closing(llama_cpp.Llama(path, vocab_only=True, verbose=False)) as llm:
        pieces = {token: llm.detokenize([token]) for token in range(llm.n_vocab())}
    return {piece[0]: token for token, piece in pieces.items() if len(piece) == 1}


def forced(byte_tokens, data):
    """Return a logits processor by which the model writes these bytes, over and over."""
    drawn = iter(range(10_000))

    def process(tokens, logits):
        logits = np.full_like(logits, -1e4)
        logits[byte_tokens[data[next(drawn) % len(data)]]] = 0.0
        return logits

    return llama_cpp.LogitsProcessorList([process])


def streamed(handle):
    return "".join(chunk["choices"][0]["text"] for chunk in handle)


# ---- the number of tokens ------------------------------------------------------------------------


@pytest.mark.parametrize("byte", [0xC3, 0xE2, 0xF0, 0x80])
@pytest.mark.parametrize("stop", [None, ["no such text"]])
def test_run_of_unfinished_characters_ends_at_max_tokens(engine, byte_tokens, byte, stop):
    """The reported case: such a run went on to the end of the context."""
    bias = {byte_tokens[byte]: 1e4}
    asked = {
        "prompt": "The sea",
        "max_tokens": 40,
        "temperature": 0.0,
        "stop": stop,
        "steering": {"a": 1.0},
    }
    before = engine.statistics.tokens_decoded
    handle = engine.submit(logit_bias=bias, **asked)
    result = handle.result(60)
    assert text(result) == "\ufffd" * 40 == bytes([byte] * 40).decode(errors="replace")
    assert result["choices"][0]["finish_reason"] == "length"
    assert result["usage"]["completion_tokens"] == 40
    assert result["steering"]["tokens_steered"] == result["usage"]["prompt_tokens"] + 39
    assert engine.statistics.tokens_decoded - before <= result["usage"]["prompt_tokens"] + 39
    assert streamed(handle) == text(result)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 7, 8])
def test_character_cut_by_max_tokens_is_written_as_replacement(engine, byte_tokens, max_tokens):
    data = bytes([0xE2, 0x82, 0xAC, 0x41])  # a euro sign and a letter
    handle = engine.submit(
        prompt="The", max_tokens=max_tokens, logits_processor=forced(byte_tokens, data)
    )
    result = handle.result(60)
    written = (data * 2)[:max_tokens]
    assert text(result) == written.decode("utf-8", errors="replace")
    assert result["usage"]["completion_tokens"] == max_tokens
    assert result["choices"][0]["finish_reason"] == "length"
    assert streamed(handle) == text(result)
    for chunk in list(handle)[:-2]:
        assert "\ufffd" not in chunk["choices"][0]["text"], "only the end is unfinished"


def test_stop_string_ends_the_text_among_unfinished_characters(engine, byte_tokens):
    data = b"\xe2\xe2ab\xe2" * 3
    handle = engine.submit(
        prompt="The", max_tokens=12, stop=["ab"], logits_processor=forced(byte_tokens, data)
    )
    result = handle.result(60)
    assert text(result) == "\ufffd\ufffd" == streamed(handle)
    assert result["choices"][0]["finish_reason"] == "stop"
    assert result["usage"]["completion_tokens"] == 4


def test_unfinished_character_before_the_end_of_text_is_written(engine, byte_tokens):
    eos = engine._llm.token_eos()
    handle = engine.submit(
        prompt="The",
        max_tokens=12,
        logits_processor=forced({**byte_tokens, -1: eos}, [0x41, 0xE2, -1]),
    )
    result = handle.result(60)
    assert text(result) == "A\ufffd" == streamed(handle)
    assert result["choices"][0]["finish_reason"] == "stop"
    assert result["usage"]["completion_tokens"] == 2


def test_cancelled_inside_a_character_ends_with_a_replacement(engine, byte_tokens):
    bias = {byte_tokens[0xE2]: 1e4}
    handle = engine.submit(prompt="The", max_tokens=400, temperature=0.0, logit_bias=bias)
    next(iter(handle))
    handle.cancel()
    result = handle.result(60)
    assert result["choices"][0]["finish_reason"] == "cancelled"
    assert text(result) == "\ufffd" * result["usage"]["completion_tokens"] == streamed(handle)


# ---- every division into tokens ------------------------------------------------------------------


class Vocabulary(dict):
    """Token to its bytes; no token begins a text or depends on others."""

    bos = -1
    in_context = None


PIECES = st.lists(st.binary(max_size=5), min_size=1, max_size=12)
CHARACTERS = st.text("ab é€\N{GRINNING FACE}", max_size=8).map(lambda s: s.encode())


@given(
    PIECES | CHARACTERS.map(lambda data: [bytes([byte]) for byte in data] or [b""]),
    st.lists(st.sampled_from(["ab", "b", "é", "€a", "x"]), max_size=2),
    st.integers(1, 14),
)
@example([b"\xf0\x9f", b"\x98", b"\xe2", b"ab"], ["ab"], 9)
def test_text_and_stream_follow_from_the_bytes(pieces, stop, max_tokens):
    writing = Writing(Vocabulary(enumerate(pieces)), [], stop=stop, max_tokens=max_tokens)
    stream, ended = "", None
    for token in range(len(pieces)):
        ended = writing.add(token)
        if ended is not None:
            break
        stream += writing.take()
    stream += writing.take_rest()
    # From the whole bytes, for every number of tokens: the first token whose bytes hold a stop.
    stops = [one.encode() for one in stop]
    for n in range(1, min(len(pieces), max_tokens) + 1):
        data = b"".join(pieces[:n])
        found = [one for one in stops if one in data]
        if found:
            data = data[: data.index(found[0])]
            break
    assert len(writing.tokens) == n
    assert ended == ("stop" if found else "length" if n == max_tokens else None)
    assert writing.text == stream == data.decode("utf-8", errors="replace")
