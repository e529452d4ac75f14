"""Random traffic for an engine, from threads of clients that check the end of every request."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
import pytest
from serving import HIGH_BYTES, STEERINGS, TOO_STRONG, outcome, solo_answers, text

from pysteer import HookError, SteeringError

CLIENTS = 6
AT_ONCE = 3  # by one client

NO_HIGH_BYTES = {"logit_bias": dict.fromkeys(HIGH_BYTES, -1e3)}
SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repeat_penalty": 1.3},
    {"temperature": 1.0},
    {"temperature": 1.5, "top_k": 8, "min_p": 0.0},
    {"temperature": 0.7, "mirostat_mode": 2},
]
BAD_ARGUMENTS = [
    {"prompt": [1] * 5000},
    {"prompt": [320]},
    {"steering": {"nobody": 1.0}},
    {"steering": {"a": float("nan")}},
    {"policy": {"scope": "first 0"}},
    {"nonsense": 1},
    {"stream": True},
]
KINDS = {
    "plain": 0.60,
    "cancelled at once": 0.05,
    "cancelled after a while": 0.10,
    "cancelled while writing": 0.10,
    "processor raises": 0.04,
    "criterion raises": 0.04,
    "too strong": 0.03,
    "refused": 0.04,
}


class Case(NamedTuple):
    """One request of a client.

    Attributes:
        number: which case it is.
        of: index of the request among those that there are solo answers for.
        kind: one of `KINDS`.
        moment: when it is cancelled, or which call of the callback raises.
        choice: which of the possibilities that the kind has.
    """

    number: int
    of: int
    kind: str
    moment: int
    choice: int


class Mine(Exception):
    """Raised by a callback of the case with this number."""


def varied_requests(n, seed, *, longest, most_tokens):
    """Return requests of different prompts, lengths, steering, policies, sampling and seeds.

    Many of the prompts begin alike.
    """
    rng = np.random.default_rng(seed)
    heads = [rng.integers(266, 320, rng.integers(0, longest // 2)).tolist() for _ in range(6)]
    requests = []
    for _ in range(n):
        head = heads[rng.integers(len(heads))]
        tail = rng.integers(5, 320, rng.integers(1, longest - len(head))).tolist()
        steering, policy = STEERINGS[rng.integers(len(STEERINGS))]
        requests.append(
            {
                "prompt": head + tail,
                "steering": steering,
                "policy": policy,
                "max_tokens": int(rng.integers(1, most_tokens + 1)),
                "seed": int(rng.integers(1, 2**31)),
                **NO_HIGH_BYTES,
                **SAMPLINGS[rng.integers(len(SAMPLINGS))],
            }
        )
    return requests


def random_cases(n, n_requests, seed):
    rng = np.random.default_rng(seed)
    kinds = rng.choice(list(KINDS), n, p=list(KINDS.values())).tolist()
    return [
        Case(
            number,
            *rng.integers(n_requests, size=1).tolist(),
            kind,
            *rng.integers(1, 6, 2).tolist(),
        )
        for number, kind in enumerate(kinds)
    ]


class Traffic:
    """Lets clients work through cases, and compares each end with the solo answer.

    Args:
        path: the model.
        requests: requests of the cases.
        solo: the answers to them.
    """

    def __init__(self, path, requests, solo):
        self._path = path
        self._requests = requests
        self._solo = solo
        self.ends = dict.fromkeys(["completed", "cancelled", "failed", "refused"], 0)
        self._others: list[tuple[Case, dict[str, Any]]] = []

    def run(self, engine, cases):
        """Work through the cases; raise the first error of a client."""
        waiting = iter(cases)
        lock = threading.Lock()

        def client():
            while True:
                with lock:
                    mine = list(itertools.islice(waiting, AT_ONCE))
                if not mine:
                    return
                for case, handle in [(case, self._ask(engine, case)) for case in mine]:
                    self._follow(case, handle)

        with ThreadPoolExecutor(CLIENTS) as pool:
            for done in [pool.submit(client) for _ in range(CLIENTS)]:
                done.result()

    def _ask(self, engine, case):
        request: dict[str, Any] = self._requests[case.of]
        calls = itertools.count(1)

        def raises(tokens, logits):
            if next(calls) == case.moment:
                raise Mine(case.number)
            return logits if case.kind == "processor raises" else False

        if case.kind == "processor raises":
            request = {**request, "logits_processor": llama_cpp.LogitsProcessorList([raises])}
        if case.kind == "criterion raises":
            request = {**request, "stopping_criteria": raises}
        if case.kind == "too strong":
            steering = TOO_STRONG[case.choice % len(TOO_STRONG)]
            request = {**request, "steering": steering, "policy": None}
        if case.kind == "refused":
            bad = BAD_ARGUMENTS[case.choice % len(BAD_ARGUMENTS)]
            with pytest.raises(SteeringError):
                engine.submit(**{**request, **bad})
            return None
        handle = engine.submit(**request)
        if case.kind == "cancelled at once":
            handle.cancel()
        return handle

    def _follow(self, case, handle):
        if case.kind == "refused":
            self.ends["refused"] += 1
            return
        if case.kind == "cancelled after a while":
            time.sleep(case.moment * case.choice / 2000)
            handle.cancel()
        if case.kind == "cancelled while writing":
            for _ in itertools.islice(handle, case.moment):
                pass
            handle.cancel()
        if case.kind == "too strong":
            with pytest.raises(HookError, match="not finite"):
                handle.result(60)
            self.ends["failed"] += 1
            return
        if case.kind in ("processor raises", "criterion raises"):
            alone = self._solo[case.of]
            drawn = alone["usage"]["completion_tokens"]
            drawn += alone["choices"][0]["finish_reason"] == "stop"  # by a token that ends it
            if case.moment <= drawn:
                with pytest.raises(Mine, match=f"^{case.number}$"):
                    handle.result(60)
                self.ends["failed"] += 1
                return
        result = handle.result(60)
        assert "".join(chunk["choices"][0]["text"] for chunk in handle) == text(result)
        if result["choices"][0]["finish_reason"] == "cancelled":
            assert case.kind.startswith("cancelled")
            self.ends["cancelled"] += 1
        else:
            self.ends["completed"] += 1
        if not _fits(result, self._solo[case.of]):
            self._others.append((case, result))

    def check_the_rounded(self):
        """Check that the few other answers come from rounding; return their number.

        Sums round differently in batches of different sizes.
        """
        for case, result in self._others:
            assert any(_fits(result, rounded) for rounded in self._rounded(case)), (case, result)
        return len(self._others)

    def _rounded(self, case):
        """Return solo answers with logits that differ as little as by rounding."""
        rng = np.random.default_rng(case.number)

        def noise(tokens, logits):
            logits = logits + rng.uniform(-1e-5, 1e-5, len(logits)).astype(np.float32)
            for token, bias in NO_HIGH_BYTES["logit_bias"].items():
                logits[token] += bias
            return logits

        # llama-cpp-python takes a processor or a bias, not both.
        processors = llama_cpp.LogitsProcessorList([noise])
        request = {**self._requests[case.of], "logit_bias": None, "logits_processor": processors}
        return solo_answers(self._path, [request] * 40)


def _fits(result, alone):
    """Return True if a result is the solo answer, up to where it was cancelled."""
    if result["choices"][0]["finish_reason"] == "cancelled":
        return text(alone).startswith(text(result))
    return outcome(result) == outcome(alone)


def check_cells(engine):
    """Check that nothing runs, and that llama.cpp agrees with the cells of the idle slots."""
    assert engine.statistics.running == engine.statistics.waiting == 0
    cache = engine._scheduler.running.cache
    assert cache.available == cache._n_cells
    assert not cache._running_holders.any()
    assert not any(slot.in_use for slot in cache.slots)
    held = np.concatenate([np.array(slot.cells, int) for slot in cache.slots])
    assert np.array_equal(np.bincount(held, minlength=cache._n_cells), cache._holders)
    assert cache.unheld == cache._n_cells - len(np.unique(held))
    assert sorted({*cache._unheld, *held.tolist()}) == list(range(cache._n_cells))
    memory = llama_cpp.llama_get_memory(engine._llm.ctx)
    for slot in cache.slots:
        last = llama_cpp.llama_memory_seq_pos_max(memory, slot.number)
        assert last + 1 == len(slot.cells)
