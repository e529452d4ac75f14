"""Both injections give the logits of llama.cpp's own control vector, to the last bit."""

from contextlib import closing

import llama_cpp
import numpy as np
import pytest
from exactness import (
    all_logits,
    check_exact,
    native_control_vector,
    random_vector,
    same_bits,
    tokens_for,
)

from pysteer import SteeredLlama, SteeringPack, SteeringVector


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0", "F16"])
@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("n_ubatch", [16, 512])
def test_logits_are_exact_for_quantisations(tiny_model, kind, flash_attn, n_ubatch):
    path = tiny_model("llama", kind, n_embd=256)
    check_exact(path, scale=0.3, flash_attn=flash_attn, n_ubatch=n_ubatch)


@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "gemma2", "gemma3", "gemma3n", "phi3", "gpt2", "mamba"]
)
def test_logits_are_exact_for_families(tiny_model, family):
    check_exact(tiny_model(family), scale=0.3, n_ubatch=16)


def test_logits_are_exact_when_n_batch_splits_the_prompt(tiny_model):
    check_exact(tiny_model("llama"), scale=0.3, n_batch=24, n_ubatch=16, n_ctx=64)


@pytest.mark.parametrize("flash_attn", [False, True])
def test_logits_are_exact_on_the_default_model(default_model, flash_attn):
    check_exact(default_model, scale=0.5, flash_attn=flash_attn, n_ubatch=16)


def test_last_logits_are_exact_without_logits_of_every_row(tiny_model):
    """The last layer then holds one row only."""
    path = tiny_model("llama")
    arguments = {"n_ctx": 128, "verbose": False}
    last = []
    with closing(llama_cpp.Llama(str(path), **arguments)) as plain:
        vector = random_vector(4, 64, 0.3)
        native_control_vector(plain, vector, 4)
        tokens = tokens_for(plain.n_vocab())
        plain.eval(tokens)
        last.append(np.ctypeslib.as_array(plain._ctx.get_logits(), (plain.n_vocab(),)).copy())
    for injection in ("resident", "hooked"):
        pack = SteeringPack({"c": vector})
        with (
            closing(SteeredLlama(path, pack=pack, injection=injection, **arguments)) as llm,
            llm.steering({"c": 1.0}),
        ):
            llm.eval(tokens)
            last.append(np.ctypeslib.as_array(llm._ctx.get_logits(), (llm.n_vocab(),)).copy())
    assert same_bits(last[0], last[1])
    assert same_bits(last[0], last[2])


def test_logits_are_exact_for_the_last_layer_alone(tiny_model):
    path = tiny_model("llama")
    arguments = {"n_ctx": 128, "logits_all": True, "verbose": False}
    vector = random_vector(4, 64, 0.5, layers=[3])
    with closing(llama_cpp.Llama(str(path), **arguments)) as plain:
        tokens = tokens_for(plain.n_vocab())
        native_control_vector(plain, vector, 4)
        expected = all_logits(plain, tokens)
    for injection in ("resident", "hooked"):
        pack = SteeringPack({"c": vector})
        with (
            closing(SteeredLlama(path, pack=pack, injection=injection, **arguments)) as llm,
            llm.steering({"c": 1.0}),
        ):
            assert same_bits(all_logits(llm, tokens), expected)


def test_orthogonal_categories_equal_the_control_vector_of_their_sum(tiny_model):
    path = tiny_model("llama")
    arguments = {"n_ctx": 128, "logits_all": True, "verbose": False}
    a, b = random_vector(4, 64, 0.3, seed=1), random_vector(4, 64, 0.3, layers=[2, 3], seed=2)
    even = np.arange(64) % 2 == 0
    a, b = (
        SteeringVector({layer: np.where(kept, row, 0) for layer, row in vector.items()})
        for vector, kept in ((a, even), (b, ~even))
    )
    total = {i: np.float32(0.5) * row for i, row in a.items()}
    for layer, row in b.items():
        total[layer] = total[layer] + np.float32(-1.5) * row
    with closing(llama_cpp.Llama(str(path), **arguments)) as plain:
        tokens = tokens_for(plain.n_vocab())
        native_control_vector(plain, SteeringVector(total), 4)
        expected = all_logits(plain, tokens)
    pack = SteeringPack({"a": a, "b": b})
    for injection in ("resident", "hooked"):
        with (
            closing(SteeredLlama(path, pack=pack, injection=injection, **arguments)) as llm,
            llm.steering({"a": 0.5, "b": -1.5}),
        ):
            np.testing.assert_allclose(all_logits(llm, tokens), expected, atol=1e-5)
