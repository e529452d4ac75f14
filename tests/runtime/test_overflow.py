"""Steering that overflows after the steered site: an error, and nothing of it is used again."""

from contextlib import closing

import numpy as np
import pytest
from gguf import GGUFReader

from pysteer import HookedLlama, HookError, SteeredLlama, SteeringPack, SteeringVector
from pysteer.pack.operators import Operator

ARGUMENTS = {"n_ctx": 256, "verbose": False, "n_threads": 1, "n_threads_batch": 1}
GREEDY = {"max_tokens": 8, "temperature": 0.0}
PROMPT = list(range(10, 30))
N_LAYER = 8


def direction(seed, n_embd=64):
    return np.random.default_rng(seed).standard_normal(n_embd)


def pack(n_layer):
    late = n_layer - 2
    return SteeringPack(
        {
            "a": SteeringVector({late: np.ones(64)}),  # their sum overflows
            "low rank": SteeringVector(
                {late: np.stack([direction(1), direction(2)])}, operator=Operator("low_rank")
            ),
            "residual": SteeringVector({late - 1: np.ones(64)}),
            "mlp": SteeringVector({late: np.ones(64)}, site="mlp"),
        }
    )


def outcome(result):
    return result["choices"][0]["text"], result["usage"], result["steering"]


@pytest.mark.parametrize(
    ("family", "steering"),
    [
        ("gpt2", {"a": 1e37}),
        ("gpt2", {"a": 3e37}),
        ("gpt2", {"low rank": 5e36}),
        ("llama", {"residual": 2e38, "mlp": 2e38}),
        ("gpt2", {"residual": 2e38, "mlp": 2e38}),
    ],
)
@pytest.mark.parametrize("logits_all", [False, True])
def test_overflow_after_the_site_raises_and_leaves_nothing_behind(
    tiny_model, family, steering, logits_all
):
    path = tiny_model(family)
    arguments = {**ARGUMENTS, "logits_all": logits_all}
    with (
        closing(HookedLlama(path, **arguments)) as plain,
        closing(SteeredLlama(path, pack=pack(plain.n_layer), **arguments)) as fresh,
        closing(
            SteeredLlama(path, pack=pack(plain.n_layer), max_relative_norm=None, **arguments)
        ) as llm,
    ):
        expected = outcome(fresh.create_completion(PROMPT, steering=None, **GREEDY))
        short = outcome(fresh.create_completion([40, 41], steering=None, **GREEDY))
        stream = llm.create_completion(PROMPT, steering=None, stream=True, **GREEDY)
        text = next(stream)["choices"][0]["text"]
        for n in (len(PROMPT), 5):
            with pytest.raises(HookError, match="not finite") as raised:
                llm.create_completion(PROMPT[:n], steering=steering, **GREEDY)
            for category, strength in steering.items():
                assert f"{category}={strength:g}" in str(raised.value)
            with llm.steering(steering), pytest.raises(HookError, match="not finite"):
                llm.eval(PROMPT)
            assert llm.n_tokens == 0
            # Cells keep what was in them: a weight of 0 times NaN would be NaN.
            assert outcome(llm.create_completion([40, 41], steering=None, **GREEDY)) == short
            assert outcome(llm.create_completion(PROMPT, steering=None, **GREEDY)) == expected
        text += "".join(chunk["choices"][0]["text"] for chunk in stream)
        assert text == expected[0]


def test_model_with_logits_that_are_not_finite_says_so_unsteered(tiny_model, tmp_path):
    path = tmp_path / "nan.gguf"
    path.write_bytes(tiny_model("llama").read_bytes())
    tensor = next(t for t in GGUFReader(path, "r+").tensors if t.name == "output_norm.weight")
    tensor.data[:] = np.nan
    tensor.data.flush()
    with (
        closing(HookedLlama(path, **ARGUMENTS)) as llm,
        pytest.raises(HookError, match=r"the model computed logits that are not finite$"),
    ):
        llm.eval(PROMPT)
