"""Chats with images through llama-cpp-python's own handler and llama.cpp's multimodal library."""

from contextlib import closing

import llama_cpp
import numpy as np
import pytest
from exactness import native_control_vector, same_bits
from images import recorded_rows
from llama_cpp.llama_chat_format import Llava15ChatHandler
from projector import N_ROWS, image_url, write_projector
from routers import router_for

from pysteer import SteeredLlama, SteeringPack, SteeringVector
from pysteer.pack.policy import Policy

ARGUMENTS = {"n_ctx": 512, "logits_all": True, "verbose": False, "n_threads": 1}
N_WRITTEN = 8
OPTIONS = {
    "max_tokens": N_WRITTEN,
    "temperature": 0.0,
    "logit_bias": dict.fromkeys(range(5 + 128, 5 + 256), -1e4),
}
VECTOR = SteeringVector({1: 2 * np.random.default_rng(0).standard_normal(64)})


def turn(*parts):
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": image_url(part)}}
        for part in parts
    ]
    return {"role": "user", "content": content}


CHATS = [
    [turn(1, "What is it?")],
    [turn(1, "What is it?"), {"role": "assistant", "content": "A cat."}, turn(2, "And 2?")],
    [turn("No image.")],
]


@pytest.fixture(scope="module")
def projector(tmp_path_factory):
    return write_projector(tmp_path_factory.mktemp("vision") / "mmproj.gguf")


def handler(projector):
    return Llava15ChatHandler(str(projector), verbose=False)


def answer(llm, messages, **request):
    """Return text, the logits that decided its tokens, number of prompt rows, and report."""
    result = llm.create_chat_completion(messages, **OPTIONS, **request)
    n = result["usage"]["prompt_tokens"]
    logits = llm.scores[n - 1 : n - 1 + N_WRITTEN].copy()
    return result["choices"][0]["message"]["content"], logits, n, result.get("steering")


def plain_answer(path, projector, messages, vector=None):
    llm = llama_cpp.Llama(str(path), chat_handler=handler(projector), **ARGUMENTS)
    with closing(llm):
        if vector is not None:
            native_control_vector(llm, vector, 4)
        return answer(llm, messages)


def same(found, expected):
    return found[0] == expected[0] and same_bits(found[1], expected[1])


def test_unsteered_and_steered_image_chats_equal_llama_cpp_to_the_last_bit(tiny_llama, projector):
    pack = SteeringPack({"a": VECTOR})
    steered = SteeredLlama(tiny_llama, pack=pack, chat_handler=handler(projector), **ARGUMENTS)
    with closing(steered) as llm:
        for messages in [*CHATS, *CHATS[::-1]]:
            expected = plain_answer(tiny_llama, projector, messages)
            assert same(answer(llm, messages, steering=None), expected)
            expected = plain_answer(tiny_llama, projector, messages, VECTOR)
            found = answer(llm, messages, steering={"a": 1.0})
            assert same(found, expected)
            assert found[3]["tokens_steered"] == found[2] + N_WRITTEN - 1
        images = plain_answer(tiny_llama, projector, [turn(1, "No image.")])[2]
        assert images - plain_answer(tiny_llama, projector, CHATS[2])[2] == N_ROWS


@pytest.mark.parametrize("pooling", ["prompt", "last", "user"])
def test_gated_image_chats_are_those_of_forced_or_unsteered_ones(tiny_llama, projector, pooling):
    router = router_for(tiny_llama, {"a": [10, 11, 12], "": [40, 41]}, pooling=pooling)
    for fires in (True, False):
        when = "a or not a" if fires else "a and not a"
        policy = Policy.from_content({"gate": "probe", "categories": {"a": {"when": when}}})
        pack = SteeringPack({"a": VECTOR}, router=router, policy=policy)
        steered = SteeredLlama(tiny_llama, pack=pack, chat_handler=handler(projector), **ARGUMENTS)
        with closing(steered) as llm:
            for messages in CHATS:
                found = answer(llm, messages)
                forced = plain_answer(tiny_llama, projector, messages, VECTOR if fires else None)
                assert found[3]["categories"]["a"]["fired"] is fires
                assert same(found, forced)
                assert found[3]["tokens_steered"] == fires * (found[2] + N_WRITTEN - 1)


@pytest.mark.parametrize("messages", CHATS, ids=["one image", "two turns", "no image"])
def test_router_of_the_users_message_reads_its_tokens_alone(tiny_llama, projector, messages):
    """The last message stands behind its image and before the template's last tokens."""
    router = router_for(tiny_llama, {"a": [10, 11, 12], "": [40, 41]}, pooling="user")
    pack = SteeringPack({"a": VECTOR}, router=router, policy=Policy(gate="probe"))
    arguments = {**ARGUMENTS, "chat_handler": handler(projector)}
    with closing(SteeredLlama(tiny_llama, pack=pack, **arguments)) as llm:
        found = answer(llm, messages)[3]["scores"]["a"]
        after = len(llm.tokenize(b"ASSISTANT: ", add_bos=False))
        text = messages[-1]["content"][-1]["text"].encode()
        own = len(llm.tokenize(text + b"ASSISTANT: ", add_bos=False)) - after
    arguments["chat_handler"] = handler(projector)
    with recorded_rows(tiny_llama, "l_out-1", **arguments) as (plain, rows):
        n = answer(plain, messages)[2]
        state = np.float64(rows[n - after - own : n - after]).mean(axis=0)
    expected = router.probe_weight[0] @ state + router.probe_bias[0]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
