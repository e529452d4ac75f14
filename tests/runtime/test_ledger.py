"""The ledger of the KV cache against a plain list with one key per token."""

import pickle
from itertools import groupby, takewhile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pysteer.runtime.ledger import CacheLedger

KEYS = [(), (("a", 1.0),), (("a", 2.0),), (("a", 1.0), ("b", 1.0))]
keys = st.sampled_from(KEYS)


class Ledger(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.ledger = CacheLedger()
        self.tokens = []

    @rule(data=st.data(), length=st.integers(0, 6), key=keys)
    def record(self, data, length, key):
        start = data.draw(st.integers(0, len(self.tokens)))
        self.ledger.record(start, start + length, key)
        self.tokens = self.tokens[:start] + [key] * length

    @precondition(lambda self: self.tokens)
    @rule(length=st.integers(1, 6), key=keys)
    def append(self, length, key):
        self.ledger.record(len(self.tokens), len(self.tokens) + length, key)
        self.tokens += [key] * length

    @rule(gap=st.integers(1, 5), length=st.integers(0, 5), key=keys)
    def record_past_the_end(self, gap, length, key):
        start = len(self.tokens) + gap
        with pytest.raises(ValueError, match="never been recorded"):
            self.ledger.record(start, start + length, key)

    @rule()
    def save_and_load(self):
        self.ledger = CacheLedger(pickle.loads(pickle.dumps(self.ledger.runs())))

    @rule(key=keys)
    def spoil_the_copy(self, key):
        self.ledger.runs().append((10**6, key))

    @invariant()
    def reusable_is_the_common_prefix(self):
        for key in KEYS:
            expected = len(list(takewhile(lambda k, key=key: k == key, self.tokens)))
            assert self.ledger.reusable(key) == expected

    @invariant()
    def runs_are_the_groups_of_equal_keys(self):
        expected, end = [], 0
        for key, group in groupby(self.tokens):
            end += len(list(group))
            expected.append((end, key))
        assert self.ledger.runs() == expected


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_loaded_runs_do_not_share_the_list():
    runs = [(3, KEYS[1])]
    ledger = CacheLedger(runs)
    ledger.record(3, 5, KEYS[2])
    assert runs == [(3, KEYS[1])]
    assert ledger.runs() == [(3, KEYS[1]), (5, KEYS[2])]
