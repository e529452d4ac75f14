"""Logits to the last bit: llama.cpp's own control vector, and a run to compare."""

import ctypes
from contextlib import closing

import llama_cpp
import numpy as np

from pysteer import SteeredLlama, SteeringPack, SteeringVector

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


def check_exact(path, *, scale, **arguments):
    """Hold both injections to llama.cpp's own control vector."""
    arguments = {"n_ctx": 128, "logits_all": True, "verbose": False, "n_threads": 2, **arguments}
    with closing(llama_cpp.Llama(str(path), **arguments)) as plain:
        n_layer = llama_cpp.llama_model_n_layer(plain.model)
        tokens = tokens_for(plain.n_vocab())
        vector = random_vector(n_layer, plain.n_embd(), scale)
        unsteered = all_logits(plain, tokens)
        native_control_vector(plain, vector, n_layer)
        steered = all_logits(plain, tokens)
    assert np.isfinite(steered).all()
    assert np.abs(steered - unsteered).max() > 1e-3
    pack = SteeringPack({"c": vector})
    for injection in ("resident", "hooked"):
        with closing(SteeredLlama(path, pack=pack, injection=injection, **arguments)) as llm:
            assert same_bits(all_logits(llm, tokens), unsteered), injection
            with llm.steering({"c": 1.0}):
                assert same_bits(all_logits(llm, tokens), steered), injection
            with llm.steering({"c": 0.0}):
                assert same_bits(all_logits(llm, tokens), unsteered), injection
            assert same_bits(all_logits(llm, tokens), unsteered), injection
