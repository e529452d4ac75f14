"""LangChain's llama.cpp classes around a SteeredLlama give the model's own answers.

Unsteered they equal llama_cpp.Llama; steered, llama_cpp.Llama with the same control vector.
"""

import asyncio
import json
from contextlib import ExitStack
from functools import partial
from typing import Literal

import llama_cpp
import pytest
from pydantic import BaseModel

from pysteer import SteeringError

llms = pytest.importorskip("langchain_community.llms.llamacpp")
chat_models = pytest.importorskip("langchain_community.chat_models.llamacpp")
embeddings = pytest.importorskip("langchain_community.embeddings.llamacpp")
prompts = pytest.importorskip("langchain_core.prompts")
parsers = pytest.importorskip("langchain_core.output_parsers")
function_calling = pytest.importorskip("langchain_core.utils.function_calling")

ON = {"c": 1.0}
PROMPT = "The three largest cities of France are"
MESSAGES = [("system", "Be brief."), ("user", "What is the capital of France?")]
AS_DICTS = [{"role": role, "content": content} for role, content in MESSAGES]
GREEDY = {"temperature": 0.0, "max_tokens": 6, "repeat_penalty": 1.0}
LONGER = {**GREEDY, "max_tokens": 128}


class Answer(BaseModel):
    """A city and what it is like."""

    city: Literal["Paris", "Rome", "Oslo", "Cairo", "Lima", "Delhi"]
    first: bool
    second: bool
    third: bool


def around(of, llm, **parameters):
    """Return LangChain's class around `llm`; its own model, as small as possible, is not used."""
    model = of(model_path=llm.model_path, vocab_only=True, verbose=False, **parameters)
    model.client = llm
    return model


# ---- through the model ------------------------------------------------------------------------


def completion(llm):
    return llm(PROMPT, **GREEDY)["choices"][0]["text"]


def chat_completion(llm):
    result = llm.create_chat_completion(AS_DICTS, **GREEDY)
    return result["choices"][0]["message"]["content"]


def tool_call(llm):
    tool = function_calling.convert_to_openai_tool(Answer)
    choice = {"type": "function", "function": {"name": "Answer"}}
    result = llm.create_chat_completion(AS_DICTS, tools=[tool], tool_choice=choice, **LONGER)
    (called,) = result["choices"][0]["message"]["tool_calls"]
    return json.loads(called["function"]["arguments"])


# ---- through LangChain: functions of the arguments that LangChain passes on --------------------


def invoke(llm):
    model = around(llms.LlamaCpp, llm, streaming=False, **GREEDY)
    return lambda **how: model.invoke(PROMPT, **how)


def stream(llm):
    model = around(llms.LlamaCpp, llm, **GREEDY)
    return lambda **how: "".join(several(model.stream(PROMPT, **how)))


def chain(llm):
    prompt = prompts.PromptTemplate.from_template("The {number} largest cities of France are")
    model = around(llms.LlamaCpp, llm, **GREEDY)
    parser = parsers.StrOutputParser()
    return lambda **how: (prompt | model.bind(**how) | parser).invoke({"number": "three"})


def chat(llm):
    model = around(chat_models.ChatLlamaCpp, llm, streaming=False, **GREEDY)
    return lambda **how: model.invoke(MESSAGES, **how).content


def chat_stream(llm):
    model = around(chat_models.ChatLlamaCpp, llm, **GREEDY)
    return lambda **how: "".join(c.content for c in several(model.stream(MESSAGES, **how)))


def chat_async(llm):
    """Each chunk may be read by another thread than the one before."""
    model = around(chat_models.ChatLlamaCpp, llm, **GREEDY)

    async def text(**how):
        return "".join([chunk.content async for chunk in model.astream(MESSAGES, **how)])

    return lambda **how: asyncio.run(text(**how))


def structured_output(llm):
    model = around(chat_models.ChatLlamaCpp, llm, **LONGER).with_structured_output(Answer)
    return lambda **how: model.invoke(MESSAGES, **how).model_dump()


def several(chunks):
    chunks = list(chunks)
    assert len(chunks) > 2
    return chunks


# -----------------------------------------------------------------------------------------------


def fresh(ask, llm, **how):
    """Return the answer from an empty context, which could change its last bits."""
    llm.reset()
    return ask(**how)


def by_itself(direct, models):
    unsteered, steered = (fresh(partial(direct, llm), llm) for llm in (models.plain, models.native))
    assert unsteered != steered
    return unsteered, steered


@pytest.fixture(scope="module")
def completions(models):
    return by_itself(completion, models)


@pytest.fixture(scope="module")
def chats(models):
    return by_itself(chat_completion, models)


def check(ask, llm, unsteered, steered):
    through = ask(llm)
    assert fresh(through, llm, steering=ON) == steered
    assert fresh(through, llm) == unsteered
    with llm.steering(ON):
        assert fresh(through, llm) == steered


@pytest.mark.parametrize("ask", [invoke, stream, chain])
def test_completions_are_steered(models, completions, ask):
    check(ask, models.hooked, *completions)


@pytest.mark.parametrize("ask", [chat, chat_stream, chat_async])
def test_chats_are_steered(models, chats, ask):
    check(ask, models.hooked, *chats)


def test_structured_output_is_steered(tiny_models):
    """With a small vocabulary, because llama.cpp checks each token against the grammar."""
    check(structured_output, tiny_models.hooked, *by_itself(tool_call, tiny_models))


def test_embeddings_are_unsteered(opened, tiny_llama):
    """Embeddings are unsteered, after any steered request."""
    arguments = {"embedding": True, "pooling_type": llama_cpp.LLAMA_POOLING_TYPE_MEAN}
    texts = [PROMPT, "Once upon a time"]
    with ExitStack() as stack:
        models = opened.models(stack, tiny_llama, opened.pack((1, 2), 64, 1.0), **arguments)
        llm, plain = models.hooked, models.plain
        through = embeddings.LlamaCppEmbeddings(client=llm)
        with llm.steering(ON):
            llm.eval([10, 11, 12])
            with pytest.raises(SteeringError, match="embed"):
                through.embed_query(PROMPT)
        assert through.embed_documents(texts) == plain.embed(texts)
        assert through.embed_query(PROMPT) == plain.embed(PROMPT)
