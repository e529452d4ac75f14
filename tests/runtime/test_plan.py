"""From strengths to plans: what is refused, what the keys say, which way in is chosen."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysteer import HookError, SteeringError, SteeringPack, SteeringVector, UnknownCategoryError
from pysteer.runtime.plan import UNSTEERED, check_strengths, compile_plan

N_LAYER, N_EMBD = 4, 3


def vector(*layers, site="residual", value=1.0):
    return SteeringVector({layer: np.full(N_EMBD, value) for layer in layers}, site=site)


PACK = SteeringPack(
    {
        "middle": vector(1, 2),
        "first": vector(0),
        "last": vector(3),
        "all": vector(0, 1, 2, 3),
        "attention": vector(1, site="attention"),
        "last attention": vector(3, site="attention"),
        "zero": vector(1, value=0.0),
    }
)


def compiled(strengths, *, pack=PACK, mode="auto"):
    return compile_plan(pack, strengths, n_layer=N_LAYER, n_embd=N_EMBD, mode=mode)


# ---- strengths ------------------------------------------------------------------------------


@given(
    st.dictionaries(
        st.sampled_from(list(PACK.categories)),
        st.one_of(
            st.floats(allow_nan=False, allow_infinity=False),
            st.integers(-(2**60), 2**60),
            st.fractions(max_denominator=100),
            st.floats(width=32, allow_nan=False, allow_infinity=False).map(np.float32),
        ),
    )
)
def test_finite_strengths_pass_as_floats_and_zero_is_dropped(steering):
    checked = check_strengths(PACK, steering)
    assert checked == {name: float(value) for name, value in steering.items() if value != 0}
    assert all(type(value) is float for value in checked.values())


@pytest.mark.parametrize(
    "strength",
    [
        float("nan"),
        float("inf"),
        -float("inf"),
        np.float32("nan"),
        True,
        False,
        np.True_,
        "1.0",
        "",
        None,
        1j,
        [1.0],
        pytest.param(10**400, id="10**400"),
        np.array([1.0, 2.0]),
    ],
    ids=repr,
)
def test_a_strength_that_is_no_finite_number_is_refused(strength):
    with pytest.raises(SteeringError, match="middle"):
        check_strengths(PACK, {"first": 1.0, "middle": strength})


def test_gating_needs_a_router():
    with pytest.raises(SteeringError, match="applies no router"):
        check_strengths(PACK, {"middle": "auto"})


@pytest.mark.parametrize("strength", [1.0, 0.0, "auto", float("nan")])
@pytest.mark.parametrize("category", ["Middle", "", 1, None])
def test_an_unknown_category_is_refused_at_any_strength(category, strength):
    with pytest.raises(UnknownCategoryError, match="middle, first"):
        check_strengths(PACK, {category: strength})


# ---- the way in -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("categories", "fits_resident"),
    [
        (["middle"], True),
        (["last"], True),
        (["middle", "last"], True),
        (["zero"], True),
        (["first"], False),
        (["all"], False),
        (["attention"], False),
        (["last attention"], False),
        (["middle", "first"], False),
        (["middle", "attention"], False),
    ],
)
def test_residual_from_layer_1_on_is_resident_and_the_rest_hooked(categories, fits_resident):
    strengths = dict.fromkeys(categories, 1.0)
    assert compiled(strengths).resident is fits_resident
    assert compiled(strengths).native is not None
    assert compiled(strengths, mode="hooked").resident is False
    if fits_resident:
        assert compiled(strengths, mode="resident").resident is True
    else:
        with pytest.raises(HookError, match="resident"):
            compiled(strengths, mode="resident")


@pytest.mark.parametrize("mode", ["auto", "resident", "hooked"])
def test_no_strengths_are_the_unsteered_plan(mode):
    plan = compiled(check_strengths(PACK, {"middle": 0, "first": -0.0}), mode=mode)
    assert plan is UNSTEERED
    assert (plan.native, plan.resident, plan.key, plan.cache_key) == (None, False, (), ())


# ---- keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("category", "in_cache_key"),
    [
        ("middle", True),
        ("first", True),
        ("all", True),
        ("attention", True),
        ("last", False),
        ("last attention", False),
    ],
)
def test_what_acts_in_the_last_layer_alone_is_no_part_of_the_cache_key(category, in_cache_key):
    plan = compiled({category: 2.0})
    entry = (PACK[category].digest, 2.0)
    assert plan.key == (entry,)
    assert plan.cache_key == ((entry,) if in_cache_key else ())


def test_in_a_model_of_one_layer_nothing_reaches_the_cache():
    pack = SteeringPack({"a": vector(0)})
    plan = compile_plan(pack, {"a": 1.0}, n_layer=1, n_embd=N_EMBD, mode="auto")
    assert plan.key == ((pack["a"].digest, 1.0),)
    assert plan.cache_key == ()


@given(
    st.dictionaries(st.sampled_from(list(PACK.categories)), st.floats(0.5, 4.0)),
    st.randoms(use_true_random=False),
)
def test_keys_list_every_category_once_whatever_the_order_of_the_request(strengths, random):
    shuffled = list(strengths.items())
    random.shuffle(shuffled)
    plan = compiled(strengths)
    assert compiled(dict(shuffled)).key == plan.key
    assert compiled(dict(shuffled)).cache_key == plan.cache_key
    assert sorted(plan.key) == sorted((PACK[name].digest, s) for name, s in strengths.items())
    assert sorted(plan.cache_key) == sorted(
        (PACK[name].digest, s) for name, s in strengths.items() if not name.startswith("last")
    )


def test_keys_differ_where_the_logits_may_and_nowhere_else():
    requests = [{"middle": 1.0}, {"middle": 2.0}, {"first": 1.0}, {"attention": 1.0}]
    requests += [{"middle": 1.0, "first": 1.0}, {"last": 1.0}, {"last attention": 1.0}]
    plans = [compiled(request) for request in requests]
    for a, b in itertools.combinations(plans, 2):
        assert a.key != b.key
    renamed = SteeringPack({"other name": PACK["middle"]})
    assert compiled({"other name": 1.0}, pack=renamed).key == plans[0].key
    assert hash(plans[0].key) == hash(compiled({"middle": 1.0}).key)


def test_the_mode_is_no_part_of_the_keys():
    modes = [compiled({"middle": 1.0}, mode=mode) for mode in ("resident", "hooked")]
    assert modes[0].key == modes[1].key
    assert modes[0].cache_key == modes[1].cache_key


# ---- sums -----------------------------------------------------------------------------------

HUGE = 2e38  # twice this is more than the largest float32, 3.4e38


def big_pack(**values):
    return SteeringPack({name: vector(1, value=value) for name, value in values.items()})


@pytest.mark.parametrize("strength", [2.0, -2.0, 1e39, 1e300, -1e300])
def test_a_strength_that_takes_a_direction_past_float32_is_refused(strength):
    with pytest.raises(SteeringError, match=r"'a'.*layer 1"):
        compiled({"a": strength}, pack=big_pack(a=HUGE))


@pytest.mark.parametrize("strength", [1e39, -1e300])
def test_so_is_a_strength_past_float32_even_for_a_zero_direction(strength):
    with pytest.raises(SteeringError, match="'zero'"):
        compiled({"zero": strength})


def test_directions_of_categories_are_summed_where_they_meet_and_nowhere_else():
    same = big_pack(a=HUGE, b=HUGE)
    with pytest.raises(SteeringError, match="'b'"):
        compiled({"a": 1.0, "b": 1.0}, pack=same)
    compiled({"a": 1.0, "b": -1.0}, pack=same)
    compiled({"a": 1.0, "b": 1.0}, pack=big_pack(a=HUGE, b=-HUGE))
    elsewhere = SteeringPack({"a": vector(1, value=HUGE), "b": vector(2, value=HUGE)})
    compiled({"a": 1.0, "b": 1.0}, pack=elsewhere)
    other_site = SteeringPack(
        {"a": vector(1, value=HUGE), "b": vector(1, value=HUGE, site="attention")}
    )
    compiled({"a": 1.0, "b": 1.0}, pack=other_site)


@pytest.mark.parametrize(("n_layer", "n_embd"), [(3, N_EMBD), (N_LAYER, 2), (N_LAYER, 4)])
def test_a_pack_that_does_not_fit_is_refused(n_layer, n_embd):
    with pytest.raises(SteeringError, match="'all'"):
        compile_plan(PACK, {"all": 1.0}, n_layer=n_layer, n_embd=n_embd, mode="auto")
