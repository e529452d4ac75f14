"""`HookedContext` and `DecodeBatch`: batches of several sequences, decoded by hand."""

from contextlib import closing

import numpy as np
import pytest

from pysteer import HookedLlama, SteeringError
from pysteer.llama.batch import ALL_SEQUENCES, EVERY_ROW, LAST_ROW, NO_ROW, DecodeBatch, chunked
from pysteer.llama.context import CacheFullError
from pysteer.llama.hooked import quiet_arguments

N_CTX = 256
ARGUMENTS = {"n_ctx": N_CTX, "n_batch": N_CTX, "type_k": 0, "type_v": 0}
TOKENS = list(range(10, 22))


@pytest.fixture
def context(tiny_llama):
    with closing(
        HookedLlama(tiny_llama, max_sequences=4, **quiet_arguments(1, **ARGUMENTS))
    ) as llm:
        yield llm.context


def last_logits(context, slot, start, tokens):
    batch = DecodeBatch(len(tokens))
    row = batch.add(slot, start, tokens)
    context.decode(batch)
    return context.logits(row).copy()


def test_batch_describes_its_rows():
    batch = DecodeBatch(8)
    assert batch.add(2, 5, [10, 11, 12], NO_ROW) == 2
    assert batch.add(0, 7, np.array([13], np.intc)) == 3
    assert batch.add(1, 0, [14, 15], EVERY_ROW) == 5
    assert batch.n_rows == 6
    assert batch.runs == [(2, 5, 3, NO_ROW), (0, 7, 1, LAST_ROW), (1, 0, 2, EVERY_ROW)]
    batch.clear()
    assert batch.n_rows == 0
    assert batch.runs == []


def test_chunks_cover_all_tokens_in_order():
    assert chunked(3, 5, 2, LAST_ROW) == [(0, 3, 2, 1), (0, 5, 2, 1), (0, 7, 1, 1)]
    assert chunked(3, 0, 2, LAST_ROW) == []


def test_sequences_in_one_batch_give_their_solo_logits(context):
    alone = []
    for n in (5, 9):
        alone.append(last_logits(context, 0, 0, TOKENS[:n]))
        context.memory.clear()
    batch = DecodeBatch(14)
    rows = [batch.add(slot, 0, TOKENS[:n]) for slot, n in enumerate((5, 9))]
    context.decode(batch)
    for row, expected in zip(rows, alone, strict=True):
        np.testing.assert_allclose(context.logits(row), expected, atol=1e-5)


def test_shared_rows_belong_to_all_sequences_until_the_batch_is_cleared(context):
    expected = last_logits(context, 0, 0, TOKENS)
    context.memory.clear()
    batch = DecodeBatch(16)
    batch.add_shared(3, TOKENS[:8], NO_ROW)
    assert batch.runs == [(ALL_SEQUENCES, 0, 8, NO_ROW)]
    rows = [batch.add(slot, 8, TOKENS[8:10]) for slot in range(3)]
    context.decode(batch)
    batch.clear()
    rows = [batch.add(slot, 10, TOKENS[10:]) for slot in range(3)]
    context.decode(batch)
    for row in rows:
        np.testing.assert_allclose(context.logits(row), expected, atol=1e-5)
    context.memory.cut(1, 0)
    assert context.memory.is_whole(0)
    assert not context.memory.is_whole(1)


def test_copied_and_cut_sequences_continue_from_their_positions(context):
    expected = last_logits(context, 0, 0, TOKENS)
    context.memory.copy(0, 2, len(TOKENS))
    context.memory.cut(2, 7)
    np.testing.assert_allclose(last_logits(context, 2, 7, TOKENS[7:]), expected, atol=1e-5)
    context.memory.clear()
    assert context.memory.is_empty


def test_batch_without_room_raises_and_changes_nothing(context):
    last_logits(context, 0, 0, [10] * N_CTX)
    with pytest.raises(CacheFullError, match="n_ctx"):
        last_logits(context, 1, 0, [10])
    context.memory.cut(0, N_CTX - 4)
    assert np.isfinite(last_logits(context, 1, 0, [10])).all()


def test_closed_context_raises(tiny_llama):
    llm = HookedLlama(tiny_llama, **quiet_arguments(1, **ARGUMENTS))
    llm.close()
    with pytest.raises(SteeringError, match="closed"):
        last_logits(llm.context, 0, 0, TOKENS)
    assert llm.context.closed


def test_quiet_arguments_use_all_cores_for_prompts_and_text():
    arguments = quiet_arguments(n_ctx=64)
    assert arguments["n_threads"] == arguments["n_threads_batch"] > 0
    assert quiet_arguments(2)["n_threads_batch"] == 2
    assert quiet_arguments(2, n_threads_batch=3, verbose=True) == {
        "n_threads": 2,
        "n_threads_batch": 3,
        "verbose": True,
    }
