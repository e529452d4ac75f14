"""Random traffic: every request ends with its solo answer or error, and leaves nothing behind."""

import sys
import time

import pytest
from memory import resident_bytes
from serving import ARGUMENTS, pack_for, solo_answers
from traffic import Traffic, check_cells, random_cases, varied_requests

from pysteer import Engine


@pytest.mark.parametrize("family", ["llama", "mamba", "lfm2"])
def test_random_traffic_gets_solo_answers_and_errors(tiny_model, family):
    path = tiny_model(family)
    requests = varied_requests(40, seed=1, longest=30, most_tokens=90)
    traffic = Traffic(path, requests, solo_answers(path, requests))
    arguments = {**ARGUMENTS, "n_ctx": 256}
    with Engine(
        path, pack=pack_for(path), max_sequences=6, max_queue=4, prompt_share=24, **arguments
    ) as engine:
        traffic.run(engine, random_cases(100, len(requests), seed=2))
        check_cells(engine)
        statistics = engine.statistics
    assert sum(traffic.ends.values()) == 100
    assert min(traffic.ends.values()) > 0
    assert traffic.check_the_rounded() <= 2
    assert family != "llama" or statistics.preemptions > 0


@pytest.mark.slow
def test_thousand_random_requests_keep_memory_flat(tiny_llama):
    requests = varied_requests(250, seed=3, longest=50, most_tokens=60)
    traffic = Traffic(tiny_llama, requests, solo_answers(tiny_llama, requests))
    cases = random_cases(1500, len(requests), seed=4)
    arguments = {**ARGUMENTS, "n_ctx": 256}
    with Engine(
        tiny_llama,
        pack=pack_for(tiny_llama),
        max_sequences=6,
        max_queue=4,
        prompt_share=24,
        **arguments,
    ) as engine:
        traffic.run(engine, cases[:500])
        warm = resident_bytes() if sys.platform == "linux" else 0
        began = time.monotonic()
        traffic.run(engine, cases[500:])
        took = time.monotonic() - began
        after = resident_bytes() if sys.platform == "linux" else 0
        check_cells(engine)
        statistics = engine.statistics
    print(
        f"{1000 / took:.0f} requests/s, {statistics}, {traffic.ends}, "
        f"{(after - warm) / 1024:.0f} KiB more"
    )
    assert sum(traffic.ends.values()) == 1500
    assert statistics.preemptions > 50
    assert statistics.tokens_reused > 1000
    assert after - warm < 1000 * 2 * 1024, "2 KiB for each request"
    assert traffic.check_the_rounded() <= 15
