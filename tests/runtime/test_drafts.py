"""Drafts of a draft model: text, logits and reports are those without a draft."""

from contextlib import closing

import numpy as np
import pytest
from drafts import Oracle, Rubble
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from routers import router_for

from pysteer import SteeredLlama, SteeringPack, SteeringVector
from pysteer.pack.policy import Policy

ARGUMENTS = {
    "n_ctx": 256,
    "verbose": False,
    "n_threads": 1,
    "n_threads_batch": 1,
    "type_k": 0,
    "type_v": 0,
}
A, B = list(range(10, 21)), list(range(40, 48))
STEERINGS = [
    (None, None),
    ({"a": 1.0}, None),
    ("auto", {"recheck": 3, "scope": "response"}),
    ("auto", {"recheck": 1, "scope": "all"}),
    ({"a": "auto"}, {"scope": "range 3 8"}),
    ({"a": 1.0}, {"scope": {"tokens": "all", "exclude": ["e", "t"]}}),
]
N_WRITTEN = 14


def vector(seed):
    return SteeringVector({2: 2 * np.random.default_rng(seed).standard_normal(64)})


@pytest.fixture(scope="module", params=["last", "prompt"])
def pack(request, tiny_model):
    router = router_for(tiny_model("llama"), {"a": A, "b": B}, pooling=request.param)
    vectors = {"a": vector(1), "b": vector(2)}
    return SteeringPack(vectors, router=router, policy=Policy(gate="probe"))


def answer(llm, prompt, steering, policy, **options):
    result = llm.create_completion(
        prompt, steering=steering, policy=policy, seed=5, max_tokens=N_WRITTEN, **options
    )
    for kind in ("scores", "ranks"):
        result["steering"][kind] = {
            name: round(value, 2) for name, value in result["steering"][kind].items()
        }
    for category in result["steering"]["categories"].values():
        category.pop("score")
    tokens = llm._input_ids[: len(prompt) + N_WRITTEN - 1].tolist()
    return result["choices"][0]["text"], result["usage"], result["steering"], tokens


@pytest.mark.parametrize(("steering", "policy"), STEERINGS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_answer_with_a_draft_model_equals_answer_without(
    tiny_llama, pack, steering, policy, temperature
):
    asked = {"temperature": temperature, "logit_bias": dict.fromkeys(range(133, 261), -1e4)}
    with closing(SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)) as llm:
        expected = [answer(llm, prompt, steering, policy, **asked) for prompt in (A, B)]
    drafts = [LlamaPromptLookupDecoding(2, 10), Rubble(), Rubble(n_tokens=200)]
    for tokens in (expected[0][3], expected[1][3]):
        drafts += [Oracle(tokens, 1, 0), Oracle(tokens, 3, 2), Oracle(tokens, 9, 1)]
    for draft in drafts:
        arguments = {**ARGUMENTS, "draft_model": draft, "n_batch": 16, "n_ubatch": 8}
        with closing(SteeredLlama(tiny_llama, pack=pack, **arguments)) as llm:
            found = [answer(llm, prompt, steering, policy, **asked) for prompt in (A, B)]
        assert found == expected


def test_long_prompt_with_a_draft_model_equals_llama_cpp_without(tiny_llama):
    """llama_cpp.Llama makes room for the logits of n_batch tokens only."""
    prompt = np.random.default_rng(0).integers(270, 320, 200).tolist()
    arguments = {**ARGUMENTS, "n_batch": 32}
    with closing(SteeredLlama(tiny_llama, **arguments)) as llm:
        expected = answer(llm, prompt, None, None, temperature=0.0)
    with closing(SteeredLlama(tiny_llama, **arguments, draft_model=Rubble())) as llm:
        assert answer(llm, prompt, None, None, temperature=0.0) == expected


def test_accepted_drafts_save_decodes(tiny_llama, pack):
    with closing(SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)) as llm:
        tokens = answer(llm, A, {"a": 1.0}, None, temperature=0.0)[3]
    calls = []

    class Counting(SteeredLlama):
        def eval(self, tokens):
            calls.append(len(tokens))
            super().eval(tokens)

    arguments = {**ARGUMENTS, "draft_model": Oracle(tokens, 6, 0)}
    with closing(Counting(tiny_llama, pack=pack, **arguments)) as llm:
        answer(llm, A, {"a": 1.0}, None, temperature=0.0)
    assert len(calls) <= 4


def test_draft_of_an_interrupted_stream_is_made_again(tiny_llama, pack):
    with closing(SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)) as llm:
        tokens = answer(llm, A, {"a": 1.0}, None, temperature=0.0)[3]
    arguments = {**ARGUMENTS, "draft_model": Oracle(tokens, 6, 0)}
    with closing(SteeredLlama(tiny_llama, pack=pack, **arguments)) as llm:
        with llm.steering({"a": 1.0}):
            stream = llm.generate(A, temp=0.0)
        found = []
        for _ in range(N_WRITTEN - 1):
            found.append(next(stream))
            llm.create_completion(B, steering=None, max_tokens=1)
    assert [*A, *found] == tokens
