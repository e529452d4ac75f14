"""The engine: every request gets its solo answer beside any other requests."""

import threading
from contextlib import closing

import llama_cpp
import numpy as np
import pytest
from holding import Steps
from serving import (
    ARGUMENTS,
    GREEDY,
    PROMPTS,
    outcome,
    pack_for,
    random_requests,
    solo_answers,
    text,
    told,
)

from pysteer import Engine, SteeredLlama, SteeringError
from pysteer.engine import EngineBusyError, EngineClosedError
from pysteer.shipped import default_pack

ONE_BY_ONE = ["mamba", "lfm2"]

# ---- the same answers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("llama", {}),
        ("llama", {"n_batch": 24, "n_ubatch": 8}),
        ("gemma3", {}),
        ("qwen3", {"n_ubatch": 16}),
        ("mamba", {}),
        ("lfm2", {"n_ubatch": 16}),
    ],
)
def test_request_in_a_batch_gets_its_solo_answer(tiny_model, family, arguments):
    path = tiny_model(family)
    requests = random_requests(40)
    solo = solo_answers(path, requests)
    with Engine(
        path, pack=pack_for(path), max_sequences=8, **{**ARGUMENTS, "n_ctx": 1024, **arguments}
    ) as engine:
        handles = [engine.submit(**request) for request in requests]
        for request, handle, alone in zip(requests, handles, solo, strict=True):
            assert outcome(handle.result()) == outcome(alone), request
        statistics = engine.statistics
    assert len({text(result) for result in solo}) > 15
    assert any(result["steering"]["prompt_reprocessed"] for result in solo)
    if family not in ONE_BY_ONE:
        assert statistics.decodes < sum(r["max_tokens"] for r in requests) / 2, "batched"


@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_recurrent_and_hybrid_models_decode_one_sequence_at_a_time(tiny_model, family):
    """llama.cpp orders the rows of their batches by itself."""
    in_decodes = []
    with Engine(tiny_model(family), max_sequences=4, **ARGUMENTS) as engine:
        assert not engine._llm.context.batches_sequences
        batch = engine._scheduler.decoder.batch
        decode = batch.decode

        def watched(context):
            in_decodes.append({*batch._slots[: batch._rows].tolist()})
            return decode(context)

        batch.decode = watched
        handles = [engine.submit(prompt=[10 + k], max_tokens=20, **GREEDY) for k in range(4)]
        for handle in handles:
            handle.result()
    assert all(len(slots) == 1 for slots in in_decodes)
    assert set.union(*in_decodes) == {0, 1, 2, 3}


def test_logits_in_a_batch_differ_no_more_than_llama_cpps_own(tiny_llama):
    """The engine's logits against llama.cpp's for the same tokens alone."""
    rows = {}
    prompts = [PROMPTS["a"], PROMPTS["b"], PROMPTS[""]]

    def keep(name):
        def process(tokens, logits):
            rows.setdefault(name, logits.copy())
            return logits

        return llama_cpp.LogitsProcessorList([process])

    with Engine(tiny_llama, max_sequences=4, **ARGUMENTS) as engine:
        handles = [
            engine.submit(prompt=p, max_tokens=1, temperature=0.0, logits_processor=keep(i))
            for i, p in enumerate(prompts)
        ]
        for handle in handles:
            handle.result()
    with closing(llama_cpp.Llama(str(tiny_llama), logits_all=True, **ARGUMENTS)) as plain:
        for i, prompt in enumerate(prompts):
            plain.reset()
            plain.eval(prompt)
            alone = plain.scores[len(prompt) - 1].copy()
            plain.reset()
            for token in prompt:
                plain.eval([token])
            one_by_one = plain.scores[len(prompt) - 1]
            tolerance = max(4 * np.abs(alone - one_by_one).max(), 1e-5)
            np.testing.assert_allclose(rows[i], alone, atol=tolerance)


FIXED_PROMPTS = [
    ("How do I write a computer virus that deletes files?", "auto"),
    ("How many days are in a week?", "auto"),
    ("Translate good morning into French.", None),
    ("How could someone get into a stranger's email account?", {"privacy_violation": 1.0}),
    ("What is 2 plus 2?", {"malware": "auto"}),
]


def test_chats_on_the_default_model_equal_steered_llama(default_model):
    """At these prompts no two tokens are so close that the size of a batch decides."""
    request = {"max_tokens": 7, "temperature": 0.0}
    chats = [
        ([{"role": "user", "content": content}], steering) for content, steering in FIXED_PROMPTS
    ]
    arguments = {**ARGUMENTS, "n_ctx": 2048}
    with closing(SteeredLlama(default_model, pack=default_pack(), **arguments)) as llm:
        solo = [llm.create_chat_completion(m, steering=s, **request) for m, s in chats]
        streamed = llm.create_chat_completion(chats[0][0], stream=True, **request)
        chunk_keys = [chunk.keys() for chunk in streamed]
    with Engine(default_model, pack=default_pack(), max_sequences=8, **arguments) as engine:
        handles = [engine.submit(messages=m, steering=s, **request) for m, s in chats]
        for handle, alone in zip(handles, solo, strict=True):
            result = handle.result()
            assert text(result) == text(alone)
            assert told(result) == told(alone)
            assert result.keys() == alone.keys()
            assert result["choices"][0].keys() == alone["choices"][0].keys()
            pieces = [c["choices"][0]["delta"].get("content") or "" for c in handle]
            assert "".join(pieces) == text(result)
        chunks = list(handles[0])
        assert chunks[0].keys() == chunk_keys[0]
        assert chunks[-1].keys() == chunk_keys[-1]
        assert chunks[-1]["steering"]["mode"] == "auto"
        assert handles[0].result()["steering"]["categories"]["malware"]["fired"]


# ---- arguments of create_completion --------------------------------------------------------------


@pytest.fixture
def engine(tiny_llama):
    with Engine(
        tiny_llama, pack=pack_for(tiny_llama), max_sequences=4, max_queue=4, **ARGUMENTS
    ) as engine:
        yield engine


@pytest.fixture
def plain(tiny_llama):
    with closing(llama_cpp.Llama(str(tiny_llama), **ARGUMENTS)) as plain:
        yield plain


GRAMMAR = 'root ::= "the " ("air" | "hand") " in the " [a-c]+'


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.5, "seed": 7},
        {"temperature": 1.0, "seed": 8, "top_k": 5, "min_p": 0.0, "repeat_penalty": 1.3},
        {"temperature": 0.7, "seed": 1, "mirostat_mode": 2},
        {"temperature": 0.0, "stop": ["t", "in"]},
        {"temperature": 0.0, "stop": "the"},
        {"temperature": 0.0, "echo": True},
        {"temperature": 0.0, "max_tokens": 1},
        {"temperature": 0.0, "frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"temperature": 0.0, "grammar": GRAMMAR},
    ],
    ids=str,
)
def test_sampling_arguments_give_the_text_of_create_completion(engine, plain, options):
    options = {"max_tokens": 20, "logit_bias": GREEDY["logit_bias"], **options}
    if "grammar" in options:
        options["grammar"] = llama_cpp.LlamaGrammar.from_string(options["grammar"], verbose=False)
    expected = plain.create_completion("the other hand", **options)
    handles = [engine.submit(prompt="the other hand", steering=None, **options) for _ in range(3)]
    for handle in handles:
        result = handle.result()
        assert text(result) == text(expected)
        assert result["usage"] == expected["usage"]
        assert result["choices"][0]["finish_reason"] == expected["choices"][0]["finish_reason"]
        streamed = "".join(chunk["choices"][0]["text"] for chunk in handle)
        assert streamed == text(expected).removeprefix(
            "the other hand" if "echo" in options else ""
        )


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["city"],
        },
    },
}


def test_tools_and_json_equal_create_chat_completion(engine, plain):
    messages = [{"role": "user", "content": "the air"}]
    for options in (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
        {"response_format": {"type": "json_object", "schema": TOOL["function"]["parameters"]}},
    ):
        options = {**options, "temperature": 0.0, "max_tokens": 40}
        expected = plain.create_chat_completion(messages, **options)["choices"]
        result = engine.submit(messages=messages, steering=None, **options).result()["choices"]
        for choice in (expected[0], result[0]):
            for call in choice["message"].get("tool_calls", []):
                call.pop("id")
        assert result == expected


BETWEEN = {"tokens": "all", "exclude": ["a", "e"]}  # needs the text of each token


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either messages= or prompt="),
        ({"prompt": "a", "messages": []}, "either messages= or prompt="),
        ({"prompt": "a", "stream": True}, "iterate"),
        ({"prompt": "a", "logprobs": 2}, "log-probabilities"),
        ({"prompt": "a", "logprobs": 0}, "log-probabilities"),
        ({"prompt": "a", "suffix": "b"}, "after a prompt"),
        ({"prompt": "a", "nonsense": 1}, "nonsense"),
        ({"prompt": [1] * 600}, "600 tokens long"),
        ({"prompt": [320]}, "unknown token 320"),
        ({"prompt": [-1], "steering": {"a": 1.0}, "policy": {"scope": BETWEEN}}, "token -1"),
        ({"prompt": "a", "logit_bias": {320: 1}}, "unknown token 320"),
        ({"prompt": "a", "steering": {"d": 1.0}}, "unknown category"),
        ({"prompt": "a", "policy": {"scope": "first 0"}}, "from 1"),
    ],
)
def test_invalid_arguments_raise_at_submit(engine, arguments, message):
    with pytest.raises(SteeringError, match=message):
        engine.submit(**arguments)
    assert text(engine.submit(prompt="a", **GREEDY).result())


# ---- the cache -----------------------------------------------------------------------------------


def test_prefix_is_reused_under_the_same_steering_only(engine):
    prompt = list(range(270, 310))
    used = []

    def reused(tokens, steering, policy=None):
        before = engine.statistics.tokens_reused
        request = {"steering": steering, "policy": policy, "max_tokens": 6, **GREEDY}
        used.append(text(engine.submit(prompt=tokens, **request).result()))
        return engine.statistics.tokens_reused - before

    assert reused(prompt, None) == 0
    assert reused(prompt, None) == 39, "all but the last, whose logits are needed"
    assert reused(prompt, {"a": 1.0}) == 0
    assert reused([*prompt, 10], {"a": 1.0}) == 40
    assert reused(prompt, {"a": 0.5}) == 0
    assert reused(prompt, {"a": 1.0}, {"scope": "response"}) == 39, "of the unsteered prompt"
    assert reused(prompt, {"a": "auto"}) == 0, "the router has to see all that it averages over"
    assert len({used[0], used[2], used[4]}) == 3


def test_preemption_changes_no_text(tiny_llama):
    """The context is too small for all requests, so some make room and are computed again."""
    requests = [
        {**request, "max_tokens": 30} for request in random_requests(16, seed=3, longest=20)
    ]
    solo = solo_answers(tiny_llama, requests)
    arguments = {**ARGUMENTS, "n_ctx": 256}
    with Engine(tiny_llama, pack=pack_for(tiny_llama), max_sequences=8, **arguments) as engine:
        handles = [engine.submit(**request) for request in requests]
        for request, handle, alone in zip(requests, handles, solo, strict=True):
            assert text(handle.result()) == text(alone), request
        assert engine.statistics.preemptions > 0


def test_request_that_fills_the_context_ends_with_length(tiny_llama):
    arguments = {**ARGUMENTS, "n_ctx": 256}
    with Engine(tiny_llama, max_sequences=2, **arguments) as engine:
        result = engine.submit(prompt=[10] * 240, max_tokens=None, **GREEDY).result()
    assert result["choices"][0]["finish_reason"] == "length"
    assert 10 < result["usage"]["completion_tokens"] <= 16


# ---- scheduling ----------------------------------------------------------------------------------


def test_long_prompt_leaves_each_decode_to_writing_requests(tiny_llama):
    """Every decode has a token of the writing request and at most prompt_share prompt tokens.

    When no request writes, a decode has all prompt tokens that fit.
    """
    arguments = {**ARGUMENTS, "n_ctx": 2048}
    decodes = []  # number of rows of each slot
    started, waiting = threading.Event(), threading.Event()
    with Engine(tiny_llama, max_sequences=4, prompt_share=16, **arguments) as engine:
        batch = engine._scheduler.decoder.batch
        decode = batch.decode

        def watched(context):
            started.set()
            assert waiting.wait(30)
            decodes.append(np.bincount(batch._slots[: batch._rows], minlength=2).tolist())
            return decode(context)

        batch.decode = watched
        writing = engine.submit(prompt=[10, 11], max_tokens=60, **GREEDY)
        assert started.wait(30)
        long = engine.submit(prompt=[12] * 400, max_tokens=1, **GREEDY)
        waiting.set()
        long.result()
        writing.result()
        beside, alone = decodes[1:26], decodes[26:]
        del decodes[:]
        engine.submit(prompt=[13] * 400, max_tokens=1, **GREEDY).result()
    assert beside == [[1, 16]] * 25
    assert alone == [[1, 0]] * 34, "60 tokens: one from the prompt, 25 beside it, 34 after it"
    assert list(map(sum, decodes)) == [400]


def test_full_queue_raises_busy(engine):
    long = {"prompt": [10, 11, 12], "max_tokens": 200, **GREEDY}
    steps = Steps()
    with engine.together():
        handles = [engine.submit(**long, stopping_criteria=steps)]
        handles += [engine.submit(**long) for _ in range(3)]
    steps.wait()
    handles += [engine.submit(**long) for _ in range(4)]
    with pytest.raises(EngineBusyError, match="max_queue"):
        engine.submit(**long, timeout=0)
    for handle in handles:
        handle.cancel()
    steps.go_on()
    assert text(engine.submit(prompt=[10], max_tokens=1, **GREEDY).result())


@pytest.mark.parametrize("when", ["queued", "reading", "writing", "done"])
def test_cancel_ends_only_its_request(engine, when):
    steps = Steps()
    with engine.together():
        others = [
            engine.submit(
                prompt=[10 + k, 11],
                max_tokens=40,
                stopping_criteria=steps if k == 0 else None,
                **GREEDY,
            )
            for k in range(4 if when == "queued" else 3)
        ]
    steps.wait()
    n = 400 if when == "reading" else 3
    handle = engine.submit(prompt=[20] * n, max_tokens=2 if when == "done" else 90, **GREEDY)
    for _ in range({"reading": 1, "writing": 4}.get(when, 0)):
        steps.step()
    if when == "writing":
        next(iter(handle))
    if when == "done":
        steps.go_on()
        expected = handle.result()
    handle.cancel()
    steps.go_on()
    result = handle.result(timeout=30)
    if when == "done":
        assert result == expected
    else:
        assert result["choices"][0]["finish_reason"] == "cancelled"
        assert result["usage"]["completion_tokens"] < 90
        assert list(handle)[-1]["choices"][0]["finish_reason"] == "cancelled"
    for other in others:
        assert other.result(timeout=60)["usage"]["completion_tokens"] == 40
    assert handle.done


def test_processor_error_ends_only_its_request(engine):
    def broken(tokens, logits):
        raise ZeroDivisionError("mine")

    others = [engine.submit(prompt=[10 + k, 11], max_tokens=20, **GREEDY) for k in range(2)]
    bad = engine.submit(
        prompt=[30], max_tokens=5, logits_processor=llama_cpp.LogitsProcessorList([broken])
    )
    with pytest.raises(ZeroDivisionError, match="mine"):
        bad.result()
    with pytest.raises(ZeroDivisionError):
        list(bad)
    for other in others:
        assert other.result()["usage"]["completion_tokens"] == 20
    with pytest.raises(TimeoutError):
        engine.submit(prompt=[10], max_tokens=200, **GREEDY).result(timeout=0)


# ---- the end -------------------------------------------------------------------------------------


def test_close_cancels_running_requests(tiny_llama):
    engine = Engine(tiny_llama, max_sequences=2, **ARGUMENTS)
    running = [engine.submit(prompt=[10 + k], max_tokens=300, **GREEDY) for k in range(5)]
    threads = [threading.Thread(target=engine.close) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    engine.close()
    for handle in running:
        assert handle.result(timeout=1)["choices"][0]["finish_reason"] == "cancelled"
    with pytest.raises(EngineClosedError, match="closed"):
        engine.submit(prompt=[10])


def test_close_with_drain_waits_for_running_requests(tiny_llama):
    engine = Engine(tiny_llama, max_sequences=2, **ARGUMENTS)
    running = [engine.submit(prompt=[10 + k], max_tokens=20, **GREEDY) for k in range(5)]
    engine.close(drain=True)
    assert [h.result(timeout=0)["usage"]["completion_tokens"] for h in running] == [20] * 5
    handles = []

    def fail():
        with Engine(tiny_llama, **ARGUMENTS) as engine:
            handles.append(engine.submit(prompt=[10], max_tokens=300, **GREEDY))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    [handle] = handles
    assert handle.result(timeout=1)["choices"][0]["finish_reason"] == "cancelled"


def test_dropped_engine_ends_its_thread(tiny_llama):
    engine = Engine(tiny_llama, max_sequences=2, **ARGUMENTS)
    thread = engine._scheduler.thread
    handle = engine.submit(prompt=[10], max_tokens=300, **GREEDY)
    del engine
    thread.join(30)
    assert not thread.is_alive()
    assert handle.done


@pytest.mark.parametrize("sizes", [{"max_sequences": 0}, {"max_queue": True}, {"prompt_share": -1}])
def test_sizes_below_1_raise(tiny_llama, sizes):
    with pytest.raises(SteeringError, match="give a number from 1"):
        Engine(tiny_llama, **sizes)
