"""Threads and asyncio tasks that share a model, each under its own steering."""

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest

from pysteer import SteeredLlama, SteeringError, SteeringPack, SteeringVector

ARGUMENTS = {"n_ctx": 256, "verbose": False, "n_threads": 1, "n_threads_batch": 1}
GREEDY = {"max_tokens": 4, "temperature": 0.0}
PROMPT = list(range(10, 20))
PACK = SteeringPack(
    {
        name: SteeringVector({1: np.random.default_rng(seed).standard_normal(64)})
        for seed, name in enumerate("ab")
    }
)


@pytest.fixture
def llm(tiny_llama):
    with closing(SteeredLlama(tiny_llama, pack=PACK, **ARGUMENTS)) as llm:
        yield llm


def steered_by(result):
    return list(result["steering"]["categories"])


def test_request_without_steering_ignores_requests_of_other_threads(llm):
    """Also where it is made while another thread's request runs."""
    running, go_on = threading.Event(), threading.Event()

    def wait(tokens, logits):
        running.set()
        assert go_on.wait(30)
        return True

    with ThreadPoolExecutor(2) as pool:
        steered = pool.submit(
            llm.create_completion,
            PROMPT,
            steering={"a": 1.0},
            stopping_criteria=wait,
            **GREEDY,
        )
        assert running.wait(30)
        plain = pool.submit(llm.create_completion, PROMPT, **GREEDY)
        # The request is compiled before it waits for the model.
        assert not plain.done()
        threading.Event().wait(0.2)
        go_on.set()
        assert steered_by(steered.result(30)) == ["a"]
        assert steered_by(plain.result(30)) == []


def test_requests_with_and_without_steering_mix_in_threads(llm):
    def ask(steering):
        arguments = {} if steering is None else {"steering": steering}
        return [steered_by(llm.create_completion(PROMPT, **arguments, **GREEDY)) for _ in range(20)]

    steerings = [None, {"a": 1.0}, None, {"b": 1.0}]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, steerings, timeout=120))
    assert found == [[list(steering or ())] * 20 for steering in steerings]


def test_block_holds_in_its_own_thread(llm):
    with llm.steering({"a": 1.0}), ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(llm.create_completion, PROMPT, **GREEDY).result(30)
        here = llm.create_completion(PROMPT, **GREEDY)
    assert steered_by(elsewhere) == []
    assert steered_by(here) == ["a"]


def test_interleaved_blocks_of_asyncio_tasks_stay_apart(llm):
    """The first block to begin is the first to end."""
    found = {}

    async def task(name, begin, end):
        await asyncio.sleep(begin)
        with llm.steering({name: 1.0}):
            await asyncio.sleep(end - begin)
            found[name] = steered_by(llm.create_completion(PROMPT, **GREEDY))
        found[name, "after"] = steered_by(llm.create_completion(PROMPT, **GREEDY))

    async def both():
        await asyncio.gather(task("a", 0, 0.4), task("b", 0.2, 0.6))

    asyncio.run(both())
    assert found == {"a": ["a"], ("a", "after"): [], "b": ["b"], ("b", "after"): []}


def test_task_made_in_a_block_inherits_its_steering(llm):
    async def ask():
        return steered_by(llm.create_completion(PROMPT, **GREEDY))

    async def outer():
        with llm.steering({"a": 1.0}):
            task = asyncio.create_task(ask())
        return await task

    assert asyncio.run(outer()) == ["a"]


def test_request_in_a_callback_inherits_the_steering_of_the_request_around_it(llm):
    inner = []

    def criterion(tokens, logits):
        inner.append(steered_by(llm.create_completion(PROMPT[:4], **GREEDY)))
        return True

    llm.create_completion(PROMPT, steering={"a": 1.0}, stopping_criteria=criterion, **GREEDY)
    assert inner
    assert all(categories == ["a"] for categories in inner)
    assert steered_by(llm.create_completion(PROMPT, **GREEDY)) == []


def answers(llm, name):
    """A generator with a block around its requests."""
    with llm.steering({name: 1.0}):
        while True:
            yield steered_by(llm.create_completion(PROMPT, **GREEDY))


def answers_once(llm, name):
    with llm.steering({name: 1.0}):
        yield steered_by(llm.create_completion(PROMPT, **GREEDY))


def test_blocks_of_interleaved_generators_end_each_by_itself(llm):
    """The first block to begin is the first to end, in one context."""
    first, second = answers(llm, "a"), answers(llm, "b")
    assert next(first) == ["a"]
    assert next(second) == ["b"]
    first.close()
    assert next(second) == ["b"]
    second.close()
    assert steered_by(llm.create_completion(PROMPT, **GREEDY)) == []


def test_block_that_ends_in_another_thread_leaves_nothing_behind(llm):
    generator = answers(llm, "a")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(next, generator).result(30) == ["a"]
        generator.close()
        after = pool.submit(llm.create_completion, PROMPT, **GREEDY).result(30)
    assert steered_by(after) == []


def test_block_that_ends_where_it_did_not_hold_is_an_error(llm):
    """As where a web server advances a generator in a new context each time."""
    generator = answers_once(llm, "a")
    assert contextvars.copy_context().run(next, generator) == ["a"]
    with pytest.raises(SteeringError, match=r"another thread or asyncio task .*give each request"):
        contextvars.copy_context().run(next, generator)


def test_context_copied_in_a_callback_outlives_the_steering_of_the_request(llm):
    contexts = []

    def criterion(tokens, logits):
        contexts.append(contextvars.copy_context())
        return True

    llm.create_completion(PROMPT, steering={"a": 1.0}, stopping_criteria=criterion, **GREEDY)
    later = contexts[0].run(llm.create_completion, PROMPT, **GREEDY)
    assert steered_by(later) == []


def test_request_of_a_thread_with_the_context_of_a_running_request_waits_for_it(llm):
    """It must neither run without the lock nor inherit the other request's steering."""
    later = []

    def criterion(tokens, logits):
        context = contextvars.copy_context()
        later.append(pool.submit(context.run, llm.create_completion, PROMPT, **GREEDY))
        threading.Event().wait(0.3)
        assert not later[0].done()
        return True

    with ThreadPoolExecutor(1) as pool:
        llm.create_completion(PROMPT, steering={"a": 1.0}, stopping_criteria=criterion, **GREEDY)
        assert steered_by(later[0].result(30)) == []
