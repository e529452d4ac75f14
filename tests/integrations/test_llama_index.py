"""LlamaIndex's llama.cpp class around a SteeredLlama gives the model's own answers.

Unsteered they equal llama_cpp.Llama; steered, llama_cpp.Llama with the same control vector.
"""

import pytest

llama_cpp_llms = pytest.importorskip("llama_index.llms.llama_cpp")
llms = pytest.importorskip("llama_index.core.llms")

ON = {"c": 1.0}
PROMPT = "The three largest cities of France are"
MESSAGES = [("system", "Be brief."), ("user", "What is the capital of France?")]


def chatml(messages):
    turns = [f"<|im_start|>{m.role.value}\n{m.content}<|im_end|>\n" for m in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def messages():
    return [llms.ChatMessage(role=role, content=content) for role, content in MESSAGES]


def around(llm, **generate_kwargs):
    """LlamaIndex's class around `llm`, whose own model is never used: it loads as little as can be.

    The result of the model is kept in what it answers, with what `generate_kwargs` hands on to it.
    """
    model = llama_cpp_llms.LlamaCPP(
        model_path=llm.model_path,
        model_kwargs={"vocab_only": True},
        generate_kwargs=generate_kwargs,
        temperature=0.0,
        max_new_tokens=6,
        messages_to_prompt=chatml,
        verbose=False,
    )
    model._model = llm
    return model


# ---- text and mode of steering, through the model and through LlamaIndex -----------------------


def completion(llm):
    return llm(PROMPT, temperature=0.0, max_tokens=6)["choices"][0]["text"]


def chat_completion(llm):
    dicts = [{"role": role, "content": content} for role, content in MESSAGES]
    result = llm.create_chat_completion(dicts, temperature=0.0, max_tokens=6)
    return result["choices"][0]["message"]["content"]


def complete(model):
    response = model.complete(PROMPT)
    return response.text, response.raw["steering"]["mode"]


def stream_complete(model):
    chunks = list(model.stream_complete(PROMPT))
    text = "".join(chunk.delta for chunk in chunks)
    assert len(chunks) > 2
    assert chunks[-1].text == text
    return text, chunks[-1].raw["steering"]["mode"]


def chat(model):
    response = model.chat(messages())
    return response.message.content, response.raw["steering"]["mode"]


def stream_chat(model):
    chunks = list(model.stream_chat(messages()))
    text = "".join(chunk.delta for chunk in chunks)
    assert len(chunks) > 2
    assert chunks[-1].message.content == text
    return text, chunks[-1].raw["steering"]["mode"]


def fresh(ask, llm, model):
    """Return the answer from an empty context, which could change its last bits."""
    llm.reset()
    return ask(model)


def by_itself(direct, models):
    unsteered, steered = (fresh(direct, llm, llm) for llm in (models.plain, models.native))
    assert unsteered != steered
    return unsteered, steered


@pytest.fixture(scope="module")
def completions(models):
    return by_itself(completion, models)


@pytest.fixture(scope="module")
def chats(models):
    return by_itself(chat_completion, models)


def check(ask, llm, unsteered, steered):
    model, forced = around(llm), around(llm, steering=ON)
    assert model.metadata.context_window == llm.n_ctx()
    assert fresh(ask, llm, forced) == (steered, "forced")
    assert fresh(ask, llm, model) == (unsteered, "off")
    with llm.steering(ON):
        assert fresh(ask, llm, model) == (steered, "forced")


@pytest.mark.parametrize("ask", [complete, stream_complete])
def test_completions_are_steered(models, completions, ask):
    check(ask, models.hooked, *completions)


@pytest.mark.parametrize("ask", [chat, stream_chat])
def test_chats_are_steered(models, chats, ask):
    check(ask, models.hooked, *chats)


def test_stream_keeps_the_steering_of_its_request(models):
    """LlamaIndex makes the request at once, and reads the chunks later."""
    model = around(models.hooked)
    with models.hooked.steering(ON):
        expected = model.complete(PROMPT).text
        chunks = model.stream_complete(PROMPT)
    assert [chunk.text for chunk in chunks][-1] == expected != model.complete(PROMPT).text
