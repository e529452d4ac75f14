"""Memory of one more active sequence, besides llama.cpp's own KV cache."""

import threading
from pathlib import Path

import numpy as np
from memory import in_own_process, measurable, resident_bytes
from serving import ARGUMENTS, pack_for

from pysteer import Engine
from pysteer.pack.policy import Policy
from pysteer.runtime.plan import PlanCompiler

N = 32
CONTEXT = 2048
LARGE_VOCABULARY = 32_000  # samplers may keep something for every token
POLICY = {"recheck": 8, "scope": {"tokens": "all", "exclude": ["a", "e"]}}


class Meeting:
    """Holds an engine's scheduler in two decodes.

    In the first until `begin`, and in the first decode at which n requests write until the end of
    the block.
    """

    def __init__(self, engine, n):
        self._scheduler = engine._scheduler
        self._n = n
        self._begun, self._reached, self._over = [threading.Event() for _ in range(3)]

    def __enter__(self):
        self._decode = self._scheduler.decoder.batch.decode
        self._scheduler.decoder.batch.decode = self._wait
        return self

    def _wait(self, context):
        assert self._begun.wait(60)
        status = self._decode(context)
        if sum(len(r.writing.tokens) > 2 for r in self._scheduler.running.active) == self._n:
            self._reached.set()
            assert self._over.wait(60)
        return status

    def begin(self):
        self._begun.set()
        assert self._reached.wait(60)

    def __exit__(self, *_):
        self._scheduler.decoder.batch.decode = self._decode
        self._over.set()


def bytes_per_active_sequence(path):
    """Measure three rounds: in the first, llama.cpp allocates memory for batches of N."""
    path = Path(path)
    rng = np.random.default_rng(0)
    prompts = rng.integers(300, LARGE_VOCABULARY, (N, 12)).tolist()
    arguments = {**ARGUMENTS, "n_ctx": CONTEXT}
    resident = []
    with Engine(path, pack=pack_for(path), max_sequences=N, **arguments) as engine:
        for _ in range(3):
            before = resident_bytes()
            with Meeting(engine, N) as meeting:
                handles = [
                    engine.submit(prompt=p, steering="auto", policy=POLICY, max_tokens=16)
                    for p in prompts
                ]
                meeting.begin()
                resident.append((resident_bytes() - before) / N)
            for handle in handles:
                handle.result()
            del handles, handle
    return resident


def bytes_per_native_sequence(path):
    """Measure sequences that are gated, rechecked, and have markers, of the context's length."""
    pack = pack_for(Path(path))
    plan = PlanCompiler(pack, Policy(**POLICY), n_layer=4, n_embd=64).compile("auto")
    excluded = np.ones(CONTEXT, np.uint32)

    def new():
        sequence = plan.start(20, [(0, 20)], CONTEXT)
        sequence.set_excluded(0, excluded)
        return sequence

    kept = [new() for _ in range(100)]
    before = resident_bytes()
    kept += [new() for _ in range(1000)]
    each = (resident_bytes() - before) / 1000
    del kept
    return each


@measurable
def test_active_sequence_takes_a_few_kilobytes(tiny_model):
    path = tiny_model("llama", n_vocab=LARGE_VOCABULARY)
    resident = in_own_process(bytes_per_active_sequence, path)
    print("bytes per active sequence:", [round(number) for number in resident])
    assert min(resident[1:]) < 16 * 1024


@measurable
def test_native_sequence_takes_a_few_kilobytes(tiny_llama):
    each = in_own_process(bytes_per_native_sequence, tiny_llama)
    print("bytes per native sequence:", round(each))
    assert 4 * CONTEXT < each < 14 * 1024
