"""The ledger of the KV cache against a plain list with one key per token."""

import pickle
from itertools import takewhile

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pysteer.runtime.ledger import CacheLedger

keys = st.lists(st.sampled_from([0, 1, 2**63, 2**64 - 1]), max_size=200)


def array(keys):
    return np.array(keys, np.uint64)


class Ledger(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.ledger = CacheLedger()
        self.tokens = []

    @rule(data=st.data(), new=keys)
    def record(self, data, new):
        start = data.draw(st.integers(0, len(self.tokens)))
        self.ledger.record(start, array(new))
        self.tokens = self.tokens[:start] + new

    @rule(new=keys)
    def append(self, new):
        self.ledger.record(len(self.tokens), array(new))
        self.tokens += new

    @rule(gap=st.integers(1, 5), new=keys)
    def record_past_the_end(self, gap, new):
        with pytest.raises(ValueError, match="are not recorded"):
            self.ledger.record(len(self.tokens) + gap, array(new))

    @rule()
    def save_and_load(self):
        self.ledger = CacheLedger(pickle.loads(pickle.dumps(self.ledger.keys())))

    @rule()
    def spoil_the_copy(self):
        self.ledger.keys()[:] = 77

    @rule(same=st.integers(0, 400), new=keys)
    def reusable_is_the_common_prefix(self, same, new):
        request = self.tokens[:same] + new
        pairs = zip(self.tokens, request, strict=False)
        expected = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        assert self.ledger.reusable(array(request)) == expected

    @invariant()
    def the_keys_are_those_of_the_tokens(self):
        assert self.ledger.keys().tolist() == self.tokens


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
