"""A model in a forked process: OpenMP's threads are missing there, so that a decode would hang."""

import os

import pytest
from forking import forking

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.mark.parametrize("threads", [1, 2])
def test_forked_model_refuses_to_decode(tiny_llama, threads):
    """Also while another thread holds its lock; the model goes on in its own process."""
    program = f"""
llm = SteeredLlama(path, n_ctx=256, n_threads={threads}, n_threads_batch={threads}, verbose=False)
request = {{"prompt": [10, 11, 12], "max_tokens": 9, "temperature": 0.0}}
expected = llm.create_completion(**request)["choices"][0]["text"]
stream = llm.create_completion(**request, stream=True)
next(stream)
identity = llm.base_model

def work():
    refused(lambda: llm.create_completion(**request))
    refused(lambda: llm.create_chat_completion([{{"role": "user", "content": "a"}}]))
    refused(lambda: next(stream))
    refused(lambda: llm.eval([10]))
    refused(lambda: llm.capture([10]))
    refused(lambda: llm.tokenize(b"a"))
    refused(lambda: llm.ctx)
    assert identity
    llm.close()
    globals().pop("llm")

print(in_child(work))
assert llm.create_completion(**request)["choices"][0]["text"] == expected
held(llm.context.lock)
print(in_child(work))
os._exit(0)
"""
    assert forking(tiny_llama, program) == "0\n0\n"
