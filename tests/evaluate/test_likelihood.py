"""Log-likelihoods against the logits of llama_cpp.Llama."""

from contextlib import closing

import llama_cpp
import numpy as np
import pytest
from scipy.special import log_softmax

from pysteer import SteeringError
from pysteer.evaluate import likelihood
from pysteer.evaluate.likelihood import Likelihood

OPTIONS = {"n_threads": 1, "type_k": 0, "type_v": 0}  # a KV cache of float32
ITEMS = [
    ("What is the sea?", "Salt water."),
    ("What is the sea?", "I can't help with that."),
    ("What is the sea?", "x"),
    ("Name a colour.", "Blue."),
    ("Name a colour.", ""),
    ("Name", "a longer answer of some words, so that it does not fit beside the others"),
    ("the cat", "\u6d77\U0001f30a"),
]


def reference(path, items):
    """Return likelihoods from all logits, one prompt at a time, in float64."""
    found = []
    with closing(
        llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, **OPTIONS)
    ) as llm:
        for prompt, text in items:
            # The prompt has the tokens that a chat completion evaluates.
            llm.create_chat_completion([{"role": "user", "content": prompt}], max_tokens=1)
            start = llm._input_ids[: llm.n_tokens].tolist()
            tokens = llm.tokenize(text.encode(), add_bos=False)
            if not tokens:
                found.append(None)
                continue
            llm.reset()
            llm.eval(start + tokens)
            rows = log_softmax(np.asarray(llm.scores[: len(start + tokens)], np.float64), axis=-1)
            found.append(np.mean([rows[len(start) - 1 + i, t] for i, t in enumerate(tokens)]))
    return found


@pytest.mark.parametrize(("sequences", "n_batch"), [(16, 512), (2, 32), (1, 32)])
def test_likelihoods_equal_llama_cpp_logits(sequences, n_batch, tiny_llama, monkeypatch):
    monkeypatch.setattr(likelihood, "_SEQUENCES", sequences)
    told = []
    with Likelihood(tiny_llama, n_ctx=256, n_batch=n_batch, **OPTIONS) as model:
        found = model.per_token(ITEMS, told.append)
        assert model.per_token(ITEMS[::-1]) == pytest.approx(found[::-1], abs=1e-4)
    expected = reference(tiny_llama, ITEMS)
    assert [one is None for one in found] == [one is None for one in expected]
    numbers = [(f, e) for f, e in zip(found, expected, strict=True) if e is not None]
    assert [f for f, _ in numbers] == pytest.approx([e for _, e in numbers], abs=1e-4)
    assert sum(told) == len(ITEMS)
    assert len({round(f, 2) for f, _ in numbers}) > 3  # the numbers differ


def test_likelihood_of_no_items_is_empty(tiny_llama):
    with Likelihood(tiny_llama, n_ctx=256, **OPTIONS) as model:
        assert model.per_token([]) == []
        assert model.per_token([("a", "")]) == [None]


def test_prompt_beyond_context_raises(tiny_llama):
    with Likelihood(tiny_llama, n_ctx=256, **OPTIONS) as model:
        with pytest.raises(SteeringError, match="--context"):
            model.per_token([("a", "x" * 400)])
        assert model.per_token([("a", "x")])[0] < 0


def test_likelihood_file_that_is_not_gguf_raises(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"junk")
    with pytest.raises(SteeringError, match="GGUF"):
        Likelihood(tmp_path / "x.gguf")
