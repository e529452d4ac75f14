"""Row tables in graphs that llama.cpp keeps: other families, layouts, failures and captures.

A schedule gives every token a factor of its own, so no control vector fits the rows of a decode.
"""

from contextlib import closing

import numpy as np
import pytest
from exactness import random_vector, same_bits

from pysteer import SteeredLlama, SteeringPack
from pysteer.llama.batch import EVERY_ROW, DecodeBatch
from pysteer.pack.policy import Policy

ARGUMENTS = {"n_ctx": 128, "n_ubatch": 8, "logits_all": True, "verbose": False, "n_threads": 1}
TOKENS = [int(t) for t in np.random.default_rng(8).integers(5, 320, 21)]


def scheduled(path, injection="auto", **arguments):
    with closing(SteeredLlama(path, **ARGUMENTS)) as llm:
        shape = llm.n_layer, llm.n_embd()
    pack = SteeringPack(
        {"a": random_vector(*shape, 0.3, seed=1), "b": random_vector(*shape, 0.3, seed=2)},
        policy=Policy(scope="linear 90"),
    )
    return closing(SteeredLlama(path, pack=pack, injection=injection, **{**ARGUMENTS, **arguments}))


def evaluated(llm, *lengths):
    """Return the logits of tokens that are decoded in parts, and the cuts of the parts."""
    llm.reset()
    cuts, start = [], 0
    for length in lengths:
        llm.eval(TOKENS[start : start + length])
        cuts.append(llm.context.cuts)
        start += length
    return llm.scores[:start].copy(), cuts


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gemma3n", "mamba", "lfm2"])
def test_scheduled_rows_equal_hooked_rows_in_every_family(tiny_model, family):
    """Of several micro-batches, and of single tokens under changing steerings."""
    path = tiny_model(family)
    found = {}
    for injection in ("auto", "hooked"):
        with scheduled(path, injection) as llm:
            found[injection] = [evaluated(llm, 13, 1, 1, 6)]
            for steering in ({"a": 1.0}, {"b": -0.5}, {"a": 0.5, "b": 0.5}, None, {"a": 1.0}):
                with llm.steering(steering):
                    found[injection].append(evaluated(llm, 13, 1, 1, 6))
    for (logits, cuts), (expected, _) in zip(found["auto"], found["hooked"], strict=True):
        assert same_bits(logits, expected)
        assert cuts == [0, 0, 0, 0]
    assert any(any(cuts) for _, cuts in found["hooked"])
    assert same_bits(found["auto"][0][0], found["auto"][4][0])
    assert np.abs(found["auto"][0][0] - found["auto"][1][0]).max() > 1e-3


def test_steering_that_changes_from_token_to_token_changes_equal_graphs(tiny_llama):
    """A backend that took a graph for the one before would repeat the rows before."""
    found = []
    for injection in ("auto", "hooked"):
        with scheduled(tiny_llama, injection) as llm:
            llm.eval(TOKENS[:8])
            logits = []
            for k, token in enumerate(TOKENS[8:]):
                with llm.steering({"ab"[k % 2]: 1.0}):
                    llm.eval([token])
                logits.append(llm.scores[llm.n_tokens - 1].copy())
            found.append(np.stack(logits))
    assert same_bits(*found)


def test_decode_outside_a_bracket_meets_no_changed_node(tiny_llama):
    with scheduled(tiny_llama) as llm:
        expected, _ = evaluated(llm, 7)
        with llm.steering({"a": 1.0}):
            steered, cuts = evaluated(llm, 7)
        assert cuts == [0]
        assert not same_bits(steered, expected)
        llm.context.memory.clear(data=True)
        batch = DecodeBatch(7)
        batch.add(0, 0, TOKENS[:7], EVERY_ROW)
        assert batch.decode(llm.context.pointer) == 0
        assert same_bits(np.stack([llm.context.logits(k).copy() for k in range(7)]), expected)


def abandon(llm):
    """Decode seven tokens, and fail before the decode ends."""
    with llm.context.decoding([(0, 0, 7, EVERY_ROW)]):
        batch = DecodeBatch(7)
        batch.add(0, 0, TOKENS[:7], EVERY_ROW)
        assert batch.decode(llm.context.pointer) == 0
        raise KeyError


def test_abandoned_decode_leaves_no_changed_node(tiny_llama):
    with scheduled(tiny_llama) as llm:
        expected, _ = evaluated(llm, 7)
        with llm.steering({"a": 1.0}):
            evaluated(llm, 7)
            llm.context.memory.clear(data=True)
            with pytest.raises(KeyError):
                abandon(llm)
        assert same_bits(evaluated(llm, 7)[0], expected)


def test_capture_takes_rows_after_their_tables(tiny_llama):
    captured = []
    for injection in ("auto", "hooked"):
        with scheduled(tiny_llama, injection) as llm, llm.steering({"a": 1.0}):
            evaluated(llm, 13)
            captured.append(llm.capture(TOKENS, layers=[2], pool="all")["residual"][2])
            with llm.steering(None):
                captured.append(llm.capture(TOKENS, layers=[2], pool="all")["residual"][2])
    assert same_bits(captured[0], captured[2])
    assert same_bits(captured[1], captured[3])
    assert not same_bits(captured[0], captured[1])
