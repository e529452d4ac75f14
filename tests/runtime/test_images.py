"""Chats with images, which a chat handler decodes straight on the context."""

from contextlib import closing

import llama_cpp
import numpy as np
import pytest
from images import ImageHandler, message
from routers import router_for

from pysteer import SteeredLlama, SteeringError, SteeringPack, SteeringVector

ARGUMENTS = {"n_ctx": 256, "verbose": False, "n_threads": 1, "n_threads_batch": 1}
OPTIONS = {
    "max_tokens": 10,
    "temperature": 0.0,
    "logit_bias": dict.fromkeys(range(5 + 128, 5 + 256), -1e4),
}
PACK = SteeringPack({"a": SteeringVector({1: 2 * np.random.default_rng(0).standard_normal(64)})})
CHATS = [
    [message("What is in ", 1, "?")],
    [message(2, "What is it")],
    [message("Two: ", 3, " and ", 4, ".")],
    [message("What is in ", 5, "?")],
    [message("no image at all")],
]


def models(path, pack=PACK):
    arguments = {**ARGUMENTS, "chat_handler": ImageHandler()}
    return (
        closing(llama_cpp.Llama(str(path), **arguments)),
        closing(SteeredLlama(path, pack=pack, **arguments)),
    )


def chat(llm, messages, **options):
    result = llm.create_chat_completion(messages, **OPTIONS, **options)
    return result["choices"], result["usage"]


def fresh(path, ask):
    with models(path)[0] as plain:
        return ask(plain)


@pytest.mark.parametrize("family", ["llama", "mamba"])
@pytest.mark.parametrize("pack", [PACK, None])
def test_unsteered_image_chat_equals_llama_cpp_after_any_request(tiny_model, family, pack):
    path = tiny_model(family)
    expected = [fresh(path, lambda plain, m=m: chat(plain, m)) for m in CHATS]
    with models(path, pack)[1] as llm:
        for number in (0, 1, 2, 3, 4, 1, 3, 0, 2):
            assert chat(llm, CHATS[number], steering=None) == expected[number]
            if pack is not None:
                llm.create_completion([7, 8, 9, 10] * 5, steering={"a": 1.0}, **OPTIONS)


def test_text_after_an_image_chat_reuses_no_cell_of_the_image(tiny_llama):
    """Where an image stands, the tokens of an earlier request are left."""
    with models(tiny_llama)[1] as llm:
        for prompt in (list(range(270, 300)), llm.tokenize(b"What is in the other hand?")):
            expected = fresh(tiny_llama, lambda plain, p=prompt: plain(p, **OPTIONS)["choices"])
            for messages in CHATS:
                assert llm(prompt, steering=None, **OPTIONS)["choices"] == expected
                chat(llm, messages, steering=None)
                left = llm._input_ids.tolist()
                assert llm(prompt, steering=None, **OPTIONS)["choices"] == expected
                chat(llm, messages, steering=None)
                again = fresh(tiny_llama, lambda plain, p=left: plain(p, **OPTIONS)["choices"])
                assert llm(left, steering=None, **OPTIONS)["choices"] == again


def test_streams_of_image_chats_take_turns(tiny_llama):
    def text(chunks):
        return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)

    expected = [
        fresh(tiny_llama, lambda plain, m=m: chat(plain, m)[0][0]["message"]["content"])
        for m in CHATS
    ]
    with models(tiny_llama)[1] as llm:
        streams = [
            llm.create_chat_completion(m, steering=None, stream=True, **OPTIONS) for m in CHATS
        ]
        chunks = [[] for _ in CHATS]
        for _ in range(40):
            for stream, found in zip(streams, chunks, strict=True):
                found += [chunk for chunk in [next(stream, None)] if chunk is not None]
            llm.create_completion([60, 61], steering={"a": 1.0}, max_tokens=1)
    assert [text(found) for found in chunks] == expected


@pytest.mark.parametrize("steering", [{"a": 1.0}, "auto", {"routed": "auto"}])
def test_steered_image_chat_is_refused(tiny_llama, steering):
    router = router_for(tiny_llama, {"routed": [10, 11], "": [40, 41]})
    pack = SteeringPack({"a": PACK["a"], "routed": PACK["a"]}, router=router)
    expected = fresh(tiny_llama, lambda plain: chat(plain, CHATS[0]))
    with models(tiny_llama, pack)[1] as llm:
        for messages in CHATS[:3]:
            with pytest.raises(SteeringError, match="images cannot be steered; pass steering=None"):
                llm.create_chat_completion(messages, steering=steering, **OPTIONS)
            assert chat(llm, CHATS[0], steering=None) == expected
        assert llm.create_chat_completion(CHATS[4], steering=steering, **OPTIONS)["steering"]


def test_refused_image_chat_leaves_the_model_to_other_requests(tiny_llama):
    prompt = list(range(270, 290))
    expected = fresh(tiny_llama, lambda plain: plain(prompt, **OPTIONS)["choices"])
    with models(tiny_llama)[1] as llm:
        uses = [
            lambda: llm(prompt, steering=None, **OPTIONS),
            lambda: llm.eval([60, 61]),
            lambda: next(llm.generate([60, 61], reset=False)),
            lambda: llm.load_state(llm.save_state()),
        ]
        for use in uses:
            with pytest.raises(SteeringError, match="images cannot be steered"):
                llm.create_chat_completion(CHATS[0], steering={"a": 1.0}, **OPTIONS)
            use()
            assert llm(prompt, steering=None, **OPTIONS)["choices"] == expected
