"""Chat handlers called with a stand-in for the model."""

from contextlib import closing

import numpy as np
import pytest

from pysteer import HookedLlama, SteeringError
from pysteer.chat.handler import ChatCall, prompt_tokens, rendered_prompt
from pysteer.chat.messages import user_message

ARGUMENTS = {"n_ctx": 256, "verbose": False, "n_threads": 1, "n_threads_batch": 1}
CHAT = {"messages": [user_message("the stone"), {"role": "assistant", "content": "a"}]}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "of it",
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
        },
    }
]


@pytest.fixture(scope="module")
def llm(chat_model):
    with closing(HookedLlama(chat_model("gemma"), **ARGUMENTS)) as llm:
        yield llm


def decoded(llm, arguments):
    """The prompt that a chat completion decodes."""
    llm.reset()
    used = llm.create_chat_completion(**arguments, max_tokens=1)["usage"]
    return llm.input_ids[: used["prompt_tokens"]].tolist()


@pytest.mark.parametrize("chat_format", ["own template", "chatml", "llama-2", "vicuna"])
def test_rendered_prompt_equals_the_decoded_prompt(llm, chat_format, monkeypatch):
    if chat_format != "own template":
        monkeypatch.setattr(llm, "chat_format", chat_format)
    llm.n_tokens = 0
    assert rendered_prompt(llm, CHAT) == decoded(llm, CHAT)
    assert rendered_prompt(llm, CHAT) == ChatCall(llm, CHAT).completion["prompt"]


def test_long_arrays_of_a_handler_are_told_apart(llm, monkeypatch):
    """The text of such an array leaves out its middle."""
    seen = []

    def handler(*, llama, messages, **_):
        for middle in (40, 41):
            tokens = np.full(5000, 40)
            tokens[2500] = middle
            seen.append(llama.detokenize(tokens))
        return llama.create_completion(prompt=[7])

    monkeypatch.setattr(llm, "chat_handler", handler)
    rendered_prompt(llm, CHAT)
    expected = [llm.detokenize([*[40] * 2500, middle, *[40] * 2499]) for middle in (40, 41)]
    assert seen == expected
    assert seen[0] != seen[1]


def test_rendered_prompt_of_text_equals_the_decoded_prompt(llm, monkeypatch):
    """This handler renders a string, with tools in it."""
    monkeypatch.setattr(llm, "chat_format", "chatml-function-calling")
    choice = {"type": "function", "function": {"name": "look"}}
    chat = {**CHAT, "tools": TOOLS, "tool_choice": choice}
    assert isinstance(ChatCall(llm, chat).completion["prompt"], str)
    assert rendered_prompt(llm, chat) == decoded(llm, chat)


def test_handler_of_several_completions_renders_its_first_prompt(llm, monkeypatch):
    monkeypatch.setattr(llm, "chat_format", "chatml-function-calling")
    chat = {**CHAT, "tools": TOOLS, "tool_choice": "auto"}
    with pytest.raises(SteeringError, match="several completions"):
        ChatCall(llm, chat)
    text = llm.detokenize(rendered_prompt(llm, chat), special=True)
    assert text.endswith(b"<|im_start|>assistant\n")


@pytest.mark.parametrize("text", ["", "the", "<|im_start|>the"])
def test_prompt_tokens_equal_those_of_a_completion(llm, text):
    llm.reset()
    used = llm.create_completion(text, max_tokens=1)["usage"]
    assert prompt_tokens(llm, text) == llm.input_ids[: max(used["prompt_tokens"], 1)].tolist()
    assert prompt_tokens(llm, [7, 8]) == [7, 8]


def test_handler_without_a_completion_raises(llm, monkeypatch):
    monkeypatch.setattr(llm, "chat_handler", lambda **arguments: {})
    with pytest.raises(SteeringError, match="completed no prompt"):
        rendered_prompt(llm, CHAT)


def test_handler_that_evaluates_tokens_raises_and_names_the_attribute(llm, monkeypatch):
    monkeypatch.setattr(llm, "chat_handler", lambda *, llama, **arguments: llama.eval([7]))
    with pytest.raises(SteeringError, match=r"uses the model's 'eval'.* SteeredLlama can"):
        rendered_prompt(llm, CHAT)


def test_unknown_argument_raises(llm):
    with pytest.raises(SteeringError, match="unexpected keyword"):
        rendered_prompt(llm, {**CHAT, "temprature": 1})


def test_handler_error_is_passed_on(llm, monkeypatch):
    def handler(**arguments):
        raise KeyError("no such role")

    monkeypatch.setattr(llm, "chat_handler", handler)
    with pytest.raises(KeyError, match="no such role"):
        rendered_prompt(llm, CHAT)
