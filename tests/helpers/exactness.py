"""Logits to the last bit: llama.cpp's own control vector, and a run to compare."""

import ctypes

import llama_cpp
import numpy as np

from pysteer import SteeringVector

N_PROMPT = 40


def random_vector(n_layer, n_embd, scale, *, layers=None, site="residual", seed=3):
    rng = np.random.default_rng(seed)
    chosen = range(1, n_layer) if layers is None else layers
    return SteeringVector(
        {layer: (scale * rng.standard_normal(n_embd)).astype(np.float32) for layer in chosen},
        site=site,
    )


def native_control_vector(llm, vector, n_layer):
    """Set llama.cpp's control vector through its own call, independently of pysteer."""
    buffer = np.zeros((n_layer - 1, vector.n_embd), np.float32)
    for layer, direction in vector.items():
        buffer[layer - 1] = direction
    status = llama_cpp.llama_set_adapter_cvec(
        llm.ctx,
        buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        buffer.size,
        vector.n_embd,
        1,
        n_layer - 1,
    )
    assert status == 0


def all_logits(llm, tokens):
    """Logits of a prompt, of one more token, and of several more at once, (tokens, n_vocab)."""
    llm.reset()
    llm.eval(tokens[:N_PROMPT])
    llm.eval(tokens[N_PROMPT : N_PROMPT + 1])
    llm.eval(tokens[N_PROMPT + 1 :])
    return llm.scores[: len(tokens)].copy()


def tokens_for(n_vocab):
    return [int(t) for t in np.random.default_rng(5).integers(3, n_vocab, N_PROMPT + 8)]


def same_bits(a, b):
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))
