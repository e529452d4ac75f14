"""Categories that are alike, by the formula of csrc/shares.hpp."""

import itertools
from contextlib import closing

import llama_cpp
import numpy as np
import pytest
from exactness import all_logits, native_control_vector, random_vector, same_bits, tokens_for
from hypothesis import given
from hypothesis import strategies as st
from routers import HALVES_ARE_NOT_ENOUGH, router_for

from pysteer import Engine, Policy, SteeredLlama, SteeringPack, SteeringVector, _native
from pysteer.pack.operators import Operator

WIDTH = 6


def combined(changes):
    """Return sum t_i a_i for the t in [0, 1] that minimise |sum t_i a_i|^2 / 2 - sum t_i |a_i|^2.

    Tries every choice of shares that are 0, 1 or between, and keeps the lowest valid minimum.
    """
    changes = np.asarray(changes, np.float64)
    gram = changes @ changes.T
    squares = np.diag(gram)
    lowest, best = np.inf, None
    for kinds in itertools.product((0.0, 1.0, None), repeat=len(changes)):
        free = [i for i, kind in enumerate(kinds) if kind is None]
        shares = np.array([kind or 0.0 for kind in kinds])
        if free:
            right = squares[free] - gram[free] @ shares
            shares[free] = np.linalg.lstsq(gram[np.ix_(free, free)], right, rcond=1e-12)[0]
        if (shares < -1e-9).any() or (shares > 1 + 1e-9).any():
            continue
        value = shares @ gram @ shares / 2 - shares @ squares
        if value < lowest:
            lowest, best = value, shares
    return best @ changes


def shared(directions, factors=None):
    """Return the native sum of factors times shares times directions, (width,)."""
    rows = np.asarray(directions, np.float32).astype(np.float64)
    factors = np.ones(len(rows)) if factors is None else factors
    found = _native.shared_factors(rows @ rows.T, np.asarray(factors, np.float32))
    return found.astype(np.float64) @ rows


def norms(rows):
    return np.linalg.norm(rows, axis=1)


@st.composite
def changes(draw, most=5):
    """Directions and factors: independent, crowded, repeated, opposed, zero; of any sizes."""
    n, width = draw(st.integers(1, most)), draw(st.integers(1, WIDTH))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = rng.standard_normal((n, width)) + draw(
        st.sampled_from([0, 0.5, 5])
    ) * rng.standard_normal(width)
    for i in range(1, n):
        how = draw(st.sampled_from(["own", "own", "own", "same", "longer", "opposite", "zero"]))
        if how != "own":
            scale = {"same": 1, "longer": 2.5, "opposite": -1, "zero": 0}[how]
            rows[i] = scale * rows[draw(st.integers(0, i - 1))]
    factors = [draw(st.sampled_from([1, 1, 1, 0.25, 3, -1, 0, 1e-3])) for _ in range(n)]
    return rows.astype(np.float32), np.array(factors, np.float32)


@given(changes())
def test_shared_sum_is_the_minimum_over_all_active_sets(case):
    rows, factors = case
    alone = rows.astype(np.float64) * factors[:, None]
    error = np.linalg.norm(shared(rows, factors) - combined(alone))
    assert error <= 2e-5 * norms(alone).max()


@given(changes(most=12))
def test_each_category_adds_what_it_lacks_along_its_direction_and_no_sum_is_longer(case):
    rows, factors = case
    rows = rows.astype(np.float64)
    after = _native.shared_factors(rows @ rows.T, factors)
    alone, found, longest = rows * factors[:, None], after @ rows, norms(rows).max() * 3
    along, slack = alone @ found - norms(alone) ** 2, 1e-5 * longest * norms(alone)
    assert (np.abs(after) <= np.abs(factors)).all()
    assert (after * factors >= 0).all()
    assert (along >= -slack)[after != factors].all()  # cut back only where the others fill in
    assert (along <= slack)[(after != 0) & (norms(alone) > 0)].all()
    assert np.linalg.norm(found) <= np.linalg.norm(alone.sum(axis=0)) + 1e-5 * longest


@given(changes(most=8), st.randoms(use_true_random=False))
def test_shared_sum_does_not_depend_on_the_order(case, random):
    rows, factors = case
    order = list(range(len(rows)))
    random.shuffle(order)
    difference = shared(rows, factors) - shared(rows[order], factors[order])
    assert np.linalg.norm(difference) <= 2e-5 * norms(rows * factors[:, None]).max()


@given(changes(most=8), st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1e-6]))
def test_shared_sum_is_continuous_in_the_factors(case, seed, change):
    rows, factors = case
    moved = factors + change * np.random.default_rng(seed).uniform(-1, 1, len(factors))
    size = norms(rows).max()
    difference = shared(rows, factors) - shared(rows, moved)
    # Directions at a small angle take over from each other within a change of about its square.
    assert np.linalg.norm(difference) <= (6 * np.sqrt(change) + 1e-4) * size


def test_two_of_equal_length_at_an_angle_are_divided_by_1_plus_the_cosine():
    for cosine in (0.1, 0.5, 0.9, 0.999):
        a, b = np.array([1.0, 0.0]), np.array([cosine, np.sqrt(1 - cosine**2)])
        np.testing.assert_allclose(shared([a, b]), (a + b) / (1 + cosine), atol=1e-6)


def test_orthogonal_and_opposed_changes_add_up_to_the_last_bit():
    rng = np.random.default_rng(0)
    axes = np.diag(rng.uniform(0.1, 9, 5))
    for rows in (axes, [axes[0], -0.5 * axes[0]], [axes[0] + axes[1], -axes[0], axes[2]]):
        rows = np.asarray(rows)
        factors = np.float32(rng.uniform(0.5, 2, len(rows)))
        assert np.array_equal(_native.shared_factors(rows @ rows.T, factors), factors)


@pytest.mark.parametrize("n", [2, 10, 50])
def test_of_parallel_changes_the_longest_alone_counts(n):
    row = np.random.default_rng(n).standard_normal(WIDTH)
    lengths = np.arange(1, n + 1) / n
    rows = lengths[:, None] * row
    for order in (slice(None), slice(None, None, -1)):
        factors = _native.shared_factors(rows[order] @ rows[order].T, np.ones(n, np.float32))
        assert np.array_equal(factors, lengths[order] == 1)
    alike = np.full((n, n), row @ row)
    assert sorted(_native.shared_factors(alike, np.ones(n, np.float32))) == [0] * (n - 1) + [1]


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e20, 1e38])
def test_shares_do_not_depend_on_the_scale(scale):
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((4, WIDTH)) + 1
    gram = np.ascontiguousarray(rows @ rows.T)
    expected = _native.shared_factors(gram, np.ones(4, np.float32))
    found = _native.shared_factors(gram * scale**2, np.full(4, scale, np.float32))
    np.testing.assert_allclose(found / np.float32(scale), expected, rtol=1e-6)


# ---- inside models --------------------------------------------------------------------------

ARGUMENTS = {"n_ctx": 128, "logits_all": True, "verbose": False, **HALVES_ARE_NOT_ENOUGH}


def crowd(n, layers=(1, 2, 3), width=64, seed=0):
    """Vectors of which each two have a cosine of about 0.8 at every layer."""
    rng = np.random.default_rng(seed)
    common = {layer: 0.3 * rng.standard_normal(width) for layer in layers}
    return [
        SteeringVector({i: d + 0.15 * rng.standard_normal(width) for i, d in common.items()})
        for _ in range(n)
    ]


@pytest.mark.parametrize("injection", ["resident", "hooked"])
def test_alike_categories_give_the_logits_of_their_combined_control_vector(tiny_model, injection):
    path = tiny_model("llama")
    vectors = [*crowd(3), random_vector(4, 64, 0.3, layers=[2, 3], seed=9)]
    strengths = dict(zip("abcd", (1.0, 0.8, 0.5, -1.5), strict=True))
    of_layer = {
        layer: combined(
            [
                s * v.direction(layer).astype(np.float64)
                for s, v in zip(strengths.values(), vectors, strict=True)
                if layer in v.layers
            ]
        )
        for layer in (1, 2, 3)
    }
    with closing(llama_cpp.Llama(str(path), **ARGUMENTS)) as plain:
        tokens = tokens_for(plain.n_vocab())
        native_control_vector(plain, SteeringVector(of_layer), 4)
        expected = all_logits(plain, tokens)
    pack = SteeringPack(dict(zip("abcd", vectors, strict=True)))
    with (
        closing(SteeredLlama(path, pack=pack, injection=injection, **ARGUMENTS)) as llm,
        llm.steering(strengths),
    ):
        np.testing.assert_allclose(all_logits(llm, tokens), expected, atol=1e-5)


@pytest.mark.parametrize("operator", [Operator(), Operator(keep_norm=True)], ids=str)
@pytest.mark.parametrize("injection", ["auto", "hooked"])
def test_the_same_direction_in_several_categories_counts_once_to_the_last_bit(
    tiny_llama, operator, injection
):
    direction = dict(random_vector(4, 64, 0.3).items())
    same = SteeringVector(direction, operator=operator)
    pack = SteeringPack({"a": same, "b": same, "c": same, "d": same})
    with closing(SteeredLlama(tiny_llama, pack=pack, injection=injection, **ARGUMENTS)) as llm:
        tokens = tokens_for(llm.n_vocab())
        with llm.steering({"a": 0.75}):
            alone = all_logits(llm, tokens)
        with llm.steering({"a": 0.75, "b": 0.75, "c": 0.5, "d": 0.1}):
            assert same_bits(all_logits(llm, tokens), alone)


def test_shares_follow_a_schedule_token_by_token(tiny_llama):
    """`fades` leaves `holds` its full strength when its own has fallen to nothing."""
    holds, fades = crowd(2, layers=[2])
    pack = SteeringPack({"holds": holds, "fades": fades})
    policy = Policy(categories={"fades": {"scope": "values 1 0.5 0.25 0"}})
    arguments = {**ARGUMENTS, "logits_all": False}
    tokens = list(range(10, 20))
    ask = {"layers": [2], "pool": "all"}
    with closing(SteeredLlama(tiny_llama, pack=pack, **arguments)) as llm:
        before = llm.capture(tokens, **ask)["residual"][2]
        with llm.steering({"holds": 1.0, "fades": 1.0}, policy=policy):
            # All ten tokens are prompt here, so only the last one is in the schedule.
            after = llm.capture(tokens, **ask)["residual"][2]
    a, b = (v.direction(2).astype(np.float64) for v in (holds, fades))
    expected = np.vstack([np.tile(a, (9, 1)), combined([a, b])])
    np.testing.assert_allclose(after - before, expected, atol=1e-5)


def test_gated_categories_that_fire_together_share_as_forced_ones_do(tiny_llama):
    vectors = crowd(2)
    prompts = {"a": list(range(10, 20)), "b": list(range(20, 30))}
    pack = SteeringPack(
        dict(zip(prompts, vectors, strict=True)), router=router_for(tiny_llama, prompts, layer=0)
    )
    open_to_all = {name: {"threshold": -1e9} for name in prompts}
    policy = Policy(gate="probe", conflict="sum", categories=open_to_all)
    with closing(SteeredLlama(tiny_llama, pack=pack, n_ctx=128, verbose=False)) as llm:
        prompt, options = list(range(10, 20)), {"max_tokens": 8, "temperature": 0}
        texts = [
            llm.create_completion(prompt, steering=steering, policy=policy, **options)
            for steering in ("auto", {"a": 1.0, "b": 1.0}, {"a": 1.0})
        ]
    found = [text["choices"][0]["text"] for text in texts]
    assert texts[0]["steering"]["categories"]["b"]["fired"]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_operators_between_alike_additions_do_not_part_them(tiny_llama):
    a, b = crowd(2, layers=[2])
    between = np.random.default_rng(3).standard_normal(64).astype(np.float32)
    ablates = SteeringVector({2: between}, operator=Operator("ablate"))
    pack = SteeringPack({"a": a, "ablates": ablates, "b": b})
    tokens, ask = list(range(10, 20)), {"layers": [2], "pool": "all"}
    with closing(SteeredLlama(tiny_llama, pack=pack, n_ctx=64, verbose=False)) as llm:
        before = llm.capture(tokens, **ask)["residual"][2]
        with llm.steering(dict.fromkeys(pack.categories, 1.0)):
            after = llm.capture(tokens, **ask)["residual"][2]
    first, second = (v.direction(2).astype(np.float64) for v in (a, b))
    gram = np.array([[first @ first, first @ second], [first @ second, second @ second]])
    shares = np.linalg.solve(gram, np.diag(gram))
    assert (shares > 0.1).all()
    assert (shares < 0.9).all()
    axis = between / np.linalg.norm(between.astype(np.float64))
    expected = before.astype(np.float64) + shares[0] * first
    expected = expected - np.outer(expected @ axis, axis) + shares[1] * second
    np.testing.assert_allclose(after, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("operator", "n_rows"),
    [(Operator("low_rank"), 4), (Operator("rotate", angle=0.4), 2)],
    ids=["low_rank", "rotate"],
)
def test_the_same_map_in_two_categories_counts_once_to_the_last_bit(tiny_llama, operator, n_rows):
    rng = np.random.default_rng(4)
    rows = (0.2 * rng.standard_normal((n_rows, 64))).astype(np.float32)
    other = (0.2 * rng.standard_normal((n_rows, 64))).astype(np.float32)
    same = SteeringVector({2: rows}, operator=operator)
    pack = SteeringPack(
        {"a": same, "b": same, "other": SteeringVector({2: other}, operator=operator)}
    )
    tokens, ask = list(range(10, 20)), {"layers": [2], "pool": "all"}
    with closing(SteeredLlama(tiny_llama, pack=pack, n_ctx=64, verbose=False)) as llm:
        found = {}
        for names in ("a", "ab", ("a", "other")):
            with llm.steering(dict.fromkeys(names, 1.0)):
                found[names] = llm.capture(tokens, **ask)["residual"][2]
    assert same_bits(found["a"], found["ab"])
    assert np.abs(found["a", "other"] - found["a"]).max() > 1e-3


@pytest.mark.parametrize("make", [SteeredLlama, Engine])
def test_two_shipped_categories_answer_as_the_stronger_one_does(default_model, make):
    from pysteer.chat.messages import user_message
    from pysteer.shipped import default_pack

    messages = [user_message("What is the capital of France?")]
    options = {"max_tokens": 24, "temperature": 0}
    steerings = [{"malware": 1.0}, {"malware": 1.0, "privacy_violation": 1.0}]
    with closing(make(default_model, pack=default_pack(), n_ctx=512, verbose=False)) as llm:
        if make is Engine:
            results = [
                llm.submit(messages=messages, steering=s, **options).result() for s in steerings
            ]
        else:
            results = [
                llm.create_chat_completion(messages, steering=s, **options) for s in steerings
            ]
    texts = [result["choices"][0]["message"]["content"] for result in results]
    assert texts[0] == texts[1]
