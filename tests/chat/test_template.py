"""A model's own template renders its chats, in extraction and in serving."""

import pickle
from contextlib import closing

import pytest
from templates import TEMPLATES, rendered, tokens_of
from tiny_models import write_tiny

from pysteer import HookedLlama, SteeredLlama
from pysteer.chat.handler import rendered_prompt
from pysteer.chat.messages import user_message
from pysteer.extract.llama_capture import LlamaCapture

ARGUMENTS = {"n_ctx": 256, "verbose": False, "n_threads": 1, "n_threads_batch": 1}
MESSAGES = [user_message(" the stone\n")]


@pytest.mark.parametrize("name", ["chatml", "llama-3", "mistral"])
def test_recognised_template_renders_extraction_and_chats(name, chat_model):
    path = chat_model(name)
    with closing(SteeredLlama(path, **ARGUMENTS)) as llm:
        expected = tokens_of(llm, rendered(llm, TEMPLATES[name].source, MESSAGES))
        llm.create_chat_completion(MESSAGES, max_tokens=1)
        assert tuple(llm.input_ids[: len(expected)]) == expected
        again = pickle.loads(pickle.dumps(llm))
        with closing(again):
            assert tuple(rendered_prompt(again, {"messages": MESSAGES})) == expected
    with closing(LlamaCapture(path, **ARGUMENTS)) as capture:
        assert capture.prompt_tokens(MESSAGES[0]["content"]) == expected


def test_chosen_chat_format_replaces_the_template(chat_model):
    with closing(HookedLlama(chat_model("gemma"), chat_format="chatml", **ARGUMENTS)) as llm:
        assert llm.chat_format == "chatml"
        assert b"<|im_start|>" in llm.detokenize(
            rendered_prompt(llm, {"messages": MESSAGES}), special=True
        )


def test_model_without_a_template_extracts_bare_prompts_and_chats_by_the_fallback(tmp_path):
    path = write_tiny("llama", tmp_path / "bare.gguf", n_layer=2, n_embd=32, chat_template="")
    with closing(HookedLlama(path, **ARGUMENTS)) as llm:
        assert llm.chat_format == "llama-2"
        prompt = llm.detokenize(rendered_prompt(llm, {"messages": MESSAGES}), special=True)
        assert b"[INST]" in prompt
    with closing(LlamaCapture(path, **ARGUMENTS)) as capture:
        assert not capture.has_chat_template
        assert capture.prompt_tokens("the") == tuple(capture.llm.tokenize(b"the"))
    with closing(LlamaCapture(path, chat_format="chatml", **ARGUMENTS)) as capture:
        assert capture.has_chat_template
        with closing(HookedLlama(path, chat_format="chatml", **ARGUMENTS)) as llm:
            expected = rendered_prompt(llm, {"messages": [user_message("the")]})
        assert capture.prompt_tokens("the") == tuple(expected)
