"""The native gate against `pysteer.pack.router.Router`, its counterpart in numpy."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pysteer.pack.router import GATES, POOLINGS, Gate, Read, Router
from pysteer.runtime.native import native_gate


def router(k, n, seed, n_reads=1):
    """Router over hidden states of width n, all reads together."""
    rng = np.random.default_rng(seed)
    return Router(
        site="residual",
        reads=[Read(i, POOLINGS[i % len(POOLINGS)]) for i in range(n_reads)],
        categories=[f"c{i}" for i in range(k)],
        margin_weight=rng.standard_normal((k + 1, n)),
        margin_bias=rng.standard_normal(k + 1),
        allowances=rng.uniform(0, 20, k) * rng.integers(0, 2, k),
        weight=rng.standard_normal((k + 1, n)),
        bias=rng.standard_normal(k + 1),
        probe_weight=rng.standard_normal((k, n)),
        probe_bias=rng.standard_normal(k),
        centroids=rng.standard_normal((k + 1, n)),
        conditions=rng.standard_normal((k, n)),
        gates={kind: Gate(np.zeros(k), np.ones(k, bool), *[np.zeros(k)] * 3) for kind in GATES},
        confusion=np.eye(k + 1, dtype=np.int64),
        threshold_rule="youden",
        train_counts=np.ones(k + 1, np.int64),
    )


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 12), n=st.integers(2, 200), seed=st.integers(0, 99))
@pytest.mark.parametrize("n_reads", [1, 8])
@pytest.mark.parametrize("kind", GATES)
def test_scores_and_ranks_equal_those_of_the_router(kind, n_reads, k, n, seed):
    made = router(k, n_reads * n, seed, n_reads)
    gate = native_gate(made, kind)
    for h in np.random.default_rng(seed + 1).standard_normal((3, n_reads * n)) * 3:
        np.testing.assert_allclose(gate.scores(h), made.scores(kind, h), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(gate.ranks(h), made.ranks(kind, h), rtol=1e-9, atol=1e-12)


def test_categories_with_equal_leads_have_equal_ranks():
    made = router(3, 4, 0)
    weight = np.array(made.margin_weight)
    weight[2] = weight[1]
    bias = np.array([0, 5, 5, -5])
    made = dataclasses.replace(made, margin_weight=weight, margin_bias=bias)
    h = np.zeros(4)
    expected = np.array([0, 0, -10]) + made.allowances
    np.testing.assert_allclose(made.ranks("margin", h), expected)
    np.testing.assert_allclose(native_gate(made, "margin").ranks(h), expected)


@pytest.mark.parametrize("kind", GATES)
def test_zero_hidden_state_has_finite_scores(kind):
    made = router(3, 8, 0)
    zeros = np.zeros(8)
    np.testing.assert_allclose(native_gate(made, kind).scores(zeros), made.scores(kind, zeros))


def test_wrong_width_raises():
    with pytest.raises(ValueError, match="8 values"):
        native_gate(router(2, 8, 0), "probe").scores(np.zeros(9))
