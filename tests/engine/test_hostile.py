"""Requests that ask for the worst they can, beside honest ones."""

import pytest
from hostile import Attack
from overflow import HONEST, engine_for, honest, steady
from traffic import check_cells


def attack(path, n, seed, **arguments):
    requests = [{**honest(request), "max_tokens": 6 + 2 * k} for k, request in enumerate(HONEST)]
    hostile = Attack(path, *steady(path, requests, noise=1e-3), seed)
    with engine_for(path, **{"max_sequences": 8, "n_ctx": 768, **arguments}) as engine:
        hostile.run(engine, n)
        check_cells(engine)
        statistics = engine.statistics
    print(hostile.ends, hostile.honest, statistics)
    assert hostile.differing == []
    assert hostile.honest + sum(hostile.ends.values()) == n
    assert min(hostile.ends.values()) > 0
    return statistics


@pytest.mark.parametrize("family", ["llama", "gpt2", "lfm2"])
def test_hostile_requests_change_no_honest_answer(tiny_model, family):
    statistics = attack(tiny_model(family), 150, seed=1)
    assert statistics.recoveries


@pytest.mark.slow
@pytest.mark.parametrize(("family", "n"), [("gpt2", 12_000), ("llama", 8_000)])
def test_twenty_thousand_requests_change_no_honest_answer(tiny_model, family, n):
    assert attack(tiny_model(family), n, seed=2).recoveries > n / 20
