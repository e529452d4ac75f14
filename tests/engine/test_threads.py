"""Threads that meet at a handle, at the end of the engine, and at the end of the interpreter."""

import gc
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from holding import Steps
from serving import ARGUMENTS, GREEDY, PROMPTS, pack_for, text

from pysteer import Engine
from pysteer.engine import EngineClosedError
from pysteer.engine.sampling import Sampler

REQUEST = {"prompt": PROMPTS[""], "max_tokens": 6, "steering": None, **GREEDY}
LONG = {**REQUEST, "max_tokens": 400}
ASKED = [{"prompt": "the"}, {"messages": [{"role": "user", "content": "the"}]}]


@pytest.fixture
def engine(tiny_llama):
    with Engine(tiny_llama, pack=pack_for(tiny_llama), max_sequences=2, **ARGUMENTS) as engine:
        yield engine


def in_threads(n, what):
    """Return the results of a function in n threads that start together."""
    start = threading.Barrier(n)

    def work(_):
        start.wait()
        return what()

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(work, range(n), timeout=60))


# ---- one handle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ASKED)
def test_handle_gives_every_thread_the_same_result(engine, asked):
    for _ in range(3):
        handle = engine.submit(**asked, steering={"a": 1.0}, max_tokens=20, **GREEDY)
        streams = in_threads(4, lambda handle=handle: list(handle))
        results = in_threads(4, handle.result)
        assert all(result is results[0] for result in results)
        assert all(stream == streams[0] for stream in streams)
        pieces = [
            choice.get("text") or choice.get("delta", {}).get("content") or ""
            for choice in (chunk["choices"][0] for chunk in streams[0])
        ]
        assert "".join(pieces) == text(results[0])
        assert streams[0][-1]["steering"] == results[0]["steering"]


def test_error_reaches_every_waiting_thread(engine):
    def broken(tokens, logits):
        raise ZeroDivisionError("mine")

    handle = engine.submit(**REQUEST, stopping_criteria=broken)

    def wait():
        with pytest.raises(ZeroDivisionError, match="mine"):
            handle.result(30)
        with pytest.raises(ZeroDivisionError, match="mine"):
            list(handle)
        return True

    assert all(in_threads(4, wait))


def test_cancel_from_many_threads_ends_every_request(engine):
    steps = Steps()
    handles = [engine.submit(**LONG, stopping_criteria=steps)]
    handles += [engine.submit(**LONG) for _ in range(5)]
    ends = []

    def work():
        for handle in handles:
            handle.cancel()
        steps.go_on()
        for handle in handles:
            ends.append(handle.result(30)["choices"][0]["finish_reason"])

    in_threads(4, work)
    assert ends == ["cancelled"] * 24


# ---- the end of the engine -----------------------------------------------------------------------


def test_submit_while_closing_answers_or_raises_closed(tiny_llama):
    for delay in (0.0, 0.003, 0.03):
        engine = Engine(tiny_llama, max_sequences=2, max_queue=1, **ARGUMENTS)
        start = threading.Barrier(4)

        def work(engine=engine, start=start):
            start.wait()
            ends = []
            try:
                while True:
                    handle = engine.submit(**REQUEST)
                    ends.append(handle.result(30)["choices"][0]["finish_reason"])
            except EngineClosedError:
                return ends

        with ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(work) for _ in range(3)]
            start.wait()
            time.sleep(delay)
            engine.close()
            for future in futures:
                assert set(future.result(30)) <= {"length", "cancelled"}
        assert engine._llm.closed


def test_model_outlives_the_last_sampler(tiny_llama, monkeypatch):
    """Also the sampler of a request that waits for room in the queue when the engine closes."""
    engine = Engine(tiny_llama, max_sequences=1, max_queue=1, **ARGUMENTS)
    freed = []
    close = engine._llm.close

    def close_model():
        freed.append("model")
        close()

    def close_sampler(sampler):
        if threading.current_thread() is not engine._scheduler.thread:
            time.sleep(0.3)
        freed.append("sampler")
        sampler._free()

    handles = [engine.submit(**LONG)]
    next(iter(handles[0]))
    handles.append(engine.submit(**LONG))
    monkeypatch.setattr(engine._llm, "close", close_model)
    monkeypatch.setattr(Sampler, "close", close_sampler)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.submit, **LONG)
        while engine._scheduler.queue.users == 0:
            time.sleep(0.001)
        engine.close()
        with pytest.raises(EngineClosedError):
            waiting.result(30)
    assert freed == ["sampler"] * 3 + ["model"]


def test_model_outlives_questions_of_a_chat_handler(tiny_llama):
    """A handler may ask new questions when it makes the result, in any thread, at any time."""
    asked, go_on = threading.Event(), threading.Event()

    def handler(*, llama, messages, stream, **_):
        if not stream:
            llama.tokenize(b"new")
        return llama.create_completion(prompt="the", stream=stream)

    engine = Engine(tiny_llama, max_sequences=1, chat_handler=handler, **ARGUMENTS)
    tokenize = engine._llm.tokenize

    def slow(data, *args, **options):
        if data == b"new":
            asked.set()
            assert go_on.wait(30)
        return tokenize(data, *args, **options)

    engine._llm.tokenize = slow
    handles = [engine.submit(messages=[], max_tokens=1) for _ in range(2)]
    list(handles[0])
    list(handles[1])
    with ThreadPoolExecutor(2) as pool:
        result = pool.submit(handles[0].result)
        assert asked.wait(30)
        closing = pool.submit(engine.close)
        time.sleep(0.2)
        still_open = not engine._llm.closed
        go_on.set()
        assert result.result(30)
        closing.result(30)
    assert still_open
    with pytest.raises(EngineClosedError):
        handles[1].result()


@pytest.mark.parametrize("asked", ASKED)
def test_engine_collected_while_a_handle_is_locked_ends(tiny_llama, asked):
    """The scheduler needs that lock to end the request."""
    engine = Engine(tiny_llama, pack=pack_for(tiny_llama), max_sequences=1, **ARGUMENTS)
    policy = {"scope": {"tokens": "all", "exclude": ["a", "e"]}}
    handle = engine.submit(**asked, steering={"a": 1.0}, policy=policy, max_tokens=400, **GREEDY)
    thread = engine._scheduler.thread
    engine.itself = [engine]
    only = [engine]
    del engine
    done = threading.Event()

    def drop():
        with handle._changed:
            only.clear()
            gc.collect()
        done.set()

    threading.Thread(target=drop, daemon=True).start()
    assert done.wait(30)
    thread.join(30)
    assert not thread.is_alive()
    assert handle.result(1)["choices"][0]["finish_reason"] in ("cancelled", "length")


# ---- the end of the interpreter ------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["engine", "handle"])
def test_interpreter_exits_while_the_engine_decodes(tiny_llama, kept):
    program = (
        "import atexit, time\n"
        "atexit.register(lambda: print('alive' if thread.is_alive() else 'ended'))\n"
        "from pysteer import Engine\n"
        f"engine = Engine({str(tiny_llama)!r}, n_ctx=1024, n_threads=1, verbose=False)\n"
        "handle = engine.submit(prompt=[10], max_tokens=1000)\n"
        "next(iter(handle))\n"
        "thread, llm = engine._scheduler.thread, engine._llm\n"
        "close = llm.close\n"
        "llm.close = lambda: (time.sleep(0.3), close())\n"
        f"{'del engine' if kept == 'handle' else ''}\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "ended\n", "")
