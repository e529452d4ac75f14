"""Requests that start together, and the logits that a handle keeps."""

import threading
from contextlib import closing

import llama_cpp
import numpy as np
import pytest

from pysteer import Engine, SteeringError, SteeringPack, SteeringVector
from pysteer.engine import EngineBusyError, EngineClosedError
from pysteer.llama.control_vector import set_native_control_vector

OPTIONS = {
    "n_threads": 1,
    "n_threads_batch": 1,
    "verbose": False,
    "n_ctx": 256,
    "type_k": 0,
    "type_v": 0,
}
PROMPTS = ["the cat", "an other thing", "zzz", "12345 6789"]


def ask(engine, prompts, **arguments):
    with engine.together():
        handles = [
            engine.submit(prompt=p, max_tokens=8, temperature=0.0, **arguments) for p in prompts
        ]
        assert engine.statistics.waiting == len(prompts)
        assert engine.statistics.running == 0
    return [handle.result()["choices"][0]["text"] for handle in handles]


def test_group_starts_at_once_from_an_empty_cache(tiny_llama):
    with Engine(tiny_llama, max_sequences=4, **OPTIONS) as engine:
        first = ask(engine, PROMPTS)
        before = engine.statistics
        assert ask(engine, PROMPTS) == first
        after = engine.statistics
    # Nothing of the first group is reused, and both took the same decodes.
    assert after.tokens_reused == before.tokens_reused == 0
    assert after.decodes == 2 * before.decodes
    assert after.tokens_decoded == 2 * before.tokens_decoded


def test_group_waits_for_running_requests(tiny_llama):
    with Engine(tiny_llama, max_sequences=2, **OPTIONS) as engine:
        early = engine.submit(prompt="the cat", max_tokens=30, temperature=0.0)
        with engine.together():
            assert early.done
            late = engine.submit(prompt="zzz", max_tokens=1)
            assert not late.done
        assert late.result()


def test_group_larger_than_the_queue_raises_busy(tiny_llama):
    with Engine(tiny_llama, max_sequences=2, max_queue=2, **OPTIONS) as engine:
        with engine.together():
            handles = [engine.submit(prompt=p, max_tokens=1) for p in PROMPTS[:2]]
            with pytest.raises(EngineBusyError):
                engine.submit(prompt="x", max_tokens=1)
        assert all(handle.result() for handle in handles)


def test_request_cancelled_before_its_start_ends(tiny_llama):
    with Engine(tiny_llama, max_sequences=2, **OPTIONS) as engine:
        with engine.together():
            gone = engine.submit(prompt="the cat", max_tokens=8)
            stays = engine.submit(prompt="zzz", max_tokens=8)
            gone.cancel()
        assert gone.result(timeout=30)["choices"][0]["finish_reason"] == "cancelled"
        assert stays.result(timeout=30)["choices"][0]["finish_reason"] != "cancelled"


def test_waiting_inside_a_group_raises(tiny_llama):
    """The group starts when the block ends, so that the thread would wait for itself."""
    with Engine(tiny_llama, max_sequences=2, **OPTIONS) as engine:
        with engine.together():
            handle = engine.submit(prompt="the cat", max_tokens=8)
            waits = [handle.result, lambda: next(iter(handle)), engine.together().__enter__]
            for wait in waits:
                with pytest.raises(SteeringError, match="behind the block"):
                    wait()
        assert handle.result(30)


def test_groups_of_two_threads_do_not_mix(tiny_llama):
    with Engine(tiny_llama, max_sequences=2, **OPTIONS) as engine:
        alone = [ask(engine, PROMPTS[:2]), ask(engine, PROMPTS[2:])]
        found = [None, None]

        def run(number):
            with engine.together():
                handles = [
                    engine.submit(prompt=p, max_tokens=8, temperature=0.0)
                    for p in PROMPTS[2 * number : 2 * number + 2]
                ]
            found[number] = [handle.result()["choices"][0]["text"] for handle in handles]

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert found == alone


def test_group_on_a_closed_engine_raises(tiny_llama):
    engine = Engine(tiny_llama, max_sequences=2, **OPTIONS)
    engine.close()
    with pytest.raises(EngineClosedError), engine.together():
        pass


def test_close_inside_a_group_ends_its_requests(tiny_llama):
    engine = Engine(tiny_llama, max_sequences=2, **OPTIONS)
    with engine.together():
        handle = engine.submit(prompt="the cat", max_tokens=8)
        engine.close()
    assert handle.result(timeout=30)["choices"][0]["finish_reason"] == "cancelled"


def test_first_logits_equal_llama_cpp(tiny_llama):
    rows = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    pack = SteeringPack({"a": SteeringVector({1 + i: row for i, row in enumerate(rows)})})
    with Engine(tiny_llama, pack=pack, max_sequences=2, **OPTIONS) as engine:
        handles = [
            engine.submit(
                prompt="the cat",
                steering=steering,
                max_tokens=3,
                repeat_penalty=1.5,
                keep_first_logits=True,
            )
            for steering in (None, {"a": 1.0})
        ]
        for handle in handles:
            handle.result()
        without = engine.submit(prompt="the cat", max_tokens=1)
        without.result()
    assert without.first_logits is None
    with closing(llama_cpp.Llama(str(tiny_llama), logits_all=True, **OPTIONS)) as llm:
        tokens = llm.tokenize(b"the cat", add_bos=True)
        for handle, vector in zip(handles, (0 * rows, rows), strict=True):
            set_native_control_vector(llm, vector)
            llm.reset()
            llm.eval(tokens)
            assert np.allclose(handle.first_logits, llm.scores[len(tokens) - 1], atol=1e-4)
    assert not np.allclose(handles[0].first_logits, handles[1].first_logits, atol=1e-2)
