"""An engine in a forked process: nothing decodes there, and nothing may hang or be freed."""

import os

import pytest
from forking import forking

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

ENGINE = """
engine = Engine(path, n_ctx=1024, n_threads=2, verbose=False)
request = {"prompt": [10, 11, 12], "temperature": 0.0}
done = engine.submit(**request, max_tokens=9)
expected = done.result(30)["choices"][0]["text"]
"""


def test_forked_engine_refuses_every_request(tiny_llama):
    """Also while other threads hold its locks."""
    program = (
        ENGINE
        + """
running = engine.submit(**request, max_tokens=900)
next(iter(running))
for lock in (running._changed, done._changed, engine._scheduler.queue._changed):
    held(lock)

def work():
    refused(lambda: engine.submit(**request))
    refused(lambda: engine.submit(messages=[{"role": "user", "content": "a"}]))
    refused(lambda: engine.tokenize("a"))
    refused(lambda: engine.together().__enter__())
    refused(running.result)
    refused(lambda: list(running))
    refused(running.cancel)
    assert done.result()["choices"][0]["text"] == expected
    assert "".join(c["choices"][0]["text"] for c in done) == expected
    assert not running.done and engine.base_model and engine.statistics
    with engine:
        pass
    engine.close(drain=True)
    globals().pop("engine")

print(in_child(work))
os._exit(0)
"""
    )
    assert forking(tiny_llama, program) == "0\n"


def test_fork_leaves_the_engine_to_its_process(tiny_llama):
    program = (
        ENGINE
        + """
running = engine.submit(**request, max_tokens=300)
context = multiprocessing.get_context("fork")

def work():
    refused(running.result)
    engine.close()

child = context.Process(target=work)
child.start()
child.join(30)
print(child.exitcode, in_child(lambda: globals().pop("engine").close()))
assert engine.submit(**request, max_tokens=9).result(30)["choices"][0]["text"] == expected
assert running.result(30)["usage"]["completion_tokens"] == 300
engine.close()
print(in_child(lambda: refused(lambda: engine.submit(**request))))
"""
    )
    assert forking(tiny_llama, program) == "0 0\n0\n"


def test_engine_made_after_the_fork_answers(tiny_llama):
    """The way out that the error names."""
    program = """
def work():
    with Engine(path, n_ctx=256, n_threads=2, verbose=False) as engine:
        assert engine.submit(prompt=[10], max_tokens=9).result(30)

print(in_child(work))
print(in_child(work))
"""
    assert forking(tiny_llama, program) == "0\n0\n"
