"""The bound on strengths: largest changes by formula, refusals, and requests under the bound."""

import math
from contextlib import closing

import numpy as np
import pytest

from pysteer import (
    Engine,
    HookedLlama,
    Policy,
    SteeredLlama,
    SteeringError,
    SteeringPack,
    SteeringVector,
)
from pysteer.pack.operators import Operator
from pysteer.runtime.limits import MAX_RELATIVE_NORM, StrengthLimits, typical_norms
from pysteer.runtime.native import native_operator

WIDTH, LAYER = 64, 2
ARGUMENTS = {"n_ctx": 128, "verbose": False, "n_threads": 1}
OPERATORS = [
    Operator(),
    Operator("ablate"),
    Operator("ablate", one_sided=True),
    Operator("clamp", low=1.5, high=1.5),
    Operator("clamp", low=-0.5, high=0.5),
    Operator("clamp", low=9.0),
    Operator("clamp", high=-1e4),
    Operator("clamp", low=-1e4, high=1e4),
    Operator("low_rank"),
]
N_ROWS = {"low_rank": 6, "rotate": 2}


def vector(operator=None, *, scale=0.3, layers=(LAYER,), site="residual", seed=0):
    operator = operator or Operator()
    rng = np.random.default_rng(seed)
    n_rows = N_ROWS.get(operator.kind, 1)
    shape = (WIDTH,) if n_rows == 1 else (n_rows, WIDTH)
    rows = {layer: scale * rng.standard_normal(shape) for layer in layers}
    return SteeringVector(rows, site=site, operator=operator)


@pytest.mark.parametrize("norm", [0.5, 20.0])
@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_no_hidden_state_of_a_norm_changes_more_than_the_largest_change(operator, norm):
    steering = vector(operator)
    rows = steering.prepared[0]
    rng = np.random.default_rng(1)
    states = rng.standard_normal((3000, WIDTH))
    # The worst states: along each row, either way; for low_rank along the right singular vectors.
    states[: 2 * len(rows)] = np.vstack([rows, -rows])
    if operator.kind == "low_rank":
        matrix = rows[:3].T.astype(np.float64) @ rows[3:].astype(np.float64)
        states[-WIDTH:] = np.linalg.svd(matrix)[2]
    states *= norm / np.linalg.norm(states, axis=1, keepdims=True)
    states = states.astype(np.float32)
    after = native_operator(operator).apply(rows, 1.0, states)
    changes = np.linalg.norm((after - states).astype(np.float64), axis=1)
    largest = operator.largest_change(rows, norm)
    assert changes.max() <= largest * (1 + 1e-5) + 1e-6
    assert changes.max() >= largest * 0.999
    twice = native_operator(operator).apply(rows, 2.0, states)
    np.testing.assert_allclose(twice - states, 2 * (after - states), atol=1e-3, rtol=1e-4)


def test_rotation_keeps_the_norm_at_any_strength_and_has_no_bound():
    operator = Operator("rotate", angle=1.0)
    assert operator.largest_change(vector(operator).prepared[0], 3.0) == 0
    StrengthLimits({LAYER: 1.0}, 1e-3).check("a", vector(operator), 1e6, [1.0])


def test_strength_beyond_the_bound_raises_with_category_strength_and_the_largest_allowed():
    limits = StrengthLimits({LAYER: 10.0}, 4.0)
    steering = SteeringVector({LAYER: np.full(4, 0.5)})  # of norm 1, so that 40 is allowed
    for strength in (40.0, -40.0, 1e-30):
        limits.check("hate", steering, strength, [1.0])
    with pytest.raises(
        SteeringError, match=r"50 of 'hate'.*layer 2.*4 times.*allowed is 40 "
    ) as found:
        limits.check("hate", steering, 50.0, [1.0])
    assert "max_relative_norm=" in str(found.value)
    with pytest.raises(SteeringError, match="allowed is -40 "):
        limits.check("hate", steering, -40.1, [1.0])


def test_strength_counts_with_the_largest_factor_of_its_scope():
    limits = StrengthLimits({LAYER: 10.0}, 4.0)
    steering = SteeringVector({LAYER: np.full(4, 0.5)})
    limits.check("a", steering, 10.0, [1.0, -4.0, 0.0])
    with pytest.raises(SteeringError, match=r"factors up to 8 in its scope.*allowed is 5 "):
        limits.check("a", steering, 10.0, [1.0, -8.0])
    with pytest.raises(SteeringError, match=r"factors up to 1e\+30"):
        limits.check("a", steering, 1e-3, [1e30])


def test_strength_copied_from_the_message_is_allowed():
    rng = np.random.default_rng(0)
    for seed in range(50):
        limits = StrengthLimits({LAYER: float(10 ** rng.uniform(-3, 3))}, MAX_RELATIVE_NORM)
        steering = vector(seed=seed)
        with pytest.raises(SteeringError) as found:
            limits.check("a", steering, 1e30, [1.0])
        allowed = float(str(found.value).partition("allowed is ")[2].split()[0])
        limits.check("a", steering, allowed, [1.0])
        with pytest.raises(SteeringError):
            limits.check("a", steering, allowed * 1.02, [1.0])


def test_layer_nearest_to_its_bound_decides():
    rows = {1: np.full(4, 0.5), 2: np.full(4, 5.0), 3: np.full(4, 0.5)}
    with pytest.raises(SteeringError, match=r"layer 2 .*allowed is 3\.2 "):
        StrengthLimits({1: 1.0, 2: 1.0, 3: 1.0}, 32).check("a", SteeringVector(rows), 4.0, [1.0])


@pytest.mark.parametrize("bound", [0, -1.0, math.inf, math.nan, True, "32"], ids=repr)
def test_bound_that_is_no_positive_number_raises(tiny_llama, bound):
    for make in (SteeredLlama, Engine):
        with pytest.raises(SteeringError, match="max_relative_norm"):
            make(tiny_llama, max_relative_norm=bound, **ARGUMENTS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mamba"])
def test_typical_norms_are_medians_of_the_hidden_states_of_a_text(tiny_model, family):
    pack = SteeringPack({"a": vector(layers=(0, 2)), "b": vector(layers=(3,), site="residual")})
    with closing(HookedLlama(tiny_model(family), **ARGUMENTS)) as llm:
        found = typical_norms(llm, pack)
        assert llm.n_tokens == 0
        text = b"An old letter was found in the library, and nobody knew who had written it."
        rows = llm.capture(llm.tokenize(text), layers=[0, 2, 3], pool="all")["residual"]
    assert sorted(found) == [0, 2, 3]
    for layer, norm in found.items():
        lengths = np.linalg.norm(rows[layer][1:], axis=1)
        assert 0.7 * lengths.min() < norm < 1.4 * lengths.max()


def test_pack_that_claims_a_huge_norm_does_not_raise_the_bound(tiny_llama):
    pack = SteeringPack({"a": vector()}, residual_norm={LAYER: 1e30})
    with (
        closing(SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)) as llm,
        pytest.raises(SteeringError, match="largest strength allowed"),
    ):
        llm.create_completion("a", steering={"a": 1e25}, max_tokens=1)


@pytest.mark.parametrize("site", ["residual", "attention", "mlp"])
@pytest.mark.parametrize("make", [SteeredLlama, Engine])
def test_request_beyond_the_bound_is_refused_and_one_at_the_bound_is_answered(
    tiny_llama, make, site
):
    pack = SteeringPack({"a": vector(site=site)})
    with closing(make(tiny_llama, pack=pack, **ARGUMENTS)) as llm:

        def ask(steering, policy=None):
            arguments = {"steering": steering, "policy": policy, "max_tokens": 8, "temperature": 0}
            prompt = list(range(10, 20))
            if make is Engine:
                return llm.submit(prompt=prompt, **arguments).result()
            return llm.create_completion(prompt, **arguments)

        unsteered = ask(None)
        with pytest.raises(SteeringError, match=r"'a'.*largest strength allowed") as found:
            ask({"a": 1e6})
        allowed = float(str(found.value).partition("allowed is ")[2].split()[0])
        wide = Policy(categories={"a": {"scope": "values 1 2"}})
        with pytest.raises(SteeringError, match="factors up to 2"):
            ask({"a": allowed}, wide)
        for strength in (allowed, -allowed, 1e-30):
            assert ask({"a": strength})["usage"]["completion_tokens"] == 8
        again = ask(None)
        assert again["choices"][0]["text"] == unsteered["choices"][0]["text"]


@pytest.mark.parametrize("make", [SteeredLlama, Engine])
def test_policy_beyond_the_bound_is_an_error_at_load(tiny_llama, make):
    pack = SteeringPack({"a": vector()})
    policy = {"categories": {"a": {"mode": "always", "strength": 1e9}}}
    with pytest.raises(SteeringError, match=r"1e\+09 of 'a'.*largest strength allowed"):
        make(tiny_llama, pack=pack, policy=policy, **ARGUMENTS)
    make(tiny_llama, pack=pack, policy=policy, max_relative_norm=None, **ARGUMENTS).close()


@pytest.mark.parametrize("make", [SteeredLlama, Engine])
def test_request_cannot_lift_the_bound(tiny_llama, make):
    pack = SteeringPack({"a": vector()})
    with closing(make(tiny_llama, pack=pack, **ARGUMENTS)) as llm:
        call = llm.submit if make is Engine else llm.create_completion
        with pytest.raises((SteeringError, TypeError)):
            call(prompt="a", steering={"a": 1e9}, max_relative_norm=None)
        with pytest.raises(SteeringError):
            call(prompt="a", policy={"max_relative_norm": 1e9})


def test_pickled_model_keeps_its_bound(tiny_llama):
    import pickle

    pack = SteeringPack({"a": vector()})
    with closing(SteeredLlama(tiny_llama, pack=pack, max_relative_norm=2.5, **ARGUMENTS)) as llm:
        content = pickle.dumps(llm)
    with (
        closing(pickle.loads(content)) as copy,
        pytest.raises(SteeringError, match=r"more than 2\.5 times"),
    ):
        copy.create_completion("a", steering={"a": 1e4}, max_tokens=1)


def test_shipped_pack_is_far_below_the_bound(default_model):
    from pysteer.shipped import default_pack

    pack = default_pack()
    with closing(HookedLlama(default_model, **ARGUMENTS)) as llm:
        limits = StrengthLimits(typical_norms(llm, pack), MAX_RELATIVE_NORM)
    for name, steering in pack.categories.items():
        limits.check(name, steering, 40.0, [1.0])
        with pytest.raises(SteeringError):
            limits.check(name, steering, 100.0, [1.0])
