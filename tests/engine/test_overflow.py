"""Steering so strong that the model overflows: the request at fault fails, no other notices."""

import itertools
import threading

import llama_cpp
import numpy as np
import pytest
from overflow import HONEST, alone, engine_for, honest, hostile_steerings, steady
from serving import GREEDY, PROMPTS, outcome, text

from pysteer import SteeringError
from pysteer.engine.cache import KvCache
from pysteer.llama.context import HookedContext

FAMILIES = ["llama", "gpt2", "gemma3", "lfm2", "mamba"]


def assert_fault(handle, steering):
    with pytest.raises(SteeringError, match="not finite") as caught:
        handle.result(60)
    for name, strength in steering.items():
        assert f"'{name}' at strength {strength:g}" in str(caught.value)


def every_few_tokens(engine, attack):
    """Return a logits processor that attacks the engine while its request is written."""
    calls = itertools.count()

    def process(tokens, logits):
        if next(calls) % 5 == 2:
            attack(engine)
        return logits

    return llama_cpp.LogitsProcessorList([process])


# ---- neighbours ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "flash"), [*((f, False) for f in FAMILIES), ("llama", True)])
def test_overflow_changes_no_other_answer(tiny_model, family, flash):
    """Neither in the same batch, nor of later requests, nor of those that reuse the cache."""
    path = tiny_model(family)
    arguments = {"flash_attn": flash}
    requests, answers = steady(path, list(map(honest, HONEST)), noise=1e-3, **arguments)
    expected = list(map(outcome, answers))
    hostile = itertools.cycle(hostile_steerings(path))
    failed = []

    def attack(engine):
        steering = next(hostile)
        prompt = [*PROMPTS["a"], *range(270, 300)][: 5 + 8 * len(failed) % 36]
        asked = {"prompt": prompt, "steering": steering, "max_tokens": 30}
        failed.append((engine.submit(**asked, **GREEDY), steering))

    with engine_for(path, **arguments) as engine:
        for _ in range(2):
            attack(engine)
            handles = [
                engine.submit(**request, logits_processor=every_few_tokens(engine, attack))
                if k in (0, 4)
                else engine.submit(**request)
                for k, request in enumerate(requests)
            ]
            attack(engine)
            assert [outcome(handle.result(60)) for handle in handles] == expected
        for handle, steering in failed:
            assert_fault(handle, steering)
        assert [outcome(engine.submit(**r).result(60)) for r in requests] == expected
        statistics = engine.statistics
    assert len(failed) > 10
    assert statistics.recoveries >= len(failed) / 2


CHATS = [  # content, steering and seed; no two tokens are so close that the size of a batch decides
    ("How many days are in a week?", None, None),
    ("What is 2 plus 2?", None, None),
    ("What is 2 plus 2?", {"mild": 1e-3}, None),
    ("How many days are in a week?", {"mild": -1e-3}, 2),
    ("What is 2 plus 2?", None, 10),
]


def test_overflow_changes_no_chat_on_the_default_model(default_model):
    requests = [
        {
            "messages": [{"role": "user", "content": content}],
            "steering": steering,
            "max_tokens": 6,
            "temperature": 0.0 if seed is None else 0.2,
            "seed": seed,
        }
        for content, steering, seed in CHATS
    ]
    arguments = {"n_ctx": 2048}
    expected = list(map(text, alone(default_model, requests, **arguments)))
    hostile = itertools.cycle(hostile_steerings(default_model))
    failed = []

    def attack(engine):
        steering = next(hostile)
        asked = {"messages": requests[len(failed) % len(CHATS)]["messages"], "steering": steering}
        failed.append((engine.submit(**asked, max_tokens=20), steering))

    with engine_for(default_model, **arguments) as engine:
        processors = every_few_tokens(engine, attack)
        handles = [engine.submit(**requests[0], logits_processor=processors)]
        handles += [engine.submit(**request) for request in requests[1:]]
        assert [text(handle.result(100)) for handle in handles] == expected
        for handle, steering in failed:
            assert_fault(handle, steering)
        assert engine.statistics.recoveries
        again = [text(engine.submit(**request).result(60)) for request in requests]
        assert again == expected
        assert engine.statistics.tokens_reused > 50


@pytest.mark.parametrize("n_batch", [16, 512])
def test_overflow_while_others_make_room_changes_no_answer(tiny_model, n_batch):
    """The context is too small for all, so some are preempted while others start over."""
    path = tiny_model("gpt2")
    arguments = {"n_ctx": 160, "n_batch": n_batch, "max_sequences": 6}
    requests = [
        {**honest(request), "max_tokens": 60} for request in HONEST if request is not HONEST[4]
    ]
    expected = list(map(text, alone(path, requests, **arguments)))
    with engine_for(path, **arguments) as engine:
        handles = []
        for request in requests:
            handles.append(engine.submit(**request))
            engine.submit(prompt=PROMPTS["b"], steering={"early": 3e38}, max_tokens=9)
        assert [text(handle.result(60)) for handle in handles] == expected
        statistics = engine.statistics
    assert statistics.recoveries
    assert statistics.preemptions


def test_cancelled_overflow_leaves_no_trace(tiny_model):
    """Cancelled between two parts of the prompt: nobody has seen its logits."""
    path = tiny_model("gpt2")
    arguments = {"n_batch": 16}
    requests = list(map(honest, HONEST))
    expected = list(map(outcome, alone(path, requests, **arguments)))
    with engine_for(path, **arguments) as engine:
        batch = engine._scheduler.decoder.batch
        decode, cancelled = batch.decode, []

        def decode_and_cancel(context):
            status = decode(context)
            for handle in cancelled:
                handle.cancel()
            return status

        batch.decode = decode_and_cancel
        for request in requests:
            cancelled.append(
                engine.submit(prompt=[*range(270, 310)], steering={"early": 3e38}, max_tokens=9)
            )
            cancelled[-1].result(60)
            assert outcome(engine.submit(**request).result(60)) == expected[requests.index(request)]
        ends = [handle.result(60)["choices"][0]["finish_reason"] for handle in cancelled]
    assert ends == ["cancelled"] * len(requests)


# ---- the request at fault ------------------------------------------------------------------------


def test_model_that_overflows_by_itself_is_named(tiny_llama, monkeypatch):
    def broken(context, row):
        return np.full(context.n_vocab, np.nan, np.float32)

    with engine_for(tiny_llama) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(HookedContext, "logits", broken)
            handles = [engine.submit(prompt=PROMPTS[n], steering=None, max_tokens=3) for n in "ab"]
            for handle in handles:
                with pytest.raises(SteeringError, match="the model itself, without steering"):
                    handle.result(60)
        assert text(engine.submit(**honest(HONEST[0])).result(60))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_victims_of_hidden_cells_are_never_blamed(tiny_llama, monkeypatch, value):
    """Logits fail whenever two certain requests are in memory together, and no request alone."""
    requests = [{**honest(HONEST[k]), "steering": None} for k in (0, 3, 5, 6)]
    expected = list(map(text, alone(tiny_llama, requests)))
    logits = HookedContext.logits
    with engine_for(tiny_llama) as engine:
        running = engine._scheduler.running

        def spoiled(context, row):
            found = logits(context, row).copy()
            if sum(len(slot.cells) > 0 for slot in running.cache.slots) > 1:
                found[7] = value
            return found

        monkeypatch.setattr(HookedContext, "logits", spoiled)
        with engine.together():
            handles = [engine.submit(**request) for request in requests]
        assert [text(handle.result(60)) for handle in handles] == expected


def test_search_ends_while_attacks_go_on(tiny_model):
    """Every recovery has to leave room for a token of those that start over."""
    path = tiny_model("gpt2")
    request = {**honest(HONEST[0]), "max_tokens": 30}
    [expected] = map(text, alone(path, [request]))
    over = threading.Event()
    with engine_for(path, max_queue=8) as engine:

        def attack():
            while not over.is_set():
                engine.submit(prompt=PROMPTS["b"], steering={"early": 3e38}, max_tokens=9)

        attackers = [threading.Thread(target=attack) for _ in range(2)]
        for attacker in attackers:
            attacker.start()
        try:
            assert text(engine.submit(**request).result(60)) == expected
        finally:
            over.set()
            for attacker in attackers:
                attacker.join(60)
        statistics = engine.statistics
    assert statistics.recoveries > 10


# ---- the cache -----------------------------------------------------------------------------------


def test_unchecked_cells_are_never_reused(tiny_llama):
    prompt = [*range(270, 310)]
    with engine_for(tiny_llama, n_batch=16) as engine:
        cache: KvCache = engine._scheduler.running.cache
        batch = engine._scheduler.decoder.batch
        decode, handles, checked = batch.decode, [], []

        def decode_and_cancel(context):
            status = decode(context)
            checked.append([slot.checked for slot in cache.slots if slot.in_use])
            handles[0].cancel()
            return status

        batch.decode = decode_and_cancel
        with engine.together():
            handles.append(engine.submit(prompt=prompt, steering=None, max_tokens=1))
        handles[0].result(60)
        batch.decode = decode
        assert checked == [[0]], "16 of 40 tokens were decoded"
        assert not any(slot.cells for slot in cache.slots)
        before = engine.statistics.tokens_reused
        engine.submit(prompt=prompt, steering=None, max_tokens=1).result(60)
        assert engine.statistics.tokens_reused == before
        engine.submit(prompt=prompt, steering=None, max_tokens=1).result(60)
        assert engine.statistics.tokens_reused == before + 39
