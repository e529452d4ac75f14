"""Requests that ask for the worst they can, beside honest ones."""

import pytest
from hostile import Attack
from overflow import HONEST, engine_for, honest, steady
from traffic import check_cells

from pysteer.runtime.limits import MAX_RELATIVE_NORM


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
    assert hostile.honest > n / 5
    assert hostile.ends["answered"] > 0
    assert arguments["max_relative_norm"] is not None or min(hostile.ends.values()) > 0
    return statistics


@pytest.mark.parametrize(
    ("family", "bound"), [("llama", MAX_RELATIVE_NORM), ("gpt2", None), ("lfm2", None)]
)
def test_hostile_requests_change_no_honest_answer(tiny_model, family, bound):
    """With the bound on strengths few of them are decoded; without it most overflow."""
    statistics = attack(tiny_model(family), 150, seed=1, max_relative_norm=bound)
    assert bound is not None or statistics.recoveries > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "n", "bound"), [("gpt2", 12_000, None), ("llama", 8_000, MAX_RELATIVE_NORM)]
)
def test_twenty_thousand_requests_change_no_honest_answer(tiny_model, family, n, bound):
    statistics = attack(tiny_model(family), n, seed=2, max_relative_norm=bound)
    assert bound is not None or statistics.recoveries > n / 20
