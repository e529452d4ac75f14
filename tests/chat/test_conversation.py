"""Chat handlers of all kinds, and the router's reads under them."""

from contextlib import closing

import numpy as np
import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from states import captured_states, read_states, reading_pack, rows_by_pooling
from templates import TEMPLATES

from pysteer import Engine, HookedLlama, SteeredLlama
from pysteer.chat.conversation import Conversation, _warned
from pysteer.chat.handler import rendered_prompt
from pysteer.chat.messages import user_message
from pysteer.extract.llama_capture import LlamaCapture

ARGUMENTS = {"n_ctx": 512, "verbose": False, "n_threads": 1, "n_threads_batch": 1}
REQUEST = {"steering": "auto", "max_tokens": 1, "temperature": 0.0}
MESSAGES = [user_message("the stone in the water")]
PACK = reading_pack(32)


@pytest.fixture(autouse=True)
def _forget_warnings():
    _warned.clear()


@pytest.fixture(scope="module")
def path(chat_model):
    return chat_model("chatml")


@pytest.fixture(scope="module")
def own_handler():
    return Jinja2ChatFormatter(
        template=TEMPLATES["chatml"].source, bos_token="<s>", eos_token="</s>"
    ).to_chat_handler()


class Handler:
    """A handler that calls another handler after its own work."""

    def __init__(self, handler, before=lambda number, llama: None):
        self.handler = handler
        self.before = before
        self.calls = 0

    def __call__(self, *, llama, **arguments):
        self.calls += 1
        self.before(self.calls, llama)
        return self.handler(llama=llama, **arguments)


def served(path, server, pack=PACK, messages=MESSAGES, **arguments):
    """The result of a chat completion."""
    if server == "llama":
        with closing(SteeredLlama(path, pack=pack, **ARGUMENTS, **arguments)) as llm:
            return llm.create_chat_completion(messages, **REQUEST)
    with Engine(path, pack=pack, max_sequences=1, **ARGUMENTS, **arguments) as engine:
        return engine.submit(messages=messages, **REQUEST).result()


both_servers = pytest.mark.parametrize("server", ["llama", "engine"])


@both_servers
def test_handler_call_count_is_one_for_each_rendering(path, own_handler, server):
    handler = Handler(own_handler)
    served(path, server, chat_handler=handler)
    assert handler.calls <= 2 + 2  # the engine calls it once more to shape the result


@both_servers
def test_handler_call_count_without_reads_of_the_message_does_not_rise(path, own_handler, server):
    handler = Handler(own_handler)
    served(path, server, reading_pack(32, poolings=("last", "prompt")), chat_handler=handler)
    assert handler.calls <= 2


def test_handler_call_count_unsteered_is_one(path, own_handler):
    handler = Handler(own_handler)
    with closing(SteeredLlama(path, pack=PACK, chat_handler=handler, **ARGUMENTS)) as llm:
        llm.create_chat_completion(MESSAGES, **{**REQUEST, "steering": None})
    assert handler.calls == 1


def fails_when_called_again(number, _llama):
    if number > 1:
        raise RuntimeError("once only")


def decodes_by_itself(_number, llama):
    llama.reset()
    assert llama._ctx.ctx is not None


@pytest.mark.parametrize("before", [fails_when_called_again, decodes_by_itself])
def test_handler_without_other_renderings_makes_router_read_all_and_warns_once(
    path, own_handler, before, caplog
):
    handler = Handler(own_handler, before)
    with closing(SteeredLlama(path, pack=PACK, chat_handler=handler, **ARGUMENTS)) as llm:
        for _ in range(2):
            handler.calls = 0
            llm.reset()
            states = read_states(llm.create_chat_completion(MESSAGES, **REQUEST))
            np.testing.assert_array_equal(states["user"], states["prompt"])
            np.testing.assert_array_equal(states["suffix"], states["last"])
    assert caplog.text.count("the router reads the whole prompt") == 1


def test_message_span_in_a_later_prompt_of_the_request_stays(path):
    """A handler that asks which tool to use appends the answer to the prompt, and goes on."""
    with closing(HookedLlama(path, **ARGUMENTS)) as llm:
        conversation = Conversation(llm, {"messages": MESSAGES})
        prompt = rendered_prompt(llm, {"messages": MESSAGES})
        start, stop = conversation.message_span(prompt)
        assert llm.detokenize(prompt[start:stop]) == b"the stone in the water"
        assert conversation.message_span([*prompt, 70, 71, 72]) == (start, stop)
        without = Conversation(llm, {"messages": []})
        assert without.message_span(prompt) == (0, len(prompt))
        assert without.message_span([*prompt, 70]) == (0, len(prompt) + 1)
        other = rendered_prompt(llm, {"messages": [user_message("it")]})
        assert conversation.message_span(other) == (start, len(other) - len(prompt) + stop)


@both_servers
@pytest.mark.parametrize("chat_format", ["chatml", "llama-2", "alpaca"])
def test_served_state_under_a_chosen_format_equals_fitted_state(path, server, chat_format):
    message = "the stone\nin the water"
    with closing(LlamaCapture(path, chat_format=chat_format, **ARGUMENTS)) as capture:
        rows = rows_by_pooling(capture, message)
        fitted = captured_states(capture, rows)
    states = read_states(
        served(path, server, messages=[user_message(message)], chat_format=chat_format)
    )
    for pooling, state in states.items():
        np.testing.assert_array_equal(state, fitted[pooling], err_msg=pooling)


def test_messages_changed_before_the_stream_is_read_are_those_of_the_call(path):
    """As where a program appends the answer to the conversation that it has asked about."""
    expected = read_states(served(path, "llama"))
    with closing(SteeredLlama(path, pack=PACK, **ARGUMENTS)) as llm:
        messages = [dict(message) for message in MESSAGES]
        stream = llm.create_chat_completion(messages, stream=True, **REQUEST)
        messages[0]["content"] = "another text"
        messages.append({"role": "assistant", "content": "an answer of many words"})
        *_, last = stream
    for pooling, state in read_states(last).items():
        np.testing.assert_array_equal(state, expected[pooling], err_msg=pooling)


def test_handler_that_uses_the_model_itself_is_called_once_more_and_decodes_once(path, caplog):
    calls, prompts = [], []

    def handler(*, llama, messages, **arguments):
        calls.append(messages)
        return llm.create_completion(messages[-1]["content"], max_tokens=1, temperature=0.0)

    with closing(SteeredLlama(path, pack=PACK, chat_handler=handler, **ARGUMENTS)) as llm:
        evaluate = llm.eval
        llm.eval = lambda tokens: (prompts.append(len(tokens)), evaluate(tokens))
        result = llm.create_chat_completion(MESSAGES, **REQUEST)
    assert len(calls) == 2
    assert len(prompts) == 1
    assert result["steering"]["scores"]
    assert "does not use the model that it is called with" in caplog.text
