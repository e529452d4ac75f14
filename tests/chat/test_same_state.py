"""Fitting and serving give a router the same hidden states.

Exactly: llama.cpp computes the same bits for the same tokens where they are decoded in one batch,
alone, whichever part of pysteer asks. Other sequences in the batch may change the last bits, since
they change the shape of the matrix products.
"""

from contextlib import ExitStack, closing
from functools import partial

import numpy as np
import pytest
from chat_cases import CONTENTS_IN_PARTS, CONVERSATIONS, MESSAGES, marked
from states import LAYER, POOLINGS, captured_states, read_states, reading_pack, rows_by_pooling
from templates import TEMPLATES, message_tokens

from pysteer import Engine, SteeredLlama
from pysteer.chat.spans import pooled_span
from pysteer.extract.capture import Row
from pysteer.extract.inputs import Tokenizer
from pysteer.extract.llama_capture import LlamaCapture
from pysteer.prompts import Prompt

ARGUMENTS = {"n_ctx": 512, "verbose": False, "n_threads": 1, "n_threads_batch": 1}
REQUEST = {"steering": "auto", "max_tokens": 1, "temperature": 0.0}
IN_COMPANY = {"rtol": 1e-4, "atol": 1e-5}
"""Of float32: how far a state may be off if other sequences are in the batch."""

VOCABULARIES = ("sentencepiece", "byte-level")


class Both:
    """One model, opened to fit a router and, twice, to serve it."""

    def __init__(self, stack, path, **arguments):
        arguments = {**ARGUMENTS, **arguments}
        self.capture = stack.enter_context(closing(LlamaCapture(path, **arguments)))
        pack = reading_pack(self.capture.base_model.n_embd)
        self.llm = stack.enter_context(closing(SteeredLlama(path, pack=pack, **arguments)))
        self.engine = stack.enter_context(Engine(path, pack=pack, max_sequences=1, **arguments))

    def served(self, messages):
        """Pooling to the router's reads, by `SteeredLlama` and by `Engine`."""
        self.llm.reset()  # no token of an earlier prompt stands in for one of this
        yield read_states(self.llm.create_chat_completion(messages, **REQUEST))
        with self.engine.together():  # from an empty cache
            handle = self.engine.submit(messages=messages, **REQUEST)
        yield read_states(handle.result())


@pytest.fixture(scope="module", params=VOCABULARIES)
def vocabulary(request):
    return request.param


@pytest.fixture(scope="module", params=TEMPLATES)
def template(request):
    return request.param


@pytest.fixture(scope="module")
def both(chat_model, template, vocabulary):
    with ExitStack() as stack:
        yield Both(stack, chat_model(template, vocabulary))


def assert_same(fitted, served):
    for pooling in POOLINGS:
        np.testing.assert_array_equal(served[pooling], fitted[pooling], err_msg=pooling)


def assert_served_is_fitted(both, source, message):
    """Fit on a message alone, by the code that fits; serve it; and find it by its offsets."""
    messages = [{"role": "user", "content": message}]
    rows = rows_by_pooling(both.capture, message)
    expected = message_tokens(both.llm, source, messages, partial(marked, messages))
    assert (rows["user"].tokens, (rows["user"].start, rows["user"].stop)) == expected
    fitted = captured_states(both.capture, rows)
    for served in both.served(messages):
        assert_same(fitted, served)


def assert_last_message_is_read(both, source, messages):
    """Serve a conversation, and compare with activations over the message found by its offsets."""
    tokens, message = message_tokens(both.llm, source, messages, partial(marked, messages))
    rows = {
        pooling: Row(tokens, *pooled_span(pooling, message, len(tokens))) for pooling in POOLINGS
    }
    expected = captured_states(both.capture, rows)
    for served in both.served(messages):
        assert_same(expected, served)


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_served_state_of_a_message_equals_fitted_state(message, template, both):
    assert_served_is_fitted(both, TEMPLATES[template].source, message)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_router_in_a_conversation_reads_the_last_user_message(messages, template, both):
    if not TEMPLATES[template].system:
        messages = [message for message in messages if message["role"] != "system"]
    assert_last_message_is_read(both, TEMPLATES[template].source, messages)


@pytest.mark.parametrize("messages", CONTENTS_IN_PARTS.values(), ids=CONTENTS_IN_PARTS)
def test_router_of_content_in_parts_reads_all_of_its_text(messages, chat_model, vocabulary):
    with ExitStack() as stack:
        both = Both(stack, chat_model("vision", vocabulary))
        assert_last_message_is_read(both, TEMPLATES["vision"].source, messages)


@pytest.mark.parametrize("message", ["white space at both ends", "end of a turn", "long"])
def test_served_state_on_the_default_model_equals_fitted_state(message, default_model):
    """Quantised, with a KV cache of 16-bit floats."""
    with ExitStack() as stack:
        both = Both(stack, default_model)
        source = both.llm.metadata["tokenizer.chat_template"]
        assert_served_is_fitted(both, source, MESSAGES[message])
        assert_last_message_is_read(both, source, CONVERSATIONS["system message says it"])


def test_states_captured_together_differ_in_the_last_bits_at_most(chat_model):
    with ExitStack() as stack:
        both = Both(stack, chat_model("gemma"), type_k=0, type_v=0)
        tokenize = Tokenizer(both.capture)
        rows = [tokenize(Prompt(message)).row("user") for message in MESSAGES.values()]
        found = dict(both.capture.activations(rows, site="residual", layers=[LAYER]))
        for index, message in enumerate(MESSAGES.values()):
            for served in both.served([{"role": "user", "content": message}]):
                np.testing.assert_allclose(served["user"], found[index][0], **IN_COMPANY)
