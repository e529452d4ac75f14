"""Draft models that propose the right tokens, wrong tokens, and no tokens at all."""

import numpy as np
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding


class Rubble(LlamaDraftModel):
    """In turns, tokens that repeat the text, random tokens, and what is no token."""

    def __init__(self, n_vocab=320, n_tokens=7, seed=0):
        self._rng = np.random.default_rng(seed)
        self._lookup = LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=n_tokens)
        self._n_vocab = n_vocab
        self._n_tokens = n_tokens

    def __call__(self, input_ids, /, **kwargs):
        kind = self._rng.integers(5)
        if kind < 2:
            return self._lookup(input_ids)
        if kind == 2:
            return np.array([], np.intc)
        draft = self._rng.integers(0, self._n_vocab, self._n_tokens).astype(np.intc)
        if kind == 3:
            draft[self._rng.integers(self._n_tokens)] = self._rng.choice([-1, 10**6])
        return draft


class Oracle(LlamaDraftModel):
    """The tokens that follow, and from a place on others.

    Args:
        tokens: prompt and answer of the request.
        n_right: number of right tokens in a draft.
        n_wrong: number of wrong tokens after these.
    """

    def __init__(self, tokens, n_right, n_wrong):
        self._tokens = np.asarray(tokens, np.intc)
        self._n_right = n_right
        self._n_wrong = n_wrong

    def __call__(self, input_ids, /, **kwargs):
        n = len(input_ids)
        right = self._tokens[n : n + self._n_right]
        wrong = (self._tokens[n + len(right) : n + len(right) + self._n_wrong] + 1) % 320
        return np.concatenate([right, wrong]).astype(np.intc)
