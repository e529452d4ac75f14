"""Tokens between markers, read token by token, against the whole text."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pysteer.runtime.markers import MarkerTracker

PAIRS = [("<think>", "</think>"), ("[[", "]]")]
texts = st.lists(
    st.sampled_from(["<think>", "</think>", "[[", "]]", "<", "/th", "ink>", "[", "]", "a", " "])
).map("".join)


def inside(text, start, end):
    """Return True if text completes a start marker and no end marker after it."""
    at, open_ = 0, False
    while True:
        marker = end if open_ else start
        found = text.find(marker, at)
        if found < 0:
            return open_
        at, open_ = found + len(marker), not open_


@given(text=texts, data=st.data())
def test_token_is_inside_if_text_after_it_is(text, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    tracker = MarkerTracker(PAIRS)
    split = data.draw(st.integers(0, len(pieces)))
    encoded = [piece.encode() for piece in pieces]
    masks = [*tracker.feed(encoded[:split]), *tracker.feed(encoded[split:])]
    assert tracker.n_tokens == len(pieces)
    for i, mask in enumerate(masks):
        so_far = "".join(pieces[: i + 1])
        expected = sum(inside(so_far, *pair) << k for k, pair in enumerate(PAIRS))
        assert mask == expected
    assert tracker.feed([]).dtype == np.uint32
