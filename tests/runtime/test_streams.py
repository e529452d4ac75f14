"""Streams that take turns on one model: each goes on as if it were alone."""

import asyncio
import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import llama_cpp
import numpy as np
import pytest

from pysteer import SteeredLlama, SteeringError, SteeringPack, SteeringVector

ARGUMENTS = {"n_ctx": 256, "verbose": False, "n_threads": 1, "n_threads_batch": 1}
PACK = SteeringPack(
    {
        name: SteeringVector({1: 2 * np.random.default_rng(seed).standard_normal(64)})
        for seed, name in enumerate("ab")
    }
)
BYTES_OF_ASCII = dict.fromkeys(range(5 + 128, 5 + 256), -10000.0)
GRAMMAR = llama_cpp.LlamaGrammar.from_string("root ::= [a-z]+", verbose=False)
# No two begin alike: tokens that are reused were summed in batches of another size.
REQUESTS = [
    {"prompt": list(range(10, 20)), "steering": None, "temperature": 0.0},
    {"prompt": list(range(20, 41)), "steering": {"a": 1.0}, "temperature": 0.8},
    {"prompt": [40, 41], "steering": {"b": 0.5}, "temperature": 1.5, "repeat_penalty": 1.3},
    {"prompt": list(range(30, 40)), "steering": {"a": 1.0}, "mirostat_mode": 2},
    {"prompt": [50, 51, 52], "steering": {"b": 1.0}, "grammar": GRAMMAR},
    {
        "prompt": [41, 42],
        "steering": {"a": 1.0, "b": -1.0},
        "policy": {"scope": "response"},
        "frequency_penalty": 0.4,
    },
]


def ask(llm, number, **options):
    request = {"max_tokens": 10, "logit_bias": BYTES_OF_ASCII, **REQUESTS[number]}
    return llm.create_completion(**{**request, "seed": number, **options})


def joined(chunks):
    """Text, logprobs and report of a stream."""
    chunks = list(chunks)
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    return text, logprobs, chunks[-1]["steering"]


def each_alone(path, arguments, **options):
    """The streams of all requests, each from a new model."""
    found = []
    for number in range(len(REQUESTS)):
        with closing(SteeredLlama(path, pack=PACK, **arguments)) as llm:
            found.append(joined(ask(llm, number, stream=True, **options)))
    return found


@pytest.fixture
def llm(tiny_llama):
    with closing(SteeredLlama(tiny_llama, pack=PACK, **ARGUMENTS)) as llm:
        yield llm


@pytest.mark.parametrize("family", ["llama", "mamba", "gemma3"])
@pytest.mark.parametrize("between", ["nothing", "answers", "by hand"])
def test_streams_in_any_order_go_on_as_alone_to_the_last_bit(tiny_model, family, between):
    path = tiny_model(family)
    arguments = {**ARGUMENTS, "logits_all": True}
    expected = each_alone(path, arguments, logprobs=3)
    rng = random.Random(family + between)
    with closing(SteeredLlama(path, pack=PACK, **arguments)) as llm:
        saved = llm.save_state()
        llm.set_cache(llama_cpp.LlamaRAMCache())
        by_hand = [
            llm.reset,
            lambda: llm.eval([60, 61]),
            lambda: llm.capture([60, 61]),
            lambda: llm.load_state(saved),
            lambda: setattr(llm, "n_tokens", 1) if family != "mamba" else None,
        ]
        streams = {
            number: (ask(llm, number, stream=True, logprobs=3), [])
            for number in range(len(REQUESTS))
        }
        running = set(streams)
        while running:
            number = rng.choice(sorted(running))
            chunk = next(streams[number][0], None)
            if chunk is None:
                running.remove(number)
            else:
                streams[number][1].append(chunk)
            if between == "answers":
                llm.create_completion([60, 61, 62], max_tokens=3)
            if between == "by hand":
                rng.choice(by_hand)()
    for number, (_, chunks) in streams.items():
        assert joined(chunks) == expected[number]


@pytest.mark.parametrize("method", ["create_completion", "create_chat_completion", "generate"])
def test_threads_read_their_own_streams_of_one_model(tiny_llama, llm, method):
    """The reported case: the process ended with GGML_ASSERT(logits != nullptr)."""

    def read(llm, number):
        steering = REQUESTS[number]["steering"]
        if method == "generate":
            with llm.steering(steering):
                stream = llm.generate(REQUESTS[number]["prompt"], temp=0.0)
            return [next(stream) for _ in range(10)]
        options = {"steering": steering, "max_tokens": 10, "temperature": 0.0, "stream": True}
        options["logit_bias"] = BYTES_OF_ASCII
        if method == "create_completion":
            return joined(llm.create_completion(REQUESTS[number]["prompt"], **options))
        messages = [{"role": "user", "content": "the air " * number}]
        chunks = list(llm.create_chat_completion(messages, **options))
        return [chunk["choices"][0]["delta"] for chunk in chunks], chunks[-1]["steering"]

    numbers = range(len(REQUESTS))
    with closing(SteeredLlama(tiny_llama, pack=PACK, **ARGUMENTS)) as alone:
        expected = [read(alone, number) for number in numbers]
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        for _ in range(3):
            assert list(pool.map(read, [llm] * len(numbers), numbers, timeout=60)) == expected


def test_asyncio_tasks_read_their_own_streams_of_one_model(tiny_llama, llm):
    expected = each_alone(tiny_llama, ARGUMENTS)

    async def read(number):
        chunks = []
        for chunk in ask(llm, number, stream=True):
            chunks.append(chunk)
            await asyncio.sleep(0)
        return joined(chunks)

    async def together():
        return await asyncio.gather(*map(read, range(len(REQUESTS))))

    assert asyncio.run(together()) == expected


def test_streams_of_one_block_take_turns(llm):
    with llm.steering({"a": 1.0}):
        streams = [llm.generate([10 + k, 11], temp=0.0) for k in range(3)]
        alone = [[next(stream) for _ in range(6)] for stream in streams]
        again = [llm.generate([10 + k, 11], temp=0.0) for k in range(3)]
        turns = list(zip(*([next(stream) for stream in again] for _ in range(6)), strict=True))
    assert [list(tokens) for tokens in turns] == alone


def test_request_in_a_callback_leaves_the_outer_request_as_it_was(tiny_llama, llm):
    expected = each_alone(tiny_llama, ARGUMENTS)

    def process(tokens, logits):
        ask(llm, 2)
        assert llm.n_tokens == len(tokens)
        return logits

    def criterion(tokens, logits):
        joined(ask(llm, 0, stream=True))
        next(llm.generate([7, 8], temp=0.0))
        return False

    for number in (0, 1, 3):
        bias = REQUESTS[number].get("logit_bias", BYTES_OF_ASCII)

        def biased(tokens, logits, bias=bias):
            logits = process(tokens, logits).copy()
            logits[list(bias)] -= 1e4
            return logits

        request = {"max_tokens": 10, **REQUESTS[number], "seed": number}
        result = llm.create_completion(
            **request,
            logits_processor=llama_cpp.LogitsProcessorList([biased]),
            stopping_criteria=llama_cpp.StoppingCriteriaList([criterion]),
        )
        assert result["choices"][0]["text"] == expected[number][0]
        assert result["steering"] == expected[number][2]


def test_stream_that_cannot_be_kept_is_refused(llm, monkeypatch):
    """No answer rests on the cells of another request."""
    stream = ask(llm, 0, stream=True)
    next(stream)

    def no_room(slot):
        raise MemoryError

    monkeypatch.setattr(llm.context.memory, "save", no_room)
    assert ask(llm, 1)["choices"]
    with pytest.raises(SteeringError, match="another request has used the model since; read each"):
        next(stream)
    assert ask(llm, 1)["choices"]


def test_closed_and_finished_streams_are_not_copied(llm, monkeypatch):
    finished, closed = ask(llm, 0, stream=True), ask(llm, 1, stream=True)
    list(finished)
    next(closed)
    closed.close()

    def copied(slot):
        raise AssertionError("copied")

    monkeypatch.setattr(llm.context.memory, "save", copied)
    assert ask(llm, 2)["choices"]


def test_sent_tokens_without_logits_of_all_tokens_do_not_end_the_process(tiny_llama, llm):
    """llama_cpp.Llama compares sent tokens with those that it draws, and needs their logits."""

    def run(model):
        generator = model.generate(list(range(10, 20)), temp=0.0)
        return [next(generator), generator.send([7, 8]), next(generator), next(generator)]

    with closing(llama_cpp.Llama(str(tiny_llama), **ARGUMENTS, logits_all=True)) as plain:
        assert run(llm) == run(plain)


def test_sampling_by_hand_leaves_the_sampler_of_a_stream_alone(tiny_llama, llm):
    expected = each_alone(tiny_llama, ARGUMENTS)
    for number in (1, 3):
        chunks = []
        for chunk in ask(llm, number, stream=True):
            chunks.append(chunk)
            if chunk["choices"][0]["finish_reason"] is None:
                llm.sample(temp=1.5, repeat_penalty=1.5)
        assert joined(chunks) == expected[number]


def test_failed_embeddings_leave_nothing_in_the_context(tiny_llama):
    """Texts before the one that is too long are in the context when the call fails."""
    arguments = {**ARGUMENTS, "embedding": True, "n_batch": 16}
    request = {"max_tokens": 6, "temperature": 0.0, "logit_bias": BYTES_OF_ASCII}
    prompt = list(range(270, 290))
    with closing(SteeredLlama(tiny_llama, **arguments)) as llm:
        expected = llm.create_completion(prompt, **request)["choices"]
        with pytest.raises(ValueError, match="exceed batch size"):
            llm.embed(["a b c d e", "a b c d e f", "x " * 40], truncate=False)
        assert llm.create_completion(prompt, **request)["choices"] == expected


@pytest.mark.parametrize("end", ["dropped", "closed", "read"])
def test_copy_of_an_interrupted_stream_goes_with_the_stream(llm, end):
    gc.collect()
    gc.disable()  # or it would hide a circle, which keeps copies until it runs
    try:
        stream = ask(llm, 0, stream=True)
        next(stream)
        left = weakref.ref(llm._turns.current)
        ask(llm, 1)
        assert left().saved is not None
        if end == "closed":
            stream.close()
        if end == "read":
            list(stream)
            ask(llm, 1)
        else:
            del stream
        assert left() is None
    finally:
        gc.enable()


def test_nothing_is_copied_for_a_request_that_failed(llm):
    def fail(tokens, logits):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask(llm, 0, stopping_criteria=llama_cpp.StoppingCriteriaList([fail]))
    failed = llm._turns.current
    ask(llm, 1)
    assert failed.saved is None


def test_logits_of_another_request_are_not_drawn_from(llm):
    """A stream that only ends puts its tokens back into the context, without their logits."""
    expected = ask(llm, 0, max_tokens=1)["choices"]
    stream = ask(llm, 0, max_tokens=1, stream=True)
    next(stream)
    ask(llm, 1)
    list(stream)
    assert llm._input_ids.tolist() == REQUESTS[0]["prompt"]
    assert ask(llm, 0, max_tokens=1)["choices"] == expected
